"""Runs a DAG as often as it is asked to, and tells what became of each run.

Each line of standard input is a request (JSON): `dag` and `conf` of the run, `environment` to set, `retry_seconds` to
begin the back-off with, and perhaps `ferry`, a command in ferry's place. The file named on the command line gets one
answer a line. It is a process of its own since Airflow reads its settings when it is imported.
"""

import json
import os
import sys

from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.models.xcom import XComModel
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import ParamValidationError
from airflow.utils.session import create_session

from ferry_airflow.execution.local import LocalSubprocess


def load_dag(dag_id):
    """The DAG as Airflow itself would load it from its bundle."""
    (bundle,) = DagBundlesManager().get_all_dag_bundles()
    bundle.initialize()
    bag = BundleDagBag(dag_folder=bundle.path, bundle_path=bundle.path, bundle_name=bundle.name)
    assert not bag.import_errors, bag.import_errors
    return bag.dags[dag_id]


def prepare(dag, request):
    os.environ["FERRY_RETRY_SECONDS"] = str(request["retry_seconds"])
    for task in dag.tasks:
        if "ferry" not in request:
            continue
        mode = LocalSubprocess(request["ferry"])
        if isinstance(task, MappedOperator):
            task.partial_kwargs["execution"] = mode
        else:
            task.execution = mode
    return dag


def name(row):
    """`convert`, or `convert-0` where it is mapped."""
    return row.task_id if row.map_index < 0 else f"{row.task_id}-{row.map_index}"


def describe(run):
    with create_session() as session:
        tasks = {
            name(instance): {"state": str(instance.state), "tries": instance.try_number}
            for instance in run.get_task_instances(session=session)
        }
        for row in session.query(XComModel).filter(XComModel.run_id == run.run_id):
            tasks[name(row)].setdefault("xcom", {})[row.key] = XComModel.deserialize_value(row)
    return {"state": str(run.state), "run_id": run.run_id, "tasks": tasks}


def answer(request):
    os.environ.update(request["environment"])
    dag = prepare(load_dag(request["dag"]), request)
    try:
        return describe(dag.test(run_conf=request["conf"]))
    except ParamValidationError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    with open(sys.argv[1], "w") as answers:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
