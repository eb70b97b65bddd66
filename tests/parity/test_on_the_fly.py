"""What `ensure_checkpoint` leaves is what the parent can restore, under each combination of the storage flags."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.maxtext.names import is_model_name, setting_names
from conversion_lib.on_the_fly import ensure_checkpoint
from conversion_lib.progress import SILENT
from conversion_lib.sources.orbax import open_orbax
from tests.parity.harness import MAXTEXT_PYTHON
from tests.support.tiny_models import make_tiny

pytestmark = pytest.mark.core

FLAGS = [(True, True), (True, False), (False, True), (False, False)]
NOT_FORWARDED = (True, True)
"""What a converter writes that is told of no flags."""


NAMES = """
import json, typing
from maxtext.configs.types import MaxTextConfig, ModelName
def names(model, outer=""):
    for name, field in model.model_fields.items():
        yield outer + name
        if hasattr(field.annotation, "model_fields"):
            yield from names(field.annotation, f"{outer}{name}.")
print(json.dumps([sorted(set(names(MaxTextConfig))), sorted(typing.get_args(ModelName))]))
"""
"""Every setting and every model that MaxText's configuration has, in its environment."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def items(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, bool], Path]:
    """The checkpoint of each combination."""
    made = {}
    for ocdbt, zarr3 in FLAGS:
        made[ocdbt, zarr3] = ensure_checkpoint(
            source,
            tmp_path_factory.mktemp("run"),
            checkpoint_storage_use_ocdbt=ocdbt,
            checkpoint_storage_use_zarr3=zarr3,
            reporter=SILENT,
        )
    return made


@pytest.fixture(scope="module")
def restored(
    items: dict[tuple[bool, bool], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[bool, bool, bool] | str, Any]:
    """What MaxText's restore made of each; by the flags, and whether Pathways' array handler did it."""
    work = tmp_path_factory.mktemp("restore")
    neither = (False, False)
    jobs: dict[tuple[bool, bool, bool] | str, dict[str, Any]] = {
        (*flags, False): {"items": str(items[flags]), "ocdbt": flags[0], "zarr3": flags[1], "pathways": False}
        for flags in FLAGS
    }
    jobs["control"] = {"items": str(items[NOT_FORWARDED]), "ocdbt": False, "zarr3": False, "pathways": False}
    # the handler that the last two register stays: they come after the others
    as_pathways = {"ocdbt": False, "zarr3": False, "pathways": True}
    jobs[*neither, True] = {"items": str(items[neither]), **as_pathways}
    jobs["not forwarded"] = {"items": str(items[NOT_FORWARDED]), **as_pathways}
    asked, answers = work / "jobs.json", work / "results.json"
    asked.write_text(json.dumps(list(jobs.values())))
    worker = Path(__file__).with_name("restore_worker.py")
    done = subprocess.run([MAXTEXT_PYTHON, worker, asked, answers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, json.loads(answers.read_text()), strict=True))


def values(items: Path) -> dict[str, list[Any]]:
    """Every parameter, read by TensorStore alone."""
    source, root = open_orbax(items), "params/params/"
    arrays = {path.removeprefix(root): source.read(path) for path in source.tensors if path.startswith(root)}
    return {
        path: [list(array.shape), array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest()]
        for path, array in arrays.items()
    }


@pytest.mark.parametrize("flags", FLAGS)
def test_maxtext_restores_what_its_flags_asked_for(
    items: dict[tuple[bool, bool], Path], restored: dict[Any, Any], flags: tuple[bool, bool]
) -> None:
    assert restored[*flags, False] == values(items[flags]) == values(items[True, True])
    assert len(restored[*flags, False]) > 10


def test_pathways_restores_what_its_flags_asked_for(
    items: dict[tuple[bool, bool], Path], restored: dict[Any, Any]
) -> None:
    assert restored[False, False, True] == values(items[False, False])


def test_pathways_cannot_restore_what_was_written_without_its_flags(
    items: dict[tuple[bool, bool], Path], restored: dict[Any, Any]
) -> None:
    """Orbax's own handler goes by the checkpoint's metadata, whatever the flags; that of Pathways cannot."""
    assert restored["control"] == values(items[NOT_FORWARDED])
    assert 'Error opening "zarr" driver' in restored["not forwarded"]["error"]
    assert '/.zarray" does not exist' in restored["not forwarded"]["error"]


def test_the_settings_and_models_that_the_drop_in_commands_know_are_maxtexts() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([MAXTEXT_PYTHON, "-c", NAMES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    settings, models = json.loads(done.stdout.splitlines()[-1])
    assert sorted(setting_names()) == settings
    assert [name for name in models if not is_model_name(name)] == []
