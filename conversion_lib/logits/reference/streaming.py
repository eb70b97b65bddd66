"""A transformers model without weights: each module fetches its weights when it runs, and releases them afterwards.

The code that runs is transformers' own: the model's forward, its layers, attention, routers, norms, masks. Only the
forward of modules that multiply by weights is replaced by one that does the same in slices: a linear map by rows of its
weight, an embedding by the rows that the tokens need, experts a few at a time with their own code. Eager attention runs
its own code for one block of queries at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from conversion_lib.logits.reference.fetching import Fetcher

ExpertObserver = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with each token's share of each expert, (tokens, experts), and the experts' output, (tokens, hidden)."""


def stream_weights(model: Any, fetcher: Fetcher, slice_bytes: int, on_experts: ExpertObserver) -> None:
    """Makes a model fetch its weights while it runs.

    Args:
        model: A transformers model on the meta device. It is changed in place.
        fetcher: Reads the weights.
        slice_bytes: Bytes of float32 weights held at a time; one expert is held whole.
        on_experts: Called after the experts of each layer. A share is zero for experts that a token does not go to.

    Raises:
        BadInput: The checkpoint lacks a parameter or has it in another shape. The message names it.
    """
    _compute_buffers(model)
    layers = list(model.base_model.layers)
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            _stream_linear(module, name, fetcher, slice_bytes)
        elif isinstance(module, nn.Embedding):
            _stream_embedding(module, name, fetcher)
        elif _holds_experts(module):
            _stream_experts(module, name, fetcher, slice_bytes, on_experts)
        elif any(module is layer for layer in layers):
            _stream_small(module, name, fetcher)
    for name, module, key in _small(model, ""):
        if not any(name.startswith(f"{_path(model, layer)}.") for layer in layers):
            fetcher.require(f"{name}.{key}", tuple(getattr(module, key).shape))
            _put(module, key, fetcher.read(f"{name}.{key}"))


def one_prompt_at_a_time(model: Any, lengths: Sequence[int]) -> None:
    """Makes linear attention, which carries a state from token to token, process the prompts one by one.

    Args:
        model: A transformers model. It is changed in place.
        lengths: Tokens of each prompt in the packed sequence.
    """
    for name, module in model.named_modules():
        if name.endswith(".linear_attn"):
            _split(module, list(lengths))


@contextmanager
def token_by_token(model: Any) -> Iterator[None]:
    """While active, the model's delta nets run transformers' recurrence instead of its chunked form.

    transformers uses the recurrence for decoding. The chunked form loses more of float32's accuracy: in 48 tiny layers
    the largest KL was 4.9e-5 with chunks and 1.1e-5 without.

    Yields:
        Nothing. Afterwards transformers' module is as before.
    """
    if not any(name.endswith(".linear_attn") for name, _ in model.named_modules()):
        yield
        return
    code: Any = sys.modules[type(model).__module__]
    in_chunks = code.torch_chunk_gated_delta_rule
    code.torch_chunk_gated_delta_rule = code.torch_recurrent_gated_delta_rule
    try:
        yield
    finally:
        code.torch_chunk_gated_delta_rule = in_chunks


