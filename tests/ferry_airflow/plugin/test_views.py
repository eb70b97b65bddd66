"""What the pages make of a run's records, and which file they take for its report."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.support.paths import ROOT

# Airflow makes its home directory when it is imported: not in the user's.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-home-"))
os.environ.setdefault("AIRFLOW__CORE__UNIT_TEST_MODE", "True")

import google_crc32c
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from conversion_lib.storage.checksums import encode_crc32c
from ferry_airflow.layout import run_report
from ferry_airflow.plugin.figures import view_models, view_run
from ferry_airflow.plugin.pages import templates
from ferry_airflow.plugin.reports import NoReport, read_report
from ferry_airflow.plugin.runs import Run, Stage
from ferry_airflow.scheduling.finding import Finding
from tests.support.fakes.cloud_storage import FakeCloudStorage

DAG = "onboard_checkpoint"
COMMIT, OLD = "1" * 40, "0" * 40
SLUG = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
REPORT = b"<h1>the report</h1>"
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def crc32c(content):
    return encode_crc32c(google_crc32c.Checksum(content))


def publish(root, *, model="tiny", report=REPORT):
    """A published location with nothing but a report, as a marker and a manifest vouch for it."""
    location = root / model / COMMIT / SLUG
    (location / "report").mkdir(parents=True)
    (location / "report" / "report.html").write_bytes(report)
    entry = {"path": "report/report.html", "size": len(report), "crc32c": crc32c(report)}
    manifest = json.dumps({"digest": "d", "checked": True, "ferry": "0.1.0", "files": [entry]}).encode()
    (location / "manifest.json").write_bytes(manifest)
    marker = {"digest": "d", "checked": True, "manifest_crc32c": crc32c(manifest), "published": NOON.isoformat()}
    (location / "ferry_commit.json").write_text(json.dumps({**marker, "ferry": "0.1.0"}))
    return location


def stage(name, manifest=None, *, start=0, seconds=10, state="success", map_index=-1, tries=1):
    started = NOON + timedelta(seconds=start)
    left = None if manifest is None else {"stage": name, **manifest}
    return Stage(name, map_index, state, tries, started, started + timedelta(seconds=seconds), left)


def run_of(url, destination):
    stages = [stage("publish", {"url": str(url)})]
    return Run(DAG, "r", "success", {"destination": str(destination)}, stages)


def test_report_of_what_the_run_published(tmp_path):
    assert read_report(run_of(publish(tmp_path), tmp_path)) == REPORT


def test_report_where_the_run_found_it_published(tmp_path):
    run = replace(run_of("", tmp_path), stages=[stage("resolve", {"published": str(publish(tmp_path))})])
    assert read_report(run) == REPORT


def test_destination_from_the_environment(tmp_path, monkeypatch):
    run = replace(run_of(publish(tmp_path), ""), conf={})
    monkeypatch.delenv("FERRY_DESTINATION", raising=False)
    with pytest.raises(NoReport, match="is not under"):
        read_report(run)
    monkeypatch.setenv("FERRY_DESTINATION", str(tmp_path))
    assert read_report(run) == REPORT


def test_report_in_cloud_storage(tmp_path, monkeypatch):
    location = publish(tmp_path)
    with FakeCloudStorage(["bucket"]) as fake:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake.endpoint)
        bucket = storage.Client(project="none", credentials=AnonymousCredentials()).bucket("bucket")
        for path in location.rglob("*.*"):
            bucket.blob(f"models/{path.relative_to(tmp_path)}").upload_from_filename(path)
        url = f"gs://bucket/models/tiny/{COMMIT}/{SLUG}"
        assert read_report(run_of(url, "gs://bucket/models/")) == REPORT
        with pytest.raises(NoReport, match="is not under"):
            read_report(run_of(url, "gs://bucket/other"))
        with pytest.raises(NoReport, match="no checkpoint at"):
            read_report(run_of(url.replace("tiny", "other"), "gs://bucket/models"))


def test_nothing_outside_of_the_runs_destination_is_opened(tmp_path):
    """Even what is published rightly, elsewhere; by another path, by `..`, by a link, at another depth."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    location = publish(outside)
    (inside / "tiny").symlink_to(outside / "tiny")
    wrong = [
        location,
        f"{inside}/../outside/tiny/{COMMIT}/{SLUG}",
        inside / "tiny" / COMMIT / SLUG,
        f"file://{location}",
        f"gs://bucket/{inside}/tiny/{COMMIT}/{SLUG}",
    ]
    for url in wrong:
        with pytest.raises(NoReport, match="is not under the destination"):
            read_report(run_of(url, inside))
    for root in (outside.parent, outside / "tiny", "gs://outside"):
        with pytest.raises(NoReport, match="is not under the destination"):
            read_report(run_of(location, root))


