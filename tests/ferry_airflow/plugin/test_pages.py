"""The pages in Airflow's UI: who sees them, what they show, and what they refuse to open."""

import re
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.airflow.standalone import OUTSIDER, REPO

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def run_page(scheduled):
    return f"/ferry/runs/onboard_checkpoint/{quote(scheduled.onboarding)}"


@pytest.fixture
def paths(run_page):
    return [run_page, f"{run_page}/report", "/ferry/models"]


def test_without_a_token_401(standalone, paths):
    assert [standalone.fetch("GET", path, user=None)[0] for path in paths] == [401, 401, 401]


def test_with_a_forged_token_as_airflow_itself_answers(standalone, paths):
    forged = {"Authorization": f"Bearer {standalone.token()[:-4]}AAAA"}
    own = standalone.fetch("GET", "/api/v2/dags/onboard_checkpoint", user=None, headers=forged)[0]
    assert own in (401, 403)
    assert {standalone.fetch("GET", path, user=None, headers=forged)[0] for path in paths} == {own}


def test_without_a_right_on_the_dag_403(standalone, paths):
    for path in paths:
        status, _, content = standalone.fetch("GET", path, user=OUTSIDER)
        assert status == 403
        assert REPO.encode() not in content


def test_with_the_right_200_by_token_and_by_cookie(standalone, paths):
    cookie = {"Cookie": f"_token={standalone.token()}"}
    assert [standalone.fetch("GET", path)[0] for path in paths] == [200, 200, 200]
    assert [standalone.fetch("GET", path, user=None, headers=cookie)[0] for path in paths] == [200, 200, 200]


def test_only_what_is_its_own_may_be_loaded(standalone, paths):
    for path in paths:
        _, headers, content = standalone.fetch("GET", path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'self'" in policy
        assert "script" not in policy
        assert headers["Cache-Control"] == "private, no-store"
        assert b"<script" not in content


def test_run_page_shows_stages_and_verdict(standalone, run_page):
    text = standalone.fetch("GET", run_page)[2].decode()
    stages = re.findall(r"<tr>\s*<td>([a-z_]+(?: \d+)?)</td>", text)
    assert [name for name in stages if name in ("resolve", "download", "convert 0", "check", "publish")] == [
        "resolve",
        "download",
        "convert 0",
        "check",
        "publish",
    ]
    assert "logits: pass" in text
    assert "largest KL of a token" in text
    assert len(re.findall(r"\d [kMG]B/s", text)) >= 3


def test_report_is_the_published_file_and_no_other(standalone, scheduled, run_page):
    url = standalone.xcom("onboard_checkpoint", scheduled.onboarding, "publish")["url"]
    report = Path(url) / "report" / "report.html"
    original = report.read_bytes()
    assert standalone.fetch("GET", f"{run_page}/report")[2] == original
    report.write_bytes(original.replace(b"pass", b"PASS"))
    try:
        status, _, content = standalone.fetch("GET", f"{run_page}/report")
    finally:
        report.write_bytes(original)
    assert status == 404
    assert b"not the one that was published" in content


def test_run_that_there_is_not(standalone):
    for path in ("/ferry/runs/onboard_checkpoint/nothing", "/ferry/runs/onboard_checkpoint/nothing/report"):
        assert standalone.fetch("GET", path)[0] == 404


def test_run_of_another_dag_has_no_checkpoint(standalone, scheduled):
    status, _, content = standalone.fetch("GET", f"/ferry/runs/scheduled_onboarding/{quote(scheduled.run_id)}")
    assert status == 200
    assert b"no stage of Ferry" in content


def test_models_page_shows_what_is_seen_and_published(standalone, standalone_hub, scheduled):
    text = standalone.fetch("GET", "/ferry/models")[2].decode()
    commit = standalone_hub.repos[REPO].commit
    # other tests onboard the same model to other targets: a row each
    rows = [row for row in text.split("<tr>") if f'href="runs/onboard_checkpoint/{quote(scheduled.onboarding)}"' in row]
    assert len(rows) == 1
    assert rows[0].count(f'title="{commit}"') == 2  # seen and published
    assert re.search(rf"{REPO}.*?published.*?pass.*?[kM]B.*?(ago|just now)", rows[0], re.DOTALL)
    assert "acme/gone: no such repository" in text
