"""Ferry's pages in Airflow's UI: a tab of each DAG run, and one page of all models."""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin

from ferry_airflow.links import TAB_ROUTE, ui_path

PREFIX = "/ferry"


class FerryPlugin(AirflowPlugin):
    """Airflow finds it through the entry point `airflow.plugins`."""

    name = "ferry"
    external_views = [  # noqa: RUF012 - as Airflow declares it
        {
            "name": "Ferry",
            "href": ui_path(PREFIX + "/runs/{DAG_ID}/{RUN_ID}"),
            "destination": "dag_run",
            "url_route": TAB_ROUTE,
        },
        {
            "name": "Models",
            "href": ui_path(PREFIX + "/models"),
            "destination": "nav",
            "category": "browse",
            "url_route": "ferry_models",
        },
    ]

    @property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The pages. Only the API server reads this, so no other process of Airflow imports them."""
        from ferry_airflow.plugin.pages import make_app

        return [{"app": make_app(), "url_prefix": PREFIX, "name": "Ferry"}]
