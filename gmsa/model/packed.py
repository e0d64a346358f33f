"""The training forward without padding: the same loss as `GmsaNetwork.forward`, in a fraction of the time.

All windows stand one after the other in one line of tokens, all soft tokens in a second, all that the decoder reads in
a third. What looks at one token at a time, nearly all of the work, sees no padding; attention alone is told where
sequences begin. Book-keeping is index tensors made beside the training (`train/examples.py`), so the forward only
gathers and scatters: no loop over rows, no word between GPU and host.

For one backbone with rotary positions, group merging, one merge size per row, frozen embeddings and head (`why_not`).
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from gmsa.model.alignment import DecoderBlocks, NoAlignment
from gmsa.model.backbone import body_of, holding, layers_of, norm_name
from gmsa.model.gmsa import GmsaNetwork
from gmsa.model.losses import ChunkedLoss, frozen_head_chunk, frozen_head_loss
from gmsa.model.merging import GroupMerging

ON_CPU, ON_CUDA = "gmsa_packed_cpu", "gmsa_packed_cuda"
BLOCK = 256  # queries whose attention is computed at once in the backward pass on the CPU
WHOLE = 384  # sequences up to this long are not cut into such blocks


class Travels:
    """Dataclasses that go from process to process as arrays: a tensor would take a file descriptor there."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return _arrived, (type(self), _exchanged(values, Tensor, Tensor.numpy))


def _arrived(kind: type, values: list[Any]) -> Any:
    return kind(*_exchanged(values, np.ndarray, torch.from_numpy))


def _exchanged(value: Any, kind: type, exchange: Callable[[Any], Any]) -> Any:
    """Lists, in lists too, with what is of a kind exchanged."""
    if isinstance(value, list):
        return [_exchanged(part, kind, exchange) for part in value]
    return exchange(value) if isinstance(value, kind) else value


@dataclass(frozen=True)
class Line(Travels):
    """Sequences one after the other."""

    positions: Tensor  # (N,) of each token in its sequence
    cell: Tensor  # (N,) each token's place in the grids of all segments
    # Of sequences of like length, (first token, last + 1, rows, width): a grid (rows, width) holds them.
    segments: list[tuple[int, int, int, int]]
    ends: Tensor  # (B + 1,) int32 cumulative lengths
    longest: int  # of the sequences


@dataclass(frozen=True)
class PackedBatch(Travels):
    """The arguments of `packed_forward`; all index tensors are (n,) and int64."""

    window_ids: Tensor  # (N_e,) tokens of all windows, throwaway first tokens included
    encoder: Line  # how the lines are cut into sequences
    lsa: Line  # of the windows' soft tokens
    decoder: Line
    places: Tensor  # of every real token in the encoder's line
    bins: Tensor  # the soft token each goes into
    weight: Tensor  # one over the tokens of that group
    ids: Tensor  # (N_d,) what the decoder reads, with 0 where a soft token stands
    soft_to: Tensor  # where each soft token stands in the decoder's line
    soft: Tensor  # (N_d, 1) bool, true there
    picked: Tensor  # states that predict the labels
    labels: Tensor  # token ids

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on a device."""
        return PackedBatch(**{field.name: _moved(getattr(self, field.name), device) for field in fields(self)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Line):
        return Line(**{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    if not isinstance(value, Tensor):
        return value
    pinned = value.pin_memory() if torch.device(device).type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)


def why_not(model: GmsaNetwork) -> str | None:
    """What keeps a model from the packed forward; None: nothing."""
    bodies = [model.compressor.encoder, body_of(model.decoder)]
    if not isinstance(model.compressor.merging, GroupMerging):
        return "it has no group merging"
    if model.config.encoder is not None:
        return "encoder and decoder are two backbones"
    if type(model.compressor.lsa) not in (DecoderBlocks, NoAlignment):
        return f"its lsa is {model.config.lsa}"
    for body in bodies:
        if not len(layers_of(body)):
            return "its decoder is elsewhere"
        first = layers_of(body)[0]
        if not isinstance(getattr(body, "rotary_emb", None), nn.Module) or not hasattr(first, "self_attn"):
            return f"blocks of {type(body).__name__} are called in another way"
        sliding = getattr(body.config, "sliding_window", None)
        kinds = set(getattr(body.config, "layer_types", None) or ())
        if (sliding is not None and not kinds) or "sliding_attention" in kinds:
            return "its attention is local"
        if getattr(body.config, "model_type", "") not in PLAIN:
            return f"{body.config.model_type} does more around its blocks"
    ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    if getattr(ends[-1], "bias", None) is not None:
        return "its head has a bias"
    trained = any(p.requires_grad for part in ends for p in part.parameters())
    return "its embeddings or its head are trained" if trained else None


def why_not_on_cuda(model: GmsaNetwork, bf16: bool) -> str | None:
    """What keeps a model from the packed forward on a GPU, beside `why_not`; None: nothing."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no attention on lines of rows (2.11 has)"
    if not bf16:
        return "it takes bf16 on a GPU, and trainer.bf16 is off"
    attention: Any = layers_of(body_of(model.decoder))[0].self_attn
    size = attention.head_dim
    return f"its heads have {size} values, and a GPU takes multiples of 8" if size % 8 else None


