"""A whole round in the Cloud Storage that others wrote, while a tenth of all answers breaks off in mid body."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion_lib import api
from conversion_lib.conversions.compare import compare
from conversion_lib.plan.parts import Part
from conversion_lib.publish.prune import prune
from conversion_lib.record import Target
from conversion_lib.storage import gcs, lease
from conversion_lib.storage import gcs_client as client
from tests.support.bucket_fixtures import QUICK_RETRIES
from tests.support.checkpoints import QWEN3, random_tensors, write_checkpoint
from tests.support.fakes.cutting_proxy import CuttingProxy
from tests.support.fakes.gcs_server import gcs_server, set_public_url
from tests.support.sparse_checkpoints import llama_tensors

CUT = 0.1


@pytest.fixture(params=[0, 1])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    with gcs_server("bucket") as port, CuttingProxy(port, CUT, request.param) as cutting:
        set_public_url(port, cutting.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", cutting.url)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", cutting.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(client, "RETRY", client.RETRY.with_delay(initial=0.01, maximum=0.1))
        monkeypatch.setattr(gcs, "TENSORSTORE_REQUESTS", gcs.TENSORSTORE_REQUESTS | QUICK_RETRIES)
        yield cutting


def test_a_round_survives(proxy: CuttingProxy, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, QWEN3, random_tensors(llama_tensors(QWEN3)), shards=2)
    api.convert(source, tmp_path / "beside")
    for part in (Part(0, 2), Part(1, 2)):
        api.convert(source, "gs://bucket/ours", options=api.Options(part=part))
    api.finalize("gs://bucket/ours")
    api.convert(source, "gs://bucket/zarr", Target(ocdbt=False, zarr3=False))
    api.export("gs://bucket/ours", tmp_path / "exported")
    assert compare(tmp_path / "exported", source).same
    cloud = api.publish("gs://bucket/ours", "gs://bucket/models", unchecked=True)
    local = api.publish("gs://bucket/ours", str(tmp_path / "models"), unchecked=True)
    for url in (cloud.url, local.url):
        assert api.verify(url).problems == []
        assert compare(f"{url}/0", tmp_path / "beside").same
    assert len(prune("gs://bucket/models", keep=1).kept) == 1
    assert proxy.cuts > 10
