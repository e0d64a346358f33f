"""The compressor: encoder -> merging -> layer semantic alignment (paper section 2)."""

from pkgutil import resolve_name

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmsa.config import ALIGNMENT_KINDS, MERGING_KINDS, GmsaConfig
from gmsa.errors import InputError
from gmsa.model.alignment import Alignment, RidgeMap, vocabulary_windows
from gmsa.model.backbone import add_lora, body_of, layers_of, take_layers
from gmsa.model.merging import Merging, check_merge_size
from gmsa.model.windows import embed_rows, pad_right


class Compressor(nn.Module):
    """Windows of token ids in, soft tokens out.

    Attributes:
        encoder: the lowest layers of the encoder's backbone, its embeddings shared with it.
        merging: makes one vector of every group (merging.py).
        lsa: makes soft tokens of them (alignment.py).
    """

    def __init__(self, config: GmsaConfig, encoder_lm: PreTrainedModel, decoder_lm: PreTrainedModel) -> None:
        super().__init__()
        self.config = config
        body = body_of(encoder_lm)
        count = len(layers_of(body)) if config.encoder_layers == "all" else int(config.encoder_layers)
        self.encoder = take_layers(body, 0, count, keep_embeddings=True, keep_norm=config.final_norm)
        width = body.config.hidden_size
        with torch.device(decoder_lm.device):  # where new weights go
            self.lsa: Alignment = resolve_name(ALIGNMENT_KINDS[config.lsa])(config, width, body_of(decoder_lm))
            self.merging: Merging = resolve_name(MERGING_KINDS[config.merging])(
                config, width, body.get_input_embeddings()
            )
        special = body.config.bos_token_id, body.config.eos_token_id, 0
        sink = next(token for token in special if token is not None)
        self.sink_id = sink[0] if isinstance(sink, list) else sink
        if config.encoder_lora is not None:
            add_lora(self.encoder, config.encoder_lora)

    @torch.no_grad()
    def fit_alignment(self, embeddings: nn.Module, window_ids: Tensor | None = None) -> None:
        """Find the alignment of a new model in closed form, where its kind has one; else nothing happens.

        Args:
            embeddings: of the decoder.
            window_ids: (W, L) tokens to fit it on; None: the vocabulary, at random.
        """
        if not isinstance(self.lsa, RidgeMap):
            return
        weight: Tensor = embeddings.weight  # type: ignore[assignment]
        if window_ids is None:
            window_ids = vocabulary_windows(weight.shape[0], self.encoder.config.hidden_size)
        window_ids = window_ids.to(weight.device)
        batches = window_ids.split(max(1, 1024 // window_ids.shape[1]))
        states = torch.cat([self.encode(ids).flatten(0, 1) for ids in batches])
        self.lsa.fit(states, embeddings(window_ids).flatten(0, 1))

    def encode(self, window_ids: Tensor) -> Tensor:
        """States of the tokens of each window: (W, L) right-padded ids -> (W, L, encoder width)."""
        # Padding is on the right and attention is causal, so real tokens see no padding and no mask is needed.
        if self.config.encoder_sink:
            sink = torch.full_like(window_ids[:, :1], self.sink_id)
            window_ids = torch.cat([sink, window_ids], dim=1)  # (W, 1 + L)
        states = self.encoder(input_ids=window_ids, use_cache=False).last_hidden_state
        return states[:, 1:] if self.config.encoder_sink else states

    def encode_with(self, window_ids: Tensor, window_mask: Tensor, more: list[Tensor]) -> list[Tensor]:
        """States of vectors that follow the tokens of each window.

        Args:
            window_ids, window_mask: (W, L), right-padded.
            more: (n_w, encoder width) for each window.

        Returns:
            (n_w, encoder width) for each window.
        """
        sink = [window_ids.new_tensor([self.sink_id])] if self.config.encoder_sink else []
        embedded = embed_rows(
            self.encoder.get_input_embeddings(),
            [torch.cat([*sink, row[real]]) for row, real in zip(window_ids, window_mask.bool(), strict=True)],
        )
        rows = [torch.cat([row, add.to(row.dtype)]) for row, add in zip(embedded, more, strict=True)]
        states = self.encoder(inputs_embeds=pad_right(rows), use_cache=False).last_hidden_state
        return [s[len(row) - len(add) : len(row)] for s, row, add in zip(states, rows, more, strict=True)]

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

        Raises:
            ConfigError: a bad merge size. InputError: padding on the left.
        """
        if not bool((window_mask[:, 1:].bool() <= window_mask[:, :-1].bool()).all()):
            raise InputError("windows must be padded on the right: a real token stands after padding")
        if not isinstance(merge_size, Tensor):
            merge_size = window_ids.new_full((len(window_ids),), check_merge_size(merge_size))
        sizes = merge_size if merge_size.dim() == 2 else merge_size[:, None]  # (W, K)
        merged, mask = self.merging(self, window_ids, window_mask, sizes)
        return self.lsa(merged), mask


def rates_of(merge_size: int | Tensor) -> int:
    """How many rates per row: (B, K) holds K."""
    return merge_size.shape[1] if isinstance(merge_size, Tensor) and merge_size.dim() == 2 else 1
