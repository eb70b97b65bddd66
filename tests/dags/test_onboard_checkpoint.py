"""The DAG by itself: it loads light, its params are checked, its stages go in order and fail as they should.

A script stands in for ferry; `test_onboarding_for_real.py` runs the real one.
"""

import json
import subprocess
import sys
from urllib.parse import quote

import pytest

from ferry_airflow.layout import run_report
from tests.support.airflow.environment import airflow_environment
from tests.support.airflow.onboarding import Onboarding, manifests
from tests.support.paths import ROOT

TASKS = [
    "resolve",
    "download",
    "dequantize",
    "split",
    "convert",
    "finalize",
    "check",
    "approval",
    "publish",
    "clean_up",
]
pytestmark = pytest.mark.timeout(900)  # of a machine that has other work
FAKE = [sys.executable, str(ROOT / "tests" / "support" / "airflow" / "fake_ferry.py")]


def run_python(home, program):
    done = subprocess.run(
        [sys.executable, "-c", program], env=airflow_environment(home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def test_bundle_loads_without_errors(airflow_home):
    program = (
        "from tests.support.airflow.run_onboarding import load_dag\n"
        "dag = load_dag('onboard_checkpoint')\n"
        "tasks = [task.task_id for task in dag.topological_sort()]\n"
        "callbacks = [one.__name__ for one in (dag.on_success_callback, dag.on_failure_callback)]\n"
        "print(tasks, callbacks, *(alert.interval for alert in dag.deadline))"
    )
    assert run_python(airflow_home, program) == f"{TASKS} ['on_success', 'on_failure'] 1 day, 0:00:00"


def test_parsing_is_light(airflow_home):
    program = (
        "import sys, dags.onboard_checkpoint\n"
        "heavy = {'jax', 'torch', 'orbax', 'tensorstore', 'transformers', 'numpy', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(airflow_home, program) == "[]"


def test_library_does_not_know_airflow():
    sources = (ROOT / "conversion_lib").rglob("*.py")
    importing = [path for path in sources if any(x in path.read_text() for x in ("import airflow", "from airflow"))]
    assert not importing


@pytest.fixture(scope="module")
def process(airflow_home, tmp_path_factory):
    onboarding = Onboarding(airflow_home, tmp_path_factory.mktemp("runs"), {})
    yield onboarding
    onboarding.close()


@pytest.fixture
def onboarding(process, tmp_path):
    process.environment = {"FERRY_WORK_DIR": str(tmp_path / "work")}
    return process


@pytest.fixture
def calls(onboarding, tmp_path):
    """The calls of the stand-in for ferry so far, after `calls.fault(...)` says which are to fail."""

    class Calls:
        faults_path, calls_path = tmp_path / "faults.json", tmp_path / "calls"

        def fault(self, **exit_codes):
            self.faults_path.write_text(json.dumps(exit_codes))

        def commands(self):
            return [json.loads(line) for line in self.calls_path.read_text().splitlines()]

    calls = Calls()
    calls.fault()
    calls.calls_path.touch()
    onboarding.environment["FAKE_FERRY_FAULTS"] = str(calls.faults_path)
    onboarding.environment["FAKE_FERRY_CALLS"] = str(calls.calls_path)
    return calls


@pytest.fixture
def source(tmp_path):
    """A directory that says it is an fp8 checkpoint."""
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    return path


def test_stages_in_order(onboarding, calls, source):
    answer = onboarding.run({"repo": str(source), "destination": "/published"}, ferry=FAKE)
    assert answer["state"] == "success", onboarding.log[-8000:]
    work = manifests(answer)["resolve"]["work_dir"]
    slug = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
    target = f"{work}/{slug}"
    layout = ["--scan-layers", "--save-dtype", "bfloat16", "--ocdbt", "--zarr3", "--maxtext", "0.2.5"]
    run = ["--run", f"onboard_checkpoint@{answer['run_id']}"]
    resolved = ["--revision", "main", "--destination", "/published", *run, "--dequantize", "staged", *layout]
    left = ["--run-report", run_report("/published", "onboard_checkpoint", answer["run_id"])]
    limit = ["--max-model-kl", "0.001"]
    assert calls.commands() == [
        ["resolve", str(source), *resolved],
        ["dequantize", str(source), f"{work}/bf16"],
        ["convert", f"{work}/bf16", target, *layout],
        ["finalize", target],
        ["check", target, "--reference", f"{work}/bf16", "--report", f"{target}/report", *limit, *left],
        ["publish", target, "/published", "--report", f"{target}/report", *left],
        ["clean-up", work, *run, "--target", slug, "--keep", "keep_on_failure", "--succeeded"],
    ]
    assert answer["tasks"]["approval"]["state"] == "skipped"
    for task in set(TASKS) - {"split", "convert", "approval"} | {"convert-0"}:
        manifest = manifests(answer)[task]
        assert {"stage", "seconds", "bytes_in", "bytes_out", "peak_bytes"} <= set(manifest)
        assert manifest["stage"] == task.removesuffix("-0")
    # what lies in a directory no browser opens: the button leads to the run's tab, which says where it is
    tab = f"/dags/onboard_checkpoint/runs/{quote(answer['run_id'], safe='')}/plugin/ferry"
    assert answer["tasks"]["publish"]["xcom"]["_link_OutputLink"] == tab


def test_fused_and_other_params(onboarding, calls, source):
    conf = {"repo": str(source), "destination": "gs://models/x", "dequantize": "fused", "model_name": "deepseek3-tiny"}
    conf |= {"scan_layers": False, "save_dtype": "float32", "ocdbt": False, "zarr3": False, "maxtext": "main"}
    answer = onboarding.run({**conf, "max_kl": 0.5, "keep_files": "keep"}, ferry=FAKE)
    assert answer["state"] == "success", onboarding.log[-8000:]
    _, convert, _, check, publish, clean_up = calls.commands()
    assert convert[1] == str(source)
    options = "--model deepseek3-tiny --no-scan-layers --save-dtype float32 --no-ocdbt --no-zarr3 --maxtext main"
    assert convert[3:] == options.split()
    assert check[3] == str(source)
    assert check[check.index("--max-kl") + 1] == "0.5"
    assert publish[2] == "gs://models/x"
    assert clean_up[-2:] == ["keep", "--succeeded"]


def test_parts_are_mapped_tasks(onboarding, calls, source):
    answer = onboarding.run({"repo": str(source), "destination": "/published", "parts": 3}, ferry=FAKE)
    assert answer["state"] == "success", onboarding.log[-8000:]
    # in no order: they are one mapped task, and each may be the first to run
    given = sorted(command[-2:] for command in calls.commands() if command[0] == "convert")
    assert given == [["--part", "0/3"], ["--part", "1/3"], ["--part", "2/3"]]
    assert manifests(answer)["finalize"]["parts"] == 3
    assert [command[0] for command in calls.commands()].count("finalize") == 1


@pytest.mark.parametrize(("task", "code"), [("check", 1), ("check", 2), ("convert", 2)])
def test_final_failures_are_not_retried(onboarding, calls, source, task, code):
    calls.fault(**{task: [code]})
    answer = onboarding.run({"repo": str(source), "destination": "/published"}, ferry=FAKE)
    assert answer["state"] == "failed"
    failed = answer["tasks"]["convert-0" if task == "convert" else task]
    assert (failed["state"], failed["tries"]) == ("failed", 1)
    assert answer["tasks"]["publish"]["state"] == "upstream_failed"
    assert f"ferry: {task} went wrong" in onboarding.log
    assert calls.commands()[-1][-1] == "--failed"  # cleaned up all the same


@pytest.mark.parametrize("codes", [[3], [143, 3]])
def test_outages_are_retried(onboarding, calls, source, codes):
    calls.fault(convert=codes)
    answer = onboarding.run({"repo": str(source), "destination": "/published"}, ferry=FAKE)
    assert answer["state"] == "success"
    assert answer["tasks"]["convert-0"]["tries"] == 1 + len(codes)


def test_waiting_for_another_run_spends_no_retry(onboarding, calls, source):
    calls.fault(convert=["busy"] * 5)
    answer = onboarding.run({"repo": str(source), "destination": "/published"}, ferry=FAKE)
    assert answer["state"] == "success", onboarding.log[-4000:]
    assert answer["tasks"]["convert-0"]["tries"] == 1
    assert "Waiting for another run" in onboarding.log


GOOD = {"repo": "acme/tiny", "destination": "/published"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"repo": "no-slash"},
        {"repo": "../escape"},
        {"repo": 7},
        {"revision": ""},
        {"model_name": "Not A Name"},
        {"scan_layers": "yes"},
        {"save_dtype": "float8_e4m3fn"},
        {"ocdbt": 1},
        {"zarr3": None},
        {"maxtext": "0.1"},
        {"dequantize": "never"},
        {"parts": 0},
        {"parts": 1.5},
        {"parts": 1000},
        {"approval": "yes"},
        {"keep_files": "some"},
        {"max_kl": 0},
        {"max_kl": "small"},
        {"max_model_kl": -1},
        {"max_model_kl": None},
        {"destination": "relative/directory"},
        {"destination": "gs://"},
    ],
    ids=str,
)
def test_wrong_params_are_refused(params, wrong):
    (name,) = wrong
    assert params(GOOD) is None
    assert f"Invalid input for param {name}" in params({**GOOD, **wrong})


@pytest.fixture(scope="module")
def params(airflow_home):
    """Says why the DAG's params refuse a conf, None where they take it; a process that stays, for speed."""
    program = (
        "import copy, json, sys\n"
        "from airflow.sdk.exceptions import ParamValidationError\n"
        "from dags.onboard_checkpoint import dag\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        params = copy.deepcopy(dag.params)\n"
        "        params.update(json.loads(line))\n"
        "        params.validate()\n"
        "        answer = None\n"
        "    except ParamValidationError as error:\n"
        "        answer = str(error)\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=airflow_environment(airflow_home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(conf):
        process.stdin.write(json.dumps(conf) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait()


def test_wrong_conf_starts_no_run(onboarding):
    """The same through Airflow's own way in, with a param missing and with one wrong."""
    assert "repo" in onboarding.run({"destination": "/published"})["refused"]
    assert "save_dtype" in onboarding.run({**GOOD, "save_dtype": "float8_e4m3fn"})["refused"]


def test_destination_has_a_default_in_the_environment(airflow_home):
    program = "import os; os.environ['FERRY_DESTINATION'] = 'gs://models'\n"
    program += "from dags.onboard_checkpoint import dag; print(dag.params['destination'])"
    assert run_python(airflow_home, program) == "gs://models"
