"""The plugin that makes the DAGs' pools when Airflow starts."""

from __future__ import annotations

import sys
from typing import Any

from airflow.jobs.job import Job
from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin
from sqlalchemy.exc import IntegrityError

from ferry_airflow.setup.pools import create_missing_pools, log


@hookimpl
def on_starting(component: Any) -> None:
    """Called in every component. Scheduler, triggerer and DAG processor are jobs, which have the metadata database."""
    if not isinstance(component, Job):
        return
    try:
        made = create_missing_pools()
    except IntegrityError:
        log.info("Another component makes the pools at this moment")
    except Exception:
        log.exception("The pools could not be made: run `python -m ferry_airflow.setup.pools`")
    else:
        log.info("Pools that were missing: %s", ", ".join(made) or "none")


class SetupPlugin(AirflowPlugin):
    """Registers this module as a listener."""

    name = "ferry-setup"
    listeners = [sys.modules[__name__]]  # noqa: RUF012 - as Airflow declares it