PLAIN = ("llama", "qwen2", "qwen3", "mistral")  # families whose bodies do nothing but run their blocks


class Take(torch.autograd.Function):
    """(size, ...) -> (N, ...): rows at places that all differ, so that the backward pass copies and adds nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, place, gradient), None


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, gradient: Tensor, first: int,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of causal attention of some queries, from the log-sum-exp of the forward pass.

    Args:
        query, out, gradient: (B, R, n, D), the R query heads that share a key head.
        key, value: (B, e, D), up to the last query.
        logsumexp: (B, R, n).
        first: place of the first query among the keys.
        scaling: of the products.

    Returns:
        Gradients of query (B, R, n, D), key and value (B, e, D).
    """
    batch, heads, n, width = query.shape
    e = key.shape[1]
    queries, gradients = query.reshape(batch, heads * n, width), gradient.reshape(batch, heads * n, width)
    scores = torch.bmm(queries, key.transpose(1, 2)).view(batch, heads, n, e).float() * scaling
    of_weights = torch.bmm(gradients, value.transpose(1, 2)).view(batch, heads, n, e).float()
    seen = torch.arange(e, device=key.device)[None] <= torch.arange(first, first + n, device=key.device)[:, None]
    weights = torch.where(seen, torch.exp(scores - logsumexp.unsqueeze(-1)), 0.0)
    delta = (gradient.float() * out.float()).sum(-1, keepdim=True)
    of_scores = (weights * (of_weights - delta) * scaling).to(query.dtype).view(batch, heads * n, e)
    weights = weights.to(query.dtype).view(batch, heads * n, e)
    of_query = torch.bmm(of_scores, key).view(batch, heads, n, width)
    return of_query, torch.bmm(of_scores.transpose(1, 2), queries), torch.bmm(weights.transpose(1, 2), gradients)


