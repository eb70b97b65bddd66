"""The right to write to a place in Cloud Storage: an object that its holder rewrites every few seconds.

A claim that stands still is a dead run's, and is taken over; no clock is compared with another.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import google.auth.exceptions
from google.api_core import exceptions

from conversion_lib.storage import gcs_client as client

BEAT_SECONDS = 10.0
"""A claim is rewritten that often (an object takes one write a second)."""
DEAD_SECONDS = 60.0
"""A claim that has not changed for so long is nobody's."""
POLL_SECONDS = 1.0
GIVING_BACK_SECONDS = 10.0
"""So long a last beat under way is waited for; a claim that is rewritten after all stands still until it is dead."""
OUTAGES = (exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError, OSError)


class Claim:
    """The right to write to a location, as the object `blob`; `lost` is set when another run has taken it over."""

    def __init__(self, blob: Any) -> None:
        self._blob, self._run = blob, uuid.uuid4().hex
        self._beats, self._generation = 0, 0
        self._lock = threading.Lock()
        self.lost = threading.Event()

    def take(self, waiting: Callable[[], None]) -> None:
        """Returns when this run holds the claim; calls `waiting` once where another one has it."""
        seen, since = 0, time.monotonic()
        while True:
            there = self._blob.bucket.get_blob(self._blob.name, retry=client.RETRY)
            self._generation = int(there.generation) if there else 0
            if self._generation != seen:
                if there and not seen:
                    waiting()
                seen, since = self._generation, time.monotonic()
            if there is None or time.monotonic() - since >= DEAD_SECONDS:
                self.lost.clear()
                self.beat()
                if not self.lost.is_set():
                    return
            time.sleep(POLL_SECONDS)

    def beat(self) -> None:
        """Rewrites the claim, unless another run has: then it is lost."""
        with self._lock:
            self._beats += 1
            content = json.dumps({"run": self._run, "beats": self._beats}).encode()
            blob = self._fresh()
            try:
                blob.upload_from_string(
                    content,
                    content_type="application/json",
                    if_generation_match=self._generation,
                    retry=client.RETRY,
                )
            except exceptions.PreconditionFailed:
                if client.read(blob) != content:  # else ours, where the answer to a first try was lost
                    self.lost.set()
                    return
                blob.reload(retry=client.RETRY)
            self._generation = int(blob.generation)

    def _fresh(self) -> Any:
        """The claim whatever its generation: one that the client has written is read as it was then."""
        return self._blob.bucket.blob(self._blob.name)

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Beats in the background, and gives the claim back at the end."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(BEAT_SECONDS):
                # an outage: the next beat tells whether another run has taken over meanwhile
                with suppress(*OUTAGES):
                    self.beat()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(GIVING_BACK_SECONDS)
            # where it cannot be deleted, the next run sees it stand still
            with suppress(*OUTAGES):
                self._fresh().delete(if_generation_match=self._generation, retry=client.RETRY)
