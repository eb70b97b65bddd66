"""`ferry convert REPO DST --stream-download` with the real client and the local Hub: bits, disk, faults, kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.runner import ConvertResult
from conversion_lib.core.retry import Backoff
from conversion_lib.demo.local_hub import Fault, LocalHub
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.hub import streaming
from conversion_lib.hub.shard_cache import Demand, ShardCache, most_bytes
from conversion_lib.hub.streaming import StreamedFiles, streamed
from conversion_lib.record import Origin, Target
from conversion_lib.runs.options import Options
from conversion_lib.sources.orbax import open_orbax, record_of
from tests.support.checkpoints import DEEPSEEK_V3, QWEN3, WRITTEN, answer, ferry_here, random_tensors, write_checkpoint
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors

REPO = "acme/Tiny-V3"
QUICK = Backoff(attempts=3, first_seconds=0.01, longest_seconds=0.02)
OPTIONS = Options(memory_budget=64 << 20, threads=2)
FIRST = "model-00001-of-00005.safetensors"
SCANNED, UNSCANNED = Target(), Target(scan_layers=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp8, so that scales go with weights; in five shards that cut through layers."""
    directory = tmp_path_factory.mktemp("source")
    write_checkpoint(directory, DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3)), shards=5)
    (directory / "tokenizer.json").write_text('{"made": "up"}')
    return directory


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub({REPO: source}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def stream(
    out: Path,
    target: Target = SCANNED,
    meddle: Callable[[StreamedFiles], None] = lambda files: None,
    options: Options = OPTIONS,
) -> ConvertResult:
    with streamed(REPO, "main", out / ".ferry" / "shards-0", output=out, backoff=QUICK) as files:
        meddle(files)
        return convert(files, out, target, options=options)


def shards(hub: LocalHub) -> list[str]:
    """The shards whose content was asked for as a whole, in order; headers come first, and are not counted."""
    bodies = [path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and path.startswith("/lfs/")]
    headers = sum(path.endswith(".safetensors") for path in hub.repos[REPO].files)
    return bodies[headers:]


def test_the_same_as_after_a_download(hub: LocalHub, tmp_path: Path) -> None:
    plain = ferry_here("convert", REPO, tmp_path / "plain", "--json")
    hub.requests.clear()
    result = ferry_here("convert", REPO, tmp_path / "out", "--stream-download", "--json")
    assert result.returncode == 0, result.stderr
    assert "at most 3 of 5 shards at once" in result.stderr
    ours, theirs = json.loads(result.stdout), json.loads(plain.stdout)
    assert (ours["fingerprint"], ours["bytes_in"]) == (theirs["fingerprint"], theirs["bytes_in"])
    assert sorted(shards(hub)) == sorted(p for p in hub.repos[REPO].files if p.endswith(".safetensors"))  # each once
    assert compare(tmp_path / "plain", tmp_path / "out").same
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out/hf" / name).read_bytes() == (tmp_path / "plain/hf" / name).read_bytes()
    record, commit = record_of(tmp_path / "out"), hub.repos[REPO].commit
    assert record is not None and record.origin == Origin(path=f"{REPO}@{commit}", repo=REPO, commit=commit)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN
    again = ferry_here("convert", REPO, tmp_path / "out", "--stream-download", "--json")
    assert json.loads(again.stdout)["already"]


def test_no_more_on_disk_than_was_said(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unscanned, so that every shard but a few tensors can go before the next."""
    monkeypatch.setattr(streaming, "SHARDS_AT_ONCE", 1)
    cache, most, over = tmp_path / "out/.ferry/shards-0", [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            most[0] = max(most[0], len(list(cache.glob("*.safetensors"))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    stream(tmp_path / "out", UNSCANNED)
    over.set()
    watcher.join()
    assert most[0] == 1
    assert len(shards(hub)) == 5


@pytest.mark.parametrize("kind", ["reset", "truncate", "corrupt", "unavailable"])
def test_a_fault_is_survived(hub: LocalHub, tmp_path: Path, source: Path, kind: str) -> None:
    convert(source, tmp_path / "plain", SCANNED, options=OPTIONS)

    def break_the_next(files: StreamedFiles) -> None:
        hub.faults.planned = [Fault(kind, "model-00003-*", after=60_000)]  # type: ignore[arg-type]

    stream(tmp_path / "out", meddle=break_the_next)
    assert hub.faults.planned[0].times == 0
    assert compare(tmp_path / "plain", tmp_path / "out").same


def test_wrong_bytes_are_never_used(hub: LocalHub, tmp_path: Path) -> None:
    def corrupt(files: StreamedFiles) -> None:
        hub.faults.planned = [Fault("corrupt", "model-00004-*", times=99, after=70_000)]

    with pytest.raises(OutsideFailure, match=r"model-00004-.* is not what was announced: sha256 expected"):
        stream(tmp_path / "out", UNSCANNED, corrupt)
    assert not (tmp_path / "out/0").exists()
    hub.faults.planned = []
    hub.requests.clear()
    assert stream(tmp_path / "out", UNSCANNED).pieces_skipped > 0
    assert FIRST not in shards(hub)


def test_a_token_that_runs_out_midway_costs_nothing(hub: LocalHub, tmp_path: Path) -> None:
    def lock(files: StreamedFiles) -> None:
        hub.faults.gated[REPO] = "hf_right"

    with pytest.raises(OutsideFailure, match="gated"):
        stream(tmp_path / "out", meddle=lock)
    assert (tmp_path / "out/.ferry/run.json").exists()


def test_a_header_other_than_the_shards_own(hub: LocalHub, tmp_path: Path) -> None:
    def rename_format(files: StreamedFiles) -> None:
        name = "model-00002-of-00005.safetensors"
        files.headers[name] = files.headers[name].replace(b'"pt"', b'"pq"')

    with pytest.raises(OutsideFailure, match=r"model-00002-.* has another header than the Hub gave"):
        stream(tmp_path / "out", meddle=rename_format)


KILLED = """
import sys
from pathlib import Path
from conversion_lib.conversions.convert import convert
from conversion_lib.engine import executor as engine
from conversion_lib.hub.streaming import streamed
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
engine.GROUP_SECONDS = 0.0
out = Path(sys.argv[2])
with streamed(sys.argv[1], "main", out / ".ferry" / "shards-0", output=out) as files:
    convert(files, out, Target(scan_layers=sys.argv[3] == "True"), options=Options(64 << 20, 2))
"""


@pytest.mark.parametrize("target", [SCANNED, UNSCANNED], ids=["scanned", "unscanned"])
def test_a_killed_run_fetches_only_what_is_left(hub: LocalHub, tmp_path: Path, source: Path, target: Target) -> None:
    """Scanned, the layers' arrays wait for the shard that stalls: what they need of those before is kept beside."""
    out, stalled = tmp_path / "out", "model-00003-of-00005.safetensors"
    convert(source, tmp_path / "plain", target, options=OPTIONS)
    hub.faults.planned = [Fault("stall", stalled, times=99, after=133_000)]  # behind what is asked of it for its header
    process = subprocess.Popen([sys.executable, "-c", KILLED, REPO, str(out), str(target.scan_layers)])
    cache, journal, deadline = out / ".ferry/shards-0", out / ".ferry/journal-0.jsonl", time.monotonic() + 60
    size = -1
    while not (journal.exists() and journal.stat().st_size == size > 0 and not (cache / FIRST).exists()):
        assert process.poll() is None and time.monotonic() < deadline
        size = journal.stat().st_size if journal.exists() else -1
        time.sleep(1.0)
    assert not target.scan_layers or (cache / f"{FIRST}.kept.json").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.faults.planned = []
    hub.requests.clear()
    stream(out, target)
    assert stalled in shards(hub) and FIRST not in shards(hub)
    assert compare(tmp_path / "plain", out).same


def test_a_disk_too_small(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "free_bytes", lambda path: 1000)
    with pytest.raises(BadInput, match=r"the disk has 1\.0 kB free; one shard of acme/Tiny-V3@\w+ at a time"):
        stream(tmp_path / "out", options=Options(64 << 20, 2, skip_disk_check=True))
    assert shards(hub) == []


def test_options_that_do_not_go_together(source: Path, tmp_path: Path) -> None:
    result = ferry_here("convert", source, tmp_path / "out", "--stream-download")
    assert result.returncode == 2 and "--stream-download: the option is for a Hub id" in result.stderr


def test_a_cache_keeps_to_its_limit_and_fetches_what_is_waited_for(tmp_path: Path) -> None:
    fetched: list[str] = []

    def fetch(name: str, stopped: threading.Event) -> None:
        fetched.append(name)
        (tmp_path / "cache" / name).write_bytes(name.encode() * 100)

    cache = ShardCache(tmp_path / "cache", fetch, lambda path: None)
    demands = [Demand(name, 100, users=1, later=1, ranges={(10, 20)}, until=3) for name in "abc"]
    demands.append(Demand("d", 100, users=1, until=3))
    assert most_bytes(demands, 2) == 2 * 100 + 30
    cache.begin(demands, 1)
    assert cache.path("a", 0, 100).read_bytes() == b"a" * 100
    assert fetched == ["a"]
    cache.used("a", last=True)
    assert cache.path("a", 10, 20).read_bytes()[10:] == b"a" * 10  # what others need of it was kept
    assert cache.path("b", 0, 100).read_bytes() == b"b" * 100
    assert cache.path("a", 0, 20).read_bytes()[:20] == b"a" * 20  # not foreseen: fetched again, beyond the limit
    assert fetched == ["a", "b", "a"]
    cache.close()
    again = ShardCache(tmp_path / "cache", fetch, lambda path: None)
    again.begin([Demand("b", 100, users=1), Demand("c", 100, users=1)], 1)
    assert again.path("b", 0, 100).exists() and fetched == ["a", "b", "a"]  # it lay there from before
    again.used("b", last=True)
    assert again.path("c", 0, 100).exists()
    again.used("c", last=True)
    again.close()
    assert not (tmp_path / "cache").exists()


TIED = QWEN3 | {"tie_word_embeddings": True}
HEAD = "params/params/decoder/logits_dense/kernel"


def with_a_head(directory: Path, *, own: bool) -> Path:
    """A checkpoint whose config ties the head, which is in its last shard all the same."""
    tensors = random_tensors(llama_tensors(TIED))
    head = tensors["model.embed_tokens.weight"].copy()
    if own:
        head[-1] *= 2  # the last rows: all of both has to be read
    return write_checkpoint(directory, TIED, {**tensors, "lm_head.weight": head}, shards=3)


@pytest.mark.parametrize("own", [True, False])
def test_a_head_is_compared_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    directory = with_a_head(tmp_path / "hf", own=own)
    with LocalHub({REPO: directory}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        planned = answer(ferry_here("plan", REPO, "--json", "--quiet"))
        assert HEAD not in [array["path"] for array in planned["arrays"]]
        assert any(line.startswith("tied head: a conversion compares lm_head.weight") for line in planned["warnings"])
        hub.faults.planned = [Fault("reset", "model-00003-*", after=100)]  # survived like any other
        result = stream(tmp_path / "out")
    convert(directory, tmp_path / "plain", SCANNED, options=OPTIONS)
    assert compare(tmp_path / "plain", tmp_path / "out").same
    assert result.fingerprint == planned["fingerprint"]
    assert (HEAD in open_orbax(tmp_path / "out").tensors) == own
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN


def test_a_server_that_gives_no_parts_of_files_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conversion_lib.hub import headers

    directory = with_a_head(tmp_path / "hf", own=True)
    monkeypatch.setattr(headers, "PARTIAL_CONTENT", 299)
    with LocalHub({REPO: directory}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(OutsideFailure, match="gives no parts of files"):
            stream(tmp_path / "out")
    assert not (tmp_path / "out").exists()
