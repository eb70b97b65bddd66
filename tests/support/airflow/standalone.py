"""One real `airflow standalone` for the tests of a session: scheduler, triggerer, API server, DAG processor; and REST.

It has a database of its own, listens on a free port of 127.0.0.1 only, and its processes end with the session.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from conversion_lib.demo.local_hub import Faults, LocalHub
from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3
from tests.support.paths import ROOT

REPO, OTHER_REPO = "acme/tiny-deepseek-v3", "acme/other-deepseek-v3"
TOKEN = "hf_thisMustNotBeSeenAnywhere"
"""Opens REPO, which is gated, and is the password of the Airflow connection `hub`."""
ADMIN, OUTSIDER = "admin", "outsider"
"""ADMIN may do everything; OUTSIDER may log in and has no right on any DAG."""
PASSWORDS = {ADMIN: "only for tests", OUTSIDER: "only for tests"}
START_SECONDS, RUN_SECONDS = 600, 900
"""Of a machine that has other work; on a quiet one it starts in 12 s, and a run takes half a minute."""
DONE = ("success", "failed")


class Standalone:
    """The server, from `start` to `stop`.

    endpoint: of UI and REST. directory: of all its files; `airflow/` is AIRFLOW_HOME. process: leader of the group.
    """

    def __init__(self, directory, environment):
        self.directory, self.home, self.log_path = directory, directory / "airflow", directory / "standalone.log"
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        passwords = directory / "passwords.json"
        passwords.write_text(json.dumps(PASSWORDS))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FERRY_", "HF_"))}
        self.environment = {
            **kept,
            # it starts its parts by their name
            "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', '')}",
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__BASE_URL": self.endpoint,
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.endpoint}/execution/",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{ADMIN}:admin,{OUTSIDER}:",
            # another Airflow on this machine has the usual ones
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
            "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            # a machine that has other work is slow, not ill
            "AIRFLOW__DAG_PROCESSOR__HEALTH_CHECK_THRESHOLD": "300",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "300",
            "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "300",
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
            "HF_HOME": str(directory / "hf-home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # local processes ask each other; whatever proxy there is has no part in it
            "NO_PROXY": "*",
            "no_proxy": "*",
            **environment,
        }
        self._tokens, self.process, self._restarted = {}, None, []

    def start(self):
        self._run("airflow", "db", "migrate")
        self._run("ferry_airflow.setup.pools")
        self.process = self._begin("standalone")
        self.wait_until(self._healthy, START_SECONDS, "healthy Airflow with its DAGs")
        return self

    def restart(self, part, **environment):
        """Kills the `scheduler` or the `triggerer` with its children, and begins another."""
        for pid in _family(self.process.pid, part):
            os.kill(pid, signal.SIGKILL)
        self._restarted.append(self._begin(part, **environment))

    def stop(self):
        """Ends every process, and waits for it."""
        for leader in (self.process, *self._restarted):
            if leader is not None:
                _end_group(leader)

    def _begin(self, command, **environment):
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "airflow", command],
                env={**self.environment, **environment},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # SIGTERM to its leader alone would leave its children behind
            )

    def wait_until(self, condition, seconds, what, *, every=0.5):
        """The first true answer of `condition`, asked so often; fails, with the log, where none comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log_path.read_text(errors="replace")[-8000:]
            if answer := condition():
                return answer
            time.sleep(every)
        raise AssertionError(f"no {what} within {seconds} s\n{self.log_path.read_text(errors='replace')[-8000:]}")

    def _run(self, module, *arguments):
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    def _healthy(self):
        try:
            status, health = self.request("GET", "/api/v2/monitor/health", user=None)
            parts = ("scheduler", "dag_processor", "triggerer")
            alive = status == 200 and all(health[part]["status"] == "healthy" for part in parts)
            dags = ("onboard_checkpoint", "scheduled_onboarding", "export_checkpoint")
            return alive and all(self.request("GET", f"/api/v2/dags/{dag}")[0] == 200 for dag in dags)
        except (OSError, KeyError):
            return False

    def token(self, user=ADMIN):
        """An access token, as the browser gets it."""
        if user not in self._tokens:
            login = {"username": user, "password": PASSWORDS[user]}
            status, answer = self.request("POST", "/auth/token", login, user=None)
            assert status == 201, answer
            self._tokens[user] = answer["access_token"]
        return self._tokens[user]

    def fetch(self, method, path, body=None, *, user=ADMIN, headers=None):
        """(status, headers, bytes) of a request with the user's token, or with none for `user=None`."""
        headers = {**({"Authorization": f"Bearer {self.token(user)}"} if user else {}), **(headers or {})}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.endpoint + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def request(self, method, path, body=None, *, user=ADMIN):
        """(status, parsed JSON)."""
        status, _, content = self.fetch(method, path, body, user=user)
        return status, json.loads(content) if content else None

    def api(self, method, path, body=None):
        """What `/api/v2<path>` answers, which has to be a success."""
        status, answer = self.request(method, f"/api/v2{path}", body)
        assert status < 300, (status, answer)
        return answer

    def trigger(self, dag_id, conf, **more):
        """Starts a run and returns its id."""
        body = {"logical_date": None, **more, "conf": conf}
        return self.api("POST", f"/dags/{dag_id}/dagRuns", body)["dag_run_id"]

    def run_state(self, dag_id, run_id):
        return self.api("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}")["state"]

    def wait_for_run(self, dag_id, run_id, *, seconds=RUN_SECONDS):
        """The state that the run ends in."""

        def ended():
            state = self.run_state(dag_id, run_id)
            return state if state in DONE else None

        return self.wait_until(ended, seconds, f"end of {dag_id} {run_id}")

    def tasks(self, dag_id, run_id):
        """The task instances of a run by name: `convert[0]` where it is mapped."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances?limit=100"
        found = self.api("GET", path)["task_instances"]
        return {t["task_id"] + (f"[{t['map_index']}]" if t["map_index"] >= 0 else ""): t for t in found}

    def xcom(self, dag_id, run_id, task_id, key="return_value", *, map_index=-1):
        """What a task returned, or left under another key."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/xcomEntries/{key}"
        value = self.api("GET", f"{path}?map_index={map_index}")["value"]
        return json.loads(value) if isinstance(value, str) else value

    def task_log(self, dag_id, run_id, task_id, *, try_number=1):
        """What a try of a task left in its log file; of a mapped one, all instances."""
        logs = self.home / "logs" / f"dag_id={dag_id}" / f"run_id={run_id}" / f"task_id={task_id}"
        return "\n".join(path.read_text() for path in sorted(logs.rglob(f"attempt={try_number}.log")))


