"""What the readers of a `config.json` share.

Values come from `ModelConfig`, which knows all spellings and the defaults of transformers' classes. Both spellings of
RoPE are read: `rope_parameters` (5.x), and `rope_theta` with `rope_scaling` (in most files on the Hub).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.config import (
    ForwardConfig,
    GroupedQuery,
    Layer,
    LayerPath,
    Mlp,
    Moe,
    Norms,
    RopeConfig,
)
from conversion_lib.models.class_defaults import known_as
from conversion_lib.models.hf_config import ModelConfig, Values, shown

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "proportional")
HAS = ", ".join(ROPE_KINDS)

LAYER_NORMS = Norms("pre_self_attention_layer_norm/scale", None, "post_self_attention_layer_norm/scale", None)
QUERY = "query/kernel"
"""End of the path of a query kernel."""

SLIDING, FULL = "sliding_attention", "full_attention"

Readers = Mapping[str, Callable[[ModelConfig], ForwardConfig]]
"""Readers by the `model_type` of config.json. Each raises BadInput for settings that the forward pass does not have."""


def refuse_switches(config: ModelConfig, *keys: str) -> None:
    """Refuses settings of transformers' class that the forward pass does not have.

    Raises:
        BadInput: One of `keys` is on.
    """
    for key in keys:
        if config.flag(key):
            raise BadInput(f"{config.path}: {key} is on, which the logit check does not support")


def require_activation(config: ModelConfig, name: str, key: str = "hidden_act") -> None:
    """Checks the activation of the MLP, under `key`.

    Raises:
        BadInput: It is not `name`.
    """
    if config.text(key) != name:
        raise BadInput(f"{config.path}: {key} {shown(config.get(key))}; the logit check supports only {name!r}")


def model(config: ModelConfig, layers: tuple[Layer, ...], *, tied: bool | None = None, **more: Any) -> ForwardConfig:
    """Makes the ForwardConfig of a model from the keys that all families have.

    Args:
        config: The config.json.
        layers: The decoder layers.
        tied: Whether the output is the embedding. None: config.json says it.
        more: Other fields of ForwardConfig.

    Raises:
        BadInput: A value is not of its type.
    """
    return ForwardConfig(
        family=known_as(config.model_type),
        hidden=config.count("hidden_size"),
        vocab=config.count("vocab_size"),
        eps=config.number("rms_norm_eps", least=0),
        tied=config.flag("tie_word_embeddings") if tied is None else tied,
        max_positions=config.count("max_position_embeddings"),
        layers=layers,
        **more,
    )


def rope(config: ModelConfig, dim: int, *, pairs: bool, takes_share: bool = False) -> RopeConfig:
    """Reads the RoPE of a model whose layers all have the same.

    Args:
        config: The config.json.
        dim: Dimensions of a head.
        pairs: Layout of rotated dimensions in the checkpoint, as in RopeConfig.
        takes_share: Whether the class has `partial_rotary_factor`, the share of dimensions that are rotated.

    Raises:
        BadInput: The scaling or a partial rotation is not supported.
    """
    values = _given(config, "rope_scaling") or _given(config, "rope_parameters") or Values({}, config.path)
    for key in (SLIDING, FULL):
        if values.get(key) is not None:
            raise BadInput(f"{config.path}: RoPE for {key} alone; the logit check supports one for all layers")
    theta = config.number("rope_theta", above=1) if values.get("rope_theta") is None else None
    share = config.number("partial_rotary_factor", default=1.0, above=0, most=1)
    share = values.number("partial_rotary_factor", default=share, above=0, most=1)
    if _kind(values) != "proportional" and share != 1.0:
        if not takes_share:
            raise BadInput(f"{config.path}: partial_rotary_factor {share:g}, which the logit check does not support")
        dim = int(dim * share)
    original = config.optional_count("original_max_position_embeddings")
    return rope_of(values, config, dim, pairs=pairs, theta=theta, original=original)


def rope_by_kind(config: ModelConfig, kind: str, dim: int, *, theta: float | None) -> RopeConfig:
    """Reads the RoPE of one kind of layers. Older files scale only that of full attention.

    Args:
        config: The config.json.
        kind: Sliding or full attention.
        dim: Dimensions of a head.
        theta: The default for this kind of layers. None: `rope_parameters` has to give it.

    Raises:
        BadInput: The scaling is not supported, or a value is missing.
    """
    nested = _given(config, "rope_parameters")
    own = nested.section(kind) if nested else None
    if nested and own is None and nested.section(FULL if kind == SLIDING else SLIDING) is None:
        raise BadInput(f"{config.path}: rope_parameters has neither {SLIDING} nor {FULL}, one of which it should have")
    if own is None and theta is None:
        raise BadInput(f"{config.path}: rope_parameters has no {kind}, which this architecture needs")
    values = own or Values({}, config.path)
    scaling = _given(config, "rope_scaling") if kind == FULL else None
    return rope_of(values if scaling is None else scaling.over(values), config, dim, pairs=False, theta=theta)


def rope_of(
    values: Values, config: ModelConfig, dim: int, *, pairs: bool, theta: float | None, original: int | None = None
) -> RopeConfig:
    """Makes the RopeConfig of given parameters.

    Args:
        values: The parameters.
        config: The config.json.
        dim: Dimensions that are rotated.
        pairs: Layout of rotated dimensions in the checkpoint, as in RopeConfig.
        theta: Default of `rope_theta`. None: `values` has to give it.
        original: Positions that the model was trained with, instead of the parameters' own.

    Raises:
        BadInput: The scaling is not supported, or a value is missing.
    """
    kind = _kind(values)
    if kind not in ROPE_KINDS:
        key = values.label("rope_type" if values.get("rope_type") is not None else "type")
        raise BadInput(f"{config.path}: {key} asks for RoPE scaling {shown(kind)}; the logit check supports {HAS}")
    if dim < 2 or dim % 2:
        raise BadInput(
            f"{config.path}: RoPE would turn {dim} dimensions of a head, and it turns them in pairs: head_dim, or "
            "hidden_size over num_attention_heads, should be even"
        )
    theta = values.number("rope_theta", default=theta, above=1)
    scaling = _scaling(kind, values, config.count("max_position_embeddings"), original)
    return RopeConfig(kind, dim, theta, pairs, scaling)


def _kind(values: Values) -> str:
    """Returns the kind of scaling, under either name."""
    return values.text("rope_type", default=values.text("type", default="default"))


def _scaling(kind: str, values: Values, positions: int, original: int | None) -> dict[str, Any]:
    """Returns the parameters of a kind of scaling, as `rope.py` reads them."""
    if kind == "default":
        return {}
    found: dict[str, Any] = {}
    if kind == "proportional":
        found["partial_rotary_factor"] = values.number("partial_rotary_factor", default=1.0, least=0, most=1)
        found["factor"] = values.number("factor", default=1.0, above=0)
    if kind in ("llama3", "yarn"):
        trained = original or values.count("original_max_position_embeddings", default=positions)
        found["original_max_position_embeddings"] = trained
        found["factor"] = values.number("factor", default=positions / trained if kind == "yarn" else None, above=0)
    if kind == "linear":
        found["factor"] = values.number("factor", above=0)
    if kind == "llama3":
        found["low_freq_factor"] = values.number("low_freq_factor", above=0)
        found["high_freq_factor"] = values.number("high_freq_factor", above=found["low_freq_factor"])
    if kind == "yarn":
        found["beta_fast"] = values.number("beta_fast", default=32.0, least=0) or 32.0
        found["beta_slow"] = values.number("beta_slow", default=1.0, least=0) or 1.0
        found["truncate"] = values.flag("truncate", default=True)
        found["attention_factor"] = values.optional_number("attention_factor", least=0)
        found["mscale"] = values.optional_number("mscale", least=0)
    found["mscale_all_dim"] = values.optional_number("mscale_all_dim", least=0)
    return {key: value for key, value in found.items() if value is not None}


def _given(config: ModelConfig, key: str) -> Values | None:
    """Returns the object under `key`; None if it is missing or empty."""
    values = config.section(key)
    return None if values is None or values.empty else values


def grouped_query(config: ModelConfig, *, pairs: bool = False, **more: Any) -> GroupedQuery:
    """Reads grouped-query attention.

    Args:
        config: The config.json.
        pairs: Layout of rotated dimensions in the checkpoint, as in RopeConfig.
        more: Other fields of GroupedQuery, or some instead of the usual ones.

    Raises:
        BadInput: A size is not a positive integer, sizes do not fit, or RoPE is not supported.
    """
    heads, dim = config.count("num_attention_heads"), head_dim(config)
    kv_heads = more.pop("kv_heads", None) or config.optional_count("num_key_value_heads") or heads
    if heads % kv_heads:
        raise BadInput(
            f"{config.path}: num_attention_heads {heads} should be a multiple of num_key_value_heads {kv_heads}"
        )
    dim = more.pop("head_dim", dim)
    return GroupedQuery(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        rope=more.pop("rope", None) or rope(config, dim, pairs=pairs),
        scale=more.pop("scale", dim**-0.5),
        **more,
    )


def head_dim(config: ModelConfig) -> int:
    """Returns the dimensions of a head: `head_dim`, or hidden_size / num_attention_heads."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    dim = config.optional_count("head_dim") or hidden // heads
    if not dim:
        raise BadInput(f"{config.path}: hidden_size {hidden} is less than num_attention_heads {heads}")
    return dim


