"""The wheel in a fresh environment: Airflow finds provider, plugins and DAGs, and a team's own packages stay theirs.

Airflow puts the plugins folder and the DAGs folder on the path behind site-packages; here each has packages that are
called `operators` and `dags`, as teams have them.
"""

import json
import os
import subprocess
import zipfile

import pytest

from tests.support.airflow.environment import bundles

TEAM_PLUGIN = """
from airflow.plugins_manager import AirflowPlugin
from dags.shared import DAGS_FROM
from operators.shared import OPERATORS_FROM


class TeamPlugin(AirflowPlugin):
    name = f"team, {OPERATORS_FROM}, {DAGS_FROM}"
"""
TEAM_DAG = """
from airflow.sdk import DAG
from dags.shared import DAGS_FROM
from operators.shared import OPERATORS_FROM
from ferry_airflow.convert import ConvertOperator

with DAG("team", tags=[OPERATORS_FROM, DAGS_FROM], schedule=None):
    ConvertOperator(task_id="convert", source="/models/source", destination="/models/converted")
"""
PROGRAM = """
import importlib.resources, json, ferry_airflow
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.plugins_manager import _get_plugins
from airflow.providers_manager import ProvidersManager

manager = ProvidersManager()
plugins, errors = _get_plugins()
bags = {}
for bundle in DagBundlesManager().get_all_dag_bundles():
    bundle.initialize()
    bags[bundle.name] = BundleDagBag(dag_folder=bundle.path, bundle_path=bundle.path, bundle_name=bundle.name)
files = importlib.resources.files("ferry_airflow")
print(json.dumps({
    "dags": {name: {dag_id: sorted(dag.tags) for dag_id, dag in bag.dags.items()} for name, bag in bags.items()},
    "import errors": {name: bag.import_errors for name, bag in bags.items() if bag.import_errors},
    "provider": manager.providers["ferry-checkpoints"].data["name"],
    "provider's plugins": [plugin.plugin_class for plugin in manager.plugins],
    "links": manager.extra_links_class_names,
    "plugins": [plugin.name for plugin in plugins],
    "plugin errors": errors,
    "data": [files.joinpath(name).is_file() for name in ("setup/pools.json", "plugin/templates/run.html")],
}))
"""


def write_packages(folder, **others):
    """`operators/` and `dags/` in a team's folder, and other files beside them."""
    for name in ("operators", "dags"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        (folder / name / "shared.py").write_text(f'{name.upper()}_FROM = "{name} of {folder.name}"\n')
    for name, text in others.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    folder = tmp_path_factory.mktemp("team")
    write_packages(folder / "plugins", team_plugin=TEAM_PLUGIN)
    write_packages(folder / "team-dags", team_dag=TEAM_DAG)
    return folder


def airflow(python, home, **settings):
    """The settings of a process of that interpreter: nothing of the tests' own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FERRY_", "HF_", "PYTHON"))}
    path = f"{python.parent}:{kept['PATH']}"
    return {**kept, "PATH": path, "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", **settings}


def run(python, program, environment, directory):
    done = subprocess.run([python, "-c", program], env=environment, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def ferry_dags(fresh, tmp_path_factory):
    """The DAG files, found as deploy/image/Dockerfile finds them, behind the link that deploy/airflow.env names."""
    link = tmp_path_factory.mktemp("opt") / "dags"
    program = "import ferry_airflow; print(ferry_airflow.DAGS_FOLDER)"
    link.symlink_to(run(fresh, program, airflow(fresh, link.parent), link.parent))
    return link


@pytest.fixture(scope="module")
def found(fresh, ferry_dags, team, tmp_path_factory):
    """What Airflow loads with a team's plugins folder and, as a bundle of its own, a team's DAGs folder."""
    home = tmp_path_factory.mktemp("home")
    environment = airflow(
        fresh,
        home,
        AIRFLOW__CORE__PLUGINS_FOLDER=str(team / "plugins"),
        AIRFLOW__CORE__DAGS_FOLDER=str(team / "team-dags"),
        **bundles(ferry_dags, team=team / "team-dags"),
    )
    migrate = [fresh, "-m", "airflow", "db", "migrate"]
    subprocess.run(migrate, env=environment, cwd=home, check=True, capture_output=True)
    return json.loads(run(fresh, PROGRAM, environment, home))


def test_wheel_has_no_name_of_others(wheel):
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"conversion_lib", "ferry_airflow"}


def test_wheel_carries_the_dag_files_as_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    dags = {name.rpartition("/")[2] for name in names if name.startswith("ferry_airflow/dags/")}
    assert dags == {"catalog.yaml", "export_checkpoint.py", "onboard_checkpoint.py", "scheduled_onboarding.py"}


def test_checkout_is_not_there(fresh, tmp_path):
    program = "import conversion_lib, ferry_airflow; print(conversion_lib.__file__, ferry_airflow.__file__)"
    for path in run(fresh, program, airflow(fresh, tmp_path), tmp_path).split():
        assert path.startswith(str(fresh.parents[1]))


def test_command_is_there(fresh, tmp_path):
    done = subprocess.run(
        [fresh.with_name("ferry"), "--version"],
        env=airflow(fresh, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("ferry "), done.stderr


def test_provider_is_registered(found):
    assert found["provider"] == "Ferry"
    assert "ferry_airflow.setup.plugin.SetupPlugin" in found["provider's plugins"]
    assert "ferry_airflow.base.OutputLink" in found["links"]


def test_plugins_are_registered(found):
    assert {"ferry", "ferry-setup"} <= set(found["plugins"])
    assert not found["plugin errors"]


def test_dags_load_from_a_bundle(found):
    assert sorted(found["dags"]["ferry"]) == ["export_checkpoint", "onboard_checkpoint", "scheduled_onboarding"]
    assert not found["import errors"]


def test_packages_of_a_team_stay_theirs(found):
    """Where both folders have a package of one name, Airflow's own order decides which it is; it is never Ferry's."""
    (plugin,) = [name for name in found["plugins"] if name.startswith("team")]
    _, operators, dags = plugin.split(", ")
    assert operators in ("operators of plugins", "operators of team-dags")
    assert dags in ("dags of plugins", "dags of team-dags")
    assert found["dags"]["team"] == {"team": sorted([operators, dags])}


def test_files_beside_the_modules_are_there(found):
    assert found["data"] == [True, True]
