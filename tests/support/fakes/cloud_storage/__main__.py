"""`python -m tests.support.fakes.cloud_storage BUCKET [DIRECTORY]`: prints its endpoint and serves."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tests.support.fakes.cloud_storage.server import FakeCloudStorage

with FakeCloudStorage([sys.argv[1]], *map(Path, sys.argv[2:])) as fake:
    print(fake.endpoint, flush=True)
    signal.pause()
