"""Addresses that a browser opens: of a checkpoint, a repository, and the plugin's pages in Airflow's UI."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, urlsplit

from airflow.configuration import conf

TAB_ROUTE = "ferry"
"""The last part of the address of a run's tab in Airflow's UI."""


def ui_path(path: str) -> str:
    """A path of Airflow's as a browser asks for it: under the path that Airflow is served at, where it has one."""
    return urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/") + path


def tab_of(dag_id: str, run_id: str) -> str:
    """Ferry's tab of a run."""
    return ui_path(f"/dags/{quote(dag_id)}/runs/{quote(run_id, safe='')}/plugin/{TAB_ROUTE}")


def browsable(location: str) -> str:
    """A link for a path, a gs:// address or a repository on the Hub."""
    if location.startswith("gs://"):
        return "https://console.cloud.google.com/storage/browser/" + location.removeprefix("gs://")
    if location.startswith("hf://"):
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return f"{hub}/{location.removeprefix('hf://')}"
    return Path(location).as_uri() if location.startswith("/") else location
