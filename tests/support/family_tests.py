"""The tests that every family has: a class in its test file inherits them, and says what is `described`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert
from conversion_lib.core.boxes import size
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.logits.by_maxtext.settings import model_settings
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.layout import layer_leaves, top_leaves
from conversion_lib.mapping.to_maxtext import plan_to_maxtext
from conversion_lib.maxtext.names import model_of, size_differences
from conversion_lib.models.catalog import MODELS
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.ops import Pick
from conversion_lib.plan.plan import ArrayPlan, Plan
from conversion_lib.plan.value_ops import Resize
from conversion_lib.record import Target
from conversion_lib.sources.orbax import open_orbax
from tests.support.config_values import (
    ABSENT,
    ODD_VALUES,
    KeyPath,
    as_the_class_has_it,
    changed_at,
    key_paths,
    outcomes,
)
from tests.support.family import Description, Leaf, Refusal, descriptions
from tests.support.maxtext_by_hand import read_weights
from tests.support.published_tensors import as_the_tables_take_them, config_of, tensors_of
from tests.support.there_and_back import RoundTrip, differing, round_trip, tensors
from tests.support.tiny_models import make_tiny, prompt, reference_logits, tiny_config

DROPPED = ("vision", "multi-token prediction")
"""What may begin a plan's line on tensors that are left out, other than a tied head."""

OTHER_FAMILY = ("hidden_size_per_layer_input", 0)
"""A value that is right, and makes it another model."""

PER_LAYER = "per_layer_config"
"""Whose layers all have the same keys."""

Read = Callable[[str], np.ndarray]


@cache
def published_tensors(family: str, name: str) -> dict[str, TensorInfo]:
    described = descriptions()[family]
    return tensors_of(described.published[name], own_names=described.own_names)


@cache
def joined_tensors(family: str, name: str) -> dict[str, TensorInfo]:
    config = config_of(descriptions()[family].published[name].config)
    return as_the_tables_take_them(published_tensors(family, name), config)


def plan_of(described: Description, name: str, found: dict[str, TensorInfo] | None = None, **target) -> Plan:
    """The plan of a published model, or of `found` under its config."""
    config = config_of(described.published[name].config)
    found = joined_tensors(described.name, name) if found is None else found
    options = {"identity": {}, "model_name": name, "chunk_limit": 64 << 20}
    return plan_to_maxtext(found, config, family_of(config), Target(**target), **options)


def by_path(plan: Plan) -> dict[str, ArrayPlan]:
    return {array.path.removeprefix("params/params/"): array for array in plan.arrays}


def converted(source: Path, destination: Path, **target) -> tuple[Read, Read]:
    """The source's tensors in float32, and the leaves below `decoder` of what it is converted to, by name."""
    convert(source, destination, Target(**({"save_dtype": "float32"} | target)))
    weights, written = read_weights(source), open_orbax(destination)
    return lambda name: weights[name].astype(np.float32), lambda path: written.read(f"params/params/decoder/{path}")


def heads(weight: np.ndarray, count: int) -> np.ndarray:
    """(count·dim, in) -> (in, count, dim)."""
    return weight.T.reshape(weight.shape[1], count, -1)


def changed(raw: dict, changes: dict) -> dict:
    """A config.json with other values for the text model."""
    return {**raw, "text_config": {**raw["text_config"], **changes}} if "text_config" in raw else {**raw, **changes}


def configs_to_walk(described: Description) -> dict[str, dict]:
    """The published config.json, and one with every key that the class has."""
    published = {name: model.config for name, model in described.published.items()}
    full = json.loads(tiny_config(described).to_json_string(use_diff=False))
    architectures = next(iter(published.values()))["architectures"]
    return published | {"tiny": full | {"architectures": architectures}}


def walk(described: Description) -> Iterator[tuple[str, dict, KeyPath]]:
    """Every key once: the name of a config.json that has it, the config, where the key is."""
    seen = set()
    for name, raw in configs_to_walk(described).items():
        for path in key_paths(raw):
            if path not in seen:
                seen.add(path)
                yield name, raw, path


