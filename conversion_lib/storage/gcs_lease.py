"""A lease in Cloud Storage: an object whose generation changes with every heartbeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.api_core import exceptions

from conversion_lib.storage import gcs_client as client
from conversion_lib.storage.interface import SCHEME
from conversion_lib.storage.lease import Lease, Note, State


class BucketLease(Lease):
    """The lease in the object `blob`."""

    def __init__(self, blob: Any, on_lost: Callable[[], None] = lambda: None) -> None:
        super().__init__(on_lost)
        self._bucket, self._name = blob.bucket, blob.name
        self._url = f"{SCHEME}{blob.bucket.name}/{blob.name}"
        self._generation = 0
        self._failed = False
        """Whether the object that was seen is the note of a failure, which any process may replace."""

    def read(self) -> Note | None:
        with client.explained(self._url, "read the lease"):
            return Note.parse(client.read(self._blob()))

    def _look(self) -> State | int:
        known = self._generation
        with client.explained(self._url, "look at the lease"):
            there = self._bucket.get_blob(self._name, retry=client.RETRY)
        self._generation = int(there.generation) if there else 0
        if not self._generation:
            return State.FREE
        if self._generation != known:
            note = self.read()
            self._failed = note is not None and note.failure is not None
        return State.FREE if self._failed else self._generation

    def _take(self) -> bool:
        self._note = self._note.model_copy(update={"failure": None, "failure_is_final": False})
        return self._write()

    def _blob(self) -> Any:
        """Returns the object at any generation: an object that the client wrote would read that generation."""
        return self._bucket.blob(self._name)

    def _write(self) -> bool:
        content, blob = self._note.model_dump_json().encode(), self._blob()
        with client.explained(self._url, "take the lease"):
            try:
                blob.upload_from_string(
                    content,
                    content_type="application/json",
                    if_generation_match=self._generation,
                    retry=client.RETRY,
                )
            except exceptions.PreconditionFailed:
                if client.read(blob) != content:  # else written by us: the response to a first try was lost
                    return False
                blob.reload(retry=client.RETRY)
        self._generation = int(blob.generation)
        return True

    def _remove(self) -> None:
        self.discard()

    def discard(self) -> None:
        with client.explained(self._url, "give the lease back"):
            try:
                self._blob().delete(if_generation_match=self._generation, retry=client.RETRY)
            except (exceptions.NotFound, exceptions.PreconditionFailed):
                return
