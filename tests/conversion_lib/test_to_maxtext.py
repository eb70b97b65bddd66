"""MaxText's own command line for its converter, with the module's name changed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conversion_lib.cli.command import run_command
from conversion_lib.demo.local_hub import LocalHub
from conversion_lib.maxtext.names import model_of, setting_names, size_differences
from conversion_lib.models.hf_config import load_config
from conversion_lib.record import CheckpointRecord
from conversion_lib.sources.orbax import open_orbax, record_of
from conversion_lib.to_maxtext import run
from tests.support.checkpoints import QWEN3, ferry_here, random_tensors, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors
from tests.support.tiny_models import make_tiny

GUIDE = """
python3 -m conversion_lib.to_maxtext \
    model_name=${MODEL?} \
    base_output_directory=${BASE_OUTPUT_DIRECTORY?} \
    scan_layers=True \
    use_multimodal=false \
    hardware=cpu \
    skip_jax_distributed_system=true \
    checkpoint_storage_use_zarr3=$((1 - USE_PATHWAYS)) \
    checkpoint_storage_use_ocdbt=$((1 - USE_PATHWAYS)) \
    --save_dtype=bfloat16
"""
"""The arguments that MaxText's guide to checkpoint conversion gives as its example."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", QWEN3, random_tensors(llama_tensors(QWEN3)))


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub({"Qwen/Qwen3-0.6B": source, "acme/tiny": source}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.delenv("HF_AUTH_TOKEN", raising=False)
        yield running


def call(*words: object, code: int = 0) -> None:
    """Runs it in this process, from its words to its exit code."""
    assert run_command(lambda reporter: run([str(word) for word in words], reporter)) == code


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an input that is refused, which leaves nothing."""
    call(*words, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1
    return lines[0]


def known_record(out: Path) -> CheckpointRecord:
    record = record_of(out)
    assert record is not None
    return record


@pytest.mark.parametrize("pathways", [0, 1])
def test_the_guides_example(hub: LocalHub, tmp_path: Path, pathways: int) -> None:
    """As a shell runs it, with the module's name changed."""
    settings = {"MODEL": "qwen3-0.6b", "BASE_OUTPUT_DIRECTORY": str(tmp_path / "out"), "USE_PATHWAYS": str(pathways)}
    command = GUIDE.replace("python3", shlex.quote(sys.executable))
    done = subprocess.run(["bash", "-c", command], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"load_parameters_path: {tmp_path}/out/0/items" in done.stdout
    source = open_orbax(tmp_path / "out")
    assert (source.ocdbt, source.zarr3, source.scan_layers) == (not pathways, not pathways, True)
    record = known_record(tmp_path / "out")
    assert (record.model_name, record.origin.repo) == ("qwen3-0.6b", "Qwen/Qwen3-0.6B")
    assert "config.json differs from MaxText's qwen3-0.6b in hidden_size (24, not 1024)" in done.stderr
    assert "ignored: use_multimodal" not in done.stderr, "it is looked at"
    assert "ignored, since they have no effect here: hardware, skip_jax_distributed_system" in done.stderr


def test_what_maxtexts_on_the_fly_conversion_passes(source: Path, tmp_path: Path) -> None:
    """The words with which from_pretrained of 0.2.5 starts its converter."""
    call(
        "model_name=qwen3-0.6b",
        f"base_output_directory={tmp_path / 'out'}",
        "scan_layers=False",
        "use_multimodal=false",
        "skip_jax_distributed_system=True",
        "--lazy_load_tensors=True",
        "--simulated_cpu_devices_count=16",
        "checkpoint_storage_use_ocdbt=False",
        "checkpoint_storage_use_zarr3=False",
        f"--hf_model_path={source}",
    )
    target = known_record(tmp_path / "out").target
    assert (target.scan_layers, target.ocdbt, target.zarr3, target.shards) == (False, False, False, 16)


def test_the_same_bits_as_ferry_convert(source: Path, tmp_path: Path) -> None:
    call("base.yml", "model_name=qwen3-0.6b", f"base_output_directory={tmp_path / 'a'}", "--hf_model_path", source)
    assert ferry_here("convert", source, tmp_path / "b", "--scan-layers").returncode == 0
    assert ferry_here("compare", tmp_path / "a", tmp_path / "b").returncode == 0


def test_the_transformers_loader(tmp_path: Path) -> None:
    """It gives the same bits; a checkpoint whose tensors transformers cannot find is refused by it alone."""
    source = make_tiny("qwen3", tmp_path / "source")
    words = ("model_name=qwen3-0.6b", f"hf_model_path={source}")
    call(*words, f"base_output_directory={tmp_path / 'a'}", "--eager_load_method=transformers")
    call(*words, f"base_output_directory={tmp_path / 'b'}")
    assert ferry_here("compare", tmp_path / "a", tmp_path / "b").returncode == 0
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "of nobody"}))
    call(*words, f"base_output_directory={tmp_path / 'c'}")
    call(*words, f"base_output_directory={tmp_path / 'd'}", "--eager_load_method=transformers", code=2)


