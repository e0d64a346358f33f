"""Linear layers with their weights laid out for the processor's bf16 units, once instead of at every product.

A step of decoding multiplies a few rows by every weight of the decoder. torch hands oneDNN the weight as it is, and
oneDNN then spends as long on bringing it into the order of AMX or AVX512-BF16 tiles as on the product. Packed weights
give bit for bit the same results and take as much memory again.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_BYTES = 2**30  # of weights: a second copy of more is not worth its memory


class PackedLinears:
    """The linear layers of a model, packed when they are first used and again after their weights have changed.

    Args:
        model: its plain `nn.Linear` layers in bf16 on the CPU are packed; where there are none, or they hold more than
            `MOST_BYTES`, nothing is, and `applied` does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = [m for m in model.modules() if type(m) is nn.Linear and _is_packable(m.weight)]
        fits = sum(linear.weight.nbytes for linear in linears) <= MOST_BYTES
        self._linears = linears if fits and _can_pack() else []
        self._packed: dict[int, tuple[tuple[int, int], Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Memory the packed weights take."""
        return sum(self._linears[number].weight.nbytes for number in self._packed)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model computes with packed weights where no gradient is asked for."""
        changed = []
        try:
            for number, linear in enumerate(self._linears):
                if _is_packable(linear.weight) and "forward" not in vars(
                    linear
                ):  # another caller, in the middle of a stream, may have been here
                    linear.forward = self._forward(number, linear)  # type: ignore[method-assign, assignment]
                    changed.append(linear)
            yield
        finally:
            for linear in changed:
                del linear.forward

    def _forward(self, number: int, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight, bias = linear.weight, linear.bias
        state = (weight.data_ptr(), weight._version)
        known = self._packed.get(number)
        if known is None or known[0] != state:
            known = state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self._packed[number] = known
        packed = known[1]

        def forward(x: Tensor) -> Tensor:
            if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
                return F.linear(x, weight, bias)
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

        return forward


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def _can_pack() -> bool:
    """Whether processor and torch have what it takes; other processors order weights in their own ways."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    wanted = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in wanted) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
