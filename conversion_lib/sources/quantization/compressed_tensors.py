"""Checkpoints of the compressed-tensors library (https://github.com/vllm-project/compressed-tensors).

Finds which group of `config_groups` quantizes which module, and how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from conversion_lib.core.patterns import Pattern, compile_pattern
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput, problem_of
from conversion_lib.limits import PATTERN_TRIES, PATTERNS
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.quantization import fp8, packed
from conversion_lib.sources.quantization.weights import Weight, companion

FP8_FORMATS = ("float-quantized", "naive-quantized")
INT4_FORMAT = "pack-quantized"

PATTERN = "re:"
"""What stands before a regular expression among names of modules."""

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")
"""Names of the tensors that a quantized module's weight is stored in, other than `weight` itself."""


class Arguments(BaseModel):
    """How a group's weights are quantized: `weights` of an entry of `config_groups`."""

    num_bits: int = 8
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    symmetric: bool = True

    @property
    def shared_by(self) -> str:
        """What shares a scale: the strategy, or if there is none, what `group_size` implies."""
        by_size = "tensor" if self.group_size is None else "channel" if self.group_size < 0 else "group"
        return self.strategy or by_size


class Group(BaseModel):
    """An entry of `config_groups`. Without `weights` it quantizes only activations."""

    targets: list[str]
    weights: Arguments | None = None
    format: str | None = None


class Settings(BaseModel):
    """The keys of `quantization_config` that say how weights are stored."""

    config_groups: dict[str, Group]
    format: str = "dense"
    ignore: list[str] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class Names:
    """Modules by name: each as it is, or by a pattern after `re:`.

    Args:
        entries: `targets` or `ignore`.
        where: What messages call the list.

    Raises:
        BadInput: A pattern cannot be matched in linear time, or there are too many.
    """

    def __init__(self, entries: Iterable[str], where: str) -> None:
        exact, patterns = set[str](), dict[str, Pattern]()
        for entry in entries:
            if entry.startswith(PATTERN):
                patterns[entry] = compile_pattern(entry.removeprefix(PATTERN), where)
            else:
                exact.add(entry)
            if len(patterns) > PATTERNS:
                raise BadInput(f"{where} has more than {PATTERNS} regular expressions, which are all that are allowed")
        self.exact, self.patterns = frozenset(exact), tuple(patterns.values())

    def __contains__(self, module: str) -> bool:
        return module in self.exact or any(pattern.matches(module) for pattern in self.patterns)


@dataclass(frozen=True)
class Scheme:
    """A group that quantizes weights; `packed`: to int4, otherwise to fp8."""

    name: str
    targets: Names
    arguments: Arguments
    packed: bool

    def takes_all(self) -> bool:
        """Returns whether the group may apply to any module.

        The target `Linear` means the module's class, which a checkpoint does not show.
        """
        return not (self.targets.exact or self.targets.patterns) or "Linear" in self.targets.exact


def weights(tensors: Mapping[str, TensorInfo], config: ModelConfig, quantization: dict[str, Any]) -> list[Weight]:
    """Finds the weights of a checkpoint whose `quant_method` is compressed-tensors.

    Args:
        tensors: The stored tensors.
        config: The checkpoint's config.json, for messages.
        quantization: Its `quantization_config`.

    Raises:
        BadInput: The format is not supported, no group applies to a quantized weight, a stored part belongs to no
            weight, or as `fp8` and `packed` raise it.
    """
    settings = _settings(config, quantization)
    schemes = _schemes(settings, config)
    ignored = Names(settings.ignore or (), f"{config.path}: ignore of quantization_config")
    _limit_tries(tensors, [ignored, *(scheme.targets for scheme in schemes)], config)
    found: list[Weight] = []
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and info.dtype.startswith("float8")):
            scheme = _scheme_of(module, info, schemes, ignored, config)
            if scheme.packed:
                found.append(_int4(tensors, info, scheme, config))
            else:
                found.append(_fp8(tensors, info, scheme, config))
    used = {part.name for weight in found for part in (weight.codes, *weight.others)}
    for name, info in tensors.items():
        if name.endswith(PARTS) and name.rpartition(".")[2] in PARTS and name not in used:
            raise BadInput(
                f"{info.file}: tensor {name} belongs to no known quantized weight; an fp8 weight has weight "
                "and weight_scale, an int4 weight has weight_packed, weight_scale and weight_shape"
            )
    return found


