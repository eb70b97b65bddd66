"""A lease in Cloud Storage: an object, whose generation changes with every heartbeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from google.api_core import exceptions

from conversion_lib.storage import gcs_client as client
from conversion_lib.storage.lease import Lease, Note, State

if TYPE_CHECKING:
    from conversion_lib.storage.gcs import BucketLocation


class BucketLease(Lease):
    """The lease in the object at `location`."""

    def __init__(self, location: BucketLocation, on_lost: Callable[[], None] = lambda: None) -> None:
        super().__init__(on_lost)
        self._location = location
        self._generation = 0

    def read(self) -> Note | None:
        return Note.parse(self._location.read())

    def _look(self) -> State | int:
        known, blob = self._generation, self._blob()
        with client.explained(str(self._location), "look at the lease"):
            there = blob.bucket.get_blob(blob.name, retry=client.RETRY)
        self._generation = int(there.generation) if there else 0
        if not self._generation:
            return State.FREE
        if self._generation != known:
            note = self.read()
            self._failed = note is not None and note.failure is not None
        return State.FREE if self._failed else self._generation

    _failed = False

    def _take(self) -> bool:
        self._note = self._note.model_copy(update={"failure": None, "failure_is_final": False})
        return self._write()

    def _blob(self) -> Any:
        """The object whatever its generation: one that the client has written is read as it was then."""
        return self._location.blob.bucket.blob(self._location.name)

    def _write(self) -> bool:
        content, blob = self._note.model_dump_json().encode(), self._blob()
        with client.explained(str(self._location), "take the lease"):
            try:
                blob.upload_from_string(
                    content,
                    content_type="application/json",
                    if_generation_match=self._generation,
                    retry=client.RETRY,
                )
            except exceptions.PreconditionFailed:
                if client.read(blob) != content:  # else ours, where the answer to a first try was lost
                    return False
                blob.reload(retry=client.RETRY)
        self._generation = int(blob.generation)
        return True

    def _remove(self) -> None:
        self.discard()

    def discard(self) -> None:
        with client.explained(str(self._location), "give the lease back"):
            try:
                self._blob().delete(if_generation_match=self._generation, retry=client.RETRY)
            except (exceptions.NotFound, exceptions.PreconditionFailed):
                return
