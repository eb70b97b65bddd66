"""The plugin that creates the DAGs' pools when Airflow starts, and registers the reference of their deadlines."""

from __future__ import annotations

import sys
from typing import Any

from airflow.jobs.job import Job
from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin
from sqlalchemy.exc import IntegrityError

from ferry_airflow.deadlines import RunCreatedDeadline
from ferry_airflow.setup.pools import create_missing_pools, log


@hookimpl
def on_starting(component: Any) -> None:
    """Creates the missing pools. Every component calls it; only jobs such as the scheduler have the database."""
    if not isinstance(component, Job):
        return
    try:
        made = create_missing_pools()
    except IntegrityError:
        log.info("Another component is creating the pools")
    except Exception:
        log.exception("Cannot create the pools: run `python -m ferry_airflow.setup.pools`")
    else:
        log.info("Created pools: %s", ", ".join(made) or "none, all exist")


class SetupPlugin(AirflowPlugin):
    """Registers this module as a listener, and the reference."""

    name = "ferry-setup"
    listeners = [sys.modules[__name__]]  # noqa: RUF012 - as Airflow declares it
    deadline_references = [RunCreatedDeadline]  # noqa: RUF012 - as Airflow declares it