def sliding_window(config: ModelConfig, kind: str) -> int | None:
    """Returns how many tokens a layer of that kind attends to; None: all before."""
    if kind != SLIDING:
        return None
    if (window := config.optional_count("sliding_window")) is None:
        raise BadInput(f"{config.path}: sliding_window is null, and layer_types has {SLIDING}")
    return window


def experts_per_token(config: ModelConfig, experts: int, key: str = "num_experts_per_tok") -> int:
    """Returns how many experts a token goes to. Raises BadInput if there are fewer."""
    if (per_token := config.count(key)) > experts:
        raise BadInput(f"{config.path}: {key} {per_token} is more than the {experts} experts that there are")
    return per_token


def mlp(config: ModelConfig, path: str = "mlp", *, width: str = "intermediate_size") -> Mlp:
    """Reads a SwiGLU (arXiv:2002.05202). `path`: below the layer; `width`: the key of its inner size.

    Raises:
        BadInput: The activation is not SiLU, or the width not a positive integer.
    """
    require_activation(config, "silu")
    return Mlp(path, config.count(width), "silu")


def one_stack(config: ModelConfig, attention: GroupedQuery, feed_forward: Mlp | Moe) -> tuple[Layer, ...]:
    """Makes `num_hidden_layers` equal layers, scanned as one stack."""
    count = config.count("num_hidden_layers")
    return tuple(
        Layer(
            LayerPath("layers", (n,), (count,), f"layers_{n}"), LAYER_NORMS, "self_attention", attention, feed_forward
        )
        for n in range(count)
    )