def test_report_that_is_not_the_published_one(tmp_path):
    location = publish(tmp_path)
    (location / "report" / "report.html").write_bytes(REPORT.upper())
    with pytest.raises(NoReport, match="not the one that was published"):
        read_report(run_of(location, tmp_path))


def test_manifest_that_is_not_the_published_one(tmp_path):
    location = publish(tmp_path)
    manifest = (location / "manifest.json").read_text()
    (location / "manifest.json").write_text(manifest.replace("0.1.0", "0.2.0"))
    with pytest.raises(NoReport, match="manifest is not the one"):
        read_report(run_of(location, tmp_path))


@pytest.mark.parametrize("gone", ["ferry_commit.json", "manifest.json"])
def test_location_without_a_marker_or_manifest(tmp_path, gone):
    location = publish(tmp_path)
    (location / gone).unlink()
    with pytest.raises(NoReport, match="no checkpoint at"):
        read_report(run_of(location, tmp_path))


def test_run_that_has_published_nothing(tmp_path):
    with pytest.raises(NoReport, match="no check has ended in this run"):
        read_report(run_of("", tmp_path))


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_report_before_publishing_and_after_a_failed_check(tmp_path, verdict):
    """What the check left for this run and no other, whatever an XCom says of it."""
    checked = [stage("check", {"verdict": verdict, "report": "/etc/passwd"}, state="failed")]
    run = replace(run_of("", tmp_path), stages=checked)
    with pytest.raises(NoReport, match="the check left none"):
        read_report(run)
    left = Path(run_report(str(tmp_path), DAG, "r"))
    left.parent.mkdir()
    left.write_bytes(REPORT)
    assert read_report(run) == REPORT
    with pytest.raises(NoReport, match="the check left none"):
        read_report(replace(run, run_id="other"))


def test_stages_with_their_figures():
    stages = [
        stage("download", {"repo": "a/b", "commit": COMMIT, "seconds": 4.0, "bytes_in": 8e6, "bytes_out": 8e6}),
        stage(
            "convert", {"seconds": 2.0, "bytes_in": 8e6, "bytes_out": 16e6, "peak_bytes": 5e8}, start=20, map_index=1
        ),
        stage("check", {"verdict": "pass", "max_kl": 2e-9, "top1": 1.0}, start=30),
    ]
    view = view_run(Run(DAG, "r", "running", {}, stages))
    assert (view.title, view.verdict, view.unfinished) == ("a/b", "pass", True)
    assert view.facts == [("Commit", COMMIT)]
    assert view.figures == [("largest KL of a token", "2.00e-09"), ("same most likely token", "100.00%")]
    download, convert, check = view.stages
    assert (download.bytes_in, download.rate, download.peak) == ("8.0 MB", "2.0 MB/s", "–")
    assert (convert.name, convert.rate, convert.peak) == ("convert 1", "8.0 MB/s", "500.0 MB")
    assert [(row.left, row.width) for row in view.stages] == [(0, 25), (50, 25), (75, 25)]
    assert check.seconds == "10.0 s"


