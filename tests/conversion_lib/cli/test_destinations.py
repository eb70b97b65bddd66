"""URLs that no command takes: refused in one line, and no directory `s3:` is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.dequantize import dequantize
from conversion_lib.conversions.export import export
from conversion_lib.errors import BadInput
from conversion_lib.hub import download
from conversion_lib.record import Target
from tests.support.checkpoints import QWEN3, ferry_here, random_tensors, refused, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors

URLS = ["s3://bucket/x", "s3:/bucket/x", "gs:/bucket/x", "GS://bucket/x", "hf://org/x", "https://host/x", "gs:bucket"]
SRC, CKPT, URL = "<source>", "<checkpoint>", "<url>"

COMMANDS = [
    ("convert", SRC, URL),
    ("convert", URL, "out"),
    ("convert", SRC, URL, "--part", "0/2"),
    ("convert", CKPT, "out", "--hf-config", URL),
    ("plan", URL),
    ("download", "org/name", URL),
    ("dequantize", SRC, URL),
    ("dequantize", URL, "out"),
    ("export", CKPT, URL),
    ("export", URL, "out"),
    ("export", CKPT, "out", "--hf-config", URL),
    ("finalize", URL),
    ("clean", URL),
    ("check", URL, "--reference", SRC),
    ("check", CKPT, "--reference", SRC, "--report", URL),
    ("check", CKPT, "--reference", SRC, "--save-golden", f"{URL}.npz"),
    ("publish", CKPT, URL, "--unchecked"),
    ("publish", URL, "out", "--unchecked"),
    ("verify", URL),
    ("prune", URL),
    ("inspect", URL),
    ("compare", URL, URL),
    ("demo", "--work-dir", URL),
]
WRITING = [("convert", SRC, URL), ("download", "org/name", URL), ("dequantize", SRC, URL)]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("names")
    source = write_checkpoint(directory / "hf", QWEN3, random_tensors(llama_tensors(QWEN3)))
    convert(source, directory / "maxtext", Target())
    return {SRC: str(source), CKPT: str(directory / "maxtext")}


@pytest.mark.parametrize(
    ("words", "url"),
    [*((words, "s3://bucket/x") for words in COMMANDS), *((words, url) for words in WRITING for url in URLS[1:])],
)
def test_a_url_that_no_command_takes(
    url: str, words: tuple[str, ...], names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [names.get(word, word.replace(URL, url)) for word in words]
    line = refused(ferry_here(*given), "expected")
    assert url in line or str(Path(url)) in line  # an option that is a path has lost a slash
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", URLS)
def test_the_library_refuses_it_too(
    url: str, names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path has lost one of two slashes by then."""
    monkeypatch.chdir(tmp_path)
    source, checkpoint = Path(names[SRC]), Path(names[CKPT])
    for work in (
        lambda: convert(source, Path(url), Target()),
        lambda: convert(source, url, Target()),
        lambda: dequantize(source, Path(url)),
        lambda: export(checkpoint, Path(url)),
        lambda: download("org/name", Path(url)),
    ):
        with pytest.raises(BadInput, match="expected"):
            work()
    assert list(tmp_path.iterdir()) == []
