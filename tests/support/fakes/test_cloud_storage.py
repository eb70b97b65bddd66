"""The Cloud Storage of the tests behaves as the service does, seen through the real clients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tensorstore
from google.api_core import exceptions
from google.cloud import storage
from google.cloud.storage import transfer_manager

from tests.support.fakes.cloud_storage import Chance, FakeCloudStorage, Fault, in_own_process

MEBI = 1 << 20


@pytest.fixture(params=["memory", "files"])
def fake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloudStorage]:
    directory = tmp_path / "objects" if request.param == "files" else None
    if directory is not None:
        directory.mkdir()
    with FakeCloudStorage(["bucket"], directory) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.endpoint)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", running.endpoint)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield running


@pytest.fixture
def bucket(fake: FakeCloudStorage) -> Any:
    return storage.Client(project="none").bucket("bucket")


def content_of(size: int) -> bytes:
    return np.random.default_rng(7).bytes(size)


@pytest.mark.parametrize("size", [0, 1, 3 * MEBI + 5])
def test_what_is_written_is_read(bucket: Any, size: int) -> None:
    blob, content = bucket.blob("a/b c/ü"), content_of(size)
    blob.upload_from_string(content, checksum="md5")
    assert blob.download_as_bytes() == content
    assert bucket.get_blob("a/b c/ü").size == size
    if size > 100:
        assert blob.download_as_bytes(start=7, end=99) == content[7:100]
        assert blob.download_as_bytes(start=size - 3) == content[-3:]
        with pytest.raises(exceptions.RequestRangeNotSatisfiable):
            blob.download_as_bytes(start=size)


def test_generations_and_preconditions(bucket: Any, fake: FakeCloudStorage) -> None:
    fake.versioning = True
    blob = bucket.blob("x")
    blob.upload_from_string(b"one", if_generation_match=0)
    first = blob.generation
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").upload_from_string(b"two", if_generation_match=0)
    blob.upload_from_string(b"two", if_generation_match=first)
    assert blob.generation > first and blob.metageneration == 1
    blob.metadata = {"key": "value"}
    blob.patch(if_metageneration_match=1)
    assert blob.metageneration == 2
    with pytest.raises(exceptions.PreconditionFailed):
        blob.patch(if_metageneration_match=1)
    with pytest.raises(exceptions.PreconditionFailed):
        blob.download_as_bytes(if_generation_match=first)
    assert bucket.blob("x", generation=first).download_as_bytes() == b"one"
    assert [b.generation for b in bucket.list_blobs(versions=True)] == [first, blob.generation]
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("x").delete(if_generation_match=first)
    blob.delete(if_generation_match=blob.generation)
    with pytest.raises(exceptions.NotFound):
        bucket.blob("x").reload()


def test_a_resumable_upload_goes_on_where_it_was(fake: FakeCloudStorage) -> None:
    content = content_of(MEBI)
    start = requests.post(
        f"{fake.endpoint}/upload/storage/v1/b/bucket/o?uploadType=resumable&name=x", json={}, timeout=5
    )
    session = start.headers["Location"]

    def send(first: int, last: int) -> requests.Response:
        headers = {"Content-Range": f"bytes {first}-{last - 1}/{MEBI}"}
        return requests.put(session, content[first:last], headers=headers, timeout=5)

    fake.faults = [Fault(method="PUT", what="reset", after=300_000)]
    with pytest.raises(requests.ConnectionError):
        send(0, MEBI)
    asked = requests.put(session, headers={"Content-Range": f"bytes */{MEBI}"}, timeout=5)
    assert (asked.status_code, asked.headers["Range"]) == (308, f"bytes=0-{(256 << 10) - 1}")  # whole blocks of 256 KiB
    assert send(512 << 10, MEBI).status_code == 503  # leaves a gap
    assert send(256 << 10, 512 << 10).status_code == 308
    done = send(0, MEBI)  # what it has is skipped
    assert done.status_code == 200
    assert requests.put(session, headers={"Content-Range": f"bytes */{MEBI}"}, timeout=5).json() == done.json()
    assert fake.read("bucket", "x") == content


def test_announced_hashes_are_checked(bucket: Any, fake: FakeCloudStorage) -> None:
    for header in ("crc32c=AAAAAA==", "md5=1B2M2Y8AsgTpgAmY7PhCfg=="):
        url = f"{fake.endpoint}/upload/storage/v1/b/bucket/o?uploadType=media&name=x"
        answer = requests.post(url, b"content", headers={"x-goog-hash": header}, timeout=5)
        assert answer.status_code == 400 and "doesn't match" in answer.text
    assert fake.names("bucket") == []


def test_listings(bucket: Any, fake: FakeCloudStorage) -> None:
    for name in ("a", "d/1", "d/2", "d/e/3", "z"):
        fake.put("bucket", name, b"x")
    assert [b.name for b in bucket.list_blobs(page_size=2)] == ["a", "d/1", "d/2", "d/e/3", "z"]
    page = bucket.list_blobs(prefix="d/", delimiter="/", page_size=1)
    assert [b.name for b in page] == ["d/1", "d/2"] and page.prefixes == {"d/e/"}
    assert [b.name for b in bucket.list_blobs(start_offset="d/2", end_offset="z")] == ["d/2", "d/e/3"]


def test_compose_copy_rewrite(bucket: Any, fake: FakeCloudStorage) -> None:
    first, second = bucket.blob("1"), bucket.blob("2")
    first.upload_from_string(b"one")
    second.upload_from_string(b"two", content_type="text/plain")
    both = bucket.blob("both/of them")
    both.compose([first, second], if_generation_match=0)
    assert both.download_as_bytes() == b"onetwo"
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob(both.name).compose([first], if_generation_match=0)
    copy = bucket.copy_blob(second, bucket, "copy/o/2", if_generation_match=0)
    assert (copy.content_type, fake.read("bucket", "copy/o/2")) == ("text/plain", b"two")

    fake.rewrite_bytes = 4
    copy = bucket.blob("copy")
    token, steps = None, list[tuple[int, int]]()
    while token is not None or not steps:
        token, done, size = copy.rewrite(both, token=token, if_generation_match=0)
        steps.append((done, size))
    assert steps == [(4, 6), (6, 6)] and copy.download_as_bytes() == b"onetwo"
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("never").rewrite(both, if_source_generation_match=1)


def test_refusals(bucket: Any, fake: FakeCloudStorage) -> None:
    def upload(name: str = "x") -> None:
        bucket.blob(name).upload_from_string(b"x", retry=None)

    for name in ("a\nb", "..", "x" * 1025):
        with pytest.raises(exceptions.BadRequest, match="Invalid object name"):
            upload(name)
    with pytest.raises(exceptions.NotFound, match="bucket does not exist"):
        list(storage.Client(project="none").bucket("other").list_blobs())
    fake.write_interval = 60
    upload()
    with pytest.raises(exceptions.TooManyRequests, match="rate limit"):
        upload()
    fake.write_interval = 0
    fake.denied = {"storage.objects.delete"}
    with pytest.raises(exceptions.Forbidden, match=r"storage\.objects\.delete"):
        upload()  # what overwrites also deletes
    upload("y")
    fake.token = "secret"
    for token, status in {"secret": 200, "other": 401}.items():
        headers = {"Authorization": f"Bearer {token}"}
        assert requests.get(f"{fake.endpoint}/storage/v1/b/bucket/o", headers=headers, timeout=5).status_code == status


@pytest.mark.parametrize("what", ["reset", "cut"])
def test_a_broken_stream(fake: FakeCloudStorage, what: Any) -> None:
    fake.put("bucket", "x", content_of(MEBI))
    fake.faults = [Fault(method="GET", what=what, after=1000)]
    url = f"{fake.endpoint}/storage/v1/b/bucket/o/x?alt=media"
    with requests.get(url, stream=True, timeout=5) as answer, pytest.raises(requests.RequestException) as caught:
        answer.raw.read(1000)
        answer.content  # noqa: B018
    assert ("reset" in str(caught.value).lower()) == (what == "reset")
    assert requests.get(url, timeout=5).headers["x-goog-generation"] == str(fake.objects["bucket", "x"].generation)


def test_the_nth_request_and_lost_answers(bucket: Any, fake: FakeCloudStorage) -> None:
    fake.faults = [Fault(500, "POST", "x", skip=1), Fault(503, "POST", "y", applied=True)]
    bucket.blob("x").upload_from_string(b"1", retry=None)
    with pytest.raises(exceptions.InternalServerError):
        bucket.blob("x").upload_from_string(b"2", retry=None)
    with pytest.raises(exceptions.ServiceUnavailable):
        bucket.blob("y").upload_from_string(b"3", retry=None)
    assert (fake.read("bucket", "x"), fake.read("bucket", "y")) == (b"1", b"3")


def test_chance_is_the_same_for_the_same_seed() -> None:
    def draws(seed: int, order: list[str]) -> dict[str, list[object]]:
        chance = Chance(0.3, seed)
        drawn: dict[str, list[object]] = {name: [] for name in order}
        for name in itertools.chain.from_iterable([order] * 20):
            drawn[name].append(chance.draw("GET", name))
        return drawn

    assert draws(1, ["a", "b", "c"]) == draws(1, ["c", "a", "b"]) != draws(2, ["a", "b", "c"])
    assert 5 < sum(fault is not None for row in draws(1, ["a", "b", "c"]).values() for fault in row) < 35


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_tensorstore_writes_and_reads(fake: FakeCloudStorage, driver: str, ocdbt: bool) -> None:
    fake.token = "token"
    store: dict[str, Any] = {"driver": "gcs", "bucket": "bucket", "path": "array/"}
    store = {"driver": "ocdbt", "base": store, "path": "a/"} if ocdbt else store
    spec = {"driver": driver, "kvstore": store}
    array = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    options: Any = {
        "dtype": "float32",
        "shape": array.shape,
        "chunk_layout": tensorstore.ChunkLayout(chunk_shape=[25, 50]),
    }
    tensorstore.open(spec, create=True, **options).result().write(array).result()
    written = tensorstore.open(spec, context=tensorstore.Context()).result()
    np.testing.assert_array_equal(written.read().result(), array)
    np.testing.assert_array_equal(written[10:20, 3:60].read().result(), array[10:20, 3:60])
    listed = tensorstore.KvStore.open({"driver": "gcs", "bucket": "bucket"}).result()
    assert [key.decode() for key in sorted(listed.list().result())] == fake.names("bucket")
    listed.delete_range(tensorstore.KvStore.KeyRange("array/", "array0")).result()
    assert fake.names("bucket") == []


def test_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(content_of(2 * MEBI))
    with in_own_process("bucket", tmp_path) as endpoint:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        bucket = storage.Client(project="none").bucket("bucket")
        failed = transfer_manager.upload_many_from_filenames(
            bucket, ["one", "two"], source_directory=str(tmp_path), worker_type=transfer_manager.THREAD
        )
        assert failed == [None, None]
        transfer_manager.download_chunks_concurrently(
            bucket.blob("two"), str(tmp_path / "back"), chunk_size=500_000, worker_type=transfer_manager.THREAD
        )
    assert (tmp_path / "back").read_bytes() == content_of(2 * MEBI)
