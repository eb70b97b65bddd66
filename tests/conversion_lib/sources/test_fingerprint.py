"""What makes a source another one: other headers, other content; not another path or time where content is known."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy

from conversion_lib.sources.files import LocalFiles
from conversion_lib.sources.fingerprint import origin_of, source_identity
from conversion_lib.sources.safetensors import SafetensorsSource


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    safetensors.numpy.save_file({"x": np.ones(4, np.float32)}, directory / "model.safetensors")
    return directory


def identity(directory) -> str:
    return source_identity(SafetensorsSource(directory))


def copy(source, touched: bool = False):
    target = source.with_name("b")
    shutil.copytree(source, target)
    if touched:
        os.utime(target / "model.safetensors", ns=(1, 1))
    return target


def test_the_same_files_are_the_same_source(source):
    assert identity(source) == identity(copy(source))


def test_without_provenance_a_changed_time_makes_another_source(source):
    assert identity(source) != identity(copy(source, touched=True))


def test_with_verified_hashes_the_time_does_not_matter(source):
    size = (source / "model.safetensors").stat().st_size
    provenance = {"repo": "o/r", "commit": "c", "files": [{"path": "model.safetensors", "size": size, "sha256": "abc"}]}
    (source / "provenance.json").write_text(json.dumps(provenance))
    assert identity(source) == identity(copy(source, touched=True))
    assert origin_of(LocalFiles(source)).repo == "o/r"
    assert origin_of(LocalFiles(source)).commit == "c"


def test_a_file_changed_after_it_was_verified_is_another_source(source):
    size = (source / "model.safetensors").stat().st_size
    files = [{"path": "model.safetensors", "size": size, "sha256": "abc"}]
    (source / "provenance.json").write_text(json.dumps({"files": files}))
    before = identity(source)
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(size - 1)
        file.write(b"x")
    later = (source / "provenance.json").stat().st_mtime_ns + 1_000_000
    os.utime(source / "model.safetensors", ns=(later, later))
    assert identity(source) != before


def test_other_hashes_make_another_source(source):
    size = (source / "model.safetensors").stat().st_size
    found = set()
    for digest in ("abc", "abd"):
        files = [{"path": "model.safetensors", "size": size, "sha256": digest}]
        (source / "provenance.json").write_text(json.dumps({"files": files}))
        found.add(identity(source))
    assert len(found) == 2


def test_other_names_make_another_source(source):
    before = identity(source)
    safetensors.numpy.save_file({"y": np.ones(4, np.float32)}, source / "model.safetensors")
    assert identity(source) != before
