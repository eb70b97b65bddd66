"""A proxy before an HTTP server that breaks off some of the answers in mid body, with a reset."""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import ExitStack, suppress
from typing import IO

ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER of zero seconds: closing sends a reset."""
NO_BODY = (b"204", b"304")


class CuttingProxy:
    """Passes requests on to `port` of this host; a `share` of the answers to GET ends in the middle of their bodies."""

    def __init__(self, port: int, share: float, seed: int = 0) -> None:
        self.answers = self.cuts = 0
        self._port, self._share, self._random = port, share, random.Random(seed)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with ExitStack() as stack, suppress(OSError):  # either end may go
            stack.enter_context(client)
            server = stack.enter_context(socket.create_connection(("127.0.0.1", self._port)))
            asked, answered = (stack.enter_context(end.makefile("rb")) for end in (client, server))
            while request := _message(asked):
                server.sendall(b"".join(request))
                head, body = _message(answered, body=not request[0].startswith(b"HEAD")) or (b"", b"")
                self.answers += 1
                if request[0].startswith(b"GET") and len(body) > 1 and self._random.random() < self._share:
                    self.cuts += 1
                    client.sendall(head + body[: len(body) // 2])
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                    return
                client.sendall(head + body)


def _message(stream: IO[bytes], *, body: bool = True) -> tuple[bytes, bytes] | None:
    """Head and body of a request or an answer; None at the end of the connection."""
    first = stream.readline()
    if not first:
        return None
    lines = [first]
    while lines[-1] not in (b"\r\n", b""):
        lines.append(stream.readline())
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    head = b"".join(lines)
    if not body or first.split()[1] in NO_BODY:
        return head, b""
    if headers.get(b"transfer-encoding") == b"chunked":
        return head, _chunked(stream)
    return head, stream.read(int(headers.get(b"content-length", 0)))


def _chunked(stream: IO[bytes]) -> bytes:
    parts = []
    while True:
        size = stream.readline()
        length = int(size.split(b";")[0], 16)
        parts += [size, stream.read(length + 2)]
        if not length:
            return b"".join(parts)
