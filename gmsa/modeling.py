"""The model: encoder, group merging, layer semantic alignment (LSA), decoder (paper section 2).

    tokens --encoder--> states --mean of every r--> groups --LSA--> soft tokens --decoder--> answer

Covered: any rate per row, contexts in independent windows, encoder and decoder of different family, width and
tokenizer, the paper's ablations by configuration. Not covered here: reading and writing checkpoints (checkpoint.py),
finding backbones (backbones.py), anything with text in it (engine.py).
"""

import copy
import functools
import inspect
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gmsa import checkpoint
from gmsa.backbones import Backbone
from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, ConfigError, InputError
from gmsa.losses import cross_entropy_in_chunks
from gmsa.merging import check_merge_size, group_merge

# Where families keep their blocks and their final norm. A family with other names is added here.
LAYER_NAMES = ("layers", "h")
NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def body_of(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM below its LM head.

    Raises:
        BackboneError: naming what the family lacks, for a family this module cannot cut.
    """
    body = causal_lm.base_model
    if body is causal_lm:
        raise BackboneError(f"{type(causal_lm).__name__} has no body below its head (no base_model); it cannot encode")
    for what, names in (("list of layers", LAYER_NAMES), ("final norm", NORM_NAMES)):
        if _first_name(body, names) is None:
            raise BackboneError(
                f"{type(causal_lm).__name__} is not supported: its body has no {what} under {' or '.join(names)}"
            )
    return body


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The argument by which a model takes keys and values: "cache", or "past_key_values" before transformers 5.24."""
    return {_cache_name(type(model)): cache}  # type: ignore[arg-type]


@functools.cache
def _cache_name(kind: Any) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def _first_name(module: nn.Module, names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def layers_of(body: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a body."""
    name = _first_name(body, LAYER_NAMES)
    assert name is not None  # body_of has checked
    return getattr(body, name)


def lowest_layers(body: PreTrainedModel, count: int, keep_embeddings: bool) -> PreTrainedModel:
    """A copy of a body that stops after its lowest `count` layers.

    Embeddings are shared with the original, not copied (or dropped, where only embedded input is ever fed). The final
    norm goes too, unless all layers are kept: the output is the body's own hidden state `count`.

    Raises:
        ConfigError: the body has fewer layers than asked for.
    """
    layer_name = _first_name(body, LAYER_NAMES)
    norm_name = _first_name(body, NORM_NAMES)
    assert layer_name is not None  # body_of has checked
    assert norm_name is not None
    layers = getattr(body, layer_name)
    if count > len(layers):
        raise ConfigError(f"encoder_layers or lsa_layers is {count}, but the backbone has {len(layers)} layers")
    embeddings = body.get_input_embeddings()
    kept = nn.ModuleList(layers[:count])
    try:
        setattr(body, layer_name, kept)
        cut = copy.deepcopy(body, memo={id(embeddings): embeddings})
    finally:
        setattr(body, layer_name, layers)
    cut.config = cut_config(body.config, count)
    for module in cut.modules():  # blocks keep a reference to the config of the body they came from
        if isinstance(getattr(module, "config", None), type(body.config)):
            module.config = cut.config
    if count < len(layers):
        setattr(cut, norm_name, nn.Identity())
    if not keep_embeddings:
        cut.set_input_embeddings(None)
    return cut


def cut_config(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The configuration of a body with `count` layers; lists with one entry per layer are cut with it."""
    cut = copy.deepcopy(config)
    layers = config.num_hidden_layers
    cut.num_hidden_layers = count
    per_layer = getattr(config, "layer_types", None)
    if isinstance(per_layer, list) and len(per_layer) == layers:
        cut.layer_types = per_layer[:count]
    return cut


class LayerSemanticAlignment(nn.Module):
    """Turns merged encoder states into vectors the decoder's lowest layer can read (paper section 2).

    Its blocks are initialised from the decoder's lowest layers, because what soft tokens lack is exactly what those
    layers would do to embeddings. The other kinds are the paper's ablations. Where encoder and decoder differ in
    width, a linear map comes first.
    """

    def __init__(self, config: GmsaConfig, encoder_width: int, decoder_body: PreTrainedModel) -> None:
        super().__init__()
        width = decoder_body.config.hidden_size
        needs_map = encoder_width != width and config.lsa in ("decoder", "random", "none")
        self.project = nn.Linear(encoder_width, width) if needs_map else None
        self.blocks: PreTrainedModel | None = None
        self.map: nn.Module | None = None
        if config.lsa in ("decoder", "random"):
            self.blocks = lowest_layers(decoder_body, config.lsa_layers, keep_embeddings=False)
            if config.lsa == "random":  # as the family draws weights at the start of pretraining, norms included
                for module in self.blocks.modules():
                    self.blocks._init_weights(module)
        elif config.lsa == "linear":
            self.map = nn.Linear(encoder_width, width)
        elif config.lsa == "mlp":
            self.map = nn.Sequential(nn.Linear(encoder_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, merged: Tensor) -> Tensor:
        """(W, M, encoder width) right-padded groups -> (W, M, decoder width).

        No mask is needed: blocks are causal and padding stands on the right, so no group ever sees it.
        """
        if self.project is not None:
            merged = self.project(merged.to(self.project.weight.dtype))
        if self.map is not None:
            return self.map(merged.to(next(self.map.parameters()).dtype))
        if self.blocks is not None:
            dtype = next(layers_of(self.blocks).parameters()).dtype
            return self.blocks(inputs_embeds=merged.to(dtype), use_cache=False).last_hidden_state
        return merged


class Compressor(nn.Module):
    """Encoder, merging and LSA: windows of token ids in, soft tokens out."""

    def __init__(self, config: GmsaConfig, encoder_lm: PreTrainedModel, decoder_lm: PreTrainedModel) -> None:
        super().__init__()
        self.config = config
        body = body_of(encoder_lm)
        count = len(layers_of(body)) if config.encoder_layers == "all" else int(config.encoder_layers)
        self.encoder = lowest_layers(body, count, keep_embeddings=True)
        width = body.config.hidden_size
        decoder_body = body_of(decoder_lm)
        self.appended = None
        with torch.device(decoder_lm.device):  # where new weights go
            self.lsa = LayerSemanticAlignment(config, width, decoder_body)
            if config.merging == "appended":
                # Drawn at the scale of the embeddings they stand among, as the encoder's layers get to see them.
                scale = _embedding_scale(body.get_input_embeddings())
                self.appended = nn.Parameter(torch.randn(config.max_appended, width, dtype=decoder_lm.dtype) * scale)
        special = body.config.bos_token_id, body.config.eos_token_id, 0
        sink = next(token for token in special if token is not None)
        self.sink_id = sink[0] if isinstance(sink, list) else sink
        if config.encoder_lora is not None:
            add_lora(self.encoder, config.encoder_lora)

    def encode(self, window_ids: Tensor) -> Tensor:
        """States of the tokens of each window: (W, L) right-padded ids -> (W, L, encoder width)."""
        # Padding is on the right and attention is causal, so real tokens see no padding and no mask is needed.
        if self.config.encoder_sink:
            sink = torch.full_like(window_ids[:, :1], self.sink_id)
            window_ids = torch.cat([sink, window_ids], dim=1)  # (W, 1 + L)
        states = self.encoder(input_ids=window_ids, use_cache=False).last_hidden_state
        return states[:, 1:] if self.config.encoder_sink else states

    def forward(self, window_ids: Tensor, window_mask: Tensor, merge_size: int | Tensor) -> tuple[Tensor, Tensor]:
        """Soft tokens of each window.

        Args:
            window_ids: (W, L) token ids in the encoder's vocabulary, padding on the right.
            window_mask: (W, L), 1 where a token is real.
            merge_size: one for all windows, or (W,), or (W, K): K rates of each window from one pass of the encoder.

        Returns:
            soft: (W, M, decoder width), right-padded, M = max of ceil(L_w / size_w); (W * K, M, width) for K rates,
                those of a window one after the other.
            mask: (W, M) or (W * K, M) bool.
        """
        if not bool((window_mask[:, 1:].bool() <= window_mask[:, :-1].bool()).all()):
            raise InputError("windows must be padded on the right: a real token stands after padding")
        states = None if self.appended is not None else self.encode(window_ids)
        if (rates := rates_of(merge_size)) > 1:
            assert isinstance(merge_size, Tensor)
            merge_size = merge_size.flatten()
            window_ids, window_mask = (part.repeat_interleave(rates, 0) for part in (window_ids, window_mask))
            states = states.repeat_interleave(rates, 0) if states is not None else None
        if states is None:  # the tokens appended differ from rate to rate, so each is a pass of its own
            soft, mask = self._append(window_ids, window_mask, merge_size)
        else:
            soft, mask = group_merge(states, window_mask, merge_size)
        return self.lsa(soft), mask

    def _append(self, ids: Tensor, mask: Tensor, merge_size: int | Tensor) -> tuple[Tensor, Tensor]:
        """TCP-AE / ICAE: ceil(L / r) learnable tokens after the context; their states are the soft tokens."""
        assert self.appended is not None
        rows, taken = [], []
        sizes = merge_size.tolist() if isinstance(merge_size, Tensor) else [merge_size] * len(ids)
        for size in sizes:
            check_merge_size(size)
        sink = [ids.new_tensor([self.sink_id])] if self.config.encoder_sink else []
        embedded = embed_rows(
            self.encoder.get_input_embeddings(),
            [torch.cat([*sink, row[real]]) for row, real in zip(ids, mask.bool(), strict=True)],
        )
        for tokens, real, size in zip(embedded, mask.bool(), sizes, strict=True):
            soft = math.ceil(int(real.sum()) / size)
            if soft > len(self.appended):
                raise InputError(f"a window needs {soft} appended tokens, max_appended is {len(self.appended)}")
            rows.append(torch.cat([tokens, self.appended[:soft].to(tokens.dtype)]))
            taken.append(soft)
        # Padding on the left keeps the appended tokens of all rows at the end.
        embeds, pad_mask = pad_left(rows)
        states = self.encoder(
            inputs_embeds=embeds, attention_mask=pad_mask, position_ids=positions(pad_mask), use_cache=False
        ).last_hidden_state
        soft_mask = torch.arange(max(taken), device=ids.device)[None] < torch.tensor(taken, device=ids.device)[:, None]
        out = states.new_zeros(len(rows), max(taken), states.shape[-1])
        out[soft_mask] = torch.cat([state[-count:] for state, count in zip(states, taken, strict=True)])
        return out, soft_mask


def add_lora(body: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Put peft LoRA on the linears of a body's layers, in place.

    Args:
        body: see `body_of`.
        lora: {"r", "alpha"} and, if wanted, "dropout" and "targets" (names of the linears; None: all of them).

    Raises:
        BackboneError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BackboneError("LoRA needs peft: pip install 'gmsa[train]'") from error
    layers = layers_of(body)
    targets = lora.get("targets") or sorted({n.rsplit(".", 1)[-1] for n, m in layers.named_modules() if _is_linear(m)})
    dropout = lora.get("dropout", 0.0)
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=dropout, target_modules=targets)
    inject_adapter_in_model(config, body)


@torch.no_grad()
def _embedding_scale(embeddings: nn.Module) -> float:
    """Root mean square of embedded tokens, about a thousand of them; some families scale what they look up."""
    weight: Tensor = embeddings.weight  # type: ignore[assignment]
    ids = torch.arange(0, len(weight), max(1, len(weight) // 1024), device=weight.device)
    return float(embeddings(ids).float().pow(2).mean().sqrt())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def embed_rows(embeddings: nn.Module, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Rows of token ids -> rows of vectors (T_i, d), in one look-up.

    One, because under FSDP each look-up gathers the table from all processes, which may hold other numbers of rows.
    """
    return embeddings(torch.cat(list(rows))).split([len(row) for row in rows])


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of (T_i, d) -> ((B, T, d) padded on the left with zeros, (B, T) mask, 1 where real)."""
    longest = max(len(row) for row in rows)
    padded = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    mask = torch.arange(longest, device=padded.device)[None] >= longest - lengths[:, None]
    return padded, mask.long()


def rates_of(merge_size: int | Tensor) -> int:
    """How many rates per row: (B, K) holds K."""
    return merge_size.shape[1] if isinstance(merge_size, Tensor) and merge_size.dim() == 2 else 1


def positions(mask: Tensor) -> Tensor:
    """Position of each real token counted from its row's first, whatever the padding: (B, T) -> (B, T)."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


class GmsaModel(PreTrainedModel):
    """Compressor and decoder. See `gmsa.GMSA` for the interface that takes text.

    Built from backbones that are already loaded; `from_pretrained` finds and loads them (checkpoint.py).
    """

    config_class = GmsaConfig
    base_model_prefix = ""
    main_input_name = "window_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: GmsaConfig, decoder: PreTrainedModel, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.compressor = Compressor(config, encoder if encoder is not None else decoder, decoder)
        self.decoder = decoder
        if config.decoder_lora is not None:
            add_lora(body_of(decoder), config.decoder_lora)
        if "decoder" in config.trained:
            self._separate_embeddings()
        # The blocks that must stay whole where a model is cut up (FSDP, device maps): those of both backbones.
        parts = (decoder, self.compressor.encoder)
        self._no_split_modules = sorted({name for part in parts for name in part._no_split_modules or ()})
        self.generation_config = copy.deepcopy(decoder.generation_config)
        self.post_init()

    def init_weights(self) -> None:
        """Nothing to draw: every part arrives with weights, and transformers would otherwise overwrite them."""

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings: soft tokens live in the same space."""
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The decoder's LM head."""
        return self.decoder.get_output_embeddings()

    # -- reading and writing ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *_: Any,
        config: GmsaConfig | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype = torch.bfloat16,
        device_map: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **_ignored: Any,  # what the Auto classes add (adapter_kwargs and the like) does not apply here
    ) -> "GmsaModel":
        """Load a checkpoint (folder or hub id) and the backbones it points to.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or does not fit; names each tensor that differs.
            BackboneError: a backbone cannot be had or has other weights than the checkpoint was trained on.
        """
        folder = checkpoint.find_folder(str(pretrained_model_name_or_path), revision, token, local_files_only)
        return load_model(
            folder,
            config=config,
            dtype=checkpoint.dtype_of(dtype),
            attn_implementation=attn_implementation,
            token=token,
            local_files_only=local_files_only,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )[0]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, form: str = "exact", **kwargs: Any) -> None:  # type: ignore[override]
        """Write what training changed and a pointer to the backbones.

        Args:
            save_directory: the folder; it changes all at once or not at all.
            form: "exact", or "int8": differences from the backbone in 8 bits (checkpoint.py).
            kwargs: `push_to_hub=True` and its arguments, as in transformers.
        """
        kwargs.pop("state_dict", None)  # the Trainer passes one; the model knows better what changed
        folder = Path(save_directory)
        checkpoint.save_model(self, folder, form)
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", folder.name), token=kwargs.get("token"))

    # -- compress --------------------------------------------------------------------------------------------------

    def compress(
        self, window_ids: Tensor, window_mask: Tensor, window_rows: Tensor, merge_size: int | Tensor
    ) -> list[Tensor]:
        """Soft tokens of each row, the windows of a row in order.

        Args:
            window_ids, window_mask: (W, L), see `Compressor.forward`.
            window_rows: (W,) the row each window belongs to, ascending; rows are 0..B-1.
            merge_size: one for all rows, or (B,), or (B, K): K rates of each row from one pass of the encoder.

        Returns:
            B tensors (M_i, d) in the decoder's dtype; B * K for K rates, those of a row one after the other.
        """
        sizes = merge_size[window_rows] if isinstance(merge_size, Tensor) else merge_size
        rates = rates_of(merge_size)
        soft, mask = self.compressor(window_ids, window_mask, sizes)
        soft = soft.to(self.get_input_embeddings().weight.dtype)
        rows: list[list[Tensor]] = [[] for _ in range((int(window_rows.max()) + 1) * rates)]
        owners = [row * rates + rate for row in window_rows.tolist() for rate in range(rates)]
        lengths = mask.sum(dim=1).tolist()
        for row, states, length in zip(owners, soft, lengths, strict=True):
            rows[row].append(states[:length])
        return [torch.cat(parts) for parts in rows]

    # -- read ------------------------------------------------------------------------------------------------------

    def embed_prompts(
        self, soft: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Join [before][soft tokens][after] per row, padded on the left: ((B, T, d), (B, T) mask).

        Args:
            soft: B tensors (M_i, d).
            before, after: B tensors of decoder token ids each.
        """
        around = embed_rows(self.get_input_embeddings(), [torch.cat(pair) for pair in zip(before, after, strict=True)])
        rows = []
        for states, ids, head in zip(soft, around, before, strict=True):
            rows.append(torch.cat([ids[: len(head)], states.to(ids.dtype), ids[len(head) :]]))
        return pad_left(rows)

    def forward(
        self,
        window_ids: Tensor,
        window_mask: Tensor,
        window_rows: Tensor,
        merge_size: int | Tensor,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        targets: Sequence[Tensor],
        texts: Sequence[Tensor] | None = None,
        learned: Sequence[Tensor] | None = None,
        keep_logits: bool = True,
    ) -> dict[str, Tensor]:
        """Loss of restoring or answering (paper section 3): cross-entropy on the targets only.

        Args:
            window_ids, window_mask, window_rows, merge_size: see `compress`; at K rates per row every row is scored K
                times.
            before, after: token ids around the soft tokens of each row, B each.
            targets: token ids to predict after them, B tensors.
            texts: the contexts as decoder token ids, B tensors. Where given, the decoder reads them in place of soft
                tokens and nothing is compressed: what distillation learns from, and the fair bound to compare with.
            learned: B bool tensors, true for the tokens of a target that count; the others (further questions) are
                only read. None: all count.
            keep_logits: return them; otherwise they exist for a few tokens at a time only, which takes less memory.

        Returns:
            "loss": mean over target tokens. "labels": (N,), rows one after the other. "correct": how many of them have
            the highest logit. "logits": (N, vocabulary), if kept. The LM head never runs where there is no label.
        """
        if texts is not None:
            soft = list(embed_rows(self.get_input_embeddings(), texts))
            return self.score(soft, before, after, targets, learned, keep_logits)
        soft = self.compress(window_ids, window_mask, window_rows, merge_size)
        if (rates := rates_of(merge_size)) > 1:
            before, after, targets = ([x for x in part for _ in range(rates)] for part in (before, after, targets))
            learned = learned and [x for x in learned for _ in range(rates)]
        return self.score(soft, before, after, targets, learned, keep_logits)

    def score(
        self,
        soft: Sequence[Tensor],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        targets: Sequence[Tensor],
        learned: Sequence[Tensor] | None = None,
        keep_logits: bool = True,
    ) -> dict[str, Tensor]:
        """Teacher-forced prediction of the targets from soft tokens that exist already; returns as `forward` does."""
        tails = [torch.cat(pair) for pair in zip(after, targets, strict=True)]
        embeds, mask = self.embed_prompts(soft, before, tails)
        hidden = body_of(self.decoder)(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).last_hidden_state
        # Rows end together, so the state that predicts the first of t targets stands t + 1 from the end.
        picked = torch.cat([state[-len(target) - 1 : -1] for state, target in zip(hidden, targets, strict=True)])
        labels = torch.cat(list(targets))
        if learned is not None:
            counts = torch.cat(list(learned))
            picked, labels = picked[counts], labels[counts]
        head = self.get_output_embeddings()
        head_is_trained = head is not None and any(p.requires_grad for p in head.parameters())
        if not keep_logits and not head_is_trained:
            loss, correct = cross_entropy_in_chunks(picked, labels, self.lm_logits)
            return {"loss": loss, "correct": correct, "labels": labels}
        logits = self.lm_logits(picked)
        correct = (logits.detach().argmax(-1) == labels).sum()
        out = {"loss": F.cross_entropy(logits.float(), labels), "correct": correct, "labels": labels}
        return {**out, "logits": logits} if keep_logits else out

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """The decoder's own logits for body states: (N, d) -> (N, vocabulary)."""
        head = self.get_output_embeddings()
        assert head is not None
        logits = head(hidden.to(next(head.parameters()).dtype))
        # Some families scale (Cohere, Granite) or soft-cap (Gemma) their logits after the head.
        factor, divisor, cap = (
            getattr(self.decoder.config, name, None)
            for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        )
        logits = logits * (factor or 1) / (divisor or 1)
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, soft: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor], **kwargs: Any
    ) -> Tensor:
        """New tokens (B, N) for each row's soft tokens and prompt, right-padded; arguments as for `generate`."""
        embeds, mask = self.embed_prompts(soft, before, after)
        return self.decoder.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    # -- training --------------------------------------------------------------------------------------------------

    def group_parameters(self, group: str) -> dict[str, nn.Parameter]:
        """Parameters of one of `config.TRAINABLE_GROUPS` by their name in this model; "lsa" may have none."""
        lora = self.config.encoder_lora is not None
        layers = f"decoder.{_prefix(self.decoder)}"
        found = {}
        for name, parameter in self.named_parameters():
            if group == "encoder":
                inside = name.startswith("compressor.encoder.") and "embed" not in name and ".wte" not in name
                inside = inside and ("lora_" in name if lora else ".wpe" not in name)
            elif group == "lsa":
                inside = name.startswith("compressor.") and not name.startswith("compressor.encoder.")
            elif group == "decoder-qkv":
                inside = name.startswith(layers) and any(part in name for part in QKV_NAMES) and "lora_" not in name
            elif group == "decoder":
                inside = name.startswith("decoder.") and "lora_" not in name
            elif group == "decoder-lora":
                inside = name.startswith("decoder.") and "lora_" in name
            else:
                raise ConfigError(f"unknown trainable group {group!r}")
            if inside:
                found[name] = parameter
        if not found and group != "lsa":
            if group == "decoder-lora":
                raise ConfigError("decoder-lora can only be trained where decoder_lora is set")
            raise BackboneError(f"{type(self.decoder).__name__} has no weights in group {group!r}")
        return found

    def train(self, mode: bool = True) -> "GmsaModel":
        """Training mode for the parts that are trained; frozen parts stay as at inference (no dropout)."""
        super().train(mode)
        for part in (self.compressor.encoder, self.compressor.lsa, self.decoder):
            if any(p.requires_grad for p in part.parameters()):
                continue
            part.eval()
            for module in part.modules():
                # Gradients pass through frozen blocks, so these recompute too; a block itself drops nothing out.
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    module.training = mode
        return self

    def set_trainable(self, groups: Sequence[str]) -> list[nn.Parameter]:
        """Freeze everything but these groups; returns their parameters and notes them in `config.trained`."""
        if "decoder" in groups:
            self._separate_embeddings()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        chosen = {n: p for group in groups for n, p in self.group_parameters(group).items()}
        if not chosen:
            raise ConfigError(f"nothing to train: this model has no weights in {', '.join(groups) or 'no group'}")
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        self.config.trained = sorted({*self.config.trained, *groups})
        return list(chosen.values())

    def _separate_embeddings(self) -> None:
        """Give the encoder a copy of the embeddings it shares, so that training the decoder's leaves memories valid."""
        shared = self.compressor.encoder.get_input_embeddings()
        if shared is self.decoder.get_input_embeddings():
            self.compressor.encoder.set_input_embeddings(copy.deepcopy(shared))


def load_model(
    folder: Path, *, dtype: torch.dtype, config: GmsaConfig | None = None, **options: Any
) -> tuple[GmsaModel, Backbone, Backbone | None]:
    """A checkpoint's model with the backbones it was built on: the decoder's and, where it differs, the encoder's.

    Args:
        folder: of the checkpoint.
        dtype: of all weights.
        config: used instead of the folder's own.
        options: transformers' loading options for the backbones; those that are None or False are left out.

    Raises:
        CheckpointError, BackboneError: see `GmsaModel.from_pretrained`.
    """
    config = config or checkpoint.read_config(folder)
    given = {name: value for name, value in options.items() if value}
    if getattr(config, "holds", None) == "compressor":
        from gmsa.scale.compressor import load_compressor  # builds on this module

        return load_compressor(folder, config, dtype, **given)
    decoder, encoder = checkpoint.load_backbones(config, dtype, **given)
    model = GmsaModel(config, decoder.model, encoder.model if encoder else None)
    checkpoint.load_weights(model, folder)
    return model.eval(), decoder, encoder


# The attention projections that KEFT trains, in the families' own names; fused ones are trained whole.
QKV_NAMES = (".q_proj.", ".k_proj.", ".v_proj.", ".qkv_proj.", ".c_attn.", ".query_key_value.", ".W_pack.")


def _prefix(causal_lm: PreTrainedModel) -> str:
    return f"{causal_lm.base_model_prefix}."


AutoConfig.register(GmsaConfig.model_type, GmsaConfig, exist_ok=True)
AutoModel.register(GmsaConfig, GmsaModel, exist_ok=True)
