"""One run of `scheduled_onboarding` and the onboarding that it triggered: for the tests of the DAG and of the pages."""

from types import SimpleNamespace

import pytest

from tests.support.airflow.standalone import REPO

DAG, ONBOARDING = "scheduled_onboarding", "onboard_checkpoint"
NO_COMMIT = "0" * 40
CATALOG = f"""\
schedule: null
at_most: 1
models:
  - repo: {REPO}
  - repo: acme/wrong
    targets: [{{scan_layers: "no"}}]
  - repo: acme/gone
  - repo: {REPO}
    revision: {{commit: "{NO_COMMIT}"}}
"""


def run_scheduled(server, catalog, *, wanted="success"):
    """Runs `scheduled_onboarding` once with this catalogue; its run id."""
    (server.directory / "catalog.yaml").write_text(catalog)
    run_id = server.trigger(DAG, {})
    state = server.wait_for_run(DAG, run_id)
    assert state == wanted, server.task_log(DAG, run_id, "summarize")
    return run_id


@pytest.fixture(scope="session")
def scheduled(standalone):
    """`run_id`: of a run that meets a new model, a wrong entry, an unknown repository, and a commit that there is not.

    `onboarding`, `failed`: the runs that it started for the model and for that commit.
    """
    run_id = run_scheduled(standalone, CATALOG, wanted="failed")
    started = standalone.xcom(DAG, run_id, "choose")
    onboarding, failed = sorted(started, key=lambda one: one["conf"]["revision"] == NO_COMMIT)
    return SimpleNamespace(run_id=run_id, onboarding=onboarding["trigger_run_id"], failed=failed["trigger_run_id"])
