"""What Gemma 2, 3 and 4 share: four norms around attention and MLP, a scaled embedding, GELU."""

from __future__ import annotations

from conversion_lib.families.common import linear
from conversion_lib.mapping.rules import OpsOf, Rule
from conversion_lib.plan.ops import Op
from conversion_lib.plan.value_ops import Resize, ScaleEmbedding, Shift
from conversion_lib.sources.joined import Dims


def plus_one(dims: Dims) -> tuple[Op, ...]:
    """Returns the ops of a norm that multiplies by 1 + weight in transformers, and by its scale in MaxText."""
    return (Shift(1),)


def norm(hf: str, maxtext: str, size: str, *, from_zero: bool) -> Rule:
    """Returns the rule of a norm.

    Args:
        hf: The norm's name, without `.weight`.
        maxtext: The norm's path in MaxText, without `/scale`.
        size: The name of the dim.
        from_zero: Whether the checkpoint has scale - 1. MaxText adds the 1 in float32.
    """
    if from_zero:
        return Rule(f"{hf}.weight", f"{maxtext}/scale", (size,), plus_one, always_float32=True)
    return Rule(f"{hf}.weight", f"{maxtext}/scale", (size,))


def embedding(factor_dtype: str) -> OpsOf:
    """Returns the ops of the embedding: MaxText's number of rows, times sqrt(hidden).

    Args:
        factor_dtype: The dtype that the factor is rounded to: `bfloat16` or `float32`.
    """

    def ops(dims: Dims) -> tuple[Op, ...]:
        vocab, rows = dims["vocab"], dims["maxtext_vocab"]
        resize = (Resize(0, vocab, rows),) if rows != vocab else ()
        return *resize, ScaleEmbedding(dims["hidden"], "bfloat16" if factor_dtype == "bfloat16" else "float32")

    return ops


def norms(suffix: str = "", *, from_zero: bool) -> tuple[Rule, ...]:
    """Returns the rules of a layer's four norms.

    Args:
        suffix: The end of their names in MaxText.
        from_zero: As for `norm`.
    """
    names = {
        "input_layernorm": "pre_self_attention_norm",
        "post_attention_layernorm": "post_self_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    return tuple(norm(hf, f"{to}{suffix}", "hidden", from_zero=from_zero) for hf, to in names.items())


def mlp(name: str, size: str = "mlp", when: str | None = None) -> tuple[Rule, ...]:
    """Returns the rules of the dense MLP.

    Args:
        name: Its path in MaxText.
        size: The name of the dim of its intermediate size.
        when: The condition of the rules, as in Rule.
    """
    return (
        Rule("mlp.gate_proj.weight", f"{name}/wi_0/kernel", (size, "hidden"), linear, when=when),
        Rule("mlp.up_proj.weight", f"{name}/wi_1/kernel", (size, "hidden"), linear, when=when),
        Rule("mlp.down_proj.weight", f"{name}/wo/kernel", ("hidden", size), linear, when=when),
    )
