"""Refinement: soft tokens improved by gradient steps of their own, everything else left alone. Past the paper.

The compressor writes a memory in one pass. Among the soft tokens near those it writes there are others that the decoder
reads better, when restoring above all; a few steps of Adam find them. What they learn from is the window itself, the
way the model was trained:

    restore    the window's text (paper section 3, stage 1)
    look up    questions about quoted words (lookups.py), drawn anew at each step

It costs a forward and a backward pass of the decoder for each step and objective, once for each memory; reading costs
what it did. Optimised prompts hold a text of many times their length (https://arxiv.org/abs/2502.13063), and studying
a text by questions about it makes a cache that answers (https://arxiv.org/abs/2506.06266); here both start from soft
tokens that are nearly right.
"""

import hashlib
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmsa.decode.malloc import return_freed_memory
from gmsa.decode.prompt import Frame, PromptTemplate
from gmsa.lookups import gaps, quotes
from gmsa.model.backbone import holding
from gmsa.model.gmsa import GmsaNetwork
from gmsa.model.packed import packed_attention, why_not

STEP = 0.01  # first step of every value, of the root mean square of the memory's values; falls to 0
BETAS = (0.9, 0.95)  # of Adam
STEPS = 20  # where nobody says how many
TURNS = 4  # questions of each kind about a window, at each step
# Positions that are read at once: each keeps some 0.6 MB of a 135M decoder in bf16 for the backward pass.
POSITIONS, CUDA_POSITIONS = 1024, 16384
FOLLOWS, FILLS = 'What comes after "{words}"?', 'Fill the gap: "{words}"'

Row = tuple[Frame, Tensor, Tensor]  # what stands around the memory; the target, and which of its tokens count


class Refiner:
    """Refines memories of one model.

    Args:
        model: whose soft tokens they are. No weight of it changes.
        template: renders prompts for its decoder.
        tokenizer: the encoder's.
    """

    def __init__(self, model: GmsaNetwork, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.template = template
        self.tokenizer = tokenizer

    @torch.enable_grad()
    def __call__(self, windows: Sequence[Sequence[int]], soft: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Soft tokens that restore and answer better.

        What becomes of a window does not depend on the others, and is the same each time.

        Args:
            windows: token ids of each.
            soft: (M_w, d), their soft tokens.
            steps: of Adam.

        Returns:
            As `soft`.
        """
        moving = [states.detach().float().clone().requires_grad_() for states in soft]
        scales = [float(states.detach().square().mean().sqrt()) for states in moving]
        adam = torch.optim.Adam(
            [{"params": [states], "lr": STEP * scale} for states, scale in zip(moving, scales, strict=True)],
            betas=BETAS,
        )
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1.0 / steps, total_iters=max(1, steps - 1))
        drawn = [random.Random(hashlib.sha256(repr(list(window)).encode()).digest()) for window in windows]
        texts = [self.tokenizer.decode(window) for window in windows]
        restoring = [self._restore(window) for window in windows]
        # Gradients of weights would only be thrown away, and what they keep of the forward pass.
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with holding(trained, "requires_grad", False), self._attention():
            for _ in range(steps):
                asking = [self._look_up(*of_one) for of_one in zip(texts, map(len, moving), drawn, strict=True)]
                adam.zero_grad()
                self._learn(moving, restoring)
                self._learn(moving, asking)
                adam.step()
                falling.step()
        self.model.entry.forget()
        return_freed_memory()  # of passes that were never of one shape
        return [states.detach().to(given.dtype) for states, given in zip(moving, soft, strict=True)]

    def _attention(self) -> AbstractContextManager[None]:
        """On a CPU attention whose backward pass is fast."""
        fits = self.model.device.type == "cpu" and why_not(self.model) is None
        return packed_attention(self.model) if fits else nullcontext()

    def _learn(self, moving: Sequence[Tensor], rows: Sequence[Row | None]) -> None:
        """Add the gradient of each memory's mean loss over its own targets; None: nothing is asked of it."""
        chosen = [(states, row) for states, row in zip(moving, rows, strict=True) if row is not None]
        chosen.sort(key=_length)
        room = CUDA_POSITIONS if self.model.device.type == "cuda" else POSITIONS
        while chosen:
            step = max(1, room // _length(chosen[-1]))
            self._backward(chosen[-step:])
            del chosen[-step:]

    def _backward(self, chosen: Sequence[tuple[Tensor, Row]]) -> None:
        device = self.model.device
        prompts, targets, learned = [], [], []
        for states, (frame, target, counts) in chosen:
            prompts.append([piece.to(device) for piece in frame.around(states)])
            targets.append(target.to(device))
            learned.append(counts.to(device))
        loss = self.model.score(prompts, targets, learned, keep_logits=False)["loss"]
        parts = [states for states, _ in chosen]
        total = sum(int(counts.sum()) for counts in learned)
        for states, counts, gradient in zip(parts, learned, torch.autograd.grad(loss, parts), strict=True):
            # The loss is the mean over all rows; a row's own mean does not hang on its neighbours.
            gradient = gradient * (total / int(counts.sum()))
            states.grad = gradient if states.grad is None else states.grad + gradient

    def _restore(self, window: Sequence[int]) -> Row:
        frame = self.template.restore()
        target = torch.tensor([*self.template.recode(list(window), self.tokenizer), self.template.end_id])
        return frame, target, torch.ones(len(target), dtype=torch.bool)

    def _look_up(self, text: str, soft: int, rng: random.Random) -> Row | None:
        """Questions about a text as one conversation, as many as the decoder has room for; None: there are none.

        Args:
            text: of a window.
            soft: how many soft tokens it has.
            rng: draws them.
        """
        turns = quotes(text, FOLLOWS, TURNS, rng) + gaps(text, FILLS, TURNS, rng)
        rng.shuffle(turns)
        told = [(question, answers[0]) for question, answers in turns]
        limit = getattr(self.model.decoder.config, "max_position_embeddings", None)
        while told:
            frame = self.template(told[0][0])
            target, learned = self.template.conversation(told, learn_questions=False)
            if limit is None or len(frame.before) + soft + len(frame.after) + len(target) <= limit:
                return frame, torch.tensor(target), torch.tensor(learned)
            told.pop()
        return None


def _length(pair: tuple[Tensor, Row]) -> int:
    """Positions of a memory and its target, the frame left aside."""
    states, (_, target, _) = pair
    return len(states) + len(target)
