"""A decoder's steps on the CPU: its weights laid out for speed.

A step multiplies a few rows by every weight of the decoder: it takes what reading them takes, and what is done between
the products. `FastDecoder` makes both faster:

- decoders of the Llama kind are walked by the few operations of `LlamaStep` in place of transformers' modules;
- "exact": bf16 weights are packed. oneDNN brings a plain weight into the order of AMX or AVX512-BF16 tiles at every
  product, which takes as long as the product;
- "int8": steps have weights of 8 bits and a scale per output channel, half as many bytes to read.
"""

import contextlib
import functools
import math
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from gmsa.decode.batch import PreallocatedLayer, attends_to_all
from gmsa.errors import BackboneError, ConfigError
from gmsa.io.files import int8_rows
from gmsa.model.backbone import body_of, layers_of

MOST_BYTES = 2**30  # of weights: a second copy of more is not worth its memory
# Tokens of a row: where there are more, a prompt is read, whose products take longer than all between them. A question
# about a memory that was read before has fewer.
FEW: dict[str, int] = {"exact": 128, "int8": 8}
KINDS = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks are those of `LlamaStep`
MOST_ROWS = 64  # of a batch
RESCORED = 16  # likeliest tokens of 8 bits whose logits are computed anew

DecoderWeights = Literal["exact", "int8"]


class FastDecoder:
    """Makes a decoder's steps fast where processor, family and dtype allow it; elsewhere `applied` does nothing.

    Args:
        decoder: a causal LM. What is laid out anew is so when it is first used and again after weights have changed.
        weights: "int8": steps use weights of 8 bits; prompts are read with those there are.

    Raises:
        BackboneError: 8 bits were asked for and cannot be had; the message says why.
        ConfigError: there are no such weights.
    """

    def __init__(self, decoder: PreTrainedModel, weights: DecoderWeights = "exact") -> None:
        if weights not in get_args(DecoderWeights):
            raise ConfigError(f"decoder_weights must be one of {', '.join(get_args(DecoderWeights))}, got {weights!r}")
        self.weights = weights
        self._kinds: dict[nn.Module, Callable[[Any], Any]] = {}  # what stands in for a module
        self._known: dict[nn.Module, tuple[Any, Any]] = {}  # the weights it had, and what stands in for it with them
        if weights == "int8":
            if why := _why_no_int8(decoder):
                raise BackboneError(f"weights of 8 bits cannot be had: {why}")
            if type(head := decoder.get_output_embeddings()) is nn.Linear:
                self._kinds[head] = Int8Head
        else:
            linears = [m for m in decoder.modules() if type(m) is nn.Linear and _is_packable(m.weight)]
            if sum(linear.weight.nbytes for linear in linears) <= MOST_BYTES:
                self._kinds = dict.fromkeys(linears, PackedLinear)
        # A step computes in fp32 between its products: of fp64 it would lose half.
        if _has_llama_blocks(decoder) and (weights == "int8" or decoder.dtype != torch.float64):
            self._kinds[body_of(decoder)] = functools.partial(LlamaStep, weights=weights)

    @property
    def nbytes(self) -> int:
        """Memory that weights laid out anew take."""
        return sum(getattr(made, "nbytes", 0) for _, made in self._known.values())

    @contextlib.contextmanager
    def applied(self, look: bool = True) -> Iterator[None]:
        """Within, the decoder computes fast where no gradient is asked for.

        Args:
            look: whether weights have changed since they were laid out, which takes a millisecond.
        """
        changed: list[nn.Module] = []
        try:
            for module in self._kinds:
                # Another caller, in the middle of a stream, may have been here.
                if "forward" not in vars(module) and (forward := self._forward(module, look)) is not None:
                    module.forward = forward  # type: ignore[method-assign, assignment]
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward

    def _forward(self, module: nn.Module, look: bool) -> Callable[..., Any] | None:
        """What to call in place of a module; None: the module itself."""
        if look or module not in self._known:
            state = [(weight.data_ptr(), weight._version) for weight in module.parameters()]
            if module not in self._known or self._known[module][0] != state:
                self._known[module] = state, self._made(module)
        made, plain = self._known[module][1], type(module).forward
        if made is None:
            return None

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() and made.takes(*args, **kwargs):
                return made(*args, **kwargs)
            return plain(module, *args, **kwargs)

        return forward

    def _made(self, module: nn.Module) -> Any:
        weight, kind = next(module.parameters()), self._kinds[module]
        if weight.device.type != "cpu" or (kind is PackedLinear and not _is_packable(weight)):  # no longer
            return None
        return kind(module)


