"""Losses on target tokens alone (paper section 3), without ever holding the logits of all of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Targets whose logits exist at once. At 49k words, in fp32 with their gradient, that is 100 MB.
CHUNK = 256
CUDA_CHUNK = 4096  # where memory is plentiful and every kernel has to be started


def cross_entropy_in_chunks(
    hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and how many tokens are predicted right.

    For a frozen LM head: weights inside `logits_of` get no gradient.

    Args:
        hidden: (N, d) states that predict the labels.
        labels: (N,) token ids.
        logits_of: (n, d) -> (n, vocabulary).

    Returns:
        loss: mean over the N tokens.
        correct: number of tokens whose label has the highest logit.
    """

    def of_chunk(states: Tensor, wanted: Tensor, needed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.set_grad_enabled(needed):
            states = states.detach().requires_grad_(needed)
            logits = logits_of(states)
        logged = F.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
        loss, correct = -logged.gather(1, wanted[:, None]).sum(), (logged.argmax(-1) == wanted).sum()
        if not needed:
            return loss, correct, None
        of_logits = logged.exp_()  # the gradient is softmax minus one-hot: made in place, not by passes over it
        of_logits[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
        return loss, correct, torch.autograd.grad(logits, states, of_logits.to(logits.dtype))[0]

    return ChunkedLoss.apply(hidden, labels, CHUNK, of_chunk)


def frozen_head_loss(hidden: Tensor, labels: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """`cross_entropy_in_chunks` for a head that is one frozen matrix (V, d), in chunks that can be compiled."""
    size = CUDA_CHUNK if hidden.device.type == "cuda" else 2 * CHUNK
    with torch.autocast(hidden.device.type, enabled=False):
        return ChunkedLoss.apply(hidden, labels, size, partial(ChunkedLoss.frozen_head, head=head.detach()))


def frozen_head_chunk(
    states: Tensor, labels: Tensor, needed: bool, head: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss, right predictions, and the gradient of the sum by the states; compiled, a few passes over logits."""
    logits = (states.to(head.dtype) @ head.T).float()
    right = (logits.argmax(-1) == labels).sum()
    logged = logits - logits.logsumexp(-1, keepdim=True)
    wanted = labels[:, None]
    loss = -logged.gather(1, wanted).sum()
    if not needed:
        return loss, right, None
    hot = torch.arange(head.shape[0], device=labels.device)[None] == wanted
    return loss, right, (logged.exp() - hot.float()).to(head.dtype) @ head


class ChunkedLoss(torch.autograd.Function):
    """Mean loss of states (N, d), and right predictions.

    The gradient with respect to the states is computed chunk by chunk along with the loss, so nothing is computed twice
    and no logits are kept for the backward pass.
    """

    frozen_head = staticmethod(frozen_head_chunk)  # exchanged for a compiled one by `packed.compile_blocks`

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, size: int, of_chunk: Callable[..., Any]) -> Any:
        """Chunks of `size` tokens by `of_chunk`: (states, labels, whether a gradient is needed), as above."""
        needed = ctx.needs_input_grad[0]
        loss, correct = hidden.new_zeros((), dtype=torch.float32), labels.new_zeros(())
        gradients: list[Tensor] = []
        for states, wanted in zip(hidden.detach().split(size), labels.split(size), strict=True):
            one, right, gradient = of_chunk(states, wanted, needed)
            loss, correct = loss + one, correct + right
            gradients += [gradient] if gradient is not None else []
        if needed:
            ctx.save_for_backward((torch.cat(gradients) / len(labels)).to(hidden.dtype))
        ctx.mark_non_differentiable(correct)
        return loss / len(labels), correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def distilled(
    loss: Tensor, student: Tensor, teacher: Tensor, counts: Sequence[int], rates: int, weight: float,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Mix cross-entropy with the distance to what the decoder predicts when it reads the full text.

    Args:
        loss: cross-entropy.
        student: (N * K, vocabulary) logits from soft tokens, K rates per row, a row's targets K times in turn.
        teacher: (N, vocabulary) logits at the same targets from the text.
        counts: learned tokens of each row's target, N in all.
        rates: K.
        weight: of the distance, the rest being that of the cross-entropy.
        temperature: both distributions are flattened by it.

    Returns:
        (1 - weight) * loss + weight * temperature**2 * KL(teacher || student), per target token.
    """
    if rates > 1:
        parts = teacher.split(list(counts))
        teacher = torch.cat([part for part in parts for _ in range(rates)])
    distance = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * loss + weight * temperature**2 * distance
