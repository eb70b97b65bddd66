"""A small Kubernetes API server on this machine: pods, their logs, secrets; and a kubelet that the test plays.

It answers the real clients: create, list by labels, get, delete of pods, logs, events, secrets. A pod that is made
waits; `run` gives it a node and a running container, `end` a result, `evict` the end that a lost node brings. What a
client sends is checked against Kubernetes' own schemas.
"""

import json
import subprocess
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

    down: while it is set every request is answered 503. forbidden: methods that are answered 403.
    """

    def __init__(self):
        self.pods, self.secrets, self.logs, self.requests = {}, {}, {}, []
        self.down, self.forbidden = False, set()
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

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

    def really_run(self, environment, name=None):
        """Runs the container's own command, as a kubelet would: its log, exit code and termination message."""
        pod = self.pods[name] if name else self.pod
        container = pod["spec"]["containers"][0]
        given = {variable["name"]: self._value(variable) for variable in container["env"]}
        self.run(name)
        message = environment["FERRY_TERMINATION_LOG"]
        command = [environment["PYTHON"], *container["args"]]
        done = subprocess.run(command, env={**given, **environment}, capture_output=True, text=True)
        self.write(*done.stderr.splitlines(), name=pod["metadata"]["name"])
        with open(message) as text:
            self.end(done.returncode, text.read(), name=pod["metadata"]["name"])

    def _value(self, variable):
        if "value" in variable:
            return variable["value"]
        key = variable["valueFrom"]["secretKeyRef"]
        return self.secrets[key["name"]]["stringData"][key["key"]]

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
        elif method in self.cluster.forbidden:
            self._send(403, _failure(403, "pods is forbidden: User cannot do that"))
        else:
            self._answer(method, body)

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
