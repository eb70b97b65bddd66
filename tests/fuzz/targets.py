"""What reads input from outside, as functions of bytes: each returns, or raises FerryError with one line."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from conversion_lib.core.documents import parse_yaml
from conversion_lib.core.patterns import compile_pattern
from conversion_lib.errors import FerryError
from conversion_lib.families import family_of
from conversion_lib.logits.reference.golden import load_golden, save_golden
from conversion_lib.logits.reference.reference import Reference
from conversion_lib.maxtext.arguments import _settings_in
from conversion_lib.models.hf_config import ModelConfig, config_of
from conversion_lib.plan.plan import ArrayPlan, Plan
from conversion_lib.publish.location import Marker
from conversion_lib.publish.manifest import Manifest
from conversion_lib.publish.verdict import parse_verdict
from conversion_lib.record import CheckpointRecord, Origin, Provenance, RemoteFile, Target, parsed, record_in
from conversion_lib.runs.journal import Journal
from conversion_lib.shown import one_line
from conversion_lib.sources.quantization import compressed_tensors
from conversion_lib.sources.safetensors_header import parse_header
from conversion_lib.sources.weight_files import read_index
from conversion_lib.storage.checksums import FileEntry
from ferry_airflow.scheduling.catalog import load_catalog
from tests.fuzz.mutations import mutated
from tests.support.checkpoints import QWEN3

CONFIG = QWEN3 | {"vocab_size": 5, "max_position_embeddings": 4096}
QUANTIZED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*gate$", r"re:^(?!mtp\.).*x"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "re:.*self_attn.*"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        }
    },
}
CATALOG = b"""schedule: "0 3 * * *"
at_most: 2
defaults: {destination: gs://bucket/models}
models:
  - repo: Qwen/Qwen3-0.6B
    revision: {branch: main}
    targets: [{scan_layers: true}, {scan_layers: false}]
  - repo: a/b
    revision: {tag: "v*"}
"""
RECORD = CheckpointRecord(
    ferry_version="1",
    fingerprint="f" * 12,
    identity={"source": "{}", "config": "{}"},
    family="qwen3",
    model_name="qwen3-0.6b",
    origin=Origin(path="/x"),
    target=Target(),
    arrays=1,
    bytes_in=1,
    bytes_out=1,
    exact=True,
)
PLAN = Plan(
    kind="orbax",
    arrays=(ArrayPlan(path="a", shape=(8, 4), dtype="bfloat16", chunk_shape=(4, 4), ops=(), sources=()),),
    identity={"source": "{}"},
    exact=True,
)

TENSORS = b'{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}, "__metadata__": {"format": "pt"}}'
HEADER = struct.pack("<Q", len(TENSORS)) + TENSORS
INDEX = b'{"metadata": {"total_size": 20}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'
FILE = FileEntry(path="0/items/_METADATA", size=2, crc32c="AAAAAA==")
MANIFEST = Manifest(digest="sha256:0", checked=True, ferry="1", files=[FILE])
MARKER = Marker(
    digest="sha256:0", checked=True, manifest_crc32c="AAAAAA==", published="2026-01-01T00:00:00+00:00", ferry="1"
)
DOWNLOAD = Provenance(
    repo="a/b",
    revision="main",
    commit="0" * 40,
    endpoint="https://huggingface.co",
    files=[RemoteFile(path="config.json", size=2, sha256=None, blob_id="0" * 40)],
    modified={"config.json": 1},
    started="2026-01-01T00:00:00+00:00",
    finished="2026-01-01T00:00:00+00:00",
    huggingface_hub="2",
    ferry="1",
)


@dataclass(frozen=True, repr=False)
class Input:
    """An input that is fuzzed.

    Attributes:
        valid: A valid input.
        read: Reads an input.
    """

    valid: bytes
    read: Callable[[bytes], object]


class OneLine:
    """A log with one line."""

    def __init__(self, line: bytes) -> None:
        self.line = line

    def replay(self, take: Callable[[bytes], bool]) -> None:
        for line in self.line.splitlines(keepends=True):
            if not take(line):
                break


def inputs(directory: Path) -> dict[str, Input]:
    """Returns the inputs by name. Those that are read from files are written to `directory`."""

    def through(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = directory / name

        def write_and_read(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return write_and_read

    def config(content: bytes) -> object:
        found = config_of(content, "config.json")
        return family_of(found).sizes(found)

    def quantization(content: bytes) -> object:
        found = config_of(content, "config.json")
        return compressed_tensors.weights({}, ModelConfig(CONFIG, "config.json"), found.raw)

    def golden(path: Path) -> object:
        return load_golden(path, CONFIG)

    arrays = [np.array([1, 2, 3], np.int32), np.linspace(0, 1, 15, dtype=np.float32).reshape(3, 5)]
    points = [{"prompt": "x", "tokens": arrays[0], "logits": arrays[1]}]
    plain = [{"prompt": "x", "tokens": [1, 2, 3], "logits": arrays[1].tolist()}]
    save_golden(directory / "valid.npz", Reference(CONFIG, [arrays[0]], [arrays[1]], {}, "bfloat16"))
    journal = json.dumps({"pieces": [["a", [[0, 4], [0, 4]]]]}).encode() + b"\n"
    return {
        "config": Input(json.dumps(CONFIG).encode(), config),
        "quantization": Input(json.dumps(QUANTIZED).encode(), quantization),
        "pattern": Input(rb"^(?!mtp\.).*layers\.\d+\.(q|k)_proj$", lambda c: compile_pattern(c.decode("latin-1"), "x")),
        "yaml": Input(b"a: &x {b: [1, 2.5, 2026-01-01, ~]}\nc: {<<: *x, d: 'e'}\n", lambda c: parse_yaml(c, "x.yaml")),
        "catalog": Input(CATALOG, through("catalog.yaml", load_catalog)),
        "maxtext_settings": Input(
            b"base_config: null\nscan_layers: true\nsteps: 5\n",
            through("settings.yml", lambda path: _settings_in(path, ["scan_layers", "steps"])),
        ),
        "record": Input(RECORD.model_dump_json().encode(), lambda c: record_in({"ferry.json": c}.get, "x")),
        "header": Input(HEADER, lambda c: parse_header("x.safetensors", len(c) + 20, c)),
        "index": Input(INDEX, lambda c: read_index("index.json", c)),
        "marker": Input(MARKER.model_dump_json().encode(), lambda c: parsed(Marker, c, "x", "marker")),
        "manifest": Input(MANIFEST.model_dump_json().encode(), lambda c: parsed(Manifest, c, "x", "manifest")),
        "download": Input(DOWNLOAD.model_dump_json().encode(), lambda c: parsed(Provenance, c, "x", "record")),
        "verdict": Input(b'{"verdict": "pass", "digest": "sha256:0", "max_kl": 0.1}', lambda c: parse_verdict(c, "x")),
        "journal": Input(journal * 3, lambda content: Journal(OneLine(content), PLAN).count),
        "npz": Input((directory / "valid.npz").read_bytes(), through("golden.npz", golden)),
        "jsonl": Input(json.dumps(plain[0]).encode() + b"\n", through("golden.jsonl", golden)),
        "pickle": Input(pickle.dumps(points), through("golden.pickle", golden)),
        "pickle_2": Input(pickle.dumps(points, 2), through("golden.pkl", golden)),
        "pickle_lists": Input(pickle.dumps(plain, 0), through("lists.pkl", golden)),
    }


def is_refused(one: Input, content: bytes) -> bool:
    """Reads an input. True if it is refused as it should be: with one short line. Any other exception is raised."""
    try:
        one.read(content)
    except FerryError as error:
        message = str(error)
        assert message and len(message) < 2100 and message == one_line(message), ascii(message)
        return True
    return False


def variant(one: Input, seed: int) -> bytes:
    """Returns the variant of a valid input that belongs to a seed."""
    return mutated(one.valid, Random(seed))
