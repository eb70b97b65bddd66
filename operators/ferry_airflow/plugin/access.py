"""Who may see what: the checks that Airflow's own routes make.

These functions of Airflow are no public interface (3.3.2 has none for this); nothing else of the plugin knows them. A
caller without a valid token gets 401 (403 where the token is no token at all), one without the right 403.
"""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends


def may_read_run() -> Any:
    """For a route with `dag_id` in its path: the caller may read what the tasks of that DAG left."""
    return Depends(requires_access_dag("GET", DagAccessEntity.XCOM))


def may_read_dag(dag_id: str) -> Any:
    """For a route about one DAG: the caller may read what its tasks left."""
    return Depends(requires_access_dag("GET", DagAccessEntity.XCOM, param_dag_id=dag_id))
