"""The fake's HTTP side: one thread for each connection."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.fakes.cloud_storage.body import Body, Broken, announced_hashes, content_range, split_related
from tests.support.fakes.cloud_storage.buckets import Buckets, Query, Refused, Session
from tests.support.fakes.cloud_storage.contents import Content
from tests.support.fakes.cloud_storage.faults import Chance, Fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in mid answer are what some tests are about."""


class FakeCloudStorage(Buckets):
    """The service: `requests` as (method, path with query) so far, `faults` and `chance` of what is to come.

    token: where set, requests without `Authorization: Bearer <token>` are answered 401.
    """

    def __init__(self, buckets: Iterable[str], directory: Path | None = None) -> None:
        super().__init__(buckets, directory)
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.chance: Chance | None = None
        self.token: str | None = None
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeCloudStorage:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, method: str, name: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.fits(method, name):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
            return self.chance.draw(method, name) if self.chance else None


class _Dropped(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    fake: FakeCloudStorage
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self) -> None:
        self.fake.requests.append((self.command, self.path))
        self.body = Body(self.rfile, self.headers)
        self.fault: Fault | None = None
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        try:
            try:
                self._route(parts.path, query)
            except Refused as refused:
                unchanged = self.command == "GET" and refused.status == 412 and "NotMatch" in refused.message
                self._fail(304 if unchanged else refused.status, refused.message, refused.reason)
        except (_Dropped, Broken):
            self._drop(reset=self.fault is not None and self.fault.what == "reset")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _route(self, path: str, query: Query) -> None:
        if self.fake.token is not None and self.headers.get("Authorization") != f"Bearer {self.fake.token}":
            raise Refused(401, "Anonymous caller does not have access, or the token is not valid.", "required")
        place = path.partition("/b/")[2].split("/")
        bucket, kind = unquote(place[0]), place[1] if len(place) > 1 else ""
        words = [unquote(word) for word in place[2:]]
        if path.startswith("/upload/"):
            self._upload(bucket, query)
        elif kind != "o":
            self.fake.allow("storage.buckets.get", bucket)
            self._send_json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
        elif not words or not words[0]:
            self._meet_fault("")
            self._send_json(self.fake.list(bucket, query))
        elif len(words) > 1 and self.command == "POST":
            self._make(bucket, words, query)
        else:
            self._object(bucket, "/".join(words), query)

    def _meet_fault(self, name: str, uploads: bool = False) -> None:
        """What is to go wrong with this request, decided once its object's name is known."""
        self.fault = fault = self.fake.take_fault(self.command, name)
        if fault is None:
            return
        time.sleep(fault.seconds)
        if fault.what == "status" and not fault.applied:
            raise Refused(fault.status, "injected")
        if fault.what in ("reset", "cut") and not fault.applied:
            if uploads:
                self.body.limit(fault.after)
            elif self.command != "GET":
                raise _Dropped

    def _object(self, bucket: str, name: str, query: Query) -> None:
        self._meet_fault(name)
        if self.command == "DELETE":
            self.fake.delete(bucket, name, query)
            self._send(204, b"")
        elif self.command == "PATCH":
            self._send_json(self.fake.patch(bucket, name, json.loads(self.body.all() or b"{}"), query).describe())
        else:
            there = self.fake.get(bucket, name, query)
            if query.get("alt") == "media":
                hashes = [f"crc32c={there.content.crc32c}"]
                hashes += [f"md5={md5}"] if (md5 := there.settings.get("md5Hash")) else []
                headers = {
                    "x-goog-generation": str(there.generation),
                    "x-goog-metageneration": str(there.metageneration),
                    "x-goog-hash": ",".join(hashes),
                    "x-goog-stored-content-length": str(there.content.size),
                    "ETag": f'"{there.generation}"',
                }
                self._send_content(there.content, headers)
            else:
                self._send_json(there.describe())

    def _make(self, bucket: str, words: list[str], query: Query) -> None:
        """compose, copyTo and rewriteTo: an object made of others. A name's slashes come quoted."""
        what = next(i for i, word in enumerate(words) if word in ("compose", "rewriteTo", "copyTo"))
        name, body = "/".join(words[:what]), json.loads(self.body.all() or b"{}")
        if words[what] == "compose":
            self._meet_fault(name)
            self._send_json(self.fake.compose(bucket, name, body, query).describe())
            return
        destination = (words[what + 2], "/".join(words[what + 4 :]))
        self._meet_fault(destination[1])
        answer = self.fake.rewrite((bucket, name), destination, body, query)
        self._send_json(answer if words[what] == "rewriteTo" else answer["resource"])

    def _upload(self, bucket: str, query: Query) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            self._continue(query["upload_id"])
            return
        hashes = announced_hashes(self.headers)
        if kind == "resumable":
            settings = self._content_type("X-Upload-Content-Type") | json.loads(self.body.all() or b"{}")
            name = query.get("name") or settings.get("name", "")
            self._meet_fault(name)
            key = self.fake.begin_session(bucket, name, settings | hashes, query)
            self._send(200, b"", {"Location": f"{self.fake.endpoint}{self.path}&upload_id={key}"})
            return
        settings, blocks = (
            split_related(self.body, self.headers)
            if kind == "multipart"
            else (self._content_type("Content-Type"), self.body)
        )
        name = query.get("name") or settings.get("name", "")
        self._meet_fault(name, uploads=True)
        self.fake.begin_write(bucket, name, query)
        growing = self.fake.growing()
        for block in blocks:
            growing.write(block)
        self._send_json(self.fake.write(bucket, name, growing.finish(), settings | hashes, query).describe())

    def _content_type(self, header: str) -> dict[str, Any]:
        return {"contentType": self.headers[header]} if self.headers[header] else {}

    def _continue(self, key: str) -> None:
        """One chunk (`bytes a-b/total`, total `*` while unknown), or a question how far it got (`bytes */total`)."""
        session = self.fake.sessions.get(key)
        if session is None:
            raise Refused(404, "Upload session not found", "notFound")
        if self.command == "DELETE":
            del self.fake.sessions[key]
            self._send(499, b"")
            return
        with session.lock:
            self._meet_fault(session.name, uploads=True)
            start, total = content_range(self.headers, self.body)
            if session.written is None:
                self._receive(session, start)
                if session.growing.received == total:
                    settings = session.settings | announced_hashes(self.headers)
                    content = session.growing.finish()
                    session.written = self.fake.write(session.bucket, session.name, content, settings, session.query)
                else:
                    session.growing.interrupt()
            else:
                self.body.all()
        if session.written is not None:
            self._send_json(session.written.describe())
        else:
            kept = session.growing.kept
            self._send(308, b"", {"Range": f"bytes=0-{kept - 1}"} if kept else {})

    def _receive(self, session: Session, start: int | None) -> None:
        """Takes what the session does not have yet; `start` is None where the request only asks."""
        if start is None:
            return
        known = session.growing.kept - start
        if known < 0:
            raise Refused(503, f"expected offset {session.growing.kept}")
        try:
            for block in self.body:
                fresh = block[min(known, len(block)) :]
                known -= len(block) - len(fresh)
                session.growing.write(fresh)
        except Broken:
            session.growing.interrupt()
            raise

    def _send_content(self, content: Content, headers: dict[str, str]) -> None:
        asked = self.headers.get("Range", "")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(content.size - int(last), 0) if last else 0
        stop = min(int(last) + 1, content.size) if first and last else content.size
        if asked and start >= content.size:
            self._send(416, b"", {"Content-Range": f"bytes */{content.size}"})
            return
        if asked:
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{content.size}"}
        self._begin(206 if asked else 200, stop - start, headers)
        self._write_out(content.read(start, stop), stop - start)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, message: str, reason: str = "") -> None:
        error = {"code": status, "message": message, "errors": [{"message": message, "reason": reason}]}
        body = b"" if status == 304 else json.dumps({"error": error}).encode()
        self.fault = None
        self._send(status, body, {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault is not None and self.fault.what == "status":
            self._fail(self.fault.status, "injected")
            return
        self._begin(status, len(body), headers or {})
        self._write_out([body], len(body))

    def _begin(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.body.all()
        self.send_response(status)
        for key, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _write_out(self, blocks: Iterable[bytes], size: int) -> None:
        """Sends the answer's body; where it is to break, at most half of it."""
        breaks = self.fault is not None and self.fault.what in ("reset", "cut")
        left = min(self.fault.after, size // 2) if self.fault is not None and breaks else size
        for block in blocks:
            self.wfile.write(block[:left])
            left -= min(left, len(block))
        if breaks:
            raise _Dropped

    def _drop(self, *, reset: bool) -> None:
        """Ends the connection, by a reset or as if all were well."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
