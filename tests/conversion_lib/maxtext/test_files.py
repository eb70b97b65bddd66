"""What lies beside a checkpoint for a MaxText run, and what goes with it where it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conversion_lib.conversions.convert import convert
from conversion_lib.maxtext.names import model_files
from conversion_lib.publish.publish import publish
from conversion_lib.record import CheckpointRecord, Target
from conversion_lib.runs.options import Options
from tests.support.checkpoints import LLAMA, random_tensors, write_checkpoint
from tests.support.published_checkpoints import write_verdict
from tests.support.sparse_checkpoints import llama_tensors

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG = LLAMA | {"rope_scaling": LLAMA3, "max_position_embeddings": 131072}
REASON = "MaxText's model has RoPE factor 8, the original 32"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", CONFIG, random_tensors(llama_tensors(CONFIG)))


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "ckpt", Target(scan_layers=False, zarr3=False))
    return tmp_path / "ckpt"


def settings_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def test_the_settings_lie_beside_a_checkpoint(checkpoint: Path):
    settings = settings_in(checkpoint / "maxtext_settings.yml")
    assert (settings["base_config"], settings["model_name"]) == ("base.yml", "llama3.1-8b")
    assert settings["override_model_config"] is True
    assert (settings["scan_layers"], settings["checkpoint_storage_use_zarr3"]) == (False, False)
    assert settings["checkpoint_storage_use_ocdbt"] is True
    assert (settings["base_emb_dim"], settings["rope_use_scale"]) == (CONFIG["hidden_size"], True)
    assert f"# {REASON}" in (checkpoint / "maxtext_settings.yml").read_text()
    # what MaxText reads over it, unless it finds this one first
    own = settings_in(checkpoint / "models" / "llama3.1-8b.yml")
    assert own.keys() >= model_files()["llama3.1-8b"].keys()
    assert own["decoder_block"] == "llama2"
    assert all(own[name] == value for name, value in settings.items() if name in own)


def test_the_record_says_what_a_run_passes(checkpoint: Path):
    record = CheckpointRecord.model_validate_json((checkpoint / "ferry.json").read_text())
    assert record.maxtext_differs == REASON
    assert record.maxtext_settings["model_name"] == "llama3.1-8b"
    assert record.maxtext_settings["base_emb_dim"] == CONFIG["hidden_size"]


def test_none_is_written_where_the_directory_is_others_too(source: Path, tmp_path: Path):
    (tmp_path / "run" / "models").mkdir(parents=True)
    (tmp_path / "run" / "models" / "mine").write_text("mine")
    convert(source, tmp_path / "run", Target(), options=Options(among_others=True))
    assert (tmp_path / "run" / "models" / "mine").read_text() == "mine"
    assert not (tmp_path / "run" / "maxtext_settings.yml").exists()
    record = CheckpointRecord.model_validate_json((tmp_path / "run" / "ferry.json").read_text())
    assert record.maxtext_differs == REASON


@pytest.mark.parametrize("checked", [True, False])
def test_all_of_it_is_published(checkpoint: Path, tmp_path: Path, checked: bool):
    line = REASON
    if checked:
        (checkpoint / "report").mkdir(exist_ok=True)
        model = {"verdict": "pass", "max_kl": 1.5e-5, "threshold": 1e-3, "differs": REASON, "settings": {}}
        write_verdict(checkpoint, weights="pass", model=model)
        line = f"{REASON}: largest KL of a token 1.50e-05"
    place = Path(publish(checkpoint, str(tmp_path / "published"), unchecked=not checked).url)
    for name in ("maxtext_settings.yml", "models/llama3.1-8b.yml"):
        assert (place / name).read_text() == (checkpoint / name).read_text()
    provenance = json.loads((place / "provenance.json").read_text())
    assert provenance["record"]["maxtext_settings"]["model_name"] == "llama3.1-8b"
    assert not checked or provenance["verdict"]["model"]["differs"] == REASON
    assert json.loads((place / "ferry_commit.json").read_text())["model"] == line
