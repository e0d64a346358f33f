"""Where soft tokens enter the decoder. Not in the paper: there they enter at its input, where LSA brings them.

A state of layer K is what a decoder expects at layer K. Soft tokens that are such states are therefore *held*: they
stand in the sequence from its input on, and the lowest layers, whose output they already are, leave them alone. Tokens
of text go through all layers and see them in each. Nothing has to be learned before they can be read.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmsa.config import GmsaConfig
from gmsa.errors import ConfigError
from gmsa.model.backbone import layers_of
from gmsa.model.windows import pad_left, pad_right


class EntryLayers:
    """Makes the lowest layers of a decoder's body leave soft tokens alone.

    Args:
        body: of the decoder; hooks are put on its lowest layers.
        count: how many of them; 0: soft tokens enter at the input, and nothing is changed.

    Raises:
        ConfigError: the body has no layer left above.
    """

    def __init__(self, body: nn.Module, count: int) -> None:
        layers = layers_of(body)
        if count >= len(layers):
            raise ConfigError(f"entry_layer is {count}, but the decoder has {len(layers)} layers: none is left to read")
        self.count = count
        self._held: tuple[Tensor, Tensor] | None = None  # (B, T) marks and (B, T, d) vectors of the forward under way
        if count:
            # What a body does to its input (scale it, add positions) is meant for embeddings.
            layers[0].register_forward_pre_hook(self._put_in, with_kwargs=True)
        for layer in layers[:count]:
            layer.register_forward_hook(self._put_back, with_kwargs=True)

    @contextlib.contextmanager
    def hold(self, embeds: Sequence[Tensor], soft: Sequence[Tensor], left: bool = False) -> Iterator[Tensor]:
        """Within, the marked positions of what the body reads are soft tokens.

        In training the marks stay after the block: gradient checkpointing runs the layers once more, later.

        Args:
            embeds: of each row what is read, (T_i, d).
            soft: of each row (T_i,) bool, true where a soft token stands.
            left: pad on the left instead of the right.

        Yields:
            (B, T, d), the rows padded: what the body is to be called with.
        """
        padded = pad_left(embeds)[0] if left else pad_right(embeds)
        if self.count and any(bool(row.any()) for row in soft):
            self._held = (pad_left(soft)[0] if left else pad_right(soft)), padded
        else:
            self._held = None
        try:
            yield padded
        finally:
            if not torch.is_grad_enabled():
                self._held = None

    def forget(self) -> None:
        """Let go of what was held with gradients: no layer will run once more."""
        self._held = None

    def _put_in(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        fit = self._fit(given)
        if fit is None or given is fit[1]:
            return None
        put = torch.where(fit[0], fit[1].to(given.dtype), given)
        return ((put, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": put})

    def _put_back(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output
        fit = self._fit(made)
        if fit is None:
            return output
        kept = torch.where(fit[0], fit[1].to(made.dtype), made)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    def _fit(self, states: Tensor) -> tuple[Tensor, Tensor] | None:
        """Marks (B, T, 1) and vectors for these states; None: they are a later step, of text alone."""
        if self._held is None or states.shape[1] != self._held[0].shape[1]:
            return None
        soft, vectors = self._held
        beams = len(states) // len(soft)  # as many rows of each prompt, one after the other
        if beams > 1:
            soft, vectors = (part.repeat_interleave(beams, 0) for part in (soft, vectors))
        return soft[..., None], vectors


def check_enters_at_input(config: GmsaConfig) -> None:
    """For decoders of other engines, which know nothing of entry layers.

    Raises:
        ConfigError: soft tokens enter further up, so that such a decoder would read them wrongly.
    """
    if config.entry_layer:
        raise ConfigError(
            f"this model's soft tokens enter the decoder at layer {config.entry_layer}; other engines can only be "
            "given embeddings at its input and would answer wrongly: use GMSA.answer, or gmsa serve without --decoder"
        )
