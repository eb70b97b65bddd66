"""A small local Hub: serves directories as model repositories to the real huggingface_hub client.

    with LocalHub({"acme/tiny": directory}) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint

or `python -m conversion_lib.demo.local_hub acme/tiny=DIR --port 8899`. It serves what a download needs: the
repository's description, its tree and its files. Requests for weights are redirected to another host name, as the Hub
does for files in Git LFS. It binds 127.0.0.1 only, and lists and hashes the files once, when it starts.

For tests it can fail: each `Fault` hits as many matching requests as its `times` says.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from conversion_lib.demo.hub_repository import HubFile, HubRepo, index_repo, model_info, refs, tree_entry

BLOCK = 1 << 20
SLOW_BLOCK = 64 << 10
WHOLE = ("corrupt", "slow")
"""Kinds of fault that still send the whole body."""
REFUSALS = {"unavailable": (503, {}), "busy": (429, {"Retry-After": "1"})}
"""Kinds of fault that refuse a request: status and headers."""


@dataclass
class Fault:
    """One fault of the server.

    Attributes:
        kind: "truncate" closes the connection cleanly after `after` bytes of the body; "reset" resets it there;
            "stall" sends nothing more from there until the Hub stops; "corrupt" flips the byte there; "slow" sends the
            body in blocks of SLOW_BLOCK bytes, `seconds` apart; "unavailable" answers 503, "busy" 429 with
            `Retry-After: 1`. All but the last two hit only requests for a file's content.
        path: Pattern (fnmatch) of the requested file; "api" for requests about the repository.
        times: How many requests it hits; counted down.
        after: Bytes of the body.
        seconds: Pause of "slow" between blocks.
    """

    kind: Literal["truncate", "reset", "stall", "corrupt", "slow", "unavailable", "busy"]
    path: str = "*"
    times: int = 1
    after: int = 0
    seconds: float = 0.05


@dataclass
class Faults:
    """Faults, gated repositories and renamed ones. Thread-safe through `take`.

    Attributes:
        planned: The faults, tried in order.
        gated: The required token, by repository.
        renamed: The new name that the Hub redirects to, by old name.
    """

    planned: list[Fault] = field(default_factory=list)
    gated: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, path: str, *, body: bool) -> Fault | None:
        """Takes the first fault that hits a request, and counts it as used.

        Args:
            path: The requested file, or "api".
            body: Whether a file's content is about to be sent.

        Returns:
            None: the request succeeds.
        """
        with self._lock:
            for fault in self.planned:
                if fault.times > 0 and fnmatch(path, fault.path) and body == (fault.kind not in REFUSALS):
                    fault.times -= 1
                    return fault
        return None


class LocalHub:
    """The server, as a context manager.

    Args:
        repos: Directories by repository name. Their files are hashed in the constructor.
        faults: What goes wrong. None: nothing.
        port: 0 takes any free port.

    Attributes:
        endpoint: The value for HF_ENDPOINT.
        port: The port that it listens on.
        repos: What is served, by repository name.
        faults: May be changed while it runs.
        requests: Every request so far, as (method, path).
        tags: Commits by tag, by repository name. Tags are only listed; their commits are not served.
        stopping: Set when the server stops.
    """

    def __init__(self, repos: Mapping[str, Path], *, faults: Faults | None = None, port: int = 0) -> None:
        self.repos = {name: index_repo(name, root) for name, root in repos.items()}
        self.faults = faults or Faults()
        self.requests: list[tuple[str, str]] = []
        self.tags: dict[str, dict[str, str]] = {}
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    # headers and body are sent in separate writes: otherwise each answer waits for the client's delayed ACK
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: `LocalHub.requests` has every request."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        try:
            if parts[:2] == ["api", "models"]:
                self._answer_api(parts[2:])
            elif parts[0] == "lfs" and len(parts) > 2:
                self._answer_lfs(parts[1], "/".join(parts[2:]))
            else:
                self._answer_resolve(parts)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has disconnected

    def _find_repo(self, parts: list[str]) -> tuple[HubRepo, list[str]] | None:
        """The repository that `parts` begins with, and the rest; None after a redirect or an error was sent."""
        for length in (2, 1):
            if new := self.hub.faults.renamed.get(old := "/".join(parts[:length])):
                self._send(307, b"", {"Location": self.path.replace(old, new, 1)})
                return None
            if repo := self.hub.repos.get("/".join(parts[:length])):
                return repo, parts[length:]
        self._fail(404, "RepoNotFound", "Repository not found")
        return None

    def _answer_api(self, parts: list[str]) -> None:
        if self._unavailable("api") or (found := self._find_repo(parts)) is None:
            return
        repo, rest = found
        if rest[1:2] and rest[1] not in ("main", repo.commit):
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        elif not rest or rest[0] == "revision":
            self._send_json(model_info(repo))
        elif rest[0] == "refs":
            self._send_json(refs(repo, self.hub.tags.get(repo.name, {})))
        elif rest[0] == "tree":
            self._send_json([tree_entry(file) for file in repo.files.values()])
        else:
            self._fail(404, None, "Not found")

    def _answer_resolve(self, parts: list[str]) -> None:
        if (found := self._find_repo(parts)) is None:
            return
        repo, rest = found
        if len(rest) < 3 or rest[0] != "resolve":
            self._fail(404, None, "Not found")
            return
        path = "/".join(rest[2:])
        if self._unavailable(path):
            return
        if rest[1] not in ("main", repo.commit):
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        elif not self._may_read(repo):
            pass
        elif (file := repo.files.get(path)) is None:
            self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})
        elif file.sha256 is None:
            headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{file.blob_id}"'}
            self._send_content(file, headers)
        else:
            # not the endpoint's host name: the client then treats it as a file server, like the Hub's CDN
            location = f"http://localhost:{self.hub.port}/lfs/{file.sha256}/{quote(file.path)}"
            linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{file.blob_id}"', "Location": location, **linked}
            self._send(302, b"", headers)

    def _answer_lfs(self, sha256: str, path: str) -> None:
        if self._unavailable(path):
            return
        for repo in self.hub.repos.values():
            if (file := repo.files.get(path)) is not None and file.sha256 == sha256:
                self._send_content(file, {"ETag": f'"{sha256}"'})
                return
        self._fail(404, None, "Not found")

    def _unavailable(self, path: str) -> bool:
        fault = self.hub.faults.take(path, body=False)
        if fault is not None:
            status, headers = REFUSALS[fault.kind]
            self._fail(status, None, fault.kind, headers)
        return fault is not None

    def _may_read(self, repo: HubRepo) -> bool:
        token = self.hub.faults.gated.get(repo.name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token is None or given == token:
            return True
        self._fail(403 if given else 401, "GatedRepo", f"Access to model {repo.name} is restricted")
        return False

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        coded = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"X-Error-Message": message, **coded, **(headers or {})})

    def _send_content(self, file: HubFile, headers: dict[str, str]) -> None:
        span = _parse_range(self.headers.get("Range"), file.size)
        if span is None:
            self._fail(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{file.size}"})
            return
        start, stop = span
        partial = "Range" in self.headers
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{file.size}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(file, start, stop, self.hub.faults.take(file.path, body=True))

    def _send_body(self, file: HubFile, start: int, stop: int, fault: Fault | None) -> None:
        end = stop if fault is None or fault.kind in WHOLE else min(start + fault.after, stop)
        slow, position = fault is not None and fault.kind == "slow", start
        with file.source.open("rb") as stream:
            stream.seek(start)
            while position < end:
                block = bytearray(stream.read(min(SLOW_BLOCK if slow else BLOCK, end - position)))
                if fault and slow:
                    time.sleep(fault.seconds)
                if fault and fault.kind == "corrupt" and position <= start + fault.after < position + len(block):
                    block[start + fault.after - position] ^= 0xFF
                self.wfile.write(block)
                position += len(block)
        if fault is None or position == stop:  # a client that has the whole body may reuse the connection
            return
        self.close_connection = True
        self.wfile.flush()
        if fault.kind == "stall":
            self.hub.stopping.wait()
        elif fault.kind == "reset":
            # closing with a zero linger time sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of `bytes=a-b` or `bytes=a-`; the whole file without a header; None if it cannot be satisfied."""
    if header is None:
        return 0, size
    first, _, last = header.removeprefix("bytes=").partition("-")
    start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop else None


def main(arguments: list[str] | None = None) -> int:
    """Serves until interrupted. Prints the endpoint to standard output."""
    parser = argparse.ArgumentParser(prog="local_hub", description="Serve directories as Hub repositories.")
    parser.add_argument("repos", nargs="+", metavar="NAME=DIR", help="repository name and its directory")
    parser.add_argument("--port", type=int, default=8899, help="0 takes any free port (default: %(default)s)")
    options = parser.parse_args(arguments)
    repos = {}
    for entry in options.repos:
        name, equals, directory = entry.partition("=")
        if not (name and equals and Path(directory).is_dir()):
            parser.error(f"{entry}: expected NAME=DIR with an existing directory")
        repos[name] = Path(directory)
    with LocalHub(repos, port=options.port) as hub:
        print(hub.endpoint, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
