"""What a checkpoint has beside its weights, and what of it goes along with a conversion."""

from __future__ import annotations

import json
import re
from pathlib import Path

import conversion_lib
from conversion_lib.models.hf_config import CONFIG_NAME, QUANTIZATION_KEY, ModelConfig
from conversion_lib.plan.plan import Plan
from conversion_lib.record import HF_RECORD_NAME, Origin
from conversion_lib.storage.files import write_atomically
from conversion_lib.storage.interface import Location

NOT_COPIED = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)|\..*|.*\.index\.json")
"""Files of a source that are weights in some form, an index of them, or hidden."""


def write_record(directory: Path, plan: Plan, origin: Origin) -> None:
    """Notes which run wrote the Hugging Face checkpoint in `directory`. The last to be written: files that are
    younger count as changed."""
    record = {
        "ferry_version": conversion_lib.__version__,
        "fingerprint": plan.fingerprint,
        "identity": plan.full_identity,
        "origin": origin.model_dump(),
    }
    write_atomically(directory / HF_RECORD_NAME, json.dumps(record, indent=2).encode())


def copy_side_files(directory: Location, config: ModelConfig, destination: Path) -> None:
    """Copies the files beside the weights in `directory`: tokenizer, generation config, licence, provenance.

    config.json goes without `quantization_config`, since the weights are plain now. Several may do this at once.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for name in sorted(directory.children() - {CONFIG_NAME, HF_RECORD_NAME}):
        if not NOT_COPIED.fullmatch(name):
            (directory / name).copy_to(destination / name)
    raw = {key: value for key, value in config.raw.items() if key != QUANTIZATION_KEY}
    write_atomically(destination / CONFIG_NAME, json.dumps(raw, indent=2).encode())
