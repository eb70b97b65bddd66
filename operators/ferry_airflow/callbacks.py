"""Callbacks for the end of a run (in the DAG processor) and for a late run (in the triggerer).

Each writes a line to that process's log, and calls the function that an environment variable names.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk import Context

SUCCESS_VARIABLE, FAILURE_VARIABLE, LATE_VARIABLE = "FERRY_ON_SUCCESS", "FERRY_ON_FAILURE", "FERRY_ON_DEADLINE"
"""Each names a function, `package.module:function`, that is called with Airflow's context."""

log = logging.getLogger(__name__)


def on_success(context: Context) -> None:
    """Called when a run has succeeded: it published the checkpoint, or found it already published."""
    log.info("Run %s succeeded", _run_id(context))
    _call(SUCCESS_VARIABLE, context)


def on_failure(context: Context) -> None:
    """Called when a run has failed: after all retries, or at once for wrong input and a failed check."""
    log.error("Run %s failed: %s", _run_id(context), context.get("reason") or "see its tasks")
    _call(FAILURE_VARIABLE, context)


async def on_deadline(**kwargs: Any) -> None:
    """Called in the triggerer when a run has not ended in time. The run continues."""
    context = kwargs.get("context") or {}
    log.warning("Run %s is late", _run_id(context))
    _call(LATE_VARIABLE, context)


def _run_id(context: Any) -> str:
    run = context.get("dag_run")
    found = context.get("run_id") or getattr(run, "run_id", None) or (run or {}).get("dag_run_id")
    return str(found)


def _call(variable: str, context: Any) -> None:
    """Calls the function that the variable names. An error is only logged: it must not change the run."""
    name = os.environ.get(variable)
    if not name:
        return
    try:
        module, _, function = name.partition(":")
        getattr(import_module(module), function)(context)
    except Exception:
        log.exception("Calling %s=%s failed", variable, name)
