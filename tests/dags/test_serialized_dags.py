"""What Airflow stores of a DAG is the same at each parse; otherwise each parse would be a new version of the DAG."""

import os
import shutil
import subprocess
import sys

from tests.support.airflow.environment import airflow_environment
from tests.support.paths import ROOT

TEAM_DAG = """
from airflow.sdk import DAG, Param
from ferry_airflow.check import CheckOperator
from ferry_airflow.convert import ConvertOperator
from ferry_airflow.execution.local import LocalSubprocess
from ferry_airflow.retries import StageRetryPolicy

with DAG("team", schedule=None, params={"source": Param("/s", type="string"), "name": Param(None)}) as dag:
    convert = ConvertOperator.partial(
        task_id="convert",
        source={"path": dag.param("source"), "work_dir": "/w"},
        model_name=dag.param("name"),
        execution=LocalSubprocess(),
        retry_policy=StageRetryPolicy(),
    ).expand(part=["0/2", "1/2"])
    CheckOperator.partial(task_id="check", reference=dag.param("source")).expand(checkpoint=convert.output)
"""
PROGRAM = """
import json, sys
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.models.serialized_dag import SerializedDagModel
from airflow.serialization.serialized_objects import DagSerialization

folder = Path(sys.argv[1])
bag = BundleDagBag(dag_folder=folder, bundle_path=folder, bundle_name="ferry")
assert not bag.import_errors, bag.import_errors
stored = {dag_id: DagSerialization.to_dict(dag) for dag_id, dag in sorted(bag.dags.items())}
ordered = SerializedDagModel._sort_serialized_dag_dict(stored)  # Airflow compares what it stores in this order
Path(sys.argv[2]).write_text(json.dumps(ordered, indent=1, sort_keys=True))
"""


def test_each_parse_gives_the_same_bytes(airflow_home, tmp_path):
    """Of the DAGs here, and of a team's own that maps stages over params."""
    folder = tmp_path / "dags"
    shutil.copytree(ROOT / "dags", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "team.py").write_text(TEAM_DAG)
    for seed in ("1", "2"):
        command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / seed)]
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        subprocess.run(command, env={**airflow_environment(airflow_home), **environment}, check=True)
    first, second = ((tmp_path / seed).read_text().splitlines() for seed in ("1", "2"))
    assert [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]] == []
    assert any('"team"' in line for line in first)
    assert [line for line in first if " at 0x" in line] == []  # the same address in both would be luck
