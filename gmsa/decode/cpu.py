"""A decoder's step on the CPU: the same network without the walk through its modules, its weights laid out for speed.

A step multiplies a few rows by every weight of the decoder: it takes what reading them takes, and what is done between
the products. `FastDecoder` changes three things of that:

- weights are packed: oneDNN brings a plain weight into the order of AMX or AVX512-BF16 tiles at every product, which
  takes as long as the product. W_Q, W_K and W_V are one product;
- decoders of the Llama kind are walked by the few lines of `LlamaStep` in place of transformers' modules;
- if asked, weights have 8 bits and a scale per output channel: half as many bytes to read.

Other families keep their own modules, with packed weights.
"""

import contextlib
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from gmsa.decode.batch import PreallocatedLayer, attends_to_all
from gmsa.errors import BackboneError
from gmsa.model.backbone import body_of, layers_of

MOST_BYTES = 2**30  # of weights: a second copy of more is not worth its memory
FEW = 8  # tokens of a row: where there are more, a prompt is read, and products take longer than all between them
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
    """

    def __init__(self, decoder: PreTrainedModel, weights: DecoderWeights = "exact") -> None:
        self.weights = weights
        self._decoder = decoder
        self._body: nn.Module | None = None
        self._linears: list[nn.Linear] = []
        if weights == "int8" and (why := _why_no_int8(decoder)):
            raise BackboneError(f"weights of 8 bits cannot be had: {why}")
        if _has_llama_blocks(decoder):
            self._body = body_of(decoder)
            head = decoder.get_output_embeddings()
            self._linears = [head] if type(head) is nn.Linear else []
        else:
            self._linears = [m for m in decoder.modules() if type(m) is nn.Linear and _is_packable(m.weight)]
            if sum(m.weight.nbytes for m in self._linears) > MOST_BYTES:
                self._linears = []
        self._known: dict[int, tuple[Any, Any]] = {}  # by number of the linear, -1: the body

    @property
    def nbytes(self) -> int:
        """Memory that weights laid out anew take."""
        return sum(getattr(made, "nbytes", 0) for _, made in self._known.values())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the decoder computes fast where no gradient is asked for."""
        changed: list[nn.Module] = []
        try:
            for number, module in enumerate([*self._linears, *([self._body] if self._body is not None else [])]):
                # Another caller, in the middle of a stream, may have been here.
                if "forward" not in vars(module) and (forward := self._forward(number, module)) is not None:
                    module.forward = forward  # type: ignore[method-assign, assignment]
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward

    def _forward(self, number: int, module: nn.Module) -> Callable[..., Any] | None:
        """What to call in place of a module; None: the module itself."""
        state = [(weight.data_ptr(), weight._version) for weight in module.parameters()]
        known = self._known.get(number)
        if known is None or known[0] != state:
            known = state, self._made(module)
            self._known[number] = known
        made, plain = known[1], type(module).forward
        if made is None:
            return None

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() and made.takes(*args, **kwargs):
                return made(*args, **kwargs)
            return plain(module, *args, **kwargs)

        return forward

    def _made(self, module: nn.Module) -> Any:
        if next(module.parameters()).device.type != "cpu":  # moved since
            return None
        if module is self._body:
            return LlamaStep(self._body, self.weights)  # type: ignore[arg-type]
        assert isinstance(module, nn.Linear)
        if self.weights == "int8":
            return Int8Head(module)
        return PackedProduct([module]) if _is_packable(module.weight) else None


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


# -- products ----------------------------------------------------------------------------------------------------------
#
# What stands between two products costs more than it seems: weights that stream through the caches push everything
# else out, and an operation that takes a microsecond takes ten when nothing it needs is at hand. So a product does as
# much as it can: it adds the residual, applies the activation, multiplies by the gate.


class PackedProduct:
    """bf16 weights of one or more linears of the same input, as oneDNN likes them."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.nbytes = sum(linear.weight.nbytes for linear in linears)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(_joined_weight(linears), None)
        self.bias = _joined_bias(linears)

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether it can be called with this."""
        return x.dtype == torch.bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), bit for bit what the linears give."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times something else of its shape."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus something else of its shape."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")


class PlainProduct:
    """Weights as they are."""

    nbytes = 0

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.parts = [(linear.weight, linear.bias) for linear in linears]

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        made = [F.linear(x, weight, bias) for weight, bias in self.parts]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return F.silu(self(x))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times something else of its shape."""
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus something else of its shape."""
        return self(x).add_(other)