def test_plan_and_where_things_lie_are_told():
    plan = {"bytes_in": 8e6, "bytes_out": 16e6, "disk_bytes": 4e7, "peak_bytes": 3e8, "seconds": 75}
    stages = [stage("resolve", {"plan": plan, "path": "/w/hf"}), stage("convert", {"path": "/w/x"})]
    view = view_run(Run(DAG, "r", "failed", {"repo": "a/b"}, stages))
    told = "8.0 MB in, 16.0 MB out; 40.0 MB of disk, at most 300.0 MB of memory; about 1 min 15 s"
    assert view.facts == [("Plan", told), ("Files", "/w/x")]
    stages.append(stage("check", {"verdict": "fail", "report": "/w/x/report/report.html"}, state="failed"))
    assert view_run(Run(DAG, "r", "failed", {}, stages)).facts[-1] == ("Report", "/w/x/report/report.html")
    stages.append(stage("publish", {"url": "gs://b/x"}))
    assert view_run(Run(DAG, "r", "success", {}, stages)).facts[1:] == [("Published at", "gs://b/x")]


def test_failed_check_shows_its_verdict_and_its_error():
    left = {"verdict": "fail", "max_kl": 0.5, "error": "ferry: max KL 0.5 is above 1e-05", "exit_code": 1}
    view = view_run(Run(DAG, "r", "failed", {"repo": "a/b"}, [stage("check", left, state="failed")]))
    assert view.verdict == "fail"
    assert view.stages[0].note == "max KL 0.5 is above 1e-05"


def test_numbers_that_are_not_finite_are_shown():
    left = {"verdict": "fail", "max_kl": "NaN", "mean_kl": "Infinity", "top1": 0.5, "error": "e"}
    view = view_run(Run(DAG, "r", "failed", {"repo": "a/b"}, [stage("check", left, state="failed")]))
    assert [value for _, value in view.figures] == ["NaN", "Infinity", "50.00%"]


def test_run_that_checks_nothing_says_nothing_of_a_report():
    exporting = view_run(Run("export_checkpoint", "r", "success", {}, [stage("export", {"bytes_out": 5})]))
    onboarding = view_run(Run(DAG, "r", "running", {"repo": "a/b"}, [stage("check", state="running")]))
    assert (exporting.checks, onboarding.checks) == (False, True)


def test_run_of_a_dag_without_stages_has_no_view():
    assert view_run(Run("other", "r", "success", {}, [stage("anything")])) is None


def finding(**found):
    named = {"repo": "a/b", "model": "b", "revision": "branch main", "target": SLUG, "destination": "/p/"}
    return Finding(**{**named, **found})


def test_new_commit_leaves_the_old_one_published():
    published = finding(state="published", commit=OLD, published=NOON.isoformat(), verdict="pass", bytes=7)
    newer = finding(state="running", commit=COMMIT, run_id="onboard__b")
    (row,) = view_models([(NOON, published), (NOON + timedelta(hours=1), newer)], {}, DAG)
    assert (row.seen, row.published, row.verdict, row.bytes) == (COMMIT, OLD, "pass", 7)
    assert (row.state, row.run) == ("running", (DAG, "onboard__b"))


def test_outage_leaves_what_was_seen():
    seen = finding(state="published", commit=OLD, verdict="pass")
    away = finding(state="skipped", note="HTTP 503")
    (row,) = view_models([(NOON, seen), (NOON + timedelta(hours=1), away)], {}, DAG)
    assert (row.seen, row.published, row.state, row.note) == (OLD, OLD, "skipped", "HTTP 503")


def test_onboarding_by_hand_joins_the_row_of_its_model():
    stages = {
        "check": {"verdict": "pass", "max_kl": 2e-9},
        "publish": {"repo": "a/b", "url": f"/p/b/{COMMIT}/{SLUG}", "bytes": 9},
    }
    runs = {"manual__1": (NOON + timedelta(hours=1), stages), "unfinished": (NOON, {"check": {}})}
    (row,) = view_models([(NOON, finding(state="new", commit=COMMIT))], runs, DAG)
    assert (row.published, row.verdict, row.kl, row.size) == (COMMIT, "pass", "2.0e-09", "9 B")
    assert (row.state, row.run) == ("published", (DAG, "manual__1"))


