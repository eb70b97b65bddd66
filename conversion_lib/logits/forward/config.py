"""What the forward pass needs to know about a model, layer by layer. Data only; `architectures` fills it in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) of one kind of layer.

    Attributes:
        kind: default, linear, llama3, yarn or proportional: `rope_type` of config.json.
        dim: Dimensions of a head that are rotated.
        values: The keys of config.json that this kind of scaling needs, such as `factor`.
    """

    kind: str
    dim: int
    theta: float
    pairs: bool
    """True: the checkpoint stores the two dimensions of a rotation side by side, (0, 1), (2, 3), ...;
    False: dimension i is rotated with i + dim / 2."""
    values: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True)
class GroupedQuery:
    """Grouped-query attention (arXiv:2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float
    """Factor on the attention scores; 1 where the checkpoint's query kernel contains it."""
    norms: Literal["none", "head", "all_heads"] = "none"
    """RMSNorm of query and key: none, over the dimensions of each head, or over those of all heads together."""
    norm_offset: float = 0.0
    """As `ForwardConfig.norm_offset`, for these norms."""
    value_norm: bool = False
    """Whether each value head gets an RMSNorm without a scale."""
    keys: Literal["own", "as_values", "earlier"] = "own"
    """Its own keys and values; one projection for both; or those of the earlier layer `keys_from`."""
    keys_from: int | None = None
    gated: bool = False
    """Whether the query kernel holds a gate after each head's query. The gate's sigmoid multiplies the head's output.
    The output kernel then has heads and their dimensions on one axis."""
    biases: bool = False
    """Whether query, key and value have a bias."""
    out_bias: bool = False
    sinks: bool = False
    """Whether each head has one more score, which takes part in the softmax only."""
    window: int | None = None
    """How many tokens, itself included, a token attends to. None: all before it."""
    softcap: float | None = None
    """Scores become softcap · tanh(score / softcap). None: they stay as they are."""


@dataclass(frozen=True, slots=True)
class Indexer:
    """The indexer of DeepSeek sparse attention (DeepSeek-V3.2 report, section 2.1): `top_k` tokens for each query."""

    heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1).

    Attributes:
        q_rank: Rank of the compressed query. None: the query is not compressed.
        kv_rank: Rank of the compressed keys and values.
        nope_dim: Dimensions of a query or key head without RoPE; `rope.dim` more have it.
        value_dim: Dimensions of a value head.
        scale: Factor on the attention scores.
        indexer: None: each query attends to all tokens before it.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeConfig
    scale: float
    norm_eps: float
    """Of the norms within."""
    indexer: Indexer | None = None


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """A gated delta net (arXiv:2412.06464), linear attention. `taps`: width of its convolution, in tokens."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def convolved(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


Attention = GroupedQuery | Latent | DeltaNet


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP (arXiv:2002.05202) at `path` below the layer; `width`: its inner size."""

    path: str
    width: int
    activation: Literal["silu", "gelu"]


@dataclass(frozen=True, slots=True)
class ExpertNorms:
    """Paths of the norms of Gemma 4's router and experts, which read the residual stream itself.

    Attributes:
        router_scale: The scale on the router's normed input.
        before_experts: The norm before the routed experts.
        after_shared: The norm after the shared expert.
        after_experts: The norm after the routed experts.
    """

    router_scale: str
    before_experts: str
    after_shared: str
    after_experts: str


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts at `path` below the layer, and a shared expert, which every token goes to, if `shared` is set.

    Attributes:
        per_token: Experts that each token goes to.
        width: Inner size of an expert.
        scaling: Factor on the shares.
        groups: Groups that the experts are split into, of equal size.
        groups_kept: Groups that the experts of a token are chosen from.
    """

    path: str
    experts: int
    per_token: int
    width: int
    scores: Literal["sigmoid", "softmax", "chosen_softmax"]
    """How logits become shares: a sigmoid (DeepSeek-V3), a softmax over all experts, or one over the chosen experts."""
    correction_bias: bool = False
    """Whether there is a bias `gate/bias` that affects only the choice of experts."""
    normalize: bool = False
    """Whether the shares of the chosen experts are divided by their sum."""
    scaling: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: int = 1
    """How many of its best scores are summed to rank a group."""
    biases: bool = False
    """Whether the gate and each expert have biases."""
    clamp: float | None = None
    """Limit on gate and up in gpt-oss' SwiGLU, which also takes up + 1. None: a plain GLU."""
    activation: Literal["silu", "gelu"] = "silu"
    shared: Mlp | None = None
    shared_gate: str | None = None
    """Path of a projection to one number. Its sigmoid multiplies the shared expert's output."""
    norms: ExpertNorms | None = None
    expert_scales: bool = False
    """Whether there is a factor on each expert's share, `per_expert_scale`."""


@dataclass(frozen=True, slots=True)
class Norms:
    """Paths of a layer's RMSNorms; None where the family has no norm there."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


@dataclass(frozen=True, slots=True)
class LayerPath:
    """The path of a layer below `decoder/`.

    Attributes:
        stack: Path in a scanned checkpoint.
        index: The layer's index in the stacked axes of a scanned checkpoint. Empty: a remainder layer, not stacked.
        counts: Lengths of these axes.
        alone: Path in an unscanned checkpoint.
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
    """Per-layer input of Gemma 4's small models: a second embedding, `width` for each layer, added after its MLP."""

    width: int
    activation: Literal["silu", "gelu"]


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """Sizes and switches of one model.

    Attributes:
        family: `model_type` of config.json.
        hidden: Width of the residual stream.
        vocab: Rows of the original's embedding.
        eps: Epsilon of the RMSNorms.
        tied: Whether the output projection is the embedding.
        max_positions: The longest sequence, in tokens.
    """

    family: str
    hidden: int
    vocab: int
    eps: float
    tied: bool
    max_positions: int
    layers: tuple[Layer, ...]
    embedding_scale: float = 1.0
    """Factor in the checkpoint's embedding. A tied output projection divides by it."""
    softcap: float | None = None
    """Logits become softcap · tanh(logit / softcap). None: they stay as they are."""
    norm_offset: float = 0.0
    """Added to the scales of the layers' norms and of the final norm: 1 where checkpoints store the scale minus one."""
    layer_scalars: bool = False
    """Whether each layer ends with a factor on the residual stream."""
    per_layer_input: PerLayerInput | None = None
    rows: int = 0
    """Rows of the checkpoint's embedding where MaxText pads or cuts the vocabulary; 0 means `vocab`."""
    rounded: tuple[str, ...] = ()
    """Ends of the paths of leaves whose values MaxText scales: saved in bfloat16, they are rounded once more than in
    the source."""

    @property
    def tokens(self) -> int:
        """The number of token ids that both the model and the checkpoint have."""
        return min(self.vocab, self.rows or self.vocab)

    @property
    def experts(self) -> int:
        """The number of routed experts in all layers."""
        return sum(layer.feed_forward.experts for layer in self.layers if isinstance(layer.feed_forward, Moe))

    @property
    def heads(self) -> int:
        """The largest number of softmax attention heads in a layer; 0 without softmax attention."""
        return max((a.heads for layer in self.layers if not isinstance(a := layer.attention, DeltaNet)), default=0)


def differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Compares two configs of this module, field by field; of the layers, only the first that differs.

    Yields:
        One text for each difference, such as `layer 0: feed_forward width 96 against 97`.
    """
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
