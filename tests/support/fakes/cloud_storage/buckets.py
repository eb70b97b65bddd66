"""The state of the fake: objects with generations, preconditions, permissions, uploads under way."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.fakes.cloud_storage.contents import Content, Growing, make_content

Query = dict[str, str]


class Refused(Exception):
    """Answered with `status` and a message in the service's JSON."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason


@dataclass
class Object:
    """One generation of an object."""

    bucket: str
    name: str
    content: Content
    generation: int
    settings: dict[str, Any]
    """What the client set: contentType, metadata, ..."""
    metageneration: int = 1
    components: int = 0

    def describe(self) -> dict[str, Any]:
        composed = {"componentCount": self.components} if self.components else {}
        return {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "bucket": self.bucket,
            "name": self.name,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "size": str(self.content.size),
            "crc32c": self.content.crc32c,
            "contentType": "application/octet-stream",
            "etag": f"{self.generation}/{self.metageneration}",
            "storageClass": "STANDARD",
            "timeCreated": _time(self.generation),
            "updated": _time(self.generation),
            **composed,
            **self.settings,
        }


def _time(generation: int) -> str:
    """A generation is the time of the write, in microseconds since 1970."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(generation // 10**6)) + f".{generation % 10**6:06}Z"


@dataclass
class Session:
    """A resumable upload under way."""

    bucket: str
    name: str
    settings: dict[str, Any]
    query: Query
    growing: Growing
    written: Object | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Rewrite:
    """A rewrite under way: its token is good for this source and destination only."""

    source: Object
    destination: tuple[str, str]
    done: int = 0


class Buckets:
    """Every bucket of the service. Public attributes may be set while it runs."""

    def __init__(self, buckets: Iterable[str], directory: Path | None = None) -> None:
        self.buckets = set(buckets)
        self.directory = directory
        self.objects: dict[tuple[str, str], Object] = {}
        self.noncurrent: list[Object] = []
        self.versioning = False
        """Whether what is overwritten or deleted stays, under its generation."""
        self.write_interval = 0.0
        """Seconds between two writes of one name; the service's own is 1. Sooner: 429."""
        self.rewrite_bytes: int | None = None
        """What one call of a rewrite copies at most; None: everything."""
        self.denied: set[str] = set()
        """Permissions that the caller does not have, such as `storage.objects.create`: 403."""
        self.sessions: dict[str, Session] = {}
        self.rewrites: dict[str, Rewrite] = {}
        self.lock = threading.RLock()
        self._generation = 0
        self._last_write: dict[tuple[str, str], float] = {}
        self._tokens = itertools.count()

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for b, name in self.objects if b == bucket and name.startswith(prefix))

    def written(self) -> list[str]:
        """Names in the order in which the objects there now were written."""
        with self.lock:
            return [o.name for o in sorted(self.objects.values(), key=lambda o: o.generation)]

    def put(self, bucket: str, name: str, content: bytes) -> Object:
        """Writes an object as somebody else might, past every rule."""
        with self.lock:
            return self._store(bucket, name, make_content(content), {})

    def read(self, bucket: str, name: str) -> bytes:
        with self.lock:
            return self.objects[bucket, name].content.all()

    def growing(self) -> Growing:
        return Growing(self.directory)

    def allow(self, permission: str, bucket: str, name: str = "") -> None:
        """Raises Refused for a bucket that is not there or a permission that the caller lacks."""
        if permission in self.denied:
            raise Refused(
                403,
                f"caller does not have {permission} access to the Google Cloud Storage"
                f" {'object' if name else 'bucket'}. Permission '{permission}' denied on resource (or it may not"
                " exist).",
                "forbidden",
            )
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.", "notFound")

    def find(self, bucket: str, name: str, query: Query, prefix: str = "if") -> Object | None:
        """The object, of the generation that is asked for. Raises Refused(412) where preconditions fail."""
        there = self.objects.get((bucket, name))
        if wanted := query.get("generation"):
            kept = [there, *self.noncurrent] if there else self.noncurrent
            fitting = (o for o in kept if (o.bucket, o.name, o.generation) == (bucket, name, int(wanted)))
            there = next(fitting, None)
        for what, value in (
            ("Generation", there.generation if there else 0),
            ("Metageneration", there.metageneration if there else 0),
        ):
            match, other = query.get(f"{prefix}{what}Match"), query.get(f"{prefix}{what}NotMatch")
            if match is not None and int(match) != value:
                raise _unmet(f"{prefix}{what}Match")
            if other is not None and int(other) == value:
                raise _unmet(f"{prefix}{what}NotMatch")
        return there

    def get(self, bucket: str, name: str, query: Query, prefix: str = "if") -> Object:
        """As `find`; raises Refused(404) where there is none."""
        self.allow("storage.objects.get", bucket, name)
        there = self.find(bucket, name, query, prefix)
        if there is None:
            raise Refused(404, f"No such object: {bucket}/{name}", "notFound")
        return there

    def begin_write(self, bucket: str, name: str, query: Query) -> None:
        """What can be said before the bytes come: the name, permissions, preconditions."""
        check_name(name)
        self.allow("storage.objects.create", bucket, name)
        if self.find(bucket, name, query) is not None:
            self.allow("storage.objects.delete", bucket, name)

    def write(self, bucket: str, name: str, content: Content, settings: dict[str, Any], query: Query) -> Object:
        """One more generation of an object. Raises Refused; 400 where an announced hash is not the content's."""
        settings = {key: value for key, value in settings.items() if key not in ("name", "bucket", "generation")}
        if (crc32c := settings.pop("crc32c", content.crc32c)) != content.crc32c:
            raise Refused(400, f"Provided CRC32C {crc32c} doesn't match {content.crc32c}", "invalid")
        if "md5Hash" in settings and settings["md5Hash"] != (md5 := content.md5):
            raise Refused(400, f"Provided MD5 hash {settings['md5Hash']} doesn't match {md5}", "invalid")
        with self.lock:
            self.begin_write(bucket, name, query)
            now = time.monotonic()
            if now - self._last_write.get((bucket, name), float("-inf")) < self.write_interval:
                raise Refused(
                    429, f"The object {bucket}/{name} exceeded the rate limit for object mutation", "rateLimitExceeded"
                )
            self._last_write[bucket, name] = now
            return self._store(bucket, name, content, settings)

    def _store(self, bucket: str, name: str, content: Content, settings: dict[str, Any]) -> Object:
        self._retire(bucket, name)
        self._generation = max(self._generation + 1, time.time_ns() // 1000)
        written = Object(bucket, name, content, self._generation, settings)
        self.objects[bucket, name] = written
        return written

    def _retire(self, bucket: str, name: str) -> None:
        there = self.objects.pop((bucket, name), None)
        if there is not None and self.versioning:
            self.noncurrent.append(there)

    def delete(self, bucket: str, name: str, query: Query) -> None:
        self.allow("storage.objects.delete", bucket, name)
        with self.lock:
            there = self.find(bucket, name, query)
            if there is None:
                raise Refused(404, f"No such object: {bucket}/{name}", "notFound")
            if there in self.noncurrent:
                self.noncurrent.remove(there)
            else:
                self._retire(bucket, name)

    def patch(self, bucket: str, name: str, settings: dict[str, Any], query: Query) -> Object:
        self.allow("storage.objects.update", bucket, name)
        with self.lock:
            there = self.get(bucket, name, query)
            there.settings |= settings
            there.metageneration += 1
            return there

    def compose(self, bucket: str, name: str, body: dict[str, Any], query: Query) -> Object:
        """An object made of others, one after the other, 32 at most."""
        parts = body.get("sourceObjects", [])
        if not 1 <= len(parts) <= 32:
            raise Refused(400, f"The number of source components provided ({len(parts)}) is not in [1, 32]", "invalid")
        with self.lock:
            sources = [self.get(bucket, part["name"], _conditions(part)) for part in parts]
            growing = self.growing()
            for source in sources:
                for block in source.content.read(0, source.content.size):
                    growing.write(block)
            written = self.write(bucket, name, growing.finish(), dict(body.get("destination", {})), query)
            written.components = sum(max(source.components, 1) for source in sources)
            return written

    def rewrite(
        self, source: tuple[str, str], destination: tuple[str, str], settings: dict[str, Any], query: Query
    ) -> dict[str, Any]:
        """Copies within the service, in as many calls as `rewrite_bytes` makes of it."""
        with self.lock:
            if token := query.get("rewriteToken"):
                under_way = self.rewrites.get(token)
                if under_way is None or under_way.destination != destination:
                    raise Refused(400, "Invalid rewrite token", "invalid")
            else:
                wanted = {"generation": query["sourceGeneration"]} if "sourceGeneration" in query else {}
                there = self.get(*source, {**query, **wanted}, "ifSource")
                self.begin_write(*destination, query)
                token, under_way = f"rewrite-{next(self._tokens)}", Rewrite(there, destination)
            size = under_way.source.content.size
            step = int(query.get("maxBytesRewrittenPerCall", self.rewrite_bytes or size))
            under_way.done = min(size, under_way.done + min(step, self.rewrite_bytes or size))
            answer: dict[str, Any] = {
                "kind": "storage#rewriteResponse",
                "totalBytesRewritten": str(under_way.done),
                "objectSize": str(size),
                "done": under_way.done == size,
            }
            self.rewrites[token] = under_way  # for good: the last answer may be lost, and asked for again
            if not answer["done"]:
                return {**answer, "rewriteToken": token}
            kept = settings or under_way.source.settings
            return {**answer, "resource": self.write(*destination, under_way.source.content, kept, query).describe()}

    def begin_session(self, bucket: str, name: str, settings: dict[str, Any], query: Query) -> str:
        """The id of a new resumable upload."""
        with self.lock:
            self.begin_write(bucket, name, query)
            token = f"session-{next(self._tokens)}"
            self.sessions[token] = Session(bucket, name, settings, query, self.growing())
            return token

    def list(self, bucket: str, query: Query) -> dict[str, Any]:
        """A page of a listing, sorted by name, with what lies below `delimiter` as prefixes."""
        self.allow("storage.objects.list", bucket)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        with self.lock:
            kept = [*self.objects.values(), *(self.noncurrent if query.get("versions", "").lower() == "true" else [])]
            rows: dict[tuple[str, int], Object | None] = {}
            for each in kept:
                if each.bucket != bucket or not each.name.startswith(prefix):
                    continue
                if not query.get("startOffset", "") <= each.name < query.get("endOffset", "\U0010ffff"):
                    continue
                below, found, _ = each.name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                row = (prefix + below + delimiter, 0) if found else (each.name, each.generation)
                rows[row] = None if found else each
            page = [row for row in sorted(rows) if row > _row(query.get("pageToken"))]
            size = min(int(query.get("maxResults", 1000)), 1000)
            shown, more = page[:size], len(page) > size
            answer: dict[str, Any] = {"kind": "storage#objects"}
            answer["items"] = [there.describe() for row in shown if (there := rows[row]) is not None]
            answer["prefixes"] = [row[0] for row in shown if rows[row] is None]
            return answer | ({"nextPageToken": f"{shown[-1][1]}/{shown[-1][0]}"} if more else {})


def _row(token: str | None) -> tuple[str, int]:
    generation, _, name = (token or "0/").partition("/")
    return name, int(generation)


def _conditions(part: dict[str, Any]) -> Query:
    """The query that a part of a compose stands for."""
    wanted = {"generation": str(part["generation"])} if "generation" in part else {}
    return wanted | {key: str(value) for key, value in part.get("objectPreconditions", {}).items()}


def _unmet(condition: str) -> Refused:
    return Refused(412, f"At least one of the pre-conditions did not hold: {condition}", "conditionNotMet")


def check_name(name: str) -> None:
    """Raises Refused(400) for a name that the service takes for no object."""
    if not 1 <= len(name.encode()) <= 1024 or name in (".", "..") or "\r" in name or "\n" in name:
        raise Refused(400, f"Invalid object name: {name[:50]!r}", "invalid")
    if name.startswith(".well-known/acme-challenge/"):
        raise Refused(400, f"Invalid object name: {name[:50]!r}", "invalid")
