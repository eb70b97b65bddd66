"""What the readers of a `config.json` share.

Both spellings of transformers are read: `rope_parameters` (5.x), and `rope_theta` with `rope_scaling` (in most files on
the Hub). Where a key is missing, the default is that of transformers' class.
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

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "proportional")
DEFAULT_THETA = 10000.0
FEWEST_POSITIONS = 2048
"""The smallest default of `max_position_embeddings` in transformers' classes. Prompts are cut to it without the key."""

LAYER_NORMS = Norms("pre_self_attention_layer_norm/scale", None, "post_self_attention_layer_norm/scale", None)
QUERY = "query/kernel"
"""End of the path of a query kernel."""

Raw = Mapping[str, Any]
"""The contents of a config.json."""
Readers = Mapping[str, Callable[[Raw], ForwardConfig]]
"""Readers by the `model_type` of config.json. Each raises BadInput for settings that the forward pass does not have."""


def refuse_switches(raw: Raw, *keys: str) -> None:
    """Refuses settings of transformers' class that the forward pass does not have.

    Raises:
        BadInput: One of `keys` is on.
    """
    for key in keys:
        if raw.get(key):
            raise BadInput(f"config.json: {key} is on, which the logit check does not support")


def require_activation(raw: Raw, *names: str, key: str = "hidden_act") -> None:
    """Checks the activation of the MLP.

    Args:
        raw: The contents of a config.json.
        names: The allowed ones; the first is the default.
        key: The key that names the activation.

    Raises:
        BadInput: It is another one.
    """
    if raw.get(key, names[0]) not in names:
        raise BadInput(f"config.json: {key} {raw[key]!r}; the logit check supports only {names[0]!r}")


def integer(raw: Raw, key: str, default: int | None = None) -> int:
    """Returns the positive integer under `key`, or `default` where the key is missing or null.

    Raises:
        BadInput: There is no value, or it is not a positive integer.
    """
    value = raw.get(key) if raw.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"config.json: {key} should be a positive integer, not {value!r}")
    return value


def model(raw: Raw, layers: tuple[Layer, ...], *, eps: float = 1e-6, tied: bool = False, **more: Any) -> ForwardConfig:
    """Makes the ForwardConfig of a model from the keys that all families have.

    Args:
        raw: The contents of a config.json.
        layers: The decoder layers.
        eps: Default of `rms_norm_eps` in the family's class.
        tied: Default of `tie_word_embeddings` in the family's class.
        more: Other fields of ForwardConfig.

    Raises:
        BadInput: A size is not a positive integer.
    """
    return ForwardConfig(
        family=str(raw["model_type"]),
        hidden=integer(raw, "hidden_size"),
        vocab=integer(raw, "vocab_size"),
        eps=float(raw.get("rms_norm_eps", eps)),
        tied=bool(raw.get("tie_word_embeddings", tied)),
        max_positions=integer(raw, "max_position_embeddings", FEWEST_POSITIONS),
        layers=layers,
        **more,
    )


