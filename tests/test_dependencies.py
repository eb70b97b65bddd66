"""What is imported is declared, in the extra that says what for; and the base install does what it is for."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions

import pytest
from packaging.utils import canonicalize_name

from tests.support.checkpoints import LLAMA, random_tensors, write_checkpoint
from tests.support.environments import declared, make_environment
from tests.support.paths import ROOT
from tests.support.sparse_checkpoints import llama_tensors

OWN = {"conversion_lib", "ferry_airflow"}
NAMESPACES = {
    "google.api_core": "google-api-core",
    "google.auth": "google-auth",
    "google.cloud.storage": "google-cloud-storage",
    "airflow.providers.cncf": "apache-airflow-providers-cncf-kubernetes",
    "airflow.providers.standard": "apache-airflow-providers-standard",
    "airflow": "apache-airflow",
}
"""Import names that several distributions share, and whose the rest of each is."""
MAXTEXTS_OWN = "conversion_lib/logits/by_maxtext/worker.py"
"""Runs under the interpreter of a MaxText installation, with what is there."""

EXTRAS = {
    "conversion_lib": (),
    "conversion_lib/logits": ("check",),
    "conversion_lib/demo": ("check",),
    "conversion_lib/models/transformers_library.py": ("check",),
    "conversion_lib/sources/transformers.py": ("check",),
    "operators/ferry_airflow": ("airflow",),
    "operators/ferry_airflow/execution/kubernetes.py": ("airflow", "kubernetes"),
    "operators/ferry_airflow/execution/pod.py": ("airflow", "kubernetes"),
    "operators/ferry_airflow/steps": (),
    "dags": ("airflow",),
}
"""What may be imported where, beside the base install; the longest path that fits counts."""


def imported(path):
    """The modules that a file imports at any level, with what is taken of a package that several share."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


_distributions = cache(packages_distributions)


def distribution_of(module):
    shared = [name for name in NAMESPACES if f"{module}.".startswith(f"{name}.")]
    if shared:
        return NAMESPACES[max(shared, key=len)]
    (found,) = set(_distributions()[module.partition(".")[0]])
    return canonicalize_name(found)


def third_party(path):
    return {m for m in imported(path) if m.partition(".")[0] not in sys.stdlib_module_names | OWN}


def extras_of(name):
    return EXTRAS[max((path for path in EXTRAS if f"{name}/".startswith(f"{path}/")), key=len)]


def sources():
    for root in ("conversion_lib", "operators/ferry_airflow", "dags"):
        for path in sorted((ROOT / root).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name != MAXTEXTS_OWN and "ferry_airflow/dags/" not in name:
                yield name, path


def test_what_is_imported_is_declared():
    undeclared = {}
    for name, path in sources():
        names = {canonicalize_name(one.name) for one in declared(*extras_of(name))}
        if more := {m for m in third_party(path) if distribution_of(m) not in names}:
            undeclared[name] = more
    assert not undeclared


def test_what_is_declared_is_imported():
    found = {distribution_of(module) for _, path in sources() for module in third_party(path)}
    extras = ("check", "airflow", "kubernetes")
    assert {canonicalize_name(one.name) for one in declared(*extras)} - found == set()


def test_dag_files_import_airflow_and_the_operators_only():
    roots = {module.partition(".")[0] for path in (ROOT / "dags").glob("*.py") for module in imported(path)}
    assert roots <= sys.stdlib_module_names | {"airflow", "ferry_airflow"}


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    """An interpreter with the base install: no jax, no torch, no Airflow."""
    return make_environment(tmp_path_factory.mktemp("base"), wheel)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "hf", LLAMA, random_tensors(llama_tensors(LLAMA)))


def run(python, directory, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    return subprocess.run(
        [python, *map(str, arguments)], cwd=directory, env=environment, capture_output=True, text=True
    )


def ferry(python, directory, *arguments):
    done = run(python, directory, python.with_name("ferry"), *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_base_install_has_no_framework(base, tmp_path):
    program = "from importlib.util import find_spec\nfor name in {}: assert find_spec(name) is None, name"
    done = run(base, tmp_path, "-c", program.format(("jax", "torch", "transformers", "airflow", "operators", "dags")))
    assert done.returncode == 0, done.stderr


def test_base_install_converts_and_publishes(base, source, tmp_path):
    assert ferry(base, tmp_path, "plan", source)["arrays"]
    ferry(base, tmp_path, "convert", source, "converted")
    assert ferry(base, tmp_path, "inspect", "converted")
    ferry(base, tmp_path, "export", "converted", "exported")
    assert ferry(base, tmp_path, "compare", source, "exported")["same"]
    url = ferry(base, tmp_path, "publish", "converted", tmp_path / "published", "--unchecked")["url"]
    assert ferry(base, tmp_path, "verify", url)["problems"] == []


def test_check_without_its_extra_names_it(base, tmp_path):
    """On the command line and in the library: one line that says what to install, whatever the arguments are."""
    hint = "pip install 'ferry-checkpoints[check]'"
    done = run(base, tmp_path, base.with_name("ferry"), "check", "converted", "--reference", "hf")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ferry: `ferry check` needs jax") and line.endswith(hint)
    program = "from conversion_lib import api\ntry: api.check('converted', 'hf')\nexcept api.BadInput as e: print(e)"
    assert run(base, tmp_path, "-c", program).stdout.rstrip().endswith(hint)
