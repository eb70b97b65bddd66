"""Access rights: the checks of Airflow's own routes.

These functions are not a public interface of Airflow (3.3.2 has none for this), so only this module uses them. A caller
without a valid token gets 401 (403 if the token is malformed). A caller without the right gets 403.
"""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from fastapi import Depends


def may_read_run() -> Any:
    """Returns a dependency for a route with `dag_id` in its path: the caller may read that DAG's XComs."""
    return Depends(requires_access_dag("GET", DagAccessEntity.XCOM))


def may_read_dag(dag_id: str) -> Any:
    """Returns a dependency for a route about one DAG: the caller may read its XComs."""
    return Depends(requires_access_dag("GET", DagAccessEntity.XCOM, param_dag_id=dag_id))
