"""What is called when a run ends (in the DAG processor) or is late (in the triggerer).

It is a line in that process's log, and a function of one's own that configuration names.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk import Context

SUCCESS_VARIABLE, FAILURE_VARIABLE, LATE_VARIABLE = "FERRY_ON_SUCCESS", "FERRY_ON_FAILURE", "FERRY_ON_DEADLINE"
"""Each names a function as `package.module:function`; it is called with Airflow's context."""

log = logging.getLogger(__name__)


def on_success(context: Context) -> None:
    """When a run has ended well: published, or found published."""
    log.info("Run %s succeeded", _run_id(context))
    _call(SUCCESS_VARIABLE, context)


def on_failure(context: Context) -> None:
    """When a run has failed: after every retry, or at once for wrong input and a failed check."""
    log.error("Run %s failed: %s", _run_id(context), context.get("reason") or "see it")
    _call(FAILURE_VARIABLE, context)


async def on_deadline(**kwargs: Any) -> None:
    """When a run has not ended in the time it was given; it goes on. Called in the triggerer."""
    context = kwargs.get("context") or {}
    log.warning("Run %s is late", _run_id(context))
    _call(LATE_VARIABLE, context)


def _run_id(context: Any) -> str:
    run = context.get("dag_run")
    found = context.get("run_id") or getattr(run, "run_id", None) or (run or {}).get("dag_run_id")
    return str(found)


def _call(variable: str, context: Any) -> None:
    """Calls what the variable names. One that cannot be called is logged: a run's end is not undone by it."""
    name = os.environ.get(variable)
    if not name:
        return
    try:
        module, _, function = name.partition(":")
        getattr(import_module(module), function)(context)
    except Exception:
        log.exception("%s=%s could not be called", variable, name)
