"""A Cloud Storage on this machine: as much of the JSON API as the real client uses to publish.

    with FakeCloudStorage(["bucket"]) as fake:
        os.environ["STORAGE_EMULATOR_HOST"] = fake.endpoint

Objects have generations; uploads (multipart, resumable, media), reads, listings and deletions honour
ifGenerationMatch and ifGenerationNotMatch; a CRC32C that an upload announces is checked. Everything is in memory.
"""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PAGE = 1000
"""Objects of a listing's page, unless the request asks for fewer."""


@dataclass
class Object:
    bucket: str
    name: str
    content: bytes
    generation: int
    content_type: str

    @property
    def crc32c(self) -> str:
        return base64.b64encode(google_crc32c.Checksum(self.content).digest()).decode()

    def metadata(self) -> dict[str, str]:
        return {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "bucket": self.bucket,
            "name": self.name,
            "generation": str(self.generation),
            "metageneration": "1",
            "size": str(len(self.content)),
            "crc32c": self.crc32c,
            "contentType": self.content_type,
            "etag": str(self.generation),
            "storageClass": "STANDARD",
        }


@dataclass
class Fault:
    """Answers `status` to `times` requests of `method` whose object's name matches `name`.

    applied: the request takes effect all the same, and only its answer is lost.
    """

    status: int
    method: str = "*"
    name: str = "*"
    times: int = 1
    applied: bool = False


