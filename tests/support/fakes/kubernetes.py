"""A small Kubernetes API server on this machine: pods, their logs, secrets; and a kubelet, where the test plays none.

It answers the real clients: create, list by labels, get, delete of pods, logs, events, secrets. A pod that is made
waits; `run` gives it a node and a running container, `end` a result, `evict` the end that a lost node brings. What a
client sends is checked against Kubernetes' own schemas.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate

VERSION = "1.31"
NOW = "2026-01-01T00:00:00Z"
CONTAINER = "ferry"


class FakeCluster:
    """`url` is the API's. pods, secrets: by name, as the API has them; logs: by pod. requests: method and path.

    made: every pod that ever was, as it was asked for.
    down: while it is set every request is answered 503. forbidden: what is answered 403, such as `POST secrets`.
    """

    def __init__(self):
        self.pods, self.secrets, self.logs, self.requests = {}, {}, {}, []
        self.down, self.forbidden, self.made = False, set(), []
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def connection(self):
        """An Airflow connection to this cluster, as JSON."""
        cluster = {"name": "c", "cluster": {"server": self.url}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "default"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "x", "clusters": [cluster]}
        config |= {"contexts": [context], "users": [{"name": "u", "user": {"token": "cluster-token"}}]}
        return json.dumps({"conn_type": "kubernetes", "extra": json.dumps({"kube_config": json.dumps(config)})})

    @property
    def pod(self):
        """The one pod that there is."""
        (pod,) = self.pods.values()
        return pod

    def run(self, name=None):
        """A node takes the pod, and its container starts."""
        with self._lock:
            status = self._status(name)
            status["phase"] = "Running"
            status["conditions"] = [{"type": "PodScheduled", "status": "True"}]
            status["containerStatuses"] = [_container({"running": {"startedAt": NOW}})]

    def write(self, *lines, name=None, seconds_ago=0):
        """The container writes log lines."""
        now = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
        self.logs.setdefault(name or self.pod["metadata"]["name"], []).extend(f"{now} {line}\n" for line in lines)

    def end(self, exit_code=0, message="", reason=None, name=None):
        """The container ends."""
        with self._lock:
            ended = {"exitCode": exit_code, "message": message, "startedAt": NOW, "finishedAt": NOW}
            status = self._status(name)
            status["phase"] = "Failed" if exit_code else "Succeeded"
            default = "Error" if exit_code else "Completed"
            status["containerStatuses"] = [_container({"terminated": {**ended, "reason": reason or default}})]

    def evict(self, name=None):
        """The node is wanted for something else."""
        with self._lock:
            self._status(name).update(phase="Failed", reason="Evicted", message="The node was low on memory")

    def command(self, pod):
        """Arguments and environment of the pod's container; None while a Secret of it is not there."""
        container = pod["spec"]["containers"][0]
        keys = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v}
        if any(key["name"] not in self.secrets for key in keys.values()):
            return None
        secret = {name: self.secrets[key["name"]]["stringData"][key["key"]] for name, key in keys.items()}
        plain = {v["name"]: v["value"] for v in container["env"] if "value" in v}
        return container["args"], {**plain, **secret}

    def _status(self, name):
        return (self.pods[name] if name else self.pod)["status"]

    def create(self, kind, body):
        with self._lock:
            kubernetes_validate.validate(body, VERSION, strict=True)
            items = self.pods if kind == "pods" else self.secrets
            name = body["metadata"]["name"]
            if name in items:
                return 409, _failure(409, f'{kind} "{name}" already exists')
            items[name] = body
            body["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": NOW}
            if kind == "pods":
                self.made.append(copy.deepcopy(body))
                body["status"] = {"phase": "Pending"}
            return 201, body

    def read(self, kind, name, query):
        with self._lock:
            items = self.pods if kind == "pods" else self.secrets
            if name is not None:
                missing = (404, _failure(404, f'{kind} "{name}" not found'))
                return (200, items[name]) if name in items else missing
            wanted = dict(part.split("=") for part in query.get("labelSelector", [""])[0].split(",") if part)
            found = [item for item in items.values() if wanted.items() <= item["metadata"].get("labels", {}).items()]
            return 200, {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": found}

    def delete(self, name):
        """Kubernetes removes with a pod what belongs to it."""
        with self._lock:
            pod = self.pods.pop(name, None)
            if pod is None:
                return 404, _failure(404, f'pods "{name}" not found')
            uid = pod["metadata"]["uid"]
            for secret in list(self.secrets.values()):
                if uid in [owner["uid"] for owner in secret["metadata"].get("ownerReferences", [])]:
                    del self.secrets[secret["metadata"]["name"]]
            return 200, pod


class Kubelet:
    """Runs the pods of a cluster as they come, as processes of this machine; those of a deleted pod get SIGTERM.

    directory: HOME, TMPDIR and the termination messages of the containers. processes: by pod, while they run.
    """

    def __init__(self, cluster, directory, **environment):
        self.cluster, self.processes = cluster, {}
        self._directory, self._taken, self._stopped = directory, set(), threading.Event()
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "TMPDIR": str(directory),
            **environment,
        }

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        for name in list(self.processes):
            self.signal(name, signal.SIGKILL)

    def evict(self, name):
        """The node is wanted for something else, at once."""
        self.cluster.evict(name)
        self.signal(name, signal.SIGKILL)

    def signal(self, name, number):
        """To the container's first process, which tells the others of SIGTERM; others are for all of them."""
        with suppress(KeyError, ProcessLookupError):
            send = os.kill if number is signal.SIGTERM else os.killpg
            send(self.processes[name].pid, number)

    def _watch(self):
        ended = set()
        while not self._stopped.wait(0.05):
            for name, pod in list(self.cluster.pods.items()):
                if name not in self._taken and (command := self.cluster.command(pod)):
                    self._taken.add(name)
                    threading.Thread(target=self._run, args=(name, *command), daemon=True).start()
            for name in set(self.processes) - set(self.cluster.pods) - ended:
                ended.add(name)
                self.signal(name, signal.SIGTERM)

    def _run(self, name, arguments, given):
        message = self._directory / f"{name}.message"
        environment = {**given, **self._environment, "FERRY_TERMINATION_LOG": str(message)}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=self._directory,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes[name] = process
        with suppress(KeyError):  # deleted meanwhile
            self.cluster.run(name)
            for line in process.stderr:
                self.cluster.write(line.rstrip(), name=name)
            if process.wait() != -signal.SIGKILL:
                self.cluster.end(process.returncode, message.read_text(), name=name)
        process.wait()
        del self.processes[name]