class CausalAttention(torch.autograd.Function):
    """Causal attention on the CPU: torch's flash kernel forward, matrix products over whole heads backward.

    The kernel's own backward takes some five times as long at the lengths of a training row.
    """

    gradients = staticmethod(attention_gradients)  # exchanged for a compiled one by `compile_blocks`

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(B, T, heads, D) each, sequences padded on the right -> (B, T, heads * D)."""
        heads = [part.transpose(1, 2) for part in (query, key, value)]
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, scale=scaling)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.scaling = scaling
        return out.transpose(1, 2).reshape(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """By blocks of queries where sequences are long."""
        query, key, value, out, logsumexp = ctx.saved_tensors
        batch, length, heads, width = query.shape
        shared = key.shape[2]
        rows, group = batch * shared, heads // shared

        def grouped(x: Tensor) -> Tensor:  # (B, T, heads, D) -> (B * shared, group, T, D)
            return (
                x.view(batch, length, shared, group, width).permute(0, 2, 3, 1, 4).reshape(rows, group, length, width)
            )

        q, g = grouped(query), grouped(gradients[0].reshape(batch, length, heads, width))
        o, lse = out.reshape(rows, group, length, width), logsumexp.reshape(rows, group, length)
        k, v = (x.transpose(1, 2).reshape(rows, length, width) for x in (key, value))
        run = CausalAttention.gradients
        if length <= WHOLE:
            dq, dk, dv = run(q, k, v, o, lse, g, 0, ctx.scaling)
        else:
            dq = torch.empty_like(q)
            dk, dv = torch.zeros(2, *k.shape, device=k.device).unbind()
            for start in range(0, length, BLOCK):
                end = min(length, start + BLOCK)
                part = slice(start, end)
                found = run(
                    q[:, :, part], k[:, :end], v[:, :end], o[:, :, part], lse[:, :, part], g[:, :, part], start,
                    ctx.scaling,
                )  # fmt: skip
                dq[:, :, part] = found[0]
                dk[:, :end] += found[1]
                dv[:, :end] += found[2]
        dq = dq.view(batch, shared, group, length, width).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
        dk, dv = (x.to(key.dtype).view(batch, shared, length, width).transpose(1, 2) for x in (dk, dv))
        return dq, dk, dv, None


@torch.compiler.disable
def _attend_on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None,
    line: Line | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within the sequences of a line, segment by segment, each spread to a grid padded on the right.

    Without a line, of a batch that is such a grid.
    """
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    # A norm of theirs that is trained, in fp32, makes them fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if line is None:
        out = CausalAttention.apply(*(x.transpose(1, 2) for x in (query, key, value)), scaling)
        return out.unflatten(-1, query.shape[1::2]), None
    # Split, not sliced: slices would each make a gradient of the whole line, zeros but for their part, to be added up.
    sizes = [last - first for first, last, _, _ in line.segments]
    flat = [x.squeeze(0).transpose(0, 1).flatten(1).split(sizes) for x in (query, key, value)]  # (n, heads * D) each
    counts = [x.shape[1] for x in (query, key, value)]
    parts = []
    for (first, last, rows, width), *pieces in zip(line.segments, *flat, strict=True):
        cell = line.cell[first:last]
        grids = [
            x.new_zeros(rows * width, x.shape[1]).index_copy_(0, cell, x).view(rows, width, heads, -1)
            for x, heads in zip(pieces, counts, strict=True)
        ]
        out = CausalAttention.apply(*grids, scaling)
        parts.append(Take.apply(out.view(rows * width, -1), cell))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.view(1, len(joined), query.shape[1], query.shape[3]), None