class Int8Product(PlainProduct):
    """Weights of 8 bits and a scale per output channel; each row of the fp32 input, too, is rounded to 8 bits.

    fbgemm's product reads its weights at the speed of memory, with VNNI's products of bytes.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weight = _joined_weight(linears).float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch moves this to torchao, which has no such product for a CPU
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.nbytes = weight.numel()
        self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = _joined_bias(linears)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.numel() == x.shape[-1]:
            out = torch.ops.quantized.linear_dynamic(x, self.weight, False)
        else:
            # The product has one scale for all rows. Each is given its own, so that it does not depend on its company.
            most = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-12)
            out = torch.ops.quantized.linear_dynamic(x / most, self.weight, False).mul_(most)
        return out if self.bias is None else out.add_(self.bias)


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


def _joined_weight(linears: Sequence[nn.Linear]) -> Tensor:
    return torch.cat([linear.weight.detach() for linear in linears])


def _joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


# -- the step ----------------------------------------------------------------------------------------------------------


class LlamaStep:
    """The forward pass of a body of the Llama kind for a few tokens of every row.

    Args:
        body: its norms and embeddings are used as they are.
        weights: of the linears.
    """

    def __init__(self, body: PreTrainedModel, weights: DecoderWeights) -> None:
        config = body.config
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        self.eps = config.rms_norm_eps
        self.embeddings: Any = body.get_input_embeddings()
        self.rotary: Any = body.rotary_emb
        layers: Any = layers_of(body)
        size = sum(m.weight.nbytes for m in layers.modules() if isinstance(m, nn.Linear))
        product: Any = Int8Product if weights == "int8" else PlainProduct
        if weights == "exact" and size <= MOST_BYTES and _is_packable(layers[0].mlp.up_proj.weight):
            product = PackedProduct
        self.dtype = torch.float32 if weights == "int8" else body.dtype  # between the products
        self.norm = _norm_weight(body.norm, self.dtype)
        self.blocks = [LlamaBlock(layer, product, self.dtype) for layer in layers]
        self.nbytes = sum(part.nbytes for block in self.blocks for part in block.products)

    @staticmethod
    def takes(
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **caches: Any,
    ) -> bool:
        """Whether it can be called with this: a few tokens of text for a `Batch` that has read something."""
        given = input_ids if input_ids is not None else inputs_embeds
        cache = _cache_of(caches)
        if given is None or cache is None or given.shape[1] > FEW or len(given) > MOST_ROWS:
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
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = self.rotary(x, position_ids)
        sin[..., : sin.shape[-1] // 2].neg_()  # with it, exchanging the halves of a head is half of its rotation
        turn = cos[:, :, None].to(self.dtype), sin[:, :, None].to(self.dtype)
        mask = self._mask(attention_mask, x, layers[0].get_seq_length())
        x = x.to(self.dtype)
        for block, layer in zip(self.blocks, layers, strict=True):
            attended = self._attended(block, self._normed(x, block.norm), turn, mask, layer)
            x = block.out.plus(attended, x)
            normed = self._normed(x, block.mlp_norm)
            x = block.down.plus(block.up.times(normed, block.gate.silu(normed)), x)
        return BaseModelOutputWithPast(last_hidden_state=self._normed(x, self.norm))

    def _mask(self, mask: Tensor | None, x: Tensor, start: int) -> Tensor | None:
        """(B or 1, 1, G * Q, T): queries of the G heads that share a key stand side by side. None: all see all."""
        width = x.shape[1]
        if mask is None and width == 1:
            return None
        if mask is None:
            places = torch.arange(start + width)
            later = places > places[start:, None]
            mask = torch.zeros(later.shape, dtype=x.dtype).masked_fill_(later, torch.finfo(x.dtype).min)[None, None]
        return mask.repeat(1, 1, self.group, 1)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _attended(
        self, block: "LlamaBlock", x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, layer: PreallocatedLayer
    ) -> Tensor:
        """What the heads make of (B, Q, d), side by side: (B, Q, H * size)."""
        rows, width, _ = x.shape
        queries, size = self.group * self.kv_heads, block.head_size
        heads = block.qkv(x).view(rows, width, -1, size)
        turned, values = heads.split((queries + self.kv_heads, self.kv_heads), dim=2)
        if block.q_norm is not None and block.k_norm is not None:
            q, k = turned.split((queries, self.kv_heads), dim=2)
            turned = torch.cat((self._normed(q, block.q_norm), self._normed(k, block.k_norm)), dim=2)
        turned = torch.addcmul(turned * turn[0], turned.roll(size // 2, -1), turn[1]).to(layer.keys.dtype)
        q, keys = turned.split((queries, self.kv_heads), dim=2)
        keys, values = layer.update(keys.transpose(1, 2), values.to(keys.dtype).transpose(1, 2))
        if width == 1:
            q = q.view(rows, self.kv_heads, self.group, size)
            out = F.scaled_dot_product_attention(q, keys, values, mask, scale=block.scale)
        else:
            q = q.view(rows, width, self.kv_heads, self.group, size).permute(0, 2, 3, 1, 4)
            q = q.reshape(rows, self.kv_heads, self.group * width, size)
            out = F.scaled_dot_product_attention(q, keys, values, mask, scale=block.scale)
            out = out.view(rows, self.kv_heads, self.group, width, size).permute(0, 3, 1, 2, 4)
        return out.reshape(rows, width, -1).to(x.dtype)


class LlamaBlock:
    """One block's products and norms.

    Args:
        layer: of transformers.
        product: kind of all its products.
        dtype: of what its norms are given.
    """

    def __init__(self, layer: Any, product: Callable[[Sequence[nn.Linear]], Any], dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = product([attention.o_proj])
        self.gate, self.up, self.down = (product([linear]) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.products = [self.qkv, self.out, self.gate, self.up, self.down]
        self.norm = _norm_weight(layer.input_layernorm, dtype)
        self.mlp_norm = _norm_weight(layer.post_attention_layernorm, dtype)
        has_norms = hasattr(attention, "q_norm")  # Qwen3
        self.q_norm = _norm_weight(attention.q_norm, dtype) if has_norms else None
        self.k_norm = _norm_weight(attention.k_norm, dtype) if has_norms else None
        self.scale, self.head_size = attention.scaling, attention.head_dim


def _cache_of(caches: dict[str, Any]) -> Any:
    """The cache, for which there are two names: see `model.backbone.cache_argument`."""
    return caches.get("cache", caches.get("past_key_values"))


def _norm_weight(norm: Any, dtype: torch.dtype) -> Tensor:
    return norm.weight.detach().to(dtype)


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
    if "fbgemm" not in torch.backends.quantized.supported_engines or not torch.cpu._is_vnni_supported():
        return "they need a processor with AVX512-VNNI"
    return None