def test_flags_in_all_their_spellings(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(
        "model_name=qwen3-0.6b",
        f"base_output_directory={tmp_path}",
        *("--save_dtype", "float32", f"hf_model_path={source}", "--simulated_cpu_devices_count=4"),
        *("lazy_load_tensors=False", "revision=v2", "weight_dtype=float32", "attention=dot_product"),
    )
    target = known_record(tmp_path).target
    assert (target.save_dtype, target.shards) == ("float32", 4)
    said = capsys.readouterr().err
    assert "revision=v2 is ignored" in said
    assert said.count("ignored, since they have no effect here") == 1
    assert "lazy_load_tensors (ferry always streams), weight_dtype (save_dtype sets the dtype" in said
    assert said.count(", attention\n") == 1


def test_a_repository_and_a_revision(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.repos["acme/tiny"].commit
    call(
        "model_name=qwen3-8b-base", "hf_model_path=acme/tiny", f"revision={commit}", f"base_output_directory={tmp_path}"
    )
    origin = known_record(tmp_path).origin
    assert (origin.repo, origin.commit) == ("acme/tiny", commit)


def test_a_token_in_any_of_maxtexts_places(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.gated["acme/tiny"] = "hf_secret"
    words = ("model_name=qwen3-0.6b", "hf_model_path=acme/tiny")
    assert "acme/tiny is gated" in refused(capsys, *words, f"base_output_directory={tmp_path / 'a'}")
    call(*words, f"base_output_directory={tmp_path / 'b'}", "hf_access_token=hf_secret")
    said = capsys.readouterr()
    assert "set HF_TOKEN" in said.err and "hf_secret" not in said.err + said.out
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_AUTH_TOKEN", "hf_secret")
    call(*words, f"base_output_directory={tmp_path / 'c'}")


def test_running_it_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("model_name=qwen3-0.6b", f"base_output_directory={tmp_path}", f"hf_model_path={source}")
    call(*words)
    call(*words)
    assert "already done" in capsys.readouterr().out
    assert "target scan_layers: True there, False here" in refused(capsys, *words, "scan_layers=false")
    call(*words, "scan_layers=false", "--overwrite")
    assert not known_record(tmp_path).target.scan_layers


def test_a_configuration_file_gives_values(source: Path, tmp_path: Path) -> None:
    settings = tmp_path / "mine.yml"
    settings.write_text(
        f"# ours\nscan_layers: false # as in training\nbase_output_directory: '{tmp_path / 'out'}'\nsteps: 5\n"
        "checkpoint_storage_use_zarr3: False\n"
    )
    call(settings, "model_name=qwen3-0.6b", f"hf_model_path={source}", "checkpoint_storage_use_zarr3=true")
    target = known_record(tmp_path / "out").target
    assert (target.scan_layers, target.zarr3) == (False, True), "the command line comes first"


def test_shards_are_what_the_chunks_fit(tmp_path: Path) -> None:
    config = QWEN3 | {"vocab_size": 40960, "hidden_size": 768, "num_hidden_layers": 1, "tie_word_embeddings": True}
    tensors = {name: np.zeros(shape, np.float32) for name, shape, _ in llama_tensors(config)}
    source = write_checkpoint(tmp_path / "source", config, tensors)
    words = ("model_name=qwen3-0.6b", f"hf_model_path={source}")
    rows = {}
    for devices in (1, 2, 4):
        call(*words, f"base_output_directory={tmp_path / str(devices)}", f"--simulated_cpu_devices_count={devices}")
        rows[devices] = open_orbax(tmp_path / str(devices)).chunk_shape("params/params/token_embedder/embedding")[0]
    assert rows == {1: 40960, 2: 20480, 4: 10240}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scan_layer=true",), "scan_layer is not known; the nearest is scan_layers"),
        (("--hf_modelpath=x",), "--hf_modelpath is not known; the nearest is hf_model_path"),
        (("zzzzzz=1",), "zzzzzz is not known: MaxText has no such setting"),
        (("scan_layers",), "scan_layers has no value: write scan_layers=VALUE"),
        (("--save_dtype",), "--save_dtype has no value"),
        (("scan_layers=maybe",), "scan_layers=maybe: write true or false"),
        (("--save_dtype=float8_e4m3fn",), "float8_e4m3fn: MaxText can save it, ferry cannot"),
        (("--simulated_cpu_devices_count=0",), "simulated_cpu_devices_count=0: write a number of at least 1"),
        (("--eager_load_method=torch",), "eager_load_method=torch: ferry takes safetensors and transformers"),
        (("param_scan_axis=0",), "param_scan_axis=0: ferry stacks layers on axis 1"),
        (("use_multimodal=true",), "use_multimodal=true: ferry converts only the text model"),
        (("hf_lora_adapter_path=a/b",), "hf_lora_adapter_path=a/b: ferry does not convert LoRA adapters"),
        (("model_name=qwen3-vl-2b",), "model qwen3-vl-2b: MaxText knows this name, but ferry has no conversion"),
        (("model_name=qwen3-0.7b",), "no model is named qwen3-0.7b; the nearest are"),
        (("model_name=",), "model_name is missing"),
        (("hf_model_path=/no/where",), "/no/where is not a directory"),
    ],
)
def test_bad_input(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    line = refused(
        capsys, "model_name=qwen3-0.6b", f"hf_model_path={source}", f"base_output_directory={tmp_path / 'out'}", *words
    )
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "other.yml: no such configuration file"),
        ("scan_layers: [", "other.yml, line 1: expected the node content"),
        ("- scan_layers", "other.yml has no settings: expected lines such as scan_layers: true"),
        ("scan_layer: true", "other.yml: scan_layer is not known; the nearest is scan_layers"),
        ("hf_lora_adapter_path: a/b", "hf_lora_adapter_path=a/b: ferry does not convert LoRA adapters"),
        ("lora:\n  lora_restore_path: a/b", "lora.lora_restore_path=a/b: ferry does not convert LoRA adapters"),
        ("use_multimodal: true", "use_multimodal=true: ferry converts only the text model"),
        ("model_name: default", "model_name is missing"),
        ("base_config: nowhere.yml", "nowhere.yml: no such configuration file"),
        ("base_config: other.yml", "which is based on it"),
        (f"base_config: {'x' * 5000}", "base_config is no file's name"),
        ('base_config: "a\\0b"', "no such configuration file"),
        ("a: " + "[" * 500, "more than 50 levels"),
    ],
)
def test_a_configuration_file_that_will_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "other.yml").write_text(content)
    given = () if "model_name" in said else ("model_name=qwen3-0.6b",)
    assert said in refused(capsys, tmp_path / "other.yml", *given)