def _end_group(leader):
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + 10
        try:
            os.killpg(leader.pid, number)
            while time.monotonic() < end:
                leader.poll()
                os.killpg(leader.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def _family(leader, part):
    """The process `airflow <part>` that `leader` started, and all that came of it."""
    parents, commands = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            commands[int(process.name)] = (process / "cmdline").read_bytes().split(b"\0")
    family = {pid for pid, parent in parents.items() if parent == leader and part.encode() in commands.get(pid, [])}
    assert family, (part, commands)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running_standalone(directory, hub, **environment):
    """Airflow with the DAGs of this checkout and a Hub, until the block ends.

    Its runs work in `directory / "work"` and publish to `directory / "published"`.
    """
    server = Standalone(
        directory,
        {
            "AIRFLOW_CONN_HUB": json.dumps({"conn_type": "http", "password": TOKEN}),
            "FERRY_DESTINATION": str(directory / "published"),
            "FERRY_HF_CONN_ID": "hub",
            "FERRY_RETRY_SECONDS": "1",
            "FERRY_WORK_DIR": str(directory / "work"),
            "HF_ENDPOINT": hub.endpoint,
            **environment,
        },
    )
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def standalone_hub(tmp_path_factory):
    """A Hub with two repositories of one small fp8 DeepSeek-V3, one of them gated."""
    path = make_tiny_deepseek_v3(tmp_path_factory.mktemp("standalone-source") / "hf")
    with LocalHub({REPO: path, OTHER_REPO: path}, faults=Faults(gated={REPO: TOKEN})) as hub:
        yield hub


@pytest.fixture(scope="session")
def standalone(tmp_path_factory, standalone_hub):
    """Airflow with the DAGs of this checkout; FERRY_CATALOG is `directory / "catalog.yaml"`."""
    directory = tmp_path_factory.mktemp("standalone")
    # Airflow reads schedule and at_most with the DAG, every half minute: all catalogues here have these
    (directory / "catalog.yaml").write_text("schedule: null\nat_most: 1\nmodels: []\n")
    # little memory and one thread: a small model is many groups, and a kill finds it in the middle
    (directory / "execution.yaml").write_text("options: {convert: [--memory-budget, 64MiB, --threads, '1']}\n")
    own = {"FERRY_EXECUTION": str(directory / "execution.yaml"), "FERRY_CATALOG": str(directory / "catalog.yaml")}
    with running_standalone(directory, standalone_hub, **own) as server:
        yield server