def _settings(config: ModelConfig, quantization: dict[str, Any]) -> Settings:
    try:
        settings = Settings.model_validate(quantization)
    except ValidationError as error:
        raise BadInput(f"{config.path}: quantization_config.{problem_of(error)}") from None
    sparsity = (settings.sparsity_config or {}).get("format", "dense")
    if sparsity != "dense" or settings.transform_config:
        what = f"sparsity {sparsity!r}" if sparsity != "dense" else "a transform_config"
        raise BadInput(f"{config.path}: compressed-tensors with {what} is not supported")
    return settings


def _schemes(settings: Settings, config: ModelConfig) -> list[Scheme]:
    """Returns the groups that quantize weights. Raises BadInput for a format that is not supported."""
    schemes = []
    for name, group in settings.config_groups.items():
        arguments, form = group.weights, group.format or settings.format
        if arguments is None or form == "dense":
            continue
        is_fp8 = form in FP8_FORMATS and (arguments.type, arguments.num_bits) == ("float", 8) and arguments.symmetric
        is_int4 = form == INT4_FORMAT and (arguments.type, arguments.num_bits) == ("int", 4)
        known = ("tensor", "channel", "group", "block") if is_fp8 else ("channel", "group") if is_int4 else ()
        if arguments.shared_by not in known:
            raise BadInput(
                f"{config.path}: {name} of config_groups, {form}, {arguments.num_bits} bits {arguments.type} by "
                f"{arguments.shared_by}, is not supported; supported are symmetric fp8 by tensor, channel, group or "
                f"block, and int4 ({INT4_FORMAT}) by channel or group"
            )
        targets = Names(group.targets, f"{config.path}: targets of {name} in config_groups")
        schemes.append(Scheme(name, targets, arguments, is_int4))
    return schemes


def _limit_tries(tensors: Mapping[str, TensorInfo], lists: list[Names], config: ModelConfig) -> None:
    patterns = sum(len(names.patterns) for names in lists)
    if patterns * len(tensors) > PATTERN_TRIES:
        raise BadInput(
            f"{config.path}: quantization_config has {patterns} regular expressions for {len(tensors)} tensors, and "
            f"{PATTERN_TRIES // len(tensors)} are allowed for so many"
        )


def _scheme_of(module: str, codes: TensorInfo, schemes: list[Scheme], ignored: Names, config: ModelConfig) -> Scheme:
    """Returns the group of a quantized weight: one that names its module, or else one for every linear layer."""
    fitting = [scheme for scheme in schemes if scheme.packed == codes.name.endswith(packed.CODES_SUFFIX)]
    if module not in ignored:
        for scheme in (*(s for s in fitting if module in s.targets), *(s for s in fitting if s.takes_all())):
            return scheme
    raise BadInput(
        f"{codes.file}: tensor {codes.name} is {codes.dtype}, but no group of config_groups in {config.path} "
        "applies to it: no target names the module, the group's weights have another type, or `ignore` names the module"
    )


def _fp8(tensors: Mapping[str, TensorInfo], codes: TensorInfo, scheme: Scheme, config: ModelConfig) -> fp8.Fp8Weight:
    if codes.dtype != fp8.DTYPE:
        raise BadInput(f"{codes.file}: tensor {codes.name} is {codes.dtype}; only {fp8.DTYPE} is supported")
    scale = companion(tensors, codes, f"{codes.name}_scale")
    rows, columns = fp8.whole_block(codes)
    arguments = scheme.arguments
    match arguments.shared_by:
        case "tensor":
            block = (rows, columns)
        case "channel":
            block = (1, columns)
        case "group":
            block = (1, _positive(scheme, config, "group_size", arguments.group_size))
        case _:
            high, wide = arguments.block_structure or (0, 0)
            key = "block_structure"
            block = (_positive(scheme, config, key, high), _positive(scheme, config, key, wide))
    return fp8.in_scale_dtype(codes, scale, block)


def _int4(tensors: Mapping[str, TensorInfo], codes: TensorInfo, scheme: Scheme, config: ModelConfig) -> Weight:
    group = None
    if scheme.arguments.shared_by == "group":
        group = _positive(scheme, config, "group_size", scheme.arguments.group_size)
    return packed.int4_weight(tensors, codes, group, scheme.arguments.symmetric)


def _positive(scheme: Scheme, config: ModelConfig, key: str, value: int | None) -> int:
    if value is None or value < 1:
        raise BadInput(f"{config.path}: {key} of {scheme.name} in config_groups should be positive, not {value}")
    return value