@dataclass
class Session:
    """A resumable upload under way."""

    bucket: str
    name: str
    metadata: dict[str, Any]
    query: dict[str, str]
    received: bytearray = field(default_factory=bytearray)
    written: Object | None = None


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class FakeCloudStorage:
    """The service: `objects` by (bucket, name), `requests` as (method, path with query), `faults` to come."""

    def __init__(self, buckets: Iterable[str]) -> None:
        self.buckets = set(buckets)
        self.objects: dict[tuple[str, str], Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.forbidden: set[str] = set()
        """Methods that the credentials do not allow: answered 403."""
        self.sessions: dict[str, Session] = {}
        self.lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_000)
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeCloudStorage:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, bucket: str) -> list[str]:
        with self.lock:
            return sorted(name for b, name in self.objects if b == bucket)

    def written(self) -> list[str]:
        """Names in the order in which the objects there now were written."""
        with self.lock:
            return [o.name for o in sorted(self.objects.values(), key=lambda o: o.generation)]

    def take_fault(self, method: str, name: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fnmatch(method, fault.method) and fnmatch(name, fault.name):
                    fault.times -= 1
                    return fault
        return None

    def check(self, bucket: str, name: str, query: dict[str, str]) -> Object | None:
        """The object there now; raises Refused(412) where the request's preconditions do not hold."""
        there = self.objects.get((bucket, name))
        generation = there.generation if there else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise Refused(412, "conditionNotMet: ifGenerationMatch")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Refused(412, "conditionNotMet: ifGenerationNotMatch")
        return there

    def write(self, bucket: str, name: str, content: bytes, metadata: dict[str, Any], query: dict[str, str]) -> Object:
        with self.lock:
            self.check(bucket, name, query)
            content_type = str(metadata.get("contentType", "application/octet-stream"))
            written = Object(bucket, name, content, next(self._generations), content_type)
            if metadata.get("crc32c", written.crc32c) != written.crc32c:
                raise Refused(400, f"Provided CRC32C {metadata['crc32c']} doesn't match {written.crc32c}")
            self.objects[bucket, name] = written
            return written


class _Handler(BaseHTTPRequestHandler):
    fake: FakeCloudStorage
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.fake.requests.append((self.command, self.path))
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        place, upload = parts.path.partition("/b/")[2].split("/"), parts.path.startswith("/upload/")
        bucket = unquote(place[0])
        name = unquote("/".join(place[2:])) or query.get("name", "")
        try:
            if self.command in self.fake.forbidden:
                raise Refused(403, "does not have storage.objects access")
            if bucket not in self.fake.buckets:
                raise Refused(404, "The specified bucket does not exist.")
            if upload:
                self._upload(bucket, name, query, body)
            elif not self._faulty(name):
                self._object(bucket, name, len(place) > 1, query)
        except Refused as refused:
            self._fail(refused.status, refused.message)

    def _faulty(self, name: str) -> bool:
        fault = self.fake.take_fault(self.command, name)
        if fault is not None:
            self._fail(fault.status, "injected")
        return fault is not None

    def _object(self, bucket: str, name: str, objects: bool, query: dict[str, str]) -> None:
        if not objects:
            self._send_json({"kind": "storage#bucket", "id": bucket, "name": bucket})
        elif not name:
            self._list(bucket, query)
        else:
            with self.fake.lock:
                there = self.fake.check(bucket, name, query)
                if there is None:
                    raise Refused(404, f"No such object: {bucket}/{name}")
                if self.command == "DELETE":
                    del self.fake.objects[bucket, name]
            if self.command == "DELETE":
                self._send(204, b"")
            elif query.get("alt") == "media":
                self._send_content(there)
            else:
                self._send_json(there.metadata())

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        names = [n for n in self.fake.names(bucket) if n.startswith(query.get("prefix", ""))]
        start, size = int(query.get("pageToken", 0)), min(int(query.get("maxResults", PAGE)), PAGE)
        with self.fake.lock:
            items = [self.fake.objects[bucket, n].metadata() for n in names[start : start + size]]
        more = {"nextPageToken": str(start + size)} if start + size < len(names) else {}
        self._send_json({"kind": "storage#objects", "items": items, **more})

    def _send_content(self, there: Object) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start = int(first or 0)
        stop = min(int(last) + 1, len(there.content)) if last else len(there.content)
        headers = {"x-goog-generation": str(there.generation), "x-goog-hash": f"crc32c={there.crc32c}"}
        if first:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(there.content)}"
        self._send(206 if first else 200, there.content[start:stop], headers)

    def _upload(self, bucket: str, name: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            self._continue(self.fake.sessions[query["upload_id"]], body)
        elif kind == "resumable":
            metadata = json.loads(body or b"{}")
            name = name or metadata["name"]
            if self._faulty(name):
                return
            with self.fake.lock:
                self.fake.check(bucket, name, query)
                key = f"session-{len(self.fake.sessions)}"
                self.fake.sessions[key] = Session(bucket, name, metadata, query)
            self._send(200, b"", {"Location": f"{self.fake.endpoint}{self.path}&upload_id={key}"})
        else:
            metadata, content = self._parts(body) if kind == "multipart" else ({}, body)
            self._write(bucket, name or metadata["name"], content, metadata, query)

    def _parts(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        """The metadata and the content of a multipart/related body."""
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        first, second = body.removesuffix(b"\r\n--" + boundary + b"--").split(b"\r\n--" + boundary + b"\r\n", 1)
        return json.loads(first.partition(b"\r\n\r\n")[2]), second.partition(b"\r\n\r\n")[2]

    def _continue(self, session: Session, body: bytes) -> None:
        """One chunk (`bytes a-b/total`, total `*` while unknown), or a question how far it got (`bytes */total`)."""
        span, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*":
            start = int(span.partition("-")[0])
            if start > len(session.received):
                raise Refused(503, f"expected offset {len(session.received)}")
            session.received += body[len(session.received) - start :]  # what is there already is ignored
        if session.written is not None:
            self._send_json(session.written.metadata())
        elif total != "*" and len(session.received) == int(total):
            content = bytes(session.received)
            session.written = self._write(session.bucket, session.name, content, session.metadata, session.query)
        else:
            got = {"Range": f"bytes=0-{len(session.received) - 1}"} if session.received else {}
            self._send(308, b"", got)

    def _write(
        self, bucket: str, name: str, content: bytes, metadata: dict[str, Any], query: dict[str, str]
    ) -> Object | None:
        fault = self.fake.take_fault(self.command, name)
        if fault is not None and not fault.applied:
            self._fail(fault.status, "injected")
            return None
        written = self.fake.write(bucket, name, content, metadata, query)
        if fault is None:
            self._send_json(written.metadata())
        else:
            self._fail(fault.status, "injected")
        return written

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, message: str) -> None:
        body = json.dumps({"error": {"code": status, "message": message}}).encode()
        self._send(status, body, {"Content-Type": "application/json"})