def _container(state):
    ready = {"name": CONTAINER, "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    return {**ready, "state": state}


def _failure(code, message):
    return {"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "message": message}


def _handler(cluster):
    return type("Handler", (_Handler,), {"cluster": cluster})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._route("GET")

    def do_POST(self):
        self._route("POST")

    def do_DELETE(self):
        self._route("DELETE")

    def _route(self, method):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        self.cluster.requests.append((method, self.path))
        if self.cluster.down:
            self._send(503, _failure(503, "the server is currently unable to handle the request"))
        elif f"{method} {self._kind()}" in self.cluster.forbidden:
            self._send(403, _failure(403, "pods is forbidden: User cannot do that"))
        else:
            self._answer(method, body)

    def _kind(self):
        return urlsplit(self.path).path.split("/")[5]

    def _answer(self, method, body):
        """`/api/v1/namespaces/<namespace>/<kind>[/<name>[/log]]`"""
        parts = urlsplit(self.path)
        kind, *rest = parts.path.split("/")[5:]
        name = rest[0] if rest else None
        if kind == "events":
            self._send(200, {"apiVersion": "v1", "kind": "EventList", "metadata": {}, "items": []})
        elif rest[1:] == ["log"]:
            self._log(name)
        elif method == "POST":
            self._send(*self.cluster.create(kind, body))
        elif method == "DELETE":
            self._send(*self.cluster.delete(name))
        else:
            self._send(*self.cluster.read(kind, name, parse_qs(parts.query)))

    def _log(self, name):
        pod = self.cluster.pods.get(name)
        if pod is None or pod["status"]["phase"] == "Pending":
            self._send(400, _failure(400, f"container in pod {name} is waiting to start"))
        else:
            assert "timestamps=True" in self.path or "timestamps=true" in self.path
            self._send(200, "".join(self.cluster.logs.get(name, [])))

    def _send(self, code, answer):
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(text.encode())