def is_power_of_two_root(number: int) -> bool:
    """Returns whether sqrt(number) is a power of two, so that multiplying by it rounds nothing."""
    return number & (number - 1) == 0 and number.bit_length() % 2 == 1


def kinds_of_layers(config: ModelConfig, cycle: Sequence[str]) -> tuple[str, ...]:
    """Returns the kind of each layer: `layer_types` of config.json, or else `cycle` repeated.

    Raises:
        BadInput: `layer_types` has another length than the model, or a kind that is not in `cycle`.
    """
    kinds = config.texts("layer_types", "num_hidden_layers")
    if kinds is None:
        return tuple(cycle[n % len(cycle)] for n in range(config.count("num_hidden_layers")))
    if unknown := set(kinds) - set(cycle):
        known = ", ".join(dict.fromkeys(cycle))
        raise BadInput(f"{config.path}: layer_types has {shown(min(unknown))}; the logit check supports {known}")
    return kinds


def cycle_path(n: int, cycle: int, count: int, stack: str = "layers/layers_{}") -> LayerPath:
    """Returns the path of a layer in a model that is scanned over cycles of layers.

    Args:
        n: The layer.
        cycle: Layers in a cycle.
        count: Layers in the model. Those after the last whole cycle are not scanned.
        stack: Path of one position of the cycle, with `{}` for its number.
    """
    whole = count // cycle * cycle
    if n >= whole:
        return LayerPath(f"layers_remainder/layers_{n - whole}", (), (), f"layers_{n}")
    return LayerPath(stack.format(n % cycle), (n // cycle,), (whole // cycle,), f"layers_{n}")
