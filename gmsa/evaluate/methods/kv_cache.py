"""Methods that read the whole text and keep less of the decoder's key-value cache.

SnapKV (https://arxiv.org/abs/2404.14469) keeps, in every layer and head, the positions that the question attends to.
KVzip (https://arxiv.org/abs/2505.23416) keeps those that repeating the context attends to, whatever is asked then.
StreamingLLM (https://arxiv.org/abs/2309.17453) keeps the first tokens and the last ones.

The prompt is read in full once; of the context as many positions stay in each layer as the budget has tokens, at the
places where they stood, and equally many in each head, which KVzip does not ask for. The question is then read anew on
what is left, so that nothing the decoder saw of the whole text reaches the answer but through these positions.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gmsa.api import GMSA
from gmsa.decode.batch import CachedStates
from gmsa.decode.loop import Row
from gmsa.decode.prompt import Frame
from gmsa.errors import ContextTooLongError
from gmsa.evaluate.methods.base import Method, MethodOutput, MethodUnavailable, Models, Question
from gmsa.model.backbone import body_of, cache_argument, holding

ROWS = 8  # prompts read in full at once
QUERIES = 256  # whose attention is held at once
REPEAT = "Repeat the previous context exactly."  # KVzip's prompt
OBSERVED = "gmsa_observed_sdpa"
Observer = Callable[[int, Tensor, Tensor, float], None]  # layer, queries (B, Hq, T, D), keys (B, H, T, D), scaling


@dataclass(frozen=True)
class WholeCache:
    """One prompt's cache, before any of it goes."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values of each, (H, T, D)
    scores: list[Tensor]  # what each layer's attention said of the context, (H, L); none where nobody asked
    ids: list[int]  # of the context
    start: int  # where it stands in the prompt
    budget: int  # positions that may stay of it


@dataclass(frozen=True)
class PrunedCache:
    """What is left of one prompt's cache."""

    # Keys and values of each, (H, P + K, D): what stands before the context, then what is left of it, which differs
    # from head to head.
    layers: list[tuple[Tensor, Tensor]]
    context: int  # how many different keys are left of it
    position: int  # of the next token

    def __len__(self) -> int:
        return self.context


def _observed_attention(
    module: Any, query: Tensor, key: Tensor, *rest: Any, observe: Observer | None = None, **options: Any
) -> Any:
    """Transformers' SDPA, whose queries and keys an observer gets to see."""
    if observe is not None:
        observe(module.layer_idx, query, key, options.get("scaling") or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, *rest, **options)


AttentionInterface.register(OBSERVED, _observed_attention)
AttentionMaskInterface.register(OBSERVED, sdpa_mask)