# -- weights of 16 bits ------------------------------------------------------------------------------------------------


class PackedLinear:
    """bf16 weights of a linear, as oneDNN likes them."""

    def __init__(self, linear: nn.Linear) -> None:
        self.nbytes = linear.weight.nbytes
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether it can be called with this."""
        return x.dtype == torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), bit for bit what the linear gives."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


# -- weights of 8 bits -------------------------------------------------------------------------------------------------
#
# What stands between two products costs more than it seems: weights that stream through the caches push everything
# else out, and an operation that takes a microsecond takes ten when nothing it needs is at hand. So there are few.


class Int8Product:
    """Weights of 8 bits and a scale per output channel; each row of the input, too, is rounded to 8 bits.

    fbgemm's product reads its weights at the speed of memory, with VNNI's products of bytes. This entrance to it takes
    tensors: that of `torch.ops.quantized` takes an object, and an exception is thrown and caught at every call.

    Args:
        linears: of the same input, whose outputs stand side by side.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weight = torch.cat([linear.weight.detach() for linear in linears]).float()
        rounded, scales = int8_rows(weight)
        self.scales = scales[:, 0]
        self.nbytes = rounded.nbytes
        self.sums = rounded.sum(dim=1, dtype=torch.int32)
        self.shape = torch.empty((), dtype=torch.int8).expand(rounded.shape)  # the product asks for no more of it
        self.zeros = torch.zeros(len(rounded))
        biases = [linear.bias.detach().float() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch moves this to torchao, which has no such product for a CPU
            self.packed = torch.fbgemm_pack_quantized_matrix(rounded)
            self(torch.zeros(1, weight.shape[1]))  # it warns once, at the first call

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(N, in) and what is added to the product (N, out) -> (N, out)."""
        most = None
        if x.shape[0] > 1:
            # The product rounds all rows within one range. Each is scaled to it, so that a large one leaves the others
            # their digits; its bounds are still the lowest and the highest of all rows, so rounding depends on company.
            most = x.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12)
            x = x / most
        out = torch.fbgemm_linear_int8_weight_fp32_activation(x, self.shape, self.packed, self.sums, 1.0, 0, self.zeros)
        if most is not None:
            out.mul_(most)
        if self.bias is not None:
            plus = self.bias if plus is None else plus + self.bias
        return out.mul_(self.scales) if plus is None else torch.addcmul(plus, out, self.scales)


class Int8Head:
    """A head of 8 bits, whose likeliest tokens are scored once more with the weights there are."""

    def __init__(self, head: nn.Linear) -> None:
        self.product = Int8Product([head])
        self.weight, self.bias = head.weight, head.bias
        self.nbytes = self.product.nbytes

    @staticmethod
    def takes(states: Tensor) -> bool:
        """Whether it can be called with this."""
        return states.numel() <= MOST_ROWS * states.shape[-1]

    def __call__(self, states: Tensor) -> Tensor:
        """(..., d) -> (..., vocabulary), fp32."""
        rows = states.float().flatten(0, -2)
        logits = self.product(rows)
        best = logits.topk(min(RESCORED, logits.shape[-1]), dim=-1).indices
        exact = torch.einsum("nd,nkd->nk", rows, F.embedding(best, self.weight).float())
        if self.bias is not None:
            exact += self.bias[best]
        return logits.scatter_(1, best, exact).view(*states.shape[:-1], -1)


# -- steps -------------------------------------------------------------------------------------------------------------


class ExactProduct:
    """The linears as they are, or with whatever stands in for them now.

    Args:
        linears: of the same input, whose outputs stand side by side.
    """

    nbytes = 0  # beside them

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = linears

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(N, in) and what is added to the product (N, out) -> (N, out), fp32."""
        x = x.to(self.linears[0].weight.dtype)
        parts = [linear(x) for linear in self.linears]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out.float() if plus is None else plus + out


class LlamaStep:
    """The forward pass of a body of the Llama kind for a few tokens of every row, in fp32 between its products.

    Args:
        body: its embeddings are used as they are.
        weights: of its products.
    """

    def __init__(self, body: PreTrainedModel, weights: DecoderWeights) -> None:
        config = body.config
        self.most_tokens = FEW[weights]
        self.kv_heads = config.num_key_value_heads
        self.heads = config.num_attention_heads
        self.embeddings: Any = body.get_input_embeddings()
        self.rotary: Any = body.rotary_emb
        self.eps = torch.tensor(math.sqrt(config.hidden_size * config.rms_norm_eps))
        self.norm = _norm_weight(body.norm)
        self.blocks = [
            LlamaBlock(layer, Int8Product if weights == "int8" else ExactProduct)
            for layer in cast(Any, layers_of(body))
        ]
        self.nbytes = sum(part.nbytes for block in self.blocks for part in block.products)

    def takes(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **caches: Any,
    ) -> bool:
        """Whether it can be called with this: a few tokens of text for a `Batch` that has read something."""
        given = input_ids if input_ids is not None else inputs_embeds
        cache = _cache_of(caches)
        if given is None or cache is None or given.shape[1] > self.most_tokens or len(given) > MOST_ROWS:
            return False
        layer = cache.layers[0]
        return isinstance(layer, PreallocatedLayer) and layer.is_initialized and not layer.places.soft

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **caches: Any,
    ) -> BaseModelOutputWithPast:
        """As the body is called."""
        layers = _cache_of(caches).layers
        embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows, width, _ = embeds.shape
        x = embeds.float().flatten(0, 1)
        turn = self._turn(*self.rotary(x, position_ids))
        mask = self._mask(attention_mask, width, layers[0])
        for block, layer in zip(self.blocks, layers, strict=True):
            attended = self._attended(block, block.qkv(self._normed(x, block.norm)), turn, mask, layer)
            x = block.out(attended, x)
            gate, up = torch.chunk(block.gate_up(self._normed(x, block.mlp_norm)), 2, dim=1)
            x = block.down(F.silu(gate, inplace=True).mul_(up), x)
        return BaseModelOutputWithPast(last_hidden_state=self._normed(x, self.norm).view(rows, width, -1))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm, of fewer operations than torch's: the root of the width is in `weight` and `eps`."""
        return (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.eps)).mul_(weight)

    def _mask(self, mask: Tensor | None, width: int, layer: PreallocatedLayer) -> Tensor | None:
        """(B or 1, 1, G * Q, T): queries of the G heads that share a key stand side by side. None: all see all."""
        if mask is None and width == 1:
            return None
        if mask is None:
            start = layer.get_seq_length()
            places = torch.arange(start + width)
            later = places > places[start:, None]
            mask = torch.zeros(later.shape, dtype=layer.keys.dtype)
            mask = mask.masked_fill_(later, torch.finfo(mask.dtype).min)[None, None]
        return mask.repeat(1, 1, self.heads // self.kv_heads, 1)

    def _turn(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, Q, size): cosines and sines (B * Q, heads, size) that turn queries and keys and leave values be."""
        sin[..., : sin.shape[-1] // 2].neg_()  # with it, exchanging the halves of a head is half of its rotation
        shape, values = (-1, self.heads + self.kv_heads, -1), (0, 0, 0, self.kv_heads)
        cos, sin = (part.flatten(0, 1)[:, None].expand(shape) for part in (cos, sin))
        return F.pad(cos, values, value=1.0), F.pad(sin, values)

    def _attended(
        self, block: "LlamaBlock", x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, layer: PreallocatedLayer
    ) -> Tensor:
        """What the heads make of queries, keys and values (N, heads * size) side by side: (N, H * size)."""
        size, parts = block.head_size, (self.heads, self.kv_heads, self.kv_heads)
        heads = x.view(x.shape[0], -1, size)
        if block.q_norm is not None and block.k_norm is not None:
            q, keys, values = torch.split_with_sizes(heads, parts, dim=1)
            heads = torch.cat((block.q_norm(q), block.k_norm(keys), values), dim=1)
        heads = torch.addcmul(heads * turn[0], torch.roll(heads, size // 2, -1), turn[1]).to(layer.keys.dtype)
        heads = heads.view(len(layer.places.starts), -1, heads.shape[1], size)  # (B, Q, heads, size)
        q, keys, values = torch.split_with_sizes(heads, parts, dim=2)
        keys, values = layer.update(keys.transpose(1, 2), values.transpose(1, 2))
        # Queries of heads that share a key stand side by side.
        q = q.unflatten(2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (B, kv, G, Q, size)
        out = F.scaled_dot_product_attention(q.flatten(2, 3), keys, values, mask, scale=block.scale)
        out = out.view(q.shape).permute(0, 3, 1, 2, 4)
        return out.float().reshape(x.shape[0], -1)


class LlamaBlock:
    """One block's products and norms.

    Args:
        layer: of transformers.
        product: kind of all its products.
    """

    def __init__(self, layer: Any, product: type[Int8Product] | type[ExactProduct]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = product([attention.o_proj])
        self.gate_up = product([mlp.gate_proj, mlp.up_proj])
        self.down = product([mlp.down_proj])
        self.products = [self.qkv, self.out, self.gate_up, self.down]
        self.norm, self.mlp_norm = _norm_weight(layer.input_layernorm), _norm_weight(layer.post_attention_layernorm)
        self.q_norm, self.k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))  # Qwen3
        self.scale, self.head_size = attention.scaling, attention.head_dim


def _cache_of(caches: dict[str, Any]) -> Any:
    """The cache, for which there are two names: see `model.backbone.cache_argument`."""
    return caches.get("cache", caches.get("past_key_values"))


def _norm_weight(norm: Any) -> Tensor:
    """What an RMS norm multiplies a vector of length 1 by."""
    return norm.weight.detach().float() * math.sqrt(len(norm.weight))


# -- what there is -----------------------------------------------------------------------------------------------------


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _can_pack()


def _can_pack() -> bool:
    """Whether processor and torch have what it takes; other processors order weights in their own ways."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    wanted = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in wanted) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _why_no_int8(decoder: PreTrainedModel) -> str | None:
    """What keeps a decoder's steps from having weights of 8 bits; None: nothing."""
    if not _has_llama_blocks(decoder):
        return f"they are for decoders of these kinds on the CPU: {', '.join(KINDS)}, with attention to all positions"
    if not hasattr(torch, "fbgemm_linear_int8_weight_fp32_activation"):
        return "this version of PyTorch has no products with them"
    if "fbgemm" not in torch.backends.quantized.supported_engines or not torch.cpu._is_vnni_supported():
        return "they need a processor with AVX512-VNNI"
    return None


def _has_llama_blocks(decoder: PreTrainedModel) -> bool:
    config = decoder.config
    if decoder.device.type != "cpu" or config.model_type not in KINDS:
        return False
    body = body_of(decoder)
    if not len(layers_of(body)):  # the decoder was dropped
        return False
    linears = [m for m in layers_of(body).modules() if isinstance(m, nn.Linear)]  # LoRA's are none of torch's own
    plain = len(linears) == 7 * len(layers_of(body)) and all(type(m) is nn.Linear for m in linears)
    return plain and config.hidden_act == "silu" and config._attn_implementation == "sdpa" and attends_to_all(body)
