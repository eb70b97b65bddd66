"""Bodies of requests as they come in, and what their headers say of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from email.message import Message
from io import BufferedIOBase
from typing import Any

from tests.support.fakes.cloud_storage.contents import BLOCK


class Broken(Exception):
    """The body ends before its announced length: the client went away, or a fault says so."""


class Body:
    """What is left of a request's body, in blocks; sized or chunked."""

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self._stream = stream
        self._chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.size = int(headers.get("Content-Length", 0))
        self._left = self.size
        self._limit: int | None = None

    def limit(self, after: int) -> None:
        """Breaks it off after that many bytes, or in the middle of what is shorter."""
        self._limit = min(after, self._left // 2)

    def __iter__(self) -> Iterator[bytes]:
        while block := self._next():
            if self._limit is not None:
                yield block[: self._limit]
                self._limit -= min(self._limit, len(block))
                if not self._limit:
                    raise Broken
            else:
                yield block

    def all(self) -> bytes:
        return b"".join(self)

    def line(self) -> bytes:
        """One line of a body with a length."""
        line = self._stream.readline(self._left)
        self._left -= len(line)
        return line

    def _next(self) -> bytes:
        if self._chunked and not self._left:
            self._left = int(self._stream.readline().split(b";")[0], 16)
            self._chunked = self._left > 0
            if not self._chunked:
                self._stream.readline()
        block = self._stream.read(min(self._left, BLOCK))
        if len(block) < min(self._left, BLOCK):
            raise Broken
        self._left -= len(block)
        if self._chunked and not self._left:
            self._stream.readline()
        return block


def split_related(body: Body, headers: Message) -> tuple[dict[str, Any], Iterator[bytes]]:
    """The metadata and the content of a multipart/related body."""
    boundary = headers["Content-Type"].partition("boundary=")[2].strip("'\"").encode()
    parts = _part(body, boundary)
    settings = json.loads(b"".join(parts))
    kind = _header(body, b"content-type")
    return ({"contentType": kind} if kind else {}) | settings, _content(body, boundary)


def _part(body: Body, boundary: bytes) -> Iterator[bytes]:
    """The lines of the first part, past its headers."""
    while not body.line().startswith(b"--" + boundary):
        pass
    _header(body, b"")
    while not (line := body.line()).startswith(b"--" + boundary):
        yield line


def _header(body: Body, name: bytes) -> str:
    """Reads past the headers of a part; the value of one of them."""
    value = b""
    while line := body.line().strip():
        found, _, rest = line.partition(b":")
        value = rest.strip() if found.lower() == name else value
    return value.decode()


def _content(body: Body, boundary: bytes) -> Iterator[bytes]:
    """The last part: everything but the closing boundary."""
    end = b"\r\n--" + boundary + b"--"
    held = b""
    for block in body:
        held += block
        spare = len(held) - len(end) - 2  # a line's end may follow
        if spare > 0:
            yield held[:spare]
            held = held[spare:]
    yield held[: held.rindex(end)]


def announced_hashes(headers: Message) -> dict[str, str]:
    """The hashes that an upload's headers announce, as an object's metadata names them."""
    words = [word.strip().partition("=") for value in headers.get_all("x-goog-hash", []) for word in value.split(",")]
    return {{"crc32c": "crc32c", "md5": "md5Hash"}[kind]: value for kind, _, value in words}


def content_range(headers: Message, body: Body) -> tuple[int | None, int | None]:
    """The offset of a resumable chunk (None: a question only) and the whole size (None: not known yet)."""
    span, _, total = headers.get("Content-Range", f"bytes 0-/{body.size}").removeprefix("bytes ").partition("/")
    return None if span == "*" else int(span.partition("-")[0]), None if total == "*" else int(total)