def _attend_on_cuda(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None,
    line: Line | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The same by flash attention on the line itself (torch 2.11 or newer)."""
    from torch.nn.attention.varlen import varlen_attn

    assert line is not None
    query, key = query.to(value.dtype), key.to(value.dtype)  # as above
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    out: Any = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), line.ends, line.ends, line.longest, line.longest,
        scale=scaling, window_size=(-1, 0),
    )  # fmt: skip
    return out[None], None


for _name, _attend in ((ON_CPU, _attend_on_cpu), (ON_CUDA, _attend_on_cuda)):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, lambda *_, **__: None)


# -- the forward -------------------------------------------------------------------------------------------------------


def packed_forward(model: GmsaNetwork, batch: PackedBatch) -> dict[str, Tensor]:
    """Loss of restoring or answering; returns as `GmsaNetwork.forward` does. Under `packed_attention`."""
    body, embeddings = body_of(model.decoder), model.get_input_embeddings()
    embeds = embeddings(batch.ids)
    if len(batch.soft_to):
        embeds = embeds.index_copy(0, batch.soft_to, _soft_tokens(model, batch))
    hidden = _run(body, embeds, batch.decoder, batch.soft if model.entry.count else None, model.entry.count, False)
    final = getattr(body, norm_name(body))(Take.apply(hidden, batch.picked))
    loss, correct = frozen_head_loss(final, batch.labels, model.get_output_embeddings().weight)  # type: ignore[union-attr,arg-type]
    return {"loss": loss, "correct": correct, "labels": batch.labels}


def _soft_tokens(model: GmsaNetwork, batch: PackedBatch) -> Tensor:
    """(M, d): encoder, group merging, layer semantic alignment."""
    compressor = model.compressor
    embeddings = compressor.encoder.get_input_embeddings()  # once the whole decoder was trained, a copy of its own
    kind: torch.dtype = embeddings.weight.dtype  # type: ignore[assignment]
    states = _run(compressor.encoder, embeddings(batch.window_ids), batch.encoder)
    real = Take.apply(states, batch.places).float() * batch.weight[:, None]
    merged = torch.zeros(len(batch.soft_to), states.shape[-1], device=states.device).index_add(0, batch.bins, real)
    blocks = compressor.lsa.blocks
    return merged.to(kind) if blocks is None else _run(blocks, merged.to(kind), batch.lsa).to(kind)


def _run(
    body: nn.Module, hidden: Tensor, line: Line, soft: Tensor | None = None, held: int = 0, norm: bool = True
) -> Tensor:
    """A body's blocks, and its final norm, on a line (N, d); soft tokens are held through the lowest blocks."""
    given = hidden
    hidden = hidden[None]
    angles = body.rotary_emb(hidden, position_ids=line.positions[None])  # type: ignore[operator]
    for number, block in enumerate(layers_of(body)):
        made = block(hidden, attention_mask=None, position_embeddings=angles, position_ids=None, line=line)
        hidden = made[0] if isinstance(made, tuple) else made
        if number < held:
            assert soft is not None
            hidden = torch.where(soft, given, hidden[0])[None]
    return getattr(body, norm_name(body))(hidden[0]) if norm else hidden[0]


def packed_attention(model: GmsaNetwork) -> AbstractContextManager[None]:
    """Within, the model's blocks attend within lines, on a CPU also to batches padded on the right, nothing else."""
    name = ON_CUDA if model.device.type == "cuda" else ON_CPU
    return holding([part.config for part in bodies(model)], "_attn_implementation", name)


def uncompiled(model: GmsaNetwork) -> AbstractContextManager[None]:
    """Within, blocks run as they are written: other shapes and caches would be compiled anew in the midst of a run."""
    return holding([block for part in bodies(model) for block in layers_of(part)], "_compiled_call_impl", None)


def bodies(model: GmsaNetwork) -> list[Any]:
    """Those that a packed batch goes through."""
    parts = (model.compressor.encoder, model.compressor.lsa.blocks, body_of(model.decoder))
    return [part for part in parts if part is not None]


def compile_blocks(model: GmsaNetwork, packed: bool = True) -> None:
    """Compile the blocks one by one, in place: blocks of a kind share one graph, whatever the lengths in a batch.

    Args:
        model: whose blocks.
        packed: the loops of attention and loss on packed batches, too.
    """
    # One graph per mode (training, probing), attention mask and dtype; past the limit torch would fall back for good.
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.cpp.dynamic_threads = True  # as many as torch is set to when it runs
    for part in bodies(model):
        for block in layers_of(part):
            block.compile(dynamic=True)
    if packed:
        CausalAttention.gradients = staticmethod(torch.compile(attention_gradients, dynamic=True))
        ChunkedLoss.frozen_head = staticmethod(torch.compile(frozen_head_chunk, dynamic=True))