class FamilyTests:
    """Plans of published models at their true sizes, what is refused, round trips of a small model."""

    described: ClassVar[Description]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        layouts = self.described.layouts
        choices = {
            "model": list(self.described.published),
            "scan_layers": layouts,
            "leaf": self.described.leaves,
            "refusal": self.described.refusals,
        }
        names = {
            "scan_layers": {True: "scanned", False: "unscanned"}.get,
            "leaf": lambda leaf: f"{leaf.model}-{leaf.path}",
            "refusal": str,
        }
        for argument in (name for name in choices if name in metafunc.fixturenames):  # in one order: workers compare
            metafunc.parametrize(argument, choices[argument], ids=names.get(argument))

    @pytest.fixture(scope="class")
    @classmethod
    def hf(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The family's small model."""
        return make_tiny(cls.described.name, tmp_path_factory.mktemp("tiny") / "hf")

    @pytest.fixture(scope="class")
    @classmethod
    def trip(cls, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> RoundTrip:
        return round_trip(hf, tmp_path_factory.mktemp("trip"), cls.described.layouts)

    def test_every_parameter_of_a_published_model_is_taken_once(self, model: str, scan_layers: bool):
        found = joined_tensors(self.described.name, model)
        plan = plan_of(self.described, model, scan_layers=scan_layers)
        left_out = {name: word for name in found for part, word in self.described.left_out.items() if part in name}
        taken = Counter(part.tensor for array in plan.arrays for part in array.sources)
        assert set(taken) == set(found) - set(left_out)
        several = {name for name, times in taken.items() if times > 1}
        assert {name for name in several if not name.endswith(self.described.several_leaves)} == set()
        for word in DROPPED:
            assert any(line.startswith(word) for line in plan.dropped) == (word in left_out.values())
        parameters = self.described.published[model].parameters
        assert sum(math.prod(found[name].shape) for name in taken) == parameters
        elements = sum(math.prod(array.shape) for array in plan.arrays)
        embedding = by_path(plan)["token_embedder/embedding"]
        vocabulary = found[embedding.sources[0].tensor].shape[0]
        assert elements - (embedding.shape[0] - vocabulary) * embedding.shape[1] == parameters
        apart = published_tensors(self.described.name, model)
        assert sum(math.prod(info.shape) for info in apart.values()) == sum(
            math.prod(info.shape) for info in found.values()
        )

    def test_sources_tile_their_arrays(self, model: str, scan_layers: bool):
        plan = plan_of(self.described, model, scan_layers=scan_layers)
        assert len({array.path for array in plan.arrays}) == len(plan.arrays)
        for array in plan.arrays:
            assert len(array.sources) * size(array.region(array.sources[0])) == math.prod(array.shape)
            assert len({part.at for part in array.sources}) == len(array.sources)
            assert list(array.sources_in(tuple((0, extent) for extent in array.shape))) != []
            if not any(isinstance(op, Pick | Resize) for op in array.ops):
                assert sum(math.prod(part.shape) for part in array.sources) == math.prod(array.shape)

    def test_the_catalogue_has_the_published_models(self):
        listed = {known.name for known in MODELS if known.family == self.described.name}
        assert listed == {*self.described.published, *self.described.same_sizes}
        assert set(self.described.same_sizes.values()) <= set(self.described.published)

    def test_one_family_alone_fits(self, model: str):
        config = config_of(self.described.published[model].config)
        named = [of for of in FAMILIES.values() if set(of.architectures) & set(config.architectures)]
        assert [of.name for of in named if of.fits(config)] == [self.described.name]
        assert family_of(config) is FAMILIES[self.described.name]

    def test_where_a_leaf_comes_from(self, leaf: Leaf):
        array = by_path(plan_of(self.described, leaf.model, scan_layers=leaf.scan_layers))[f"decoder/{leaf.path}"]
        assert array.shape == leaf.shape
        if leaf.scan_layers:
            second = next(part for part in array.sources if part.at == (0, 1, *[0] * (len(leaf.shape) - 2)))
            assert second.tensor == leaf.tensor
        else:
            assert [part.tensor for part in array.sources] == [leaf.tensor]

    def test_what_is_refused_from_the_config_alone(self, refusal: Refusal):
        """A plan of a checkpoint without tensors: only what the config says can be complained of."""
        config = config_of(changed(self.described.published[refusal.model].config, refusal.changes))
        options = {"identity": {}, "model_name": "m", "chunk_limit": 64 << 20}
        with pytest.raises(BadInput, match=refusal.message):
            plan_to_maxtext({}, config, family_of(config), Target(scan_layers=refusal.scan_layers), **options)

    def test_every_value_of_every_key_is_read_or_refused_in_one_line(self):
        """Whatever is put there: never a traceback, and what is refused is named."""
        for name, raw, path in walk(self.described):
            for value in ODD_VALUES:
                try:
                    found = outcomes(changed_at(raw, path, value))
                except Exception as error:
                    pytest.fail(f"{name}: {path} = {value!r}: {type(error).__name__}: {error}")
                for reader, outcome in found.items():
                    if not isinstance(outcome, str) or (path[-1], value) == OTHER_FAMILY:
                        continue
                    named = any(key.removesuffix("s") in outcome for key in path)
                    assert outcome.startswith("config.json") and named, (name, path, value, reader, outcome)
                    assert "\n" not in outcome

    def test_what_is_left_out_is_what_the_class_has(self):
        """Without a key, plan and check read what they read of the config that transformers' class makes of it."""
        for name, raw, path in walk(self.described):
            without = changed_at(raw, path, ABSENT)
            full = as_the_class_has_it(without) if "model_type" in without else None
            if full is None or PER_LAYER in path:
                continue
            ours, theirs = outcomes(without), outcomes(full)
            for reader in ours:
                both_refused = isinstance(ours[reader], str) and isinstance(theirs[reader], str)
                assert both_refused or ours[reader] == theirs[reader], (name, path, reader)

    def test_published_sizes_are_those_of_the_name(self, model: str):
        """The sizes in MaxText's name against the published config.json, written down by other hands."""
        assert size_differences(model_of(model), config_of(self.described.published[model].config)) == []

    def test_the_logit_check_has_a_forward_pass_of_as_many_parameters(self, model: str):
        """By the leaves that the forward pass reads, which knows nothing of the family's table."""
        of = self.described.published[model]
        try:
            config = parse_config(of.config)
        except BadInput as error:
            pytest.fail(f"family {self.described.name}: {error}")
        shapes = [*top_leaves(config).values()]
        shapes += [shape for layer in config.layers for shape in layer_leaves(layer, config).values()]
        more_rows = config.rows - config.vocab if config.rows else 0
        assert sum(map(math.prod, shapes)) - more_rows * config.hidden == of.parameters

    def test_maxtext_has_settings_for_it(self):
        """By which `tests/parity` and `ferry check --engine maxtext` run MaxText."""
        for scan in self.described.layouts:
            config = ModelConfig(tiny_config(self.described).to_dict(), "config.json")
            assert f"scan_layers={str(scan).lower()}" in model_settings(config, scan)

    def test_every_tensor_comes_back(self, trip: RoundTrip):
        source, back = tensors(trip.hf), tensors(trip.back[False])
        lost = differing(source, back)
        if not self.described.scaled_query:
            assert lost == []
            return
        assert all(name.endswith("q_proj.weight") for name in lost)
        for name in lost:
            before, after = (kind[name].astype(np.float32) for kind in (source, back))
            assert before.shape == after.shape
            # half a unit in the last place, of eight bits, twice
            assert np.all(np.abs(after - before) <= 2**-7 * np.abs(before))

    def test_both_layouts_give_the_same_files(self, trip: RoundTrip):
        names = {path.name for path in trip.back[False].iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors"} <= names
        for scan in self.described.layouts:
            assert compare(trip.back[scan], trip.back[False]).same
            assert {path.name for path in trip.back[scan].iterdir()} == names
            for name in names - {".ferry_record.json"}:
                assert (trip.back[scan] / name).read_bytes() == (trip.back[False] / name).read_bytes()

    def test_transformers_loads_it(self, trip: RoundTrip):
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(trip.back[False], output_loading_info=True)
        assert {kind: names for kind, names in info.items() if names} == {}
        assert type(model).__name__ in model.config.architectures
        assert str(model.dtype) == "torch.bfloat16"

    def test_the_text_model_of_one_with_towers_computes_the_same(self, trip: RoundTrip):
        nested = "text_config" in json.loads((trip.hf / "config.json").read_text())
        assert nested == bool(self.described.towers)
        if nested:
            tokens = prompt(16, 500)
            np.testing.assert_array_equal(reference_logits(trip.back[False], tokens), reference_logits(trip.hf, tokens))

    def test_one_layout_becomes_the_other(self, trip: RoundTrip, tmp_path: Path):
        if self.described.layouts == (False,):
            with pytest.raises(BadInput, match="unscanned only"):
                convert(trip.maxtext[False], tmp_path / "out", Target(scan_layers=True))
            return
        for scan in self.described.layouts:
            out = tmp_path / str(scan)
            convert(trip.maxtext[not scan], out, Target(scan_layers=scan))
            assert compare(out, trip.maxtext[scan]).same
            for name in ("config.json", "generation_config.json"):
                assert (out / "hf" / name).read_bytes() == (trip.maxtext[scan] / "hf" / name).read_bytes()


class ClassNameTests:
    """Of a family whose class in transformers has other names for its tensors than those that are published."""

    described: ClassVar[Description]

    def test_the_names_of_transformers_class(self, hf: Path, scan_layers: bool, tmp_path: Path):
        """As `save_pretrained(save_original_format=False)` writes them: experts in one tensor."""
        own = make_tiny(self.described.name, tmp_path / "model", own_names=True)
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in read_weights(own))
        for source, out in ((hf, "published"), (own, "own")):
            convert(source, tmp_path / out, Target(scan_layers=scan_layers))
        assert compare(tmp_path / "published", tmp_path / "own").same
