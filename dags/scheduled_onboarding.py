"""Onboards what is new on the Hub, for the models of the catalogue.

- **read_catalog** reads the catalogue.
- **look** asks the Hub for new commits, and the destinations for what is published. **choose** collects what is new.
- **onboard** runs `onboard_checkpoint` for each new commit and target, at most `at_most` at once.
- **summarize** writes a summary to its log. It fails if something needs a person.

The catalogue is `catalog.yaml` beside this DAG, or the file that `FERRY_CATALOG` names; docs/guides/scheduled.md lists
its keys. A wrong entry is reported with its line and does not stop the others. If the Hub does not answer, a model is
skipped until the next look. A failed onboarding is not retried by itself: clear its run.

| setting of the workers (environment) | meaning |
| --- | --- |
| `FERRY_CATALOG` | another catalogue (also read by the DAG processor) |
| `FERRY_DESTINATION` | destination of the models without one |
| `FERRY_HF_CONN_ID` | Airflow connection whose password is the Hub token (also read by the DAG processor) |
| `HF_ENDPOINT`, `HF_TOKEN` | another Hub; the token, if there is no connection |
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, get_current_context, task

from ferry_airflow.callbacks import on_failure
from ferry_airflow.scheduling.catalog import catalog_path, load_catalog

PATH = catalog_path(Path(__file__).with_name("catalog.yaml"))
WAIT_SECONDS = 10
"""How often the triggerer asks whether an onboarding has ended. The waiting task holds no worker."""

log = logging.getLogger("airflow.task")
# A catalogue that cannot be read at all is an import error of this DAG, which Airflow shows on its first page.
catalog = load_catalog(PATH)

with DAG(
    "scheduled_onboarding",
    description="Onboards new commits on the Hub, for the models of the catalogue",
    doc_md=__doc__,
    schedule=catalog.schedule,
    catchup=False,
    max_active_runs=1,
    tags=["ferry", "maxtext"],
    on_failure_callback=on_failure,
    default_args={"owner": "ferry", "retries": 2, "retry_delay": timedelta(seconds=30)},
) as dag:
    hf_conn_id = os.environ.get("FERRY_HF_CONN_ID") or None

    @task
    def read_catalog() -> list[dict[str, Any]]:
        from ferry_airflow.scheduling import tasks as scheduling_tasks

        return scheduling_tasks.read_catalog(PATH, log)

    @task(map_index_template="{{ repo }}")
    def look(entry: dict[str, Any]) -> list[dict[str, Any]]:
        from ferry_airflow.scheduling import tasks as scheduling_tasks

        get_current_context()["repo"] = entry["repo"]
        return scheduling_tasks.look_at(entry, hf_conn_id, log)

    @task(trigger_rule="all_done")
    def choose(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        from ferry_airflow.scheduling import tasks as scheduling_tasks

        return scheduling_tasks.choose(found, log)

    @task(trigger_rule="all_done", retries=0)
    def summarize(entries: list[dict[str, Any]]) -> str:
        from ferry_airflow.scheduling import tasks as scheduling_tasks

        return scheduling_tasks.summarize(entries, log)

    entries = read_catalog()
    chosen = choose(look.expand(entry=entries))
    onboard = TriggerDagRunOperator.partial(
        task_id="onboard",
        trigger_dag_id="onboard_checkpoint",
        logical_date=None,
        wait_for_completion=True,
        deferrable=True,
        poke_interval=WAIT_SECONDS,
        skip_when_already_exists=True,
        fail_when_dag_is_paused=True,
        max_active_tis_per_dag=catalog.at_most,
        map_index_template="{{ task.trigger_run_id }}",
        retries=0,
    ).expand_kwargs(chosen)
    onboard >> summarize(entries)
