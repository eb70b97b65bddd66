"""The files beside a checkpoint's weights that a conversion copies or writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import conversion_lib
from conversion_lib.models.hf_config import CONFIG_NAME, QUANTIZATION_KEY, ModelConfig
from conversion_lib.plan.plan import Plan
from conversion_lib.record import HF_RECORD_NAME, NOT_OF_A_SOURCE, HfRecord, Origin
from conversion_lib.sources.noted import modified_times
from conversion_lib.storage.files import write_atomically
from conversion_lib.storage.interface import Location

NOT_COPIED = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)|\..*|.*\.index\.json")
"""Files of a source that are not copied: weights in any form, an index of them, and hidden files."""


def write_record(directory: Path, plan: Plan, origin: Origin) -> None:
    """Writes the record of the run that wrote the Hugging Face checkpoint in `directory`.

    The weights must be complete: a file that is written later counts as changed.
    """
    weights = (path.name for path in directory.glob("*.safetensors"))
    record = HfRecord(
        ferry_version=conversion_lib.__version__,
        fingerprint=plan.fingerprint,
        identity=plan.full_identity,
        origin=origin,
        modified=modified_times(directory, weights),
    )
    write_atomically(directory / HF_RECORD_NAME, record.model_dump_json(indent=2).encode())


def copy_side_files(directory: Location, config: ModelConfig, destination: Path) -> None:
    """Copies the files beside the weights in `directory`: tokenizer, generation config, licence.

    Files that a person would take for records of Ferry are left out. config.json is written from `config`, without
    `quantization_config`, since the weights are plain now. Several processes may do this at once.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for name in sorted(directory.children() - {CONFIG_NAME, *NOT_OF_A_SOURCE}):
        if not NOT_COPIED.fullmatch(name):
            (directory / name).copy_to(destination / name)
    raw = {key: value for key, value in config.raw.items() if key != QUANTIZATION_KEY}
    write_atomically(destination / CONFIG_NAME, json.dumps(raw, indent=2).encode())
