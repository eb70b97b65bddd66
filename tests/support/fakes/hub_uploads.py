"""A Hub that takes uploads, as far as the real client's `create_repo` and `create_commit` go."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class UploadHub:
    """repos: by name, `private` and `commits`, each a dict of files with the message. token: who may write.

    unavailable: how many requests are answered 503 first.
    """

    def __init__(self, token):
        self.token, self.repos, self.unavailable = token, {}, 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.unavailable:
            self.hub.unavailable -= 1
            return self._send(503, {})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(403, {"error": "Forbidden"})
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        _, _, _, organization, name, action, _ = path.split("/")
        modes = action == "preupload"
        return self._modes(json.loads(content)) if modes else self._commit(f"{organization}/{name}", content)

    def _create(self, request):
        name = f"{request['organization']}/{request['name']}"
        if name in self.hub.repos:
            return self._send(409, {"url": f"{self.hub.endpoint}/{name}", "error": "exists"})
        self.hub.repos[name] = {"private": request["visibility"] == "private", "commits": []}
        return self._send(200, {"url": f"{self.hub.endpoint}/{name}"})

    def _modes(self, request):
        """Every file goes along with the commit: the other ways are the client's affair."""
        files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in request["files"]]
        self._send(200, {"files": files})

    def _commit(self, name, content):
        lines = [json.loads(line) for line in content.splitlines()]
        files = {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")}
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.hub.repos[name]["commits"].append({"message": message, "files": files})
        commit = hashlib.sha1(content).hexdigest()
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._send(200, {"commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _send(self, status, answer):
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
