"""The parts of a causal LM that GMSA uses: its body, its lowest layers, its head, LoRA on its linears.

Families differ in names only. What they may be called stands in the tables below; a family with other names is one
more entry there.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gmsa.errors import BackboneError, ConfigError

# Where families keep their blocks and their final norm.
LAYER_NAMES = ("layers", "h")
NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
# W_Q, W_K and W_V, the projections that KEFT trains (paper section 3); fused ones are trained whole.
QKV_NAMES = (".q_proj.", ".k_proj.", ".v_proj.", ".qkv_proj.", ".c_attn.", ".query_key_value.", ".W_pack.")


def body_of(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM below its LM head.

    Raises:
        BackboneError: naming what the family lacks, for a family this module cannot cut.
    """
    body = causal_lm.base_model
    if body is causal_lm:
        raise BackboneError(f"{type(causal_lm).__name__} has no body below its head (no base_model); it cannot encode")
    for what, names in (("list of layers", LAYER_NAMES), ("final norm", NORM_NAMES)):
        if first_name(body, names) is None:
            raise BackboneError(
                f"{type(causal_lm).__name__} is not supported: its body has no {what} under {' or '.join(names)}"
            )
    return body


def first_name(module: nn.Module, names: Sequence[str]) -> str | None:
    """The first of some names under which a module has a child; None: there is none."""
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def name_in(body: nn.Module, names: Sequence[str]) -> str:
    """What a body calls a part that it has: `LAYER_NAMES` or `NORM_NAMES`."""
    name = first_name(body, names)
    assert name is not None  # body_of has checked
    return name


def layers_of(body: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a body."""
    return getattr(body, name_in(body, LAYER_NAMES))


def norm_name(body: nn.Module) -> str:
    """What a body calls its final norm."""
    return name_in(body, NORM_NAMES)


def take_layers(
    body: PreTrainedModel, start: int, count: int, keep_embeddings: bool, keep_norm: bool = False
) -> PreTrainedModel:
    """A copy of a body that has `count` of its layers, from number `start` on.

    Embeddings are shared with the original, not copied (or dropped, where only embedded input is ever fed). The final
    norm goes too, unless all layers are kept: the output of the lowest layers is the body's own hidden state `count`.
    With `keep_norm` the final norm is put on that state.

    Raises:
        ConfigError: the body has fewer layers than asked for.
    """
    layer_name, layers = name_in(body, LAYER_NAMES), layers_of(body)
    if start + count > len(layers):
        field = "entry_layer" if start else "encoder_layers or lsa_layers"
        raise ConfigError(f"{field} is {start + count}, but the backbone has {len(layers)} layers")
    embeddings = body.get_input_embeddings()
    try:
        setattr(body, layer_name, nn.ModuleList(layers[start : start + count]))
        taken = copy.deepcopy(body, memo={id(embeddings): embeddings})
    finally:
        setattr(body, layer_name, layers)
    taken.config = cut_config(body.config, start, count)
    for number, layer in enumerate(layers_of(taken)):  # keys and values are kept by the layer's number
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    for module in taken.modules():  # blocks keep a reference to the config of the body they came from
        if isinstance(getattr(module, "config", None), type(body.config)):
            module.config = taken.config
    if count < len(layers) and not keep_norm:
        setattr(taken, norm_name(body), nn.Identity())
    if not keep_embeddings:
        taken.set_input_embeddings(None)
    return taken


def cut_config(config: PreTrainedConfig, start: int, count: int) -> PreTrainedConfig:
    """The configuration of a body with `count` of its layers; lists with one entry per layer are cut with it."""
    cut = copy.deepcopy(config)
    layers = config.num_hidden_layers
    cut.num_hidden_layers = count
    per_layer = getattr(config, "layer_types", None)
    if isinstance(per_layer, list) and len(per_layer) == layers:
        cut.layer_types = per_layer[start : start + count]
    return cut


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The argument by which a model takes keys and values: "cache", or "past_key_values" before transformers 5.24."""
    return {_cache_name(type(model)): cache}  # type: ignore[arg-type]


@functools.cache
def _cache_name(kind: Any) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def head_logits(causal_lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The causal LM's own logits for states of its body: (N, d) -> (N, vocabulary)."""
    head = causal_lm.get_output_embeddings()
    logits = head(hidden.to(next(head.parameters()).dtype))
    # Some families scale (Cohere, Granite) or soft-cap (Gemma) their logits after the head.
    factor, divisor, cap = (
        getattr(causal_lm.config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    logits = logits * (factor or 1) / (divisor or 1)
    return (logits / cap).tanh() * cap if cap else logits


def add_lora(body: PreTrainedModel, lora: dict[str, Any]) -> None:
    """Put peft LoRA on the linears of a body's layers, in place.

    Args:
        body: see `body_of`.
        lora: {"r", "alpha"} and, if wanted, "dropout" and "targets" (names of the linears; None: all of them).

    Raises:
        BackboneError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BackboneError("LoRA needs peft: pip install 'gmsa[train]'") from error
    layers = layers_of(body)
    targets = lora.get("targets") or sorted({n.rsplit(".", 1)[-1] for n, m in layers.named_modules() if _is_linear(m)})
    dropout = lora.get("dropout", 0.0)
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=dropout, target_modules=targets)
    inject_adapter_in_model(config, body)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@contextlib.contextmanager
def holding(things: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Within, an attribute of each of these has this value."""
    before = [getattr(thing, name) for thing in things]
    for thing in things:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, own in zip(things, before, strict=True):
            setattr(thing, name, own)
