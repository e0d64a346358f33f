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
from gmsa.model.losses import cross_entropy_in_chunks
from gmsa.model.padding import embed_rows, pad_left, positions


class GmsaNetwork(PreTrainedModel):
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
        return head_logits(self.decoder, hidden)

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