def test_a_file_that_is_based_on_others(source: Path, tmp_path: Path) -> None:
    """As MaxText's own are: one beside it or in a directory above, whose values it replaces."""
    (tmp_path / "configs" / "tpu").mkdir(parents=True)
    (tmp_path / "base.yml").write_text("model_name: default\nscan_layers: True\ncheckpoint_storage_use_ocdbt: False\n")
    (tmp_path / "configs" / "mine.yml").write_text("base_config: base.yml\nmodel_name: 'qwen3-0.6b'  # mine\n")
    settings = tmp_path / "configs" / "tpu" / "run.yml"
    settings.write_text(f"base_config: mine.yml\nscan_layers: false\nbase_output_directory: {tmp_path / 'a#b'}\n")
    call(settings, f"hf_model_path={source}")
    record = known_record(tmp_path / "a#b")
    assert (record.family, record.model_name) == ("qwen3", source.name)  # a name renames nothing
    assert (record.target.scan_layers, record.target.ocdbt, record.target.zarr3) == (False, False, True)


def test_the_environment_overrides_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yml").write_text("scan_layers: true\n")
    words = ("model_name=qwen3-0.6b", f"hf_model_path={source}", f"base_output_directory={tmp_path / 'out'}")
    monkeypatch.setenv("M_SCAN_LAYERS", "false")
    monkeypatch.setenv("M_STEPS", "7")
    assert "scan_layers is given, and M_SCAN_LAYERS" in refused(capsys, *words, "scan_layers=false")
    call(tmp_path / "mine.yml", *words)
    assert not known_record(tmp_path / "out").target.scan_layers


def test_help_names_what_has_a_meaning() -> None:
    done = subprocess.run([sys.executable, "-m", "conversion_lib.to_maxtext", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "simulated_cpu_devices_count" in done.stdout


def test_sizes_under_another_spelling_are_compared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"num_local_experts": 8, "hidden_size": 2048}, {})
    assert size_differences(model_of("qwen3-30b-a3b"), load_config(tmp_path)) == ["num_local_experts (8, not 128)"]


def test_maxtexts_settings_are_known() -> None:
    assert {"scan_layers", "lora.lora_rank", "ici_fsdp_parallelism"} <= set(setting_names())
    assert len(setting_names()) > 800
