"""The steps that run where the stages run: `python -m ferry_airflow.steps`, as the execution modes start it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.dequantize import dequantize
from conversion_lib.demo.local_hub import Faults, LocalHub
from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT
from conversion_lib.publish.location import Marker
from conversion_lib.publish.publish import publish
from conversion_lib.record import Target
from ferry_airflow.steps import resolve as resolving
from ferry_airflow.steps.files import begin, clean_up, forget
from ferry_airflow.steps.resolve import Request, resolve
from tests.support.checkpoints import DEEPSEEK_V3, LLAMA, random_tensors, write_checkpoint
from tests.support.published_checkpoints import write_verdict
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors

REPO, TOKEN = "acme/tiny", "hf_thisOpensIt"
SLUG = Target().slug


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), LLAMA, random_tensors(llama_tensors(LLAMA)))


@pytest.fixture(scope="module")
def hub(checkpoint):
    with LocalHub({REPO: checkpoint}) as hub:
        yield hub


@pytest.fixture
def request_for(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)

    def make(repo=REPO, **values):
        given = {"revision": "main", "target": Target(), "model": None, "destination": str(tmp_path / "published")}
        return Request(repo=repo, **{**given, "staged": True, "run": "run1", **values})

    return make


class TestResolve:
    def test_repository(self, hub, request_for, work_dir):
        commit = hub.repos[REPO].commit
        result = resolve(request_for(), SILENT)
        assert (result["repo"], result["commit"], result["quantized"]) == (REPO, commit, False)
        assert result["work_dir"] == str(work_dir / "acme--tiny" / commit)
        assert result["path"] == result["work_dir"] + "/hf"
        plan = result["plan"]
        assert plan["download_bytes"] > plan["bytes_in"] > 0
        assert plan["disk_bytes"] > plan["download_bytes"] + plan["bytes_out"]
        assert not list(work_dir.rglob("*.safetensors"))  # headers only
        assert result["maxtext"]["settings"]["model_name"] == "llama3.1-8b"
        assert result["maxtext"]["differs"] == ""

    def test_what_is_there_is_not_counted(self, request_for, checkpoint, work_dir):
        first = resolve(request_for(), SILENT)
        path = Path(first["path"])
        path.mkdir(parents=True)
        for file in checkpoint.glob("*.safetensors"):
            (path / file.name).symlink_to(file)
        assert resolve(request_for(), SILENT)["plan"]["download_bytes"] < first["plan"]["download_bytes"]

    def test_directory(self, request_for, checkpoint):
        result = resolve(request_for(str(checkpoint)), SILENT)
        assert (result["commit"], result["path"], result["plan"]["download_bytes"]) == (None, str(checkpoint), 0)

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"repo": "acme/none"}, "no such repository"),
            ({"revision": "none"}, "no such revision"),
            ({"repo": "/no/such/directory"}, "is not a directory"),
            ({"model": "no-such-model"}, "no model is named no-such-model"),
            ({"destination": "s3://bucket"}, "expected gs://"),
            ({"destination": f"{__file__}/below"}, "cannot be written"),
        ],
        ids=["repository", "revision", "directory", "model", "scheme", "destination"],
    )
    def test_wrong_input(self, request_for, wrong, says):
        with pytest.raises(BadInput, match=says):
            resolve(request_for(**wrong), SILENT)

    def test_a_disk_that_is_too_small(self, request_for, work_dir, monkeypatch):
        monkeypatch.setattr(resolving, "free_bytes", lambda path: 1000)
        with pytest.raises(BadInput, match=r"needs .* and 1\.0 kB are free"):
            resolve(request_for(), SILENT)
        assert not list(work_dir.rglob("run1"))

    @pytest.mark.parametrize("checked", [True, False])
    def test_published(self, hub, request_for, tmp_path, work_dir, checked):
        model = resolve(request_for(), SILENT)["model"]
        location = tmp_path / "published" / model / hub.repos[REPO].commit / SLUG
        location.mkdir(parents=True)
        marker = Marker(
            digest="d", checked=checked, manifest_crc32c="c", published="2026-01-01T00:00:00+00:00", ferry="1"
        )
        (location / "ferry_commit.json").write_text(marker.model_dump_json())
        assert resolve(request_for(), SILENT)["published"] == (str(location) if checked else None)
        assert resolve(request_for(target=Target(scan_layers=False)), SILENT)["published"] is None


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("fp8") / "deepseek-v3-fp8", DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3))
    )


def published(request, directory):
    """Does what the stages of a run do, with the check taken for passed; the address that `publish` gives."""
    source = Path(request.repo)
    if request.staged:
        dequantize(source, directory / "bf16")
        source = directory / "bf16"
    convert(source, directory / "converted", request.target)
    (directory / "converted" / "report").mkdir()
    write_verdict(directory / "converted")
    return publish(directory / "converted", request.destination).url


class TestQuantizedDirectory:
    """Without a commit, its second level is a fingerprint: that of the original, whichever way it is converted."""

    @pytest.mark.parametrize("staged", [True, False], ids=["staged", "fused"])
    def test_second_run_finds_it_published(self, request_for, quantized, tmp_path, staged):
        request = request_for(str(quantized), staged=staged)
        assert resolve(request, SILENT)["published"] is None
        url = published(request, tmp_path)
        assert resolve(request, SILENT)["published"] == url
        assert resolve(replace(request, staged=not staged), SILENT)["published"] == url
        assert resolve(replace(request, target=Target(scan_layers=False)), SILENT)["published"] is None

    def test_dequantized_copy_as_the_source(self, request_for, quantized, tmp_path):
        url = published(request_for(str(quantized)), tmp_path)
        assert resolve(request_for(str(tmp_path / "bf16")), SILENT)["published"] == url

    def test_copy_that_was_changed_is_another_source(self, request_for, quantized, tmp_path):
        published(request_for(str(quantized)), tmp_path)
        file = next((tmp_path / "bf16").glob("*.safetensors"))
        later = file.stat().st_mtime_ns + 10**10
        os.utime(file, ns=(later, later))
        assert resolve(request_for(str(tmp_path / "bf16")), SILENT)["published"] is None


@pytest.fixture
def worked(tmp_path):
    """A working directory as a run leaves it."""
    for name in ("hf", "bf16", SLUG):
        (tmp_path / "w" / name).mkdir(parents=True)
        (tmp_path / "w" / name / "file").write_bytes(b"x" * 10000)
    begin(tmp_path / "w", "run1", SLUG, SILENT)
    return tmp_path / "w"


class TestCleanUp:
    @pytest.mark.parametrize(
        ("keep", "succeeded", "left"),
        [
            ("keep", True, {"hf", "bf16", SLUG}),
            ("keep", False, {"hf", "bf16", SLUG}),
            ("keep_on_failure", True, {"hf"}),
            ("keep_on_failure", False, {"hf", "bf16", SLUG}),
            ("remove", True, set()),
            ("remove", False, set()),
        ],
    )
    def test_policies(self, worked, keep, succeeded, left):
        result = clean_up(worked, "run1", SLUG, keep=keep, succeeded=succeeded, reporter=SILENT)
        there = {path.name for path in worked.iterdir() if not path.name.startswith(".")} if worked.exists() else set()
        assert there == left
        assert len(result["removed"]) == 3 - len(left)
        assert bool(result["bytes_freed"]) == (len(left) < 3)

    def test_what_another_run_works_with_stays(self, worked):
        begin(worked, "run2", "another", SILENT)
        clean_up(worked, "run1", SLUG, keep="remove", succeeded=True, reporter=SILENT)
        assert (worked / "bf16").exists() and (worked / "hf").exists()
        assert not (worked / SLUG).exists()
        clean_up(worked, "run2", "another", keep="remove", succeeded=True, reporter=SILENT)
        assert not worked.exists()

    def test_two_runs_of_one_target(self, worked):
        begin(worked, "run2", SLUG, SILENT)
        clean_up(worked, "run1", SLUG, keep="keep_on_failure", succeeded=True, reporter=SILENT)
        assert (worked / SLUG).exists()

    def test_twice(self, worked):
        for _ in range(2):
            clean_up(worked, "run1", SLUG, keep="remove", succeeded=False, reporter=SILENT)
        assert not worked.exists()


def test_command_line(checkpoint, tmp_path, hub):
    """Result on standard output, a wrong input as one line with exit code 2, and the token in the environment alone."""
    command = [sys.executable, "-m", "ferry_airflow.steps", "resolve", REPO, "--destination", str(tmp_path / "d")]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "FERRY_WORK_DIR": str(tmp_path), "HF_TOKEN": TOKEN}
    hub.faults = Faults(gated={REPO: TOKEN})

    def run(*arguments, **changed):
        return subprocess.run(
            [*command, *arguments, "--run", "r", "--json"],
            env={**environment, **changed},
            capture_output=True,
            text=True,
        )

    done = run("--no-scan-layers")
    assert (done.returncode, json.loads(done.stdout)["commit"]) == (0, hub.repos[REPO].commit)
    assert "plan: acme--tiny (llama" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    refused = run(HF_TOKEN="hf_another")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("ferry: acme/tiny")


class TestForget:
    """`overwrite`: what a stage and those after it made earlier is removed, before the run uses any of it."""

    @pytest.fixture
    def used(self, tmp_path):
        work = tmp_path / "work" / "c"
        for name in ("hf", "bf16", SLUG, f"{SLUG}/report", "other-target"):
            (work / name).mkdir(parents=True)
            (work / name / "file").write_text("x")
            (work / f".{name.replace('/', '-')}.written.json").write_text("{}")
        begin(work, "mine", SLUG, SILENT)
        return work

    @pytest.mark.parametrize(
        ("stage", "left"),
        [
            ("download", {"other-target"}),
            ("dequantize", {"hf", "other-target"}),
            ("convert", {"hf", "bf16", "other-target"}),
            ("check", {"hf", "bf16", SLUG, "other-target"}),
        ],
    )
    def test_from_that_stage_on(self, used, stage, left):
        forget(used, "mine", SLUG, stage, SILENT)
        assert {path.name for path in used.iterdir() if path.is_dir() and path.name != ".runs"} == left
        assert not (used / SLUG / "report").exists()
        assert (used / f".{SLUG}.written.json").exists() == (stage == "check")

    @pytest.mark.parametrize(
        ("stage", "target", "refused"),
        [("dequantize", "other-target", True), ("convert", SLUG, True), ("convert", "other-target", False)],
    )
    def test_nothing_that_another_run_uses(self, used, stage, target, refused):
        begin(used, "theirs", target, SILENT)
        if not refused:
            return forget(used, "mine", SLUG, stage, SILENT)
        with pytest.raises(BadInput, match=f"overwrite={stage} would remove files .* that other runs use: theirs"):
            forget(used, "mine", SLUG, stage, SILENT)
        return None

    def test_published_checkpoint_does_not_end_the_run(self, request_for, checkpoint, monkeypatch):
        monkeypatch.setattr(resolving, "_published", lambda *_: "/published/x")
        source = str(checkpoint)
        assert resolve(request_for(source), SILENT)["published"] == "/published/x"
        assert resolve(request_for(source, overwrite="convert"), SILENT)["published"] is None
