"""Runs `onboard_checkpoint` as often as it is asked to, and tells what became of each run.

Each line of standard input is a request (JSON): `conf` of the run, `environment` to set, `retry_seconds` in place of
the DAG's back-off, and perhaps `ferry`, a command in ferry's place. The file named on the command line gets one
answer a line. It is a process of its own since Airflow reads its settings when it is imported.
"""

import json
import os
import sys
from datetime import timedelta

from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag
from airflow.models.xcom import XComModel
from airflow.sdk.exceptions import ParamValidationError
from airflow.utils.session import create_session


def load_dag(dag_id):
    """The DAG as Airflow itself would load it from its bundle."""
    (bundle,) = DagBundlesManager().get_all_dag_bundles()
    bundle.initialize()
    bag = BundleDagBag(dag_folder=bundle.path, bundle_path=bundle.path, bundle_name=bundle.name)
    assert not bag.import_errors, bag.import_errors
    return bag.dags[dag_id]


def prepare(dag, request):
    for task in dag.tasks:
        task.retry_delay = timedelta(seconds=request["retry_seconds"])
        task.max_retry_delay = task.retry_delay
        if "ferry" in request:
            task.place._command = request["ferry"]
    return dag


def describe(run):
    with create_session() as session:
        tasks = {
            instance.task_id: {"state": str(instance.state), "tries": instance.try_number}
            for instance in run.get_task_instances(session=session)
        }
        for row in session.query(XComModel).filter(XComModel.run_id == run.run_id):
            tasks[row.task_id].setdefault("xcom", {})[row.key] = XComModel.deserialize_value(row)
    return {"state": str(run.state), "run_id": run.run_id, "tasks": tasks}


def answer(request):
    os.environ.update(request["environment"])
    dag = prepare(load_dag("onboard_checkpoint"), request)
    try:
        return describe(dag.test(run_conf=request["conf"]))
    except ParamValidationError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    with open(sys.argv[1], "w") as answers:
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
