"""What readers of a `config.json` share.

Both of transformers' spellings are taken: `rope_parameters` (5.x), or `rope_theta` with `rope_scaling` (what most
files on the Hub have). Where a key is missing, the default is that of transformers' class.
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
"""The smallest default of `max_position_embeddings` in transformers' classes: longer prompts are cut to it."""

LAYER_NORMS = Norms("pre_self_attention_layer_norm/scale", None, "post_self_attention_layer_norm/scale", None)
QUERY = "query/kernel"
"""The end of its path."""

Raw = Mapping[str, Any]
Readers = Mapping[str, Callable[[Raw], ForwardConfig]]
"""By the `model_type` of config.json."""


def refuse_switches(raw: Raw, *keys: str) -> None:
    """Raises BadInput where one of `keys` is on: settings of the class that the forward pass does not have."""
    for key in keys:
        if raw.get(key):
            raise BadInput(f"config.json: {key} is on, which the logit check does not have")


def require_activation(raw: Raw, *names: str, key: str = "hidden_act") -> None:
    """Raises BadInput where the MLP's activation is none of `names`, the first of which is the default."""
    if raw.get(key, names[0]) not in names:
        raise BadInput(f"config.json: {key} {raw[key]!r}, where the logit check has only {names[0]!r}")


def integer(raw: Raw, key: str, default: int | None = None) -> int:
    """The positive integer under `key`. Raises BadInput where it is something else."""
    value = raw.get(key) if raw.get(key) is not None else default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"config.json: {key} should be a positive integer, not {value!r}")
    return value


def model(raw: Raw, layers: tuple[Layer, ...], *, eps: float = 1e-6, tied: bool = False, **more: Any) -> ForwardConfig:
    """What every family has. eps, tied: the defaults of the family's class."""
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
    """RoPE of heads of `dim` dimensions.

    values: its parameters, by default those of the whole model. partial: the share of the dimensions that turns, where
    nothing is said; 1 for a class that has no such share. Gemma 4's `proportional` turns all, most by nothing.
    """
    if values is None:
        values = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    values = dict(values)
    kind = str(values.get("rope_type") or values.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise BadInput(f"config.json: RoPE scaling {kind!r}; the logit check has {', '.join(ROPE_KINDS)}")
    share = values.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or partial
    if kind != "proportional" and share != 1.0:
        if partial == 1.0:
            raise BadInput(f"config.json: partial_rotary_factor {share}, which the logit check does not have")
        dim = int(dim * share)
    positions = integer(raw, "max_position_embeddings", FEWEST_POSITIONS)
    values.setdefault("original_max_position_embeddings", positions)
    if values.get("factor") is None:
        values["factor"] = positions / values["original_max_position_embeddings"]
    theta = float(values.get("rope_theta") or raw.get("rope_theta") or DEFAULT_THETA)
    return RopeConfig(kind, dim, theta, pairs, values)


def grouped_query(raw: Raw, *, head_dim: int | None = None, pairs: bool = False, **more: Any) -> GroupedQuery:
    """Grouped-query attention; head_dim: the class's own default, None for hidden / heads."""
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
    """A SwiGLU (arXiv:2002.05202)."""
    require_activation(raw, "silu")
    return Mlp(path, integer(raw, width), "silu")


def one_stack(raw: Raw, attention: GroupedQuery, feed_forward: Mlp | Moe) -> tuple[Layer, ...]:
    """All layers alike, in one scan."""
    count = integer(raw, "num_hidden_layers")
    return tuple(
        Layer(
            LayerPath("layers", (n,), (count,), f"layers_{n}"), LAYER_NORMS, "self_attention", attention, feed_forward
        )
        for n in range(count)
    )


def is_power_of_two_root(number: int) -> bool:
    """Whether sqrt(number) is a power of two: multiplying by it rounds nothing."""
    return number & (number - 1) == 0 and number.bit_length() % 2 == 1


def kinds_of_layers(raw: Raw, cycle: Sequence[str]) -> tuple[str, ...]:
    """config.json's `layer_types`, or `cycle` over and over where it has none."""
    count = integer(raw, "num_hidden_layers")
    kinds = raw.get("layer_types") or [cycle[n % len(cycle)] for n in range(count)]
    if len(kinds) != count or set(kinds) - set(cycle):
        raise BadInput(
            f"config.json: layer_types {kinds!r}, where the logit check has {count} of {', '.join(set(cycle))}"
        )
    return tuple(kinds)


def rope_by_kind(raw: Raw, kind: str, dim: int, *, local_theta: float, theta: float) -> RopeConfig:
    """RoPE of a model whose sliding and full attention may have their own; only the full one is scaled."""
    values = raw.get("rope_parameters") or {}
    if kind in values:
        return rope(raw, dim, pairs=False, values={"rope_theta": theta} | values[kind])
    if kind == "sliding_attention":
        return rope(raw, dim, pairs=False, values={"rope_theta": local_theta})
    scaling = raw.get("rope_scaling") or values
    return rope(raw, dim, pairs=False, values={"rope_theta": raw.get("rope_theta") or theta} | scaling)


def cycle_path(n: int, cycle: int, count: int, stack: str = "layers/layers_{}") -> LayerPath:
    """Layer `n` of a scan over whole cycles of layers; those left over come after it, one by one."""
    whole = count // cycle * cycle
    if n >= whole:
        return LayerPath(f"layers_remainder/layers_{n - whole}", (), (), f"layers_{n}")
    return LayerPath(stack.format(n % cycle), (n // cycle,), (whole // cycle,), f"layers_{n}")
