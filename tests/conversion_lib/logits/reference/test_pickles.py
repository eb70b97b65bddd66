"""Golden pickles without the unpickler: what numpy writes is read, and nothing is called."""

from __future__ import annotations

import datetime
import pickle
import struct

import numpy as np
import pytest

from conversion_lib.errors import BadInput
from conversion_lib.logits.reference.golden import load_golden
from conversion_lib.logits.reference.pickles import NotPlain, PickledArray, load

CONFIG = {"vocab_size": 5}
TOKENS = [1, 4, 0]
LOGITS = np.linspace(-1, 1, 15).reshape(3, 5)


def read(tmp_path, content):
    (tmp_path / "golden.pickle").write_bytes(content)
    return load_golden(tmp_path / "golden.pickle", CONFIG)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("tokens", "logits"),
    [
        (np.array(TOKENS), LOGITS),
        (np.array(TOKENS, np.int32), LOGITS.astype(np.float32)),
        (np.array(TOKENS, np.uint8), LOGITS.astype(">f4")),
        (TOKENS, LOGITS.tolist()),
        (tuple(TOKENS), list(LOGITS)),
        ([np.int64(token) for token in TOKENS], [[np.float32(x) for x in row] for row in LOGITS]),
        (np.array(TOKENS), np.asfortranarray(LOGITS)),
        (np.array([0, *TOKENS])[1:], LOGITS[:, ::-1][:, ::-1].astype(np.float16)),
    ],
)
def test_reads_what_the_unpickler_reads(tmp_path, protocol, tokens, logits):
    points = [{"prompt": "x", "tokens": tokens, "logits": logits, "n": 2**70, "f": 1.5, "b": [True, None, b"y"]}] * 2
    found = read(tmp_path, pickle.dumps(points, protocol))
    for prompt, values in zip(found.prompts, found.logits, strict=True):
        assert prompt.dtype == np.int32
        assert prompt.tolist() == TOKENS
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.array(logits, np.float32))


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    return b"J" + struct.pack("<i", value)


POINTER = b"C\x08" + struct.pack("<Q", 0x0000414141414140)
OBJECTS = b"cnumpy\ndtype\n(" + text("O8") + b"\x89\x88tR(" + integer(3) + text("|") + b"NNN" + integer(-1) * 2
OBJECTS += integer(0) + b"tb"  # whose flags say that it holds no objects
NUMBERS = b"cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR"
DATETIMES = b"cnumpy\ndtype\n(" + text("M8") + b"\x89\x88tR"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"tC\x01btR"


def state(dtype, content=POINTER, length=1):
    return b"(" + integer(1) + b"(" + integer(length) + b"t" + dtype + b"\x89" + content + b"tb"


class Calls:
    def __init__(self, called, *arguments):
        self.reduced = (called, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Calls(print, "it ran")),
        pickle.dumps(Calls(eval, "1")),
        pickle.dumps(Calls(np.frombuffer, b"x")),
        pickle.dumps(datetime.date(2026, 1, 1)),
        pickle.dumps({1, 2}),
        pickle.dumps(np.array([{}], object)),
        pickle.dumps(np.array(["x"])),
        pickle.dumps(np.zeros(1, "V4")),
        pickle.dumps(np.zeros(1, [("a", "i4")])),
        b"\x80\x04" + ARRAY + state(OBJECTS) + b".",
        b"\x80\x04cnumpy._core.numeric\n_frombuffer\n("
        + POINTER
        + OBJECTS
        + b"("
        + integer(1)
        + b"t"
        + text("C")
        + b"tR.",
        b"\x80\x04cnumpy._core.multiarray\nscalar\n(" + OBJECTS + POINTER + b"tR.",
        b"\x80\x04" + ARRAY + state(DATETIMES) + b".",
        b"\x80\x04" + ARRAY + state(NUMBERS, length=2) + b".",
        b"\x80\x04" + ARRAY + state(NUMBERS, length=2**31 - 1) + b".",
        b"\x80\x04" + ARRAY + state(NUMBERS, length=-1) + b".",
        b"\x80\x04]r\xff\xff\xff\x3f",
        b"\x80\x04a.",
        b"\x80\x04.",
        b"\x80\x04(t",
        b"\x80\x04h\x05.",
        b"\x80\x04P1\n.",
        b"\x80\x04Q.",
        b"(cos\nsystem\nVid\no.",
        b"(Vid\nios\nsystem\n.",
        b"\x82\x01.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"",
        b"\xff",
    ],
)
def test_refuses_anything_else(tmp_path, content, capsys):
    with pytest.raises(NotPlain):
        load(content)
    with pytest.raises(BadInput, match="is not a golden file, or is truncated"):
        read(tmp_path, content)
    assert capsys.readouterr().out == ""


def laughs(levels):
    value = [0] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


def itself():
    value = []
    value.append(value)
    return value


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "point",
    [
        {"tokens": laughs(9), "logits": [[0.0]]},
        {"tokens": [0], "logits": laughs(9)},
        {"tokens": itself(), "logits": [[0.0]]},
        {"tokens": [0], "logits": [[0.0] * 30_000] * 30_000},  # one row, 30,000 times
        {"tokens": [2**31], "logits": [[0.0] * 5]},
        {"tokens": [-1], "logits": [[0.0] * 5]},
        {"tokens": [1.5], "logits": [[0.0] * 5]},
        {"tokens": np.array([2**32]), "logits": [[0.0] * 5]},
        {"tokens": ["x"], "logits": [[0.0] * 5]},
        {"tokens": [1], "logits": [[0.0] * 5, [0.0]]},
        {"tokens": 1, "logits": 1.0},
        {"tokens": None, "logits": None},
        {"tokens": [1]},
        5,
    ],
)
def test_refuses_arrays_that_are_none_or_too_large(tmp_path, point):
    with pytest.raises(BadInput, match=r"golden\.pickle"):
        read(tmp_path, pickle.dumps([point]))


def test_lists_however_deep_end_in_one_line(tmp_path):
    content = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    with pytest.raises(BadInput, match="should have tokens and logits"):
        read(tmp_path, content)


def test_hex_of_hex_of_hex_is_not_decoded():
    content = b"C\x10" + b"A" * 16
    for _ in range(31):
        content = b"c_codecs\nencode\n(" + content + text("hex_codec") + b"tR"
    with pytest.raises(NotPlain, match="_codecs"):
        load(b"\x80\x04" + content + b".")


def test_an_array_is_a_value_by_itself():
    found = load(pickle.dumps(np.arange(3)))
    assert isinstance(found, PickledArray)
    assert found.array.tolist() == [0, 1, 2]
