"""A published checkpoint is read over gs:// by TensorStore, as Orbax reads arrays; `make parity` has Orbax do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore

from conversion_lib.conversions.convert import convert
from conversion_lib.publish.publish import publish
from conversion_lib.record import Target
from tests.support.checkpoints import QWEN3, random_tensors, write_checkpoint
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.sparse_checkpoints import llama_tensors


def arrays(base: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every array of the OCDBT store at `base`, by its name."""
    store = {"driver": "ocdbt", "base": base}
    keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    names = sorted(key.removesuffix("zarr.json") for key in keys if key.endswith("/zarr.json"))
    specs = [{"driver": "zarr3", "kvstore": {**store, "path": name}} for name in names]
    reads = [tensorstore.open(spec, open=True).result().read() for spec in specs]
    return {name: read.result() for name, read in zip(names, reads, strict=True)}


def test_the_same_arrays(tmp_path: Path, fake: FakeCloudStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "hf", QWEN3, random_tensors(llama_tensors(QWEN3)))
    convert(source, tmp_path / "made", Target())
    url = publish(tmp_path / "made", "gs://bucket/models", unchecked=True).url
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", fake.endpoint)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    local = arrays({"driver": "file", "path": f"{tmp_path}/made/0/items/"})
    published = arrays({"driver": "gcs", "bucket": "bucket", "path": f"{url.removeprefix('gs://bucket/')}/0/items/"})
    assert len(local) > 5 and local.keys() == published.keys()
    for name, array in local.items():
        np.testing.assert_array_equal(array, published[name])
