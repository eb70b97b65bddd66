"""Names with something around them: what is the model's own name, and what transformers makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from conversion_lib.errors import BadInput
from conversion_lib.sources.renamed import plain_names, plainly_named
from tests.support.memory_source import MemorySource

OWN = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"_forward_module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module.base_model.model.{name}",
        lambda name: name.replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: f"model.{name}",
        lambda name: name.replace("lm_head", "model.lm_head"),
    ],
)
def test_what_stands_around_names_is_taken_off(wrapped):
    arrays = {wrapped(name): np.full(2, number, np.float32) for number, name in enumerate(OWN)}
    source = plainly_named(MemorySource(arrays), tied=False)
    assert list(source.tensors) == OWN
    for number, name in enumerate(OWN):
        assert source.tensors[name].name == name
        assert source.read(name).tolist() == [number, number]
        assert source.read(name, ((1, 2),)).tolist() == [number]
        assert [part.name for part in source.requires(name)] == [wrapped(name)]  # what the files hold


@pytest.mark.parametrize(
    "names",
    [
        OWN,
        ["embed_tokens.weight", "layers.0.mlp.up_proj.weight"],
        ["model.language_model.embed_tokens.weight", "model.visual.patch_embed.weight", "lm_head.weight"],
        ["module.a.weight", "model.b.weight"],  # not around all of them
        ["model.layers.0.module.weight"],
        [],
    ],
)
def test_a_models_own_names_are_left_alone(names):
    source = MemorySource({name: np.zeros(1) for name in names})
    assert plainly_named(source, tied=True) is source


def test_two_tensors_of_one_name_are_refused():
    arrays = {"model.layers.0.a.weight": np.zeros(1), "model.layers.0._orig_mod.a.weight": np.zeros(1)}
    with pytest.raises(BadInput, match=r"model\.layers\.0\.a\.weight and model\.layers\.0\._orig_mod\.a\.weight are"):
        plainly_named(MemorySource(arrays), tied=False)


@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model."])
def test_a_head_alone_is_the_embedding_that_it_is_tied_to(prefix):
    """As the safetensors package saves a tied model: of two names for one tensor it keeps the first by the alphabet."""
    names = ["lm_head.weight", f"{prefix}layers.0.mlp.up_proj.weight", f"{prefix}norm.weight"]
    assert plain_names(names, tied=True)["lm_head.weight"] == f"{prefix}embed_tokens.weight"
    assert plain_names(names, tied=False)["lm_head.weight"] == "lm_head.weight"
    both = [*names, f"{prefix}embed_tokens.weight"]
    assert plain_names(both, tied=True) == dict(zip(both, both, strict=True))
