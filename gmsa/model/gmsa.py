r"""The model: a compressor and the decoder that reads its soft tokens (paper section 2).

    tokens --encoder--> states --mean of every r--> groups --LSA--> soft tokens --decoder--> answer
           \____________________ compressor.py ____________________/

Everything here takes tensors. Reading and writing checkpoints is gmsa/io, text is gmsa/api.py.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, ConfigError
from gmsa.model.backbone import QKV_NAMES, add_lora, body_of, head_logits
from gmsa.model.compressor import Compressor, rates_of
from gmsa.model.entry import EntryLayers
from gmsa.model.losses import cross_entropy_in_chunks
from gmsa.model.windows import embed_rows, pad_left


class GmsaNetwork(PreTrainedModel):
    """Compressor and decoder. See `gmsa.GMSA` for the interface that takes text.

    Built from backbones that are already loaded; `from_pretrained` finds and loads them (io/loading.py).
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
        self.entry = EntryLayers(body_of(decoder), config.entry_layer)
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

    # -- compress --------------------------------------------------------------------------------------------------

    def compress(
        self, window_ids: Tensor, window_mask: Tensor, window_memories: Tensor, merge_size: int | Tensor
    ) -> list[Tensor]:
        """Soft tokens of each memory, its windows in order.

        Args:
            window_ids, window_mask: (W, L), see `Compressor.forward`.
            window_memories: (W,) the memory each window belongs to, ascending; memories are 0..N-1.
            merge_size: one for all memories, or (N,), or (N, K): K rates of each from one pass of the encoder.

        Returns:
            N tensors (M_i, d) in the decoder's dtype; N * K for K rates, those of a memory one after the other.
        """
        sizes = merge_size[window_memories] if isinstance(merge_size, Tensor) else merge_size
        rates = rates_of(merge_size)
        soft, mask = self.compressor(window_ids, window_mask, sizes)
        soft = soft.to(self.get_input_embeddings().weight.dtype)
        memories: list[list[Tensor]] = [[] for _ in range((int(window_memories.max()) + 1) * rates)]
        owners = [memory * rates + rate for memory in window_memories.tolist() for rate in range(rates)]
        lengths = mask.sum(dim=1).tolist()
        for owner, states, length in zip(owners, soft, lengths, strict=True):
            memories[owner].append(states[:length])
        return [torch.cat(parts) for parts in memories]

    # -- read ------------------------------------------------------------------------------------------------------

    def embed(self, prompts: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """What the decoder reads for each prompt: token ids are embedded, soft tokens stand as they are.

        Args:
            prompts: of each row its pieces in order: token ids (T,), or soft tokens (M, d), told apart by their dtype.

        Returns:
            embeds: a (T_i, d) tensor per row.
            soft: a (T_i,) bool tensor per row, true where a soft token stands.
        """
        ids = [piece for pieces in prompts for piece in pieces if not piece.is_floating_point()]
        embedded = iter(embed_rows(self.get_input_embeddings(), ids)) if ids else iter(())
        dtype: torch.dtype = self.get_input_embeddings().weight.dtype  # type: ignore[assignment]
        embeds, soft = [], []
        for pieces in prompts:
            embeds.append(torch.cat([p.to(dtype) if p.is_floating_point() else next(embedded) for p in pieces]))
            marks = [torch.full((len(p),), p.is_floating_point(), device=p.device) for p in pieces]
            soft.append(torch.cat(marks))
        return embeds, soft

    def forward(
        self,
        prompts: Sequence[Sequence[Tensor]],
        targets: Sequence[Tensor],
        window_ids: Tensor | None = None,
        window_mask: Tensor | None = None,
        window_memories: Tensor | None = None,
        merge_size: int | Tensor = 1,
        learned: Sequence[Tensor] | None = None,
        keep_logits: bool = True,
    ) -> dict[str, Tensor]:
        """Loss of restoring (autoencoder stage) or answering (KEFT stage): cross-entropy on the targets only.

        Args:
            prompts: of each of B rows token ids (T,), one list more than the row has memories: between each two that
                follow one another its next memory stands. A row without any is text alone, as a teacher reads it.
            targets: token ids to predict after each prompt, B tensors.
            window_ids, window_mask, window_memories, merge_size: of all memories, those of the first row first; see
                `compress`. At K rates per memory every row is scored K times. None: no row has a memory.
            learned: B bool tensors, true for the tokens of a target that count; the others (further questions) are
                only read. None: all count.
            keep_logits: return them; otherwise they exist for a few tokens at a time only, which takes less memory.

        Returns:
            "loss": mean over target tokens. "labels": (N,), rows one after the other. "correct": how many of them have
            the highest logit. "logits": (N, vocabulary), if kept. The LM head never runs where there is no label.
        """
        if window_ids is None:
            return self.score(prompts, targets, learned, keep_logits)
        assert window_mask is not None
        assert window_memories is not None
        memories = self.compress(window_ids, window_mask, window_memories, merge_size)
        rates = rates_of(merge_size)
        rows: list[list[Tensor]] = []
        first = 0
        for texts in prompts:
            for rate in range(rates):
                pieces = [texts[0]]
                for number, text in enumerate(texts[1:]):
                    pieces += [memories[(first + number) * rates + rate], text]
                rows.append(pieces)
            first += len(texts) - 1
        if rates > 1:
            targets = [target for target in targets for _ in range(rates)]
            learned = learned and [counts for counts in learned for _ in range(rates)]
        return self.score(rows, targets, learned, keep_logits)

    def score(
        self,
        prompts: Sequence[Sequence[Tensor]],
        targets: Sequence[Tensor],
        learned: Sequence[Tensor] | None = None,
        keep_logits: bool = True,
    ) -> dict[str, Tensor]:
        """Teacher-forced prediction of the targets after prompts of pieces (see `embed`); returns as `forward` does."""
        embeds, soft = self.embed([[*pieces, target] for pieces, target in zip(prompts, targets, strict=True)])
        with self.entry.hold(embeds, soft) as padded:
            hidden = body_of(self.decoder)(inputs_embeds=padded, use_cache=False).last_hidden_state
        # The state before each target token predicts it.
        picked = torch.cat(
            [
                states[len(row) - len(target) - 1 : len(row) - 1]
                for states, row, target in zip(hidden, embeds, targets, strict=True)
            ]
        )
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
        return head_logits(self.decoder, hidden)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[Tensor]], **kwargs: Any) -> Tensor:  # type: ignore[override]
        """New tokens (B, N) after prompts of pieces, right-padded, by transformers' `generate`, whose options it takes.

        For beams and other ways of searching that gmsa/decode does not know.
        """
        embeds, soft = self.embed(prompts)
        _, mask = pad_left(soft)
        with self.entry.hold(embeds, soft, left=True) as padded:
            return self.decoder.generate(inputs_embeds=padded, attention_mask=mask, **kwargs)

    # -- training --------------------------------------------------------------------------------------------------

    def group_parameters(self, group: str) -> dict[str, nn.Parameter]:
        """Parameters of one of `config.TRAINABLE_GROUPS` by their name in this model; "lsa" may have none."""
        lora = self.config.encoder_lora is not None
        layers = f"decoder.{self.decoder.base_model_prefix}."
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

    def train(self, mode: bool = True) -> "GmsaNetwork":
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
        for module in self.modules():  # LoRA that is frozen within a part that is not
            dropout = getattr(module, "lora_dropout", None)
            if dropout is not None and not any(p.requires_grad for p in module.lora_A.parameters()):
                dropout.eval()
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
