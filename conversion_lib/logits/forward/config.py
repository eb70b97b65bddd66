"""What the forward pass needs to know of a model, layer by layer. Data only; `architectures` reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `dim` rotated dimensions; `values` holds the keys of the scaling's kind."""

    kind: str
    dim: int
    theta: float
    pairs: bool
    """True where the checkpoint holds the two halves of a rotation side by side, (0, 1), (2, 3), ...;
    False where dimension i turns with i + dim / 2."""
    values: Mapping[str, Any] = field(compare=False)


@dataclass(frozen=True, slots=True)
class GroupedQuery:
    """Grouped-query attention (arXiv:2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float
    """On the scores at run time; 1 where the checkpoint's query kernel carries it."""
    norms: Literal["none", "head", "all_heads"] = "none"
    """RMSNorm of query and key: none, over each head's dimensions, or over those of all heads together."""
    norm_offset: float = 0.0
    """As `ForwardConfig` has it, of these norms."""
    value_norm: bool = False
    """RMSNorm without a scale over each value head."""
    keys: Literal["own", "as_values", "earlier"] = "own"
    """Own keys and values; one projection that is both; or those of the layer `keys_from`."""
    keys_from: int | None = None
    gated: bool = False
    """A gate follows each head's query in the query kernel; its sigmoid multiplies what the head puts out. The output
    kernel then has heads and their dimensions on one axis."""
    biases: bool = False
    """Of query, key and value."""
    out_bias: bool = False
    sinks: bool = False
    window: int | None = None
    """How many tokens, itself included, a token looks at; None for all before it."""
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Indexer:
    """The indexer of DeepSeek sparse attention (DeepSeek-V3.2 report, section 2.1)."""

    heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1)."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeConfig
    scale: float
    indexer: Indexer | None = None


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """A gated delta net (arXiv:2412.06464): attention that is linear in the tokens. `taps`: of its convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def convolved(self) -> int:
        """Channels that are convolved: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


Attention = GroupedQuery | Latent | DeltaNet


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP at `path`."""

    path: str
    width: int
    activation: Literal["silu", "gelu"]


@dataclass(frozen=True, slots=True)
class ExpertNorms:
    """Gemma 4's paths of what its router and its experts have of their own, since both look at the stream itself:
    the scale on the router's normed input, the norm before the experts, those after shared and routed experts."""

    router_scale: str
    before_experts: str
    after_shared: str
    after_experts: str


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts at `path`, and at `shared` one that every token goes to, where there is one."""

    path: str
    experts: int
    per_token: int
    width: int
    scores: Literal["sigmoid", "softmax", "chosen_softmax"]
    """How logits become shares: DeepSeek-V3's sigmoid, a softmax over all experts, or one over the chosen."""
    correction_bias: bool = False
    """A bias, `gate/bias`, that takes part in the choice only."""
    normalize: bool = False
    """Whether the chosen experts' shares are divided by their sum."""
    scaling: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: int = 1
    """Of a group, how many of its best experts are summed to tell its rank."""
    biases: bool = False
    """Of the gate and of every expert."""
    clamp: float | None = None
    """gpt-oss' SwiGLU: limits on gate and up, and up + 1."""
    activation: Literal["silu", "gelu"] = "silu"
    shared: Mlp | None = None
    shared_gate: str | None = None
    """Where a projection to one number is whose sigmoid multiplies what the shared expert puts out."""
    norms: ExpertNorms | None = None
    expert_scales: bool = False
    """A factor on each expert's share, `per_expert_scale`."""


@dataclass(frozen=True, slots=True)
class Norms:
    """Paths of a layer's RMSNorms; None where the family has none at that place."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


@dataclass(frozen=True, slots=True)
class LayerPath:
    """Where a layer lies below `decoder/`.

    stack, index, counts: of a scanned checkpoint, the path, the layer's index in the stacked axes, and those axes'
    lengths; both are empty for a layer left over from the scan, which is not stacked. alone: the path of an
    unscanned checkpoint.
    """

    stack: str
    index: tuple[int, ...]
    counts: tuple[int, ...]
    alone: str


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    path: LayerPath
    norms: Norms
    attention_path: str
    attention: Attention
    feed_forward: Mlp | Moe


@dataclass(frozen=True, slots=True)
class PerLayerInput:
    """Gemma 4's small models: a second embedding, of `width` for each layer, which joins the stream behind its MLP."""

    width: int
    activation: Literal["silu", "gelu"]


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """Sizes and switches of one model."""

    family: str
    hidden: int
    vocab: int
    eps: float
    tied: bool
    max_positions: int
    layers: tuple[Layer, ...]
    embedding_scale: float = 1.0
    """What the checkpoint's embedding was multiplied by; a tied output divides by it."""
    softcap: float | None = None
    """Of the logits."""
    norm_offset: float = 0.0
    """Of the norms of layers and the last one: what is added to a scale; 1 where checkpoints have it less one."""
    layer_scalars: bool = False
    """Whether each layer ends with a factor on the stream."""
    per_layer_input: PerLayerInput | None = None
    rows: int = 0
    """Of the checkpoint's embedding, where MaxText pads or cuts the vocabulary; 0 for `vocab`."""
    rounded: tuple[str, ...] = ()
    """Leaves, by the end of their path, that MaxText holds in other values than the source: saved in bfloat16 they
    are rounded once more than the source was."""

    @property
    def tokens(self) -> int:
        """Ids that both the model and the checkpoint have."""
        return min(self.vocab, self.rows or self.vocab)

    @property
    def experts(self) -> int:
        """Routed experts over all layers."""
        return sum(layer.feed_forward.experts for layer in self.layers if isinstance(layer.feed_forward, Moe))

    @property
    def heads(self) -> int:
        """Of the attention that makes scores of each token for each: the most of a layer, 0 where there is none."""
        return max((a.heads for layer in self.layers if not isinstance(a := layer.attention, DeltaNet)), default=0)


def differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """What differs between two configs of this module, `name a against b` each, the outermost name first."""
    if is_dataclass(a) and type(a) is type(b):
        for item in fields(a):
            if item.compare:
                yield from differences(getattr(a, item.name), getattr(b, item.name), f"{name} {item.name}".strip())
    elif isinstance(a, tuple) and isinstance(b, tuple) and a and b and is_dataclass(a[0]):
        if len(a) != len(b):
            yield f"{name} {len(a)} against {len(b)}"
        else:
            first = next((index for index, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
            if first is not None:
                yield from differences(a[first], b[first], f"layer {first}:")
    elif a != b:
        yield f"{name} {a!r} against {b!r}"