def test_revisions_of_one_model_have_a_row_each():
    """A branch that is published, and a pinned commit whose onboarding failed: neither hides the other."""
    head = finding(state="published", commit=COMMIT, verdict="pass")
    pinned = finding(state="failed", revision=f"commit {OLD}", commit=OLD, run_id="onboard__old")
    stages = {"publish": {"repo": "a/b", "url": f"/p/b/{COMMIT}/{SLUG}", "bytes": 9}, "check": {"verdict": "pass"}}
    runs = {"onboard__new": (NOON, stages)}
    first, second = view_models([(NOON + timedelta(hours=1), head), (NOON + timedelta(hours=1), pinned)], runs, DAG)
    assert (first.revision, first.state, first.run) == ("branch main", "published", (DAG, "onboard__new"))
    assert (second.revision, second.state, second.run) == (f"commit {OLD}", "failed", (DAG, "onboard__old"))
    assert (second.published, second.seen) == ("", OLD)


def test_age_in_the_largest_unit():
    for delta, age in ((90, "1 minute ago"), (7200, "2 hours ago"), (200000, "2 days ago"), (5, "just now")):
        when = (datetime.now(UTC) - timedelta(seconds=delta)).isoformat()
        (row,) = view_models([(NOON, finding(state="published", commit=OLD, published=when))], {}, DAG)
        assert row.age == age


def test_import_of_the_plugin_is_light():
    """Every process of Airflow loads it; the pages only the API server."""
    program = (
        "import sys, airflow.plugins_manager\nbefore = set(sys.modules)\nimport ferry_airflow.plugin\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['ferry_airflow']", done.stderr


@pytest.mark.parametrize(
    "figures",
    [
        {"seconds": "x"},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": -1},
        {"seconds": [1], "bytes_in": 5},
        {"bytes_in": "12", "bytes_out": {}},
        {"bytes_in": -5, "peak_bytes": 10**400},
        {"plan": "x"},
        {"plan": {"seconds": [1], "bytes_in": "x"}},
        {"target": {"a": 1}, "url": 7, "path": [1]},
        {"error": 5, "verdict": {}},
        {"max_kl": "x", "mean_kl": float("nan"), "top1": True},
    ],
)
@pytest.mark.parametrize("name", ["resolve", "check", "convert", "publish"])
def test_figures_of_another_type_are_not_shown(name, figures):
    run = Run(DAG, "r", "failed", {"repo": "a/b", "destination": "/x"}, [stage(name, figures)])
    view = view_run(run)
    assert view is not None
    page = templates.get_template("run.html").render(nonce="n", run=run, view=view, missing="")
    assert "nan" not in page
    assert "inf" not in page.replace("info", "")


@pytest.mark.parametrize(("published", "rows"), [("x", 0), (7, 0), ("gs://a/b/c/d", 1)])
def test_models_page_with_figures_of_another_type(published, rows):
    stages = {"publish": {"url": published, "bytes": "5"}, "check": {"max_kl": "x", "verdict": 1}}
    found = view_models([], {"r": (NOON, stages)}, DAG)
    assert len(found) == rows
    templates.get_template("models.html").render(nonce="n", rows=found)


def test_pages_show_control_characters_as_text():
    run = Run(DAG, "r", "failed", {"repo": "a\u202eb", "destination": "/x"}, [stage("check", {"error": "\x1b[2J<b>"})])
    page = templates.get_template("run.html").render(nonce="n", run=run, view=view_run(run), missing="")
    assert "a\\u202eb" in page
    assert "\\x1b[2J&lt;b&gt;" in page
    assert not {"\u202e", "\x1b"} & set(page)
