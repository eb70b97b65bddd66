"""The package as `pip install` lays it out: Airflow finds provider and plugins by themselves, and DAGs by a bundle."""

import json
import subprocess
import sys

import pytest

from tests.support.airflow.environment import airflow_environment

PROGRAM = """
import importlib.resources, json, operators
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.plugins_manager import _get_plugins
from airflow.providers_manager import ProvidersManager

(bundle,) = DagBundlesManager().get_all_dag_bundles()
bundle.initialize()
bag = BundleDagBag(dag_folder=bundle.path, bundle_path=bundle.path, bundle_name=bundle.name)
manager = ProvidersManager()
plugins, errors = _get_plugins()
files = importlib.resources.files("operators")
print(json.dumps({
    "at": ferry_airflow.__file__,
    "dags": sorted(bag.dags),
    "import errors": bag.import_errors,
    "provider": manager.providers["ferry-checkpoints"].data["name"],
    "provider's plugins": [plugin.plugin_class for plugin in manager.plugins],
    "links": manager.extra_links_class_names,
    "plugins": [plugin.name for plugin in plugins],
    "plugin errors": errors,
    "data": [files.joinpath(name).is_file() for name in ("pools.json", "plugin/templates/run.html")],
}))
"""


@pytest.fixture(scope="module")
def found(airflow_home, installed, installed_bundle, tmp_path_factory):
    environment = {**airflow_environment(airflow_home), **installed_bundle}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=elsewhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["at"].startswith(str(installed))
    return found


def test_provider_is_registered(found):
    assert found["provider"] == "Ferry"
    assert "ferry_airflow.setup.plugin.SetupPlugin" in found["provider's plugins"]
    assert "ferry_airflow.base.OutputLink" in found["links"]


def test_plugins_are_registered(found):
    assert {"ferry", "ferry-setup"} <= set(found["plugins"])
    # the checkout that the tests run from is registered too
    assert not [
        error for error in found["plugin errors"].values() if not error.endswith("already registered, skipping")
    ]


def test_dags_load_from_a_bundle(found):
    assert found["dags"] == ["export_checkpoint", "onboard_checkpoint", "scheduled_onboarding"]
    assert not found["import errors"]


def test_files_beside_the_modules_are_there(found):
    assert found["data"] == [True, True]
