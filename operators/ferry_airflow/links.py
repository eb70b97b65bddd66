"""Links for a browser: to a checkpoint, to a repository, and to the plugin's pages in Airflow's UI."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, urlsplit

from airflow.configuration import conf

TAB_ROUTE = "ferry"
"""The last part of the address of a run's tab in Airflow's UI."""


def ui_path(path: str) -> str:
    """Prefixes a path of Airflow's UI with the path of `[api] base_url`, if that has one."""
    return urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/") + path


def tab_of(dag_id: str, run_id: str) -> str:
    """Returns the path of Ferry's tab of a run, for a browser."""
    return ui_path(f"/dags/{quote(dag_id)}/runs/{quote(run_id, safe='')}/plugin/{TAB_ROUTE}")


def report_of(dag_id: str, run_id: str) -> str:
    """Returns the path of the page with a run's report alone, for a browser."""
    return ui_path(f"/ferry/runs/{quote(dag_id)}/{quote(run_id, safe='')}/report")


def browsable(location: str) -> str:
    """Returns a link to an absolute path, a gs:// URL or an hf:// repository; anything else unchanged."""
    if location.startswith("gs://"):
        return "https://console.cloud.google.com/storage/browser/" + location.removeprefix("gs://")
    if location.startswith("hf://"):
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{hub}/{location.removeprefix('hf://')}"
    return Path(location).as_uri() if location.startswith("/") else location
