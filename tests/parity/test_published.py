"""MaxText and Orbax read a checkpoint where it was published: over gs://, from the tests' Cloud Storage."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.logits.by_maxtext.settings import EXACT, model_settings
from conversion_lib.models.hf_config import load_config
from conversion_lib.publish.publish import publish
from conversion_lib.record import Target
from tests.parity.harness import MAXTEXT_PYTHON
from tests.support.checkpoints import QWEN3, random_tensors, write_checkpoint
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.sparse_checkpoints import llama_tensors
from tests.support.tiny_models import prompt

pytestmark = pytest.mark.core

TARGETS = {"default": Target(), "pathways": Target(ocdbt=False, zarr3=False)}

Answers = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeCloudStorage]:
    with FakeCloudStorage(["bucket"]) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", running.endpoint)  # google-cloud-storage, and gcsfs under Orbax
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", running.endpoint)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield running


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def answers(fake: FakeCloudStorage, work: Path) -> Answers:
    """What MaxText's environment says, by the kind of storage and by what it was asked."""
    source = write_checkpoint(work / "hf", QWEN3, random_tensors(llama_tensors(QWEN3)))
    np.save(source / "tokens.npy", prompt(16, QWEN3["vocab_size"]))
    jobs: dict[tuple[str, str], dict[str, Any]] = {}
    for name, target in TARGETS.items():
        convert(source, work / name, target=target)
        if target.ocdbt:  # written straight to the bucket, and copied within it
            convert(source, f"gs://bucket/staging/{name}", target=target)
        staged = f"gs://bucket/staging/{name}" if target.ocdbt else work / name
        published = publish(staged, "gs://bucket/models", unchecked=True).url
        jobs[name, "compare"] = {"kind": "compare", "ours": str(work / name), "theirs": published}
        for where, checkpoint in {"local": str(work / name), "published": published}.items():
            jobs[name, where] = {
                "kind": "logits",
                "checkpoint": checkpoint,
                "settings": [*model_settings(load_config(source), True, target.ocdbt, target.zarr3), *EXACT],
                "tokens": f"{source}/tokens.npy",
                "out": str(work / f"{name}-{where}.npy"),
            }
    (work / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [MAXTEXT_PYTHON, Path(__file__).with_name("maxtext_worker.py"), work / "jobs.json", work / "results.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(jobs, json.loads((work / "results.json").read_text()), strict=True))


@pytest.mark.parametrize("storage", TARGETS)
def test_orbax_restores_the_same_bits(answers: Answers, storage: str) -> None:
    compared = answers[storage, "compare"]
    assert "error" not in compared, compared
    assert len(compared["value"]["leaves"]) > 5 and compared["value"]["differences"] == []


@pytest.mark.parametrize("storage", TARGETS)
def test_maxtext_runs_it(answers: Answers, work: Path, storage: str) -> None:
    loaded = answers[storage, "published"]
    assert loaded.get("value", {}).get("training_loader") == "same", loaded
    logits = [np.load(work / f"{storage}-{where}.npy") for where in ("published", "local")]
    assert np.isfinite(logits[0]).all() and np.ptp(logits[0]) > 0
    np.testing.assert_array_equal(*logits)
