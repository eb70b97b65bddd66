"""MaxText's own command line for its way back, with the module's name changed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.demo.local_hub import LocalHub
from conversion_lib.program import run_command
from conversion_lib.record import Target
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.to_huggingface import run
from tests.support.checkpoints import QWEN3, ferry_here, random_tensors, write_checkpoint
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.fakes.hub_uploads import UploadHub
from tests.support.sparse_checkpoints import llama_tensors

GUIDE = """
python3 -m conversion_lib.to_huggingface \
    model_name=${MODEL?} \
    load_parameters_path=${MAXTEXT_CKPT_PATH?} \
    base_output_directory=${BASE_OUTPUT_DIRECTORY?} \
    hardware=cpu \
    skip_jax_distributed_system=true \
    scan_layers=false \
    use_multimodal=false \
    weight_dtype=bfloat16
"""
"""The arguments that MaxText's guide to checkpoint conversion gives as its example."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("source") / "hf", QWEN3, random_tensors(llama_tensors(QWEN3)))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("maxtext") / "out"
    convert(source, out, Target(scan_layers=False))
    return out


@pytest.fixture
def of_maxtext(checkpoint: Path, tmp_path: Path) -> Path:
    """The same as MaxText leaves it: nothing beside `0/`."""
    shutil.copytree(checkpoint / "0", tmp_path / "maxtext" / "0")
    return tmp_path / "maxtext" / "0" / "items"


def call(*words: object, code: int = 0) -> None:
    """Runs it in this process, from its words to its exit code."""
    assert run_command(lambda reporter: run([str(word) for word in words], reporter)) == code


def words(checkpoint: Path, out: Path) -> tuple[str, ...]:
    return ("model_name=qwen3-0.6b", f"load_parameters_path={checkpoint}", f"base_output_directory={out}")


def test_the_guides_example(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    """As a shell runs it, with the module's name changed."""
    settings = {
        "MODEL": "qwen3-0.6b",
        "MAXTEXT_CKPT_PATH": str(checkpoint / "0" / "items"),
        "BASE_OUTPUT_DIRECTORY": str(tmp_path / "out"),
    }
    command = GUIDE.replace("python3", shlex.quote(sys.executable))
    done = subprocess.run(["bash", "-c", command], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ferry_here("compare", source, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert "ignored, since they have no effect here: hardware, skip_jax_distributed_system" in done.stderr


def test_without_a_dtype_it_is_maxtexts(checkpoint: Path, tmp_path: Path) -> None:
    call(*words(checkpoint, tmp_path / "out"))
    assert {info.dtype for info in SafetensorsSource(tmp_path / "out").tensors.values()} == {"float32"}


def test_config_and_tokenizer_of_another_model(source: Path, of_maxtext: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    (other / "tokenizer.json").write_text('{"version": "2.0"}')
    call(*words(of_maxtext, tmp_path / "out"), "weight_dtype=bfloat16", f"--hf_model_path={other}")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "2.0"}'
    assert ferry_here("compare", source, tmp_path / "out").returncode == 0


def test_what_maxtext_wrote_takes_them_from_the_hub(
    source: Path, of_maxtext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalHub({"Qwen/Qwen3-0.6B": source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        call(*words(of_maxtext, tmp_path / "out"), "weight_dtype=bfloat16")
        assert not [path for _, path in hub.requests if path.endswith(".safetensors")], "no weights are fetched"
    assert ferry_here("compare", source, tmp_path / "out").returncode == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == QWEN3["hidden_size"]


def test_running_it_again(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(*words(checkpoint, tmp_path / "out"))
    call(*words(checkpoint, tmp_path / "out"))
    assert "already done" in capsys.readouterr().out


def test_a_file_says_nothing_against_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """MaxText's base.yml has scan_layers: True; only what is said on the command line has to fit."""
    (tmp_path / "base.yml").write_text("scan_layers: True\nweight_dtype: bfloat16\n")
    call(tmp_path / "base.yml", *words(checkpoint, tmp_path / "out"))
    assert {info.dtype for info in SafetensorsSource(tmp_path / "out").tensors.values()} == {"bfloat16"}


def test_to_a_bucket(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files as in a directory, and none of them is left here."""
    from google.cloud import storage

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    call(*words(checkpoint, tmp_path / "out"))
    with FakeCloudStorage(["bucket"]) as cloud:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", cloud.endpoint)
        call(*words(checkpoint, "gs://bucket/exports/x"))
        sent = {blob.name: blob.download_as_bytes() for blob in storage.Client().list_blobs("bucket")}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert sent[f"exports/x/{name}"] == (tmp_path / "out" / name).read_bytes()
    assert not list((tmp_path / "here").iterdir())


def test_to_the_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private repository, as MaxText makes it, and one commit."""
    with UploadHub("hf_mayWrite") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_mayWrite")
        call(*words(checkpoint, "hf://acme/back"))
        repo = hub.repos["acme/back"]
    assert repo["private"]
    (commit,) = repo["commits"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(commit["files"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("scan_layers=true",), "scan_layers=true, but "),
        (("weight_dtype=float8_e4m3fn",), "weight_dtype=float8_e4m3fn: ferry takes float32 and bfloat16 and float16"),
        (("load_parameters_path=/no/where",), "/no/where has no Orbax checkpoint"),
        (("load_parameters_path=",), "load_parameters_path is missing"),
        (
            ("base_output_directory=s3://me/x",),
            "s3://me/x: expected a directory or gs://... or hf://..., for base_output_directory",
        ),
        (("lora.lora_restore_path=x",), "lora.lora_restore_path=x: ferry does not convert LoRA adapters"),
        (("--hf_model_path=tests",), "hf_model_path=tests has no config.json"),
        (("load_full_state_path=x",), "load_full_state_path=x: give load_parameters_path"),
        (("--save_dtype=bfloat16",), "--save_dtype is not known"),
        (("weightdtype=bfloat16",), "weightdtype is not known; the nearest is weight_dtype"),
        (("model_name=qwen3-omni-30b-a3b",), "MaxText knows this name, but ferry has no conversion for it"),
    ],
)
def test_bad_input(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], said: str
) -> None:
    call(*words(checkpoint, tmp_path / "out"), *given, code=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