def rope(
    raw: Raw, dim: int, *, pairs: bool, values: Mapping[str, Any] | None = None, partial: float = 1.0
) -> RopeConfig:
    """Reads the RoPE of a model, or of one kind of its layers.

    Args:
        raw: The contents of a config.json.
        dim: Dimensions of a head.
        pairs: Layout of rotated dimensions in the checkpoint, as in RopeConfig.
        values: Parameters of RoPE. None: those of the whole model.
        partial: Default of `partial_rotary_factor`, the share of dimensions that are rotated; 1 for a class without
            that key. Gemma 4's `proportional` rotates all dimensions, most of them by an angle of 0.

    Raises:
        BadInput: The scaling or a partial rotation is not supported.
    """
    if values is None:
        values = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    values = dict(values)
    kind = str(values.get("rope_type") or values.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise BadInput(f"config.json: RoPE scaling {kind!r}; the logit check supports {', '.join(ROPE_KINDS)}")
    share = values.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or partial
    if kind != "proportional" and share != 1.0:
        if partial == 1.0:
            raise BadInput(
                f"config.json: partial_rotary_factor {share}; the logit check supports only 1 for this architecture"
            )
        dim = int(dim * share)
    positions = integer(raw, "max_position_embeddings", FEWEST_POSITIONS)
    values.setdefault("original_max_position_embeddings", positions)
    if values.get("factor") is None:
        values["factor"] = positions / values["original_max_position_embeddings"]
    theta = float(values.get("rope_theta") or raw.get("rope_theta") or DEFAULT_THETA)
    return RopeConfig(kind, dim, theta, pairs, values)


def grouped_query(raw: Raw, *, head_dim: int | None = None, pairs: bool = False, **more: Any) -> GroupedQuery:
    """Reads grouped-query attention.

    Args:
        raw: The contents of a config.json.
        head_dim: Default of `head_dim` in the family's class. None: hidden_size / num_attention_heads.
        pairs: Layout of rotated dimensions in the checkpoint, as in RopeConfig.
        more: Other fields of GroupedQuery, or `rope` or `scale` in place of the usual ones.

    Raises:
        BadInput: A size is not a positive integer, or RoPE is not supported.
    """
    heads = integer(raw, "num_attention_heads")
    dim = integer(raw, "head_dim", head_dim or integer(raw, "hidden_size") // heads)
    return GroupedQuery(
        heads=heads,
        kv_heads=integer(raw, "num_key_value_heads", heads),
        head_dim=dim,
        rope=more.pop("rope", None) or rope(raw, dim, pairs=pairs),
        scale=more.pop("scale", dim**-0.5),
        **more,
    )


def mlp(raw: Raw, path: str = "mlp", *, width: str = "intermediate_size") -> Mlp:
    """Reads a SwiGLU (arXiv:2002.05202). `path`: below the layer; `width`: the key of its inner size.

    Raises:
        BadInput: The activation is not SiLU, or the width not a positive integer.
    """
    require_activation(raw, "silu")
    return Mlp(path, integer(raw, width), "silu")


def one_stack(raw: Raw, attention: GroupedQuery, feed_forward: Mlp | Moe) -> tuple[Layer, ...]:
    """Makes `num_hidden_layers` equal layers, scanned as one stack."""
    count = integer(raw, "num_hidden_layers")
    return tuple(
        Layer(
            LayerPath("layers", (n,), (count,), f"layers_{n}"), LAYER_NORMS, "self_attention", attention, feed_forward
        )
        for n in range(count)
    )


def is_power_of_two_root(number: int) -> bool:
    """Returns whether sqrt(number) is a power of two, so that multiplying by it rounds nothing."""
    return number & (number - 1) == 0 and number.bit_length() % 2 == 1


def kinds_of_layers(raw: Raw, cycle: Sequence[str]) -> tuple[str, ...]:
    """Returns the kind of each layer: `layer_types` of config.json, or else `cycle` repeated.

    Raises:
        BadInput: `layer_types` has another length than the model, or a kind that is not in `cycle`.
    """
    count = integer(raw, "num_hidden_layers")
    kinds = raw.get("layer_types") or [cycle[n % len(cycle)] for n in range(count)]
    if len(kinds) != count or set(kinds) - set(cycle):
        raise BadInput(
            f"config.json: layer_types {kinds!r}; the logit check expects {count} of {', '.join(set(cycle))}"
        )
    return tuple(kinds)


def rope_by_kind(raw: Raw, kind: str, dim: int, *, local_theta: float, theta: float) -> RopeConfig:
    """Reads the RoPE of one kind of layer, in a model whose sliding and full attention may differ.

    Args:
        raw: The contents of a config.json.
        kind: `sliding_attention` or `full_attention`.
        dim: Dimensions of a head.
        local_theta: Default of `rope_theta` in sliding attention, which is not scaled.
        theta: Default of `rope_theta` in full attention.

    Raises:
        BadInput: The scaling is not supported.
    """
    values = raw.get("rope_parameters") or {}
    if kind in values:
        return rope(raw, dim, pairs=False, values={"rope_theta": theta} | values[kind])
    if kind == "sliding_attention":
        return rope(raw, dim, pairs=False, values={"rope_theta": local_theta})
    scaling = raw.get("rope_scaling") or values
    return rope(raw, dim, pairs=False, values={"rope_theta": raw.get("rope_theta") or theta} | scaling)


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
