"""The onboarding in an Airflow on PostgreSQL with the LocalExecutor, as it runs in earnest."""

import os

import pytest

from tests.dags.postgresql import programs, running_postgresql
from tests.dags.standalone import REPO, Standalone

pytestmark = pytest.mark.timeout(1800)  # of a machine that has other work; alone it takes half a minute


@pytest.fixture(scope="module")
def on_postgresql(tmp_path_factory, standalone_hub):
    if programs() is None and not os.environ.get("CI"):
        pytest.skip("PostgreSQL is not installed: the DAG was NOT tested on it")
    directory = tmp_path_factory.mktemp("on-postgresql")
    with running_postgresql() as address:
        environment = {
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": address,
            "FERRY_DESTINATION": str(directory / "published"),
            "FERRY_WORK_DIR": str(directory / "work"),
            "HF_ENDPOINT": standalone_hub.endpoint,
        }
        server = Standalone(directory, environment)
        try:
            yield server.start()
        finally:
            server.stop()


def test_onboarding(on_postgresql):
    conf = {"repo": REPO, "dequantize": "fused", "destination": str(on_postgresql.directory / "published")}
    run_id = on_postgresql.trigger("onboard_checkpoint", conf)
    assert on_postgresql.wait_for_run("onboard_checkpoint", run_id) == "success"
    published = on_postgresql.xcom("onboard_checkpoint", run_id, "publish")
    assert published["verdict"] == "pass"
    assert (on_postgresql.directory / "published" / "tiny-deepseek-v3" / published["commit"]).is_dir()
    assert not (on_postgresql.home / "airflow.db").exists()
