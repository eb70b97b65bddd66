"""The description of this package for Airflow: the entry point `apache_airflow_provider`."""

from __future__ import annotations

from typing import Any

from conversion_lib import __version__


def get_provider_info() -> dict[str, Any]:
    """Returns the package as Airflow's list of providers shows it, with its plugin and its extra link."""
    return {
        "package-name": "ferry-checkpoints",
        "name": "Ferry",
        "description": "Converts checkpoints between Hugging Face (safetensors) and MaxText (Orbax).",
        "versions": [__version__],
        "extra-links": ["ferry_airflow.base.OutputLink"],
        "plugins": [{"name": "ferry-setup", "plugin-class": "ferry_airflow.setup.plugin.SetupPlugin"}],
    }
