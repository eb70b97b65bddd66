"""The arrays of an .npz: sizes are compared before anything is unpacked."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest

from conversion_lib.errors import BadInput
from conversion_lib.logits.reference.golden import load_golden

IDENTITY = {"format": 2, "prompts": 1, "config": {"vocab_size": 5}, "origin": {}, "dtype": "bfloat16"}


def npy(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array))
    return stream.getvalue()


def header(descr, shape, body=b""):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


GOOD = {
    "identity": npy(json.dumps(IDENTITY)),
    "tokens_0": npy(np.array([1, 2], np.int32)),
    "logits_0": npy(np.zeros((2, 5), np.float32)),
}


def write(path, compression=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**GOOD, **members}.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_reads_stored_and_compressed_files(tmp_path, compression):
    found = load_golden(write(tmp_path / "golden.npz", compression), None)
    assert (found.prompts[0].tolist(), found.logits[0].shape) == ([1, 2], (2, 5))


@pytest.mark.parametrize(
    "members",
    [
        {"tokens_0": header("<i4", (10**12,))},
        {"tokens_0": header("<i4", (2**40, 2**40))},
        {"tokens_0": header("<i4", (0, 10**12))},
        {"tokens_0": header("<i4", (-1,), b"x" * 64)},
        {"tokens_0": header("|O", (1,), b"x" * 8)},
        {"tokens_0": header("<U4", (1,), b"x" * 16)},
        {"tokens_0": header("<c16", (1,), b"x" * 16)},
        {"tokens_0": header("<f4", (2,), b"\0" * 8)},
        {"tokens_0": header([("a", "<i4")], (1,), b"x" * 4)},
        {"logits_0": header("<f4", (2, 5), b"\0" * 20)},
        {"identity": header("<U1000000000", (), bytes(4000))},
        {"identity": npy(["{}", "{}"])},
        {"identity": npy("[" * 5000)},
        {"identity": npy("[1]")},
        {"identity": npy(json.dumps({**IDENTITY, "prompts": 10**15}))},
        {"identity": npy(json.dumps({**IDENTITY, "prompts": "x"}))},
        {"identity": npy(json.dumps({**IDENTITY, "prompts": -1}))},
        {"identity": npy(json.dumps({**IDENTITY, "config": []}))},
        {"identity": npy(json.dumps({"format": 2}))},
        {"identity": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000},
        {"identity": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{"},
        {"identity": b"\x93NUMPY\x09\x00\x00\x00{"},
    ],
)
def test_refuses_arrays_that_are_not_what_they_say(tmp_path, members):
    with pytest.raises(BadInput, match=r"golden\.npz"):
        load_golden(write(tmp_path / "golden.npz", **members), None)


@pytest.mark.timeout(60)
def test_refuses_what_decodes_to_far_more_than_the_file_has(tmp_path):
    elements = 20 << 20
    path = write(tmp_path / "golden.npz", tokens_0=header("<i4", (elements,), bytes(4 * elements)))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(BadInput, match="tokens_0 takes 83886208 bytes, more than"):
        load_golden(path, None)
