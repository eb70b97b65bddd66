"""All families together: each has a file of tests, and the catalogue has no more than they describe."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, LATER, MODULES, family_of, qwen2
from conversion_lib.logits.forward.architectures import READERS
from conversion_lib.models.catalog import MODELS
from tests.conversion_lib.logits.forward.test_delta_net import MODELS as DELTA_NETS_AND_GEMMA4
from tests.support.check_tests import CheckTests
from tests.support.family import TESTS, description_in, descriptions
from tests.support.family_tests import FamilyTests
from tests.support.logit_models import CONFIGS
from tests.support.published_tensors import config_of

BY_HAND = {family for family, _ in CONFIGS.values()}
"""Whose forward pass has tests of its own: on weights that are laid out by hand, or as a model with a state."""


def classes_in(module: ModuleType) -> list[type]:
    """The classes in a family's test file that inherit the tests of every family."""
    found = importlib.import_module(TESTS.format(module.__name__.rpartition(".")[2]))
    return [of for of in vars(found).values() if isinstance(of, type) and issubclass(of, FamilyTests)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.FAMILY.name)
def test_each_family_inherits_the_tests_of_all(module):
    name = module.FAMILY.name
    tests = [of for of in classes_in(module) if of is not FamilyTests]
    assert [of.described.name for of in tests] == [name]
    elsewhere = BY_HAND | {family for family, _ in DELTA_NETS_AND_GEMMA4.values()}
    assert issubclass(tests[0], CheckTests) or name in elsewhere, f"no test runs the logit check on {name}"


def test_a_family_without_tests_is_asked_for_them_by_name():
    with pytest.raises(LookupError, match=r"family olmo4 has no tests: write tests/.*/families/test_olmo4\.py"):
        description_in("olmo4")


def test_a_file_of_tests_that_cannot_be_imported_says_why(monkeypatch):
    """Not that it is missing."""
    monkeypatch.setitem(sys.modules, "tests.support.family_tests", None)
    monkeypatch.delitem(sys.modules, TESTS.format("qwen2"), raising=False)
    with pytest.raises(ModuleNotFoundError, match="family_tests"):
        description_in("qwen2")


def test_a_family_without_a_forward_pass_is_asked_for_it_by_name(monkeypatch):
    """As its own tests fail then, and as `ferry check` refuses it."""
    (tests,) = (of for of in classes_in(qwen2) if of is not FamilyTests)
    monkeypatch.delitem(READERS, "qwen2")
    said = (
        "no logit check for architecture Qwen2ForCausalLM .*conversion_lib/logits/forward/architectures has no reader"
    )
    with pytest.raises(pytest.fail.Exception, match=f"family qwen2.5: .*{said}"):
        tests().test_the_logit_check_has_a_forward_pass_of_as_many_parameters("qwen2.5-7b")


def test_the_catalogue_has_no_other_models():
    described = {name for of in descriptions().values() for name in (*of.published, *of.same_sizes)}
    assert {model.name for model in MODELS} == described
    assert {model.family for model in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", LATER)
def test_what_is_left_for_later_is_refused_by_name(name):
    with pytest.raises(BadInput, match=f"{name} is not supported"):
        family_of(config_of({"architectures": [name]}))