def _split(module: Any, lengths: list[int]) -> None:
    whole = module.forward

    def forward(hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        parts = torch.split(hidden_states, lengths, dim=1)
        return torch.cat([whole(hidden_states=part, **more) for part in parts], dim=1)

    module.forward = forward


def indexers_in_blocks(model: Any, score_bytes: int) -> None:
    """Makes DeepSeek V3.2's indexers process a block of queries at a time.

    Args:
        model: A transformers model. It is changed in place.
        score_bytes: Bytes of the scores of a block.
    """
    for name, module in model.named_modules():
        if name.endswith(".indexer"):
            _choose_in_blocks(module, score_bytes)


class _Keys:
    """Stands in for the indexer's cache: keeps all keys at the first call, and returns them at later ones."""

    def __init__(self) -> None:
        self._all: torch.Tensor | None = None

    def update_indexer(self, keys: torch.Tensor, _layer: int) -> torch.Tensor:
        if self._all is None:
            self._all = keys
            return keys[:, :1]  # the first call chooses nothing
        return self._all


def _choose_in_blocks(module: Any, score_bytes: int) -> None:
    whole = module.forward

    def forward(
        hidden_states: torch.Tensor,
        low_rank: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        positions: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        keys, tokens = _Keys(), hidden_states.shape[1]
        whole(hidden_states, low_rank, tables, mask[..., :1], positions, past_key_values=keys)
        chosen = []
        for here in _query_blocks(tokens, 4 * module.n_heads * tokens, score_bytes):
            turned = (tables[0][:, here], tables[1][:, here])
            rows = (hidden_states[:, here], low_rank[:, here], turned, mask[:, here], positions)
            chosen.append(whole(*rows, past_key_values=keys))
        return torch.cat(chosen, dim=1)

    module.forward = forward


def _query_blocks(tokens: int, bytes_a_query: int, most: int) -> Iterator[slice]:
    step = max(1, most // bytes_a_query)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


@contextmanager
def attention_in_blocks(model: Any, score_bytes: int) -> Iterator[None]:
    """While active, the model's eager attention processes a block of queries at a time.

    Args:
        model: A transformers model.
        score_bytes: Bytes of the scores of a block.

    Yields:
        Nothing. Afterwards transformers' module is as before.
    """
    code = sys.modules[type(model).__module__]
    whole = code.eager_attention_forward

    def blocks(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        heads, tokens = query.shape[1:3]
        outs = []
        for here in _query_blocks(tokens, 4 * len(query) * heads * key.shape[2], score_bytes):
            mask = None if attention_mask is None else attention_mask[:, :, here]
            outs.append(whole(module, query[:, :, here], key, value, mask, **more)[0])
        return torch.cat(outs, dim=1), None

    code.eager_attention_forward = blocks  # type: ignore[attr-defined]
    try:
        yield
    finally:
        code.eager_attention_forward = whole  # type: ignore[attr-defined]


def _path(model: Any, wanted: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _compute_buffers(model: Any) -> None:
    """Computes buffers that no checkpoint has, such as RoPE's frequencies, with transformers' own initialisation."""
    owners = []
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, key = name.rpartition(".")[::2]
        owners.append(model.get_submodule(owner))
        owners[-1]._buffers[key] = torch.empty_like(buffer, device="cpu")
    for module in owners:
        with torch.no_grad():
            model._init_weights(module)


def _holds_experts(module: Any) -> bool:
    """Whether a module's own parameters hold all experts on their first axis."""
    return any(name in ("gate_up_proj", "down_proj") for name in module._parameters)


def _small(module: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yields what is held whole while its layer runs: norms, routers, sinks, correction biases.

    Each as (path of its module, the module, name within the module).
    """
    for name, inner in list(module.named_modules(prefix=prefix)):
        if type(inner) is nn.Linear or isinstance(inner, nn.Embedding) or _holds_experts(inner):
            continue
        for key, tensor in [*inner._parameters.items(), *inner._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                yield name, inner, key


def _put(module: Any, key: str, tensor: torch.Tensor) -> None:
    if key in module._buffers:
        module._buffers[key] = tensor
    else:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)


def _stream_small(layer: Any, name: str, fetcher: Fetcher) -> None:
    small = [(module, key, f"{inner}.{key}", getattr(module, key)) for inner, module, key in _small(layer, name)]
    for _, _, parameter, tensor in small:
        fetcher.require(parameter, tuple(tensor.shape))

    def fetch(*_: Any) -> None:
        for module, key, parameter, _tensor in small:
            _put(module, key, fetcher.read(parameter))

    def release(*_: Any) -> None:
        for module, key, _parameter, tensor in small:
            _put(module, key, tensor)

    layer.register_forward_pre_hook(fetch)
    layer.register_forward_hook(release)


def _stream_linear(module: nn.Linear, name: str, fetcher: Fetcher, slice_bytes: int) -> None:
    out, width = module.weight.shape
    rows = max(1, slice_bytes // (4 * width))
    fetcher.require(f"{name}.weight", (out, width))
    has_bias = module.bias is not None
    if has_bias:
        fetcher.require(f"{name}.bias", (out,))

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = torch.empty((*x.shape[:-1], out))
        for start in range(0, out, rows):
            span = (start, min(start + rows, out))
            bias = fetcher.read(f"{name}.bias", span) if has_bias else None
            result[..., slice(*span)] = nn.functional.linear(x, fetcher.read(f"{name}.weight", span), bias)
        return result

    module.forward = forward  # type: ignore[method-assign,assignment]


def _stream_embedding(module: nn.Embedding, name: str, fetcher: Fetcher) -> None:
    fetcher.require(f"{name}.weight", tuple(module.weight.shape))
    module.padding_idx = None  # it matters for training only: the row is like any other

    def fetch(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        used, indices = torch.unique(inputs[0], return_inverse=True)
        _put(module, "weight", fetcher.read_rows(f"{name}.weight", used.tolist()))
        return (indices, *inputs[1:])

    module.register_forward_pre_hook(fetch)


def _stream_experts(module: Any, name: str, fetcher: Fetcher, slice_bytes: int, on_experts: ExpertObserver) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in module._parameters.items()}
    fetcher.require_experts(name, shapes)
    count, one_slice = module.num_experts, module.forward
    expert_bytes = 4 * sum(torch.Size(shape[1:]).numel() for shape in shapes.values())
    step = max(1, slice_bytes // expert_bytes)

    def forward(states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(states)
        for start in range(0, count, step):
            stop = min(start + step, count)
            tokens, slots = ((chosen >= start) & (chosen < stop)).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            for key in shapes:
                _put(module, key, fetcher.experts(name, key, start, stop))
            module.num_experts = stop - start
            # each (token, expert) pair counts as one token, so that every token of a slice has one expert
            visits = one_slice(states[tokens], chosen[tokens, slots][:, None] - start, shares[tokens, slots][:, None])
            total.index_add_(0, tokens, visits)
        for key, shape in shapes.items():
            _put(module, key, torch.empty(shape, device="meta"))
        on_experts(torch.zeros((len(chosen), count)).scatter_(1, chosen, shares.float()), total)
        return total

    module.forward = forward
