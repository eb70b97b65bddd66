"""The Python in the pages is run, and the package stays cheap to import. For commands: tests/test_docs.py."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion_lib import api
from conversion_lib.demo.local_hub import LocalHub
from tests.support.paths import ROOT
from tests.support.tiny_models import make_tiny

DOCS = ROOT / "docs"
MODULES_THAT_COST = ("jax", "orbax", "torch", "transformers", "huggingface_hub", "google.cloud.storage")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory in which an example runs, with a Hub that has its model."""
    shutil.copytree(model, tmp_path / "qwen3" / "hf")
    monkeypatch.chdir(tmp_path)
    with LocalHub({"Qwen/Qwen3-0.6B": model}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / ".hf"))
        monkeypatch.setenv("FERRY_CACHE", str(tmp_path / ".cache"))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield tmp_path


def examples(document: str, language: str) -> str:
    """All of a document's examples in a language, one after the other."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (DOCS / document).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return "\n".join(found)


def test_the_examples_of_the_api(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(examples("guides/python.md", "python"), "python.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("qwen3 (500, 96) ")
    assert "target scan_layers: True there, False here" in said
    assert (here / "qwen3/maxtext/report/report.html").exists()


def test_the_examples_of_on_the_fly(here: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(examples("guides/on_the_fly.md", "python"), "on_the_fly.md", "exec"), names)
    assert names["load_parameters_path"] == here / "runs" / "base" / "0" / "items"


def test_importing_is_cheap() -> None:
    code = f"import sys, conversion_lib.api; print([name for name in {MODULES_THAT_COST} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", [name for name, _ in inspect.getmembers(api, inspect.isfunction)])
def test_each_function_says_what_it_does(name: str) -> None:
    assert len(inspect.getdoc(getattr(api, name)) or "") > 50
