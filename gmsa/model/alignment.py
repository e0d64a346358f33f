"""Layer semantic alignment (LSA, paper section 2) and what the paper compares it with: one class each.

Merged encoder states are states of the encoder's last layer, and the decoder would read them as embeddings. LSA bridges
that gap. A kind is a subclass of `Alignment` and a line in `config.ALIGNMENT_KINDS`.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmsa.config import GmsaConfig
from gmsa.model.backbone import layers_of, take_layers

# Of `RidgeMap`.
RIDGE = 1e-3  # added to the diagonal, where every state has variance 1
WINDOW = 2  # tokens in a row: longer rows of random words are a context that no text is (experiments/alignment.py)
PER_DIMENSION = 8  # tokens for each dimension of a state


class Alignment(nn.Module):
    """From merged states to soft tokens.

    Args:
        config: of the model.
        encoder_width: of the merged states.
        decoder_body: of which `width` is wanted, and whose blocks may be copied.

    Attributes:
        blocks: transformer blocks, None where a kind has none.
        drawn: names of parameters that are drawn at random, as prefixes: no backbone has them, so a checkpoint cannot
            hold their difference from one.
    """

    drawn: tuple[str, ...] = ("project.",)

    def __init__(self, config: GmsaConfig, encoder_width: int, decoder_body: PreTrainedModel) -> None:
        super().__init__()
        self.blocks: PreTrainedModel | None = None

    def forward(self, merged: Tensor) -> Tensor:
        """(W, M, encoder width) right-padded groups -> (W, M, decoder width)."""
        raise NotImplementedError


class NoAlignment(Alignment):
    """The merged states as they are; a linear map where encoder and decoder differ in width."""

    def __init__(self, config: GmsaConfig, encoder_width: int, decoder_body: PreTrainedModel) -> None:
        super().__init__(config, encoder_width, decoder_body)
        width = decoder_body.config.hidden_size
        self.project = nn.Linear(encoder_width, width) if encoder_width != width else None

    def to_width(self, merged: Tensor) -> Tensor:
        """(..., encoder width) -> (..., decoder width)."""
        return merged if self.project is None else self.project(merged.to(self.project.weight.dtype))

    def forward(self, merged: Tensor) -> Tensor:
        return self.to_width(merged)


class DecoderBlocks(NoAlignment):
    """The paper's: `lsa_layers` blocks initialised from the decoder's own.

    From its lowest, because what soft tokens lack is exactly what those layers would do to embeddings. Where soft
    tokens enter the decoder further up (`entry_layer`), from the layers right below the entry: merged states of encoder
    layer K go through the decoder's layer K and are what its layer K + 1 expects, before any training.
    """

    def __init__(self, config: GmsaConfig, encoder_width: int, decoder_body: PreTrainedModel) -> None:
        super().__init__(config, encoder_width, decoder_body)
        start = config.entry_layer - config.lsa_layers if config.entry_layer else 0
        self.blocks = take_layers(
            decoder_body, start, config.lsa_layers, keep_embeddings=False, keep_norm=config.final_norm
        )

    def forward(self, merged: Tensor) -> Tensor:
        """See `Alignment`. No mask is needed: blocks are causal and padding is on the right, so no group sees it."""
        assert self.blocks is not None
        dtype = next(layers_of(self.blocks).parameters()).dtype
        merged = self.to_width(merged).to(dtype)
        return self.blocks(inputs_embeds=merged, use_cache=False).last_hidden_state


class RandomBlocks(DecoderBlocks):
    """The same blocks with fresh weights: the paper's ablation of their initialisation."""

    drawn = ("",)

    def __init__(self, config: GmsaConfig, encoder_width: int, decoder_body: PreTrainedModel) -> None:
        super().__init__(config, encoder_width, decoder_body)
        assert self.blocks is not None
        for module in self.blocks.modules():  # as the family draws weights at the start of pretraining, norms included
            self.blocks._init_weights(module)


class LinearMap(Alignment):
    """One linear map: what the authors' release has as the alternative to LSA."""

    drawn = ("",)

    def __init__(self, config: GmsaConfig, encoder_width: int, decoder_body: PreTrainedModel) -> None:
        super().__init__(config, encoder_width, decoder_body)
        self.map = self._map(encoder_width, decoder_body.config.hidden_size)

    def _map(self, encoder_width: int, width: int) -> nn.Module:
        return nn.Linear(encoder_width, width)

    def forward(self, merged: Tensor) -> Tensor:
        return self.map(merged.to(next(self.map.parameters()).dtype))


class MultilayerPerceptron(LinearMap):
    """Two linear maps with a GELU between them, as ICAE-like models have."""

    def _map(self, encoder_width: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(encoder_width, width), nn.GELU(), nn.Linear(width, width))


class NormedPerceptron(LinearMap):
    """LCLM's adapter (https://arxiv.org/abs/2606.09659): RMSNorm, then two linear maps with a GELU between them."""

    def _map(self, encoder_width: int, width: int) -> nn.Module:
        norm = nn.RMSNorm(encoder_width, eps=1e-6)
        return nn.Sequential(norm, nn.Linear(encoder_width, width), nn.GELU(), nn.Linear(width, width))


class RidgeMap(LinearMap):
    """One linear map; `fit` finds the least squares from the encoder's states of tokens to the embeddings of the same.

    After SeMe (https://arxiv.org/abs/2505.20144): spaces are aligned by what the vocabulary is in each, without data
    and without training. How far that gets is in docs/training-log.md.
    """

    @torch.no_grad()
    def fit(self, states: Tensor, wanted: Tensor) -> None:
        """Set the map to the one that brings states (N, encoder width) nearest to `wanted` (N, decoder width)."""
        x, y = states.double(), wanted.double()
        mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)  # a few dimensions are far larger than all others
        x, middle = (x - mean) / scale, y.mean(0)
        gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ (y - middle) / len(x)) / scale[:, None]  # (encoder width, width)
        self.map.get_parameter("weight").copy_(weight.T)
        self.map.get_parameter("bias").copy_(middle - mean @ weight)


def vocabulary_windows(size: int, width: int, length: int = WINDOW) -> Tensor:
    """Tokens of a vocabulary of that size at random, the same at every call: (W, length), enough for a width."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (-(-PER_DIMENSION * width // length), length), generator=generator)
