"""What Airflow is told of this package when it is installed: the entry point `apache_airflow_provider`."""

from __future__ import annotations

from typing import Any

from conversion_lib import __version__


def get_provider_info() -> dict[str, Any]:
    """The package as Airflow's list of providers shows it, and the plugin that sets things up."""
    return {
        "package-name": "ferry-checkpoints",
        "name": "Ferry",
        "description": "Carries checkpoints between Hugging Face (safetensors) and MaxText (Orbax).",
        "versions": [__version__],
        "extra-links": ["ferry_airflow.base.OutputLink"],
        "plugins": [{"name": "ferry-setup", "plugin-class": "ferry_airflow.setup.plugin.SetupPlugin"}],
    }
