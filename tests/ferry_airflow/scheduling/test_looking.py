"""A look at the Hub and the destination: what is found new, published, under way, or out of reach."""

import json
import shutil
from pathlib import Path

import pytest

from conversion_lib.core.retry import Backoff
from conversion_lib.demo.local_hub import Fault, Faults, LocalHub
from ferry_airflow.scheduling import looking as scheduling
from ferry_airflow.scheduling.catalog import Entry, TargetChoice
from ferry_airflow.scheduling.looking import (
    look,
    needs_a_person,
    newest_commit,
    run_id_of,
    settled,
    summary_lines,
    triggers,
)

REPO = "acme/tiny"
SLUG = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    monkeypatch.setattr(scheduling, "PATIENCE", Backoff(attempts=2, first_seconds=0.01, longest_seconds=0.01))
    with LocalHub({REPO: source}, faults=Faults()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def entry(tmp_path):
    return Entry(repo=REPO, destination=str(tmp_path / "published"))


def no_run(run_id):
    return None


def publish_by_hand(entry, commit, *, verdict="pass", checked=True):
    """What publishing leaves that a look reads; the publishing itself is tested with publish."""
    location = f"{entry.destination}/{entry.published_as}/{commit}/{SLUG}"
    path = Path(location)
    path.mkdir(parents=True)
    published = {"digest": "d", "checked": checked, "manifest_crc32c": "", "published": "2026-11-21T03:00:00+00:00"}
    (path / "ferry_commit.json").write_text(json.dumps({**published, "ferry": "0.1.0"}))
    files = [{"path": f"0/{i}", "size": 700, "crc32c": "AAAAAA=="} for i in range(2)]
    manifest = {"digest": "d", "checked": checked, "ferry": "0.1.0", "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "provenance.json").write_text(json.dumps({"verdict": {"verdict": verdict, "max_kl": 2e-9}}))
    return path


def test_new_commit_is_to_be_onboarded(hub, entry):
    (found,) = look(entry, no_run)
    commit = hub.repos[REPO].commit
    assert (found.state, found.commit, found.target) == ("new", commit, SLUG)
    (trigger,) = triggers(entry, [found])
    assert trigger["trigger_run_id"] == found.run_id == run_id_of(entry, commit, TargetChoice())
    assert trigger["conf"]["revision"] == commit


def test_published_commit_is_left_alone(hub, entry):
    path = publish_by_hand(entry, hub.repos[REPO].commit)
    (found,) = look(entry, no_run)
    assert (found.state, found.verdict, found.max_kl, found.bytes) == ("published", "pass", 2e-9, 1400)
    assert (found.url, found.published) == (str(path), "2026-11-21T03:00:00+00:00")
    assert triggers(entry, [found]) == []


def test_another_target_of_a_published_commit_is_new(hub, entry):
    publish_by_hand(entry, hub.repos[REPO].commit)
    both = entry.model_copy(update={"targets": [TargetChoice(), TargetChoice(scan_layers=False)]})
    findings = look(both, no_run)
    assert [found.state for found in findings] == ["published", "new"]
    assert [one["conf"]["scan_layers"] for one in triggers(both, findings)] == [False]


def test_unchecked_publication_shows_as_unchecked(hub, entry):
    publish_by_hand(entry, hub.repos[REPO].commit, checked=False)
    assert look(entry, no_run)[0].verdict == "unchecked"


@pytest.mark.parametrize(
    ("run_state", "state"), [("queued", "running"), ("running", "running"), ("failed", "failed"), ("success", "failed")]
)
def test_commit_with_a_run_is_not_triggered_again(hub, entry, run_state, state):
    asked = []
    (found,) = look(entry, lambda run_id: asked.append(run_id) or run_state)
    assert (found.state, triggers(entry, [found])) == (state, [])
    assert asked == [found.run_id]
    assert run_state in found.note


def test_outage_skips_the_model_and_says_so(hub, entry):
    hub.faults.planned.append(Fault("unavailable", "api", times=100))
    (found,) = look(entry, no_run)
    assert (found.state, found.commit) == ("skipped", None)
    assert "HTTP 503" in found.note
    assert needs_a_person([found], []) == []


def test_unknown_repository_needs_a_person(hub, entry):
    gone = entry.model_copy(update={"repo": "acme/gone"})
    (found,) = look(gone, no_run)
    assert found.state == "wrong"
    assert "acme/gone: no such repository" in found.note
    assert needs_a_person([found], ["catalog.yaml, line 3: wrong"]) == [
        "catalog.yaml, line 3: wrong",
        f"acme/gone: {found.note}",
    ]


def test_pinned_commit_is_not_asked_for(hub, entry):
    pinned = Entry(repo=REPO, destination=entry.destination, revision={"commit": COMMIT})
    (found,) = look(pinned, no_run)
    assert (found.state, found.commit, hub.requests) == ("new", COMMIT, [])


def test_marker_without_a_manifest_needs_a_person(hub, entry):
    (publish_by_hand(entry, hub.repos[REPO].commit) / "manifest.json").unlink()
    (found,) = look(entry, no_run)
    assert (found.state, triggers(entry, [found])) == ("wrong", [])
    assert "ferry verify" in found.note


def test_verdict_that_is_not_finite_goes_through_json(hub, entry):
    path = publish_by_hand(entry, hub.repos[REPO].commit)
    (path / "provenance.json").write_text(json.dumps({"verdict": {"verdict": "fail", "max_kl": "Infinity"}}))
    (found,) = look(entry, no_run)
    assert (found.verdict, found.max_kl) == ("fail", None)


def test_run_ids_tell_what_differs(entry):
    other = entry.model_copy(update={"destination": "gs://elsewhere"})
    ids = {
        run_id_of(entry, COMMIT, TargetChoice()),
        run_id_of(entry, COMMIT, TargetChoice(scan_layers=False)),
        run_id_of(entry, COMMIT[::-1], TargetChoice()),
        run_id_of(other, COMMIT, TargetChoice()),
    }
    assert len(ids) == 4
    assert run_id_of(entry, COMMIT, TargetChoice()) == run_id_of(entry, COMMIT, TargetChoice())


def test_settled_says_what_became_of_an_onboarding(hub, entry):
    (new,) = look(entry, no_run)
    assert "was not started" in settled(new, no_run).note
    assert settled(new, lambda run_id: "failed").state == "failed"
    path = publish_by_hand(entry, new.commit)
    done = settled(new, lambda run_id: "success")
    assert (done.state, done.url, done.bytes) == ("published", str(path), 1400)
    shutil.rmtree(path)
    assert settled(done, no_run) == done


def test_summary_is_a_table(hub, entry):
    lines = summary_lines(look(entry, no_run), ["catalog.yaml, line 3: wrong"])
    head, row, wrong = lines
    assert head.split() == ["model", "target", "commit", "state", "verdict", "size", "note"]
    assert row.split()[:4] == [REPO, SLUG, hub.repos[REPO].commit[:12], "new"]
    assert row.index("new") == head.index("state")
    assert wrong == "WRONG ENTRY: catalog.yaml, line 3: wrong"


@pytest.mark.parametrize(
    ("pattern", "tags", "newest"),
    [
        ("v*", ["v1.9", "v1.10", "w2.0"], "v1.10"),
        ("*", ["v2.0", "v2.0-rc1", "v1.0"], "v2.0"),
        ("*", ["2026-01-02", "2025-12-31"], "2026-01-02"),
        ("release-*", ["release-9", "release-10", "v99"], "release-10"),
    ],
)
def test_newest_tag_of_a_pattern(hub, entry, pattern, tags, newest):
    commits = {tag: f"{index:040x}" for index, tag in enumerate(tags)}
    hub.tags[REPO] = commits
    revision = entry.model_validate({**entry.model_dump(), "revision": {"tag": pattern}}).revision
    assert newest_commit(REPO, revision) == commits[newest]


def test_pattern_without_a_tag_needs_a_person(hub, entry):
    hub.tags[REPO] = {"v1": COMMIT}
    tagged = entry.model_validate({**entry.model_dump(), "revision": {"tag": "release-*"}})
    (found,) = look(tagged, no_run)
    assert (found.state, found.note) == ("wrong", f"{REPO} has no tag that matches release-*")