class CacheMethod(Method):
    """Reads the whole prompt and answers from less of its cache; `prune` says what is left."""

    observes: ClassVar[bool] = False  # whether `score` is wanted of every layer's attention

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        if any(layer.is_sliding for layer in DynamicCache(config=reader.model.decoder.config).layers):
            raise MethodUnavailable("it needs a decoder that attends to everything in every layer, without windows")

    @abstractmethod
    def prune(self, cache: WholeCache) -> PrunedCache:
        """What is left of a cache."""

    def score(self, query: Tensor, key: Tensor, scaling: float, span: tuple[int, int, int]) -> Tensor:
        """What one layer's attention says of the context, (H, L); arguments as of `attention_to_context`."""
        return attention_to_context(query, key, scaling, span).mean(dim=(1, 2))

    def frame(self, prompt: Frame, context: list[int]) -> Frame:
        """What is read before and after a context."""
        return prompt

    @torch.no_grad()
    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        outputs: list[MethodOutput] = []
        for start in range(0, len(questions), ROWS):
            part = questions[start : start + ROWS]
            contexts = [self.reader.template.encode(q.context) for q in part]
            prompts = [self.frame(self.reader.template(q.prompt), ids) for q, ids in zip(part, contexts, strict=True)]
            outputs += [MethodOutput(self.prune(cache)) for cache in self._prefill(contexts, prompts, merge_size)]
        return outputs

    def _prefill(self, contexts: list[list[int]], prompts: list[Frame], merge_size: int) -> list[WholeCache]:
        model = self.reader.model
        rows = [
            torch.cat([prompt.before, torch.tensor(ids, dtype=torch.long), prompt.after])
            for ids, prompt in zip(contexts, prompts, strict=True)
        ]
        for row in rows:
            check_fits(self.reader, len(row))
        # Padding on the right: attention is causal, so no real token sees it and no mask is needed.
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        starts = [len(prompt.before) for prompt in prompts]
        scores: list[list[Tensor]] = [[] for _ in rows]  # by row and layer

        def observe(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
            for i, (start, ids) in enumerate(zip(starts, contexts, strict=True)):
                scores[i].append(self.score(query[i], key[i], scaling, (start, start + len(ids), len(rows[i]))))

        cache = DynamicCache()
        body = body_of(model.decoder)
        options = {"observe": observe} if self.observes else {}
        with holding([body.config] if self.observes else [], "_attn_implementation", OBSERVED):
            body(input_ids=padded, use_cache=True, **options, **cache_argument(body, cache))
        caches = []
        for i, ids in enumerate(contexts):
            layers = [(layer.keys[i], layer.values[i]) for layer in cache.layers]
            caches.append(WholeCache(layers, scores[i], ids, starts[i], math.ceil(len(ids) / merge_size)))
        return caches

    def answer(
        self, questions: Sequence[Question], outputs: Sequence[MethodOutput], max_new_tokens: int, batch_size: int
    ) -> list[str]:
        rows = []
        for question, output in zip(questions, outputs, strict=True):
            kept, prompt = output.content, self.reader.template(question.prompt).after
            assert isinstance(kept, PrunedCache)
            check_fits(self.reader, kept.position + len(prompt) + max_new_tokens)
            keys, values = ([pair[side] for pair in kept.layers] for side in (0, 1))
            rows.append(Row([prompt], max_new_tokens, begins=CachedStates(keys, values, kept.position)))
        self.reader.run(rows, batch_size)
        return [row.text.strip() for row in rows]


class PrunedCacheMethod(CacheMethod):
    """Keeps some positions and drops the others; which is what its subclasses say."""

    observes = True

    @abstractmethod
    def choose(self, attention: Tensor, before: int, budget: int) -> Tensor:
        """Which positions of the context stay in one layer: (H, budget) indices, ascending in each head.

        Args:
            attention: (H, L) how much each of the L tokens is attended to, by `score`.
            before: tokens in front of the context, which all stay.
            budget: at most L.
        """

    def prune(self, cache: WholeCache) -> PrunedCache:
        kept = []
        for (keys, values), scores in zip(cache.layers, cache.scores, strict=True):
            index = cache.start + self.choose(scores, cache.start, cache.budget)
            kept.append((_take(keys, cache.start, index), _take(values, cache.start, index)))
        return PrunedCache(kept, cache.budget, cache.start + len(cache.ids))


def attention_to_context(query: Tensor, key: Tensor, scaling: float, span: tuple[int, int, int]) -> Tensor:
    """How much each token of a run attends to each token of a context before it.

    Args:
        query: (Hq, T, D). key: (H, T, D), each serving Hq / H queries.
        scaling: of the products.
        span: where the context begins, where the run begins and where it ends.

    Returns:
        (H, Hq / H, Q, L), L the tokens from where the context begins to where the run does.
    """
    start, end, stop = span
    queries = query[:, end:stop].unflatten(0, (len(key), -1))  # (H, Hq / H, Q, D)
    products = (queries @ key[:, None, :stop].transpose(-1, -2)).float().mul_(scaling)  # (H, Hq / H, Q, stop)
    later = torch.ones(stop - end, stop - end, dtype=torch.bool, device=key.device).triu(1)  # of the run's own tokens
    products[..., end:].masked_fill_(later, -math.inf)
    return products.softmax(-1)[..., start:end]


def _take(states: Tensor, before: int, index: Tensor) -> Tensor:
    """What stands before the context and the chosen positions of each head: (H, T, D) -> (H, before + K, D)."""
    chosen = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
    return torch.cat([states[:, :before], chosen], dim=1)


def check_fits(reader: GMSA, tokens: int) -> None:
    """Raise ContextTooLongError unless a decoder has that many positions."""
    limit = getattr(reader.model.decoder.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ContextTooLongError(f"a prompt of {tokens} tokens exceeds the decoder's {limit}")


class SnapKV(PrunedCacheMethod):
    """Keeps what the question attends to, smoothed over 5 neighbours as in the authors' code."""

    def choose(self, attention: Tensor, before: int, budget: int) -> Tensor:
        smooth = F.avg_pool1d(attention[None], kernel_size=5, padding=2, stride=1)[0]
        return smooth.topk(budget, dim=-1).indices.sort(dim=-1).values


class KVzip(PrunedCacheMethod):
    """Keeps what the decoder attends to most while it repeats the context; blind to the question."""

    query_agnostic = True

    def frame(self, prompt: Frame, context: list[int]) -> Frame:
        repeat = self.reader.template(REPEAT)
        return Frame(repeat.before, torch.cat([repeat.after, torch.tensor(context, dtype=torch.long)]))

    def score(self, query: Tensor, key: Tensor, scaling: float, span: tuple[int, int, int]) -> Tensor:
        start, end, stop = span
        highest = key.new_zeros(len(key), end - start, dtype=torch.float)
        for first in range(end, stop, QUERIES):
            found = attention_to_context(query, key, scaling, (start, first, min(stop, first + QUERIES)))
            highest = torch.maximum(highest, found[..., : end - start].amax(dim=(1, 2)))
        return highest

    def choose(self, attention: Tensor, before: int, budget: int) -> Tensor:
        return attention.topk(budget, dim=-1).indices.sort(dim=-1).values


class StreamingLLM(PrunedCacheMethod):
    """Keeps the first 4 tokens of the prompt and the last of the context; blind to the question."""

    query_agnostic = True

    def choose(self, attention: Tensor, before: int, budget: int) -> Tensor:
        heads, length = attention.shape
        sinks = min(budget, max(0, 4 - before))
        index = torch.arange(length, device=attention.device)
        return torch.cat([index[:sinks], index[length - (budget - sinks) :]]).expand(heads, -1)
