"""A Cloud Storage on this machine, for google-cloud-storage, gcsfs and TensorStore's `gcs` driver.

    with FakeCloudStorage(["bucket"]) as fake:
        os.environ["STORAGE_EMULATOR_HOST"] = fake.endpoint           # google-cloud-storage, gcsfs
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = fake.endpoint        # TensorStore
        os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "token"

The JSON API: objects with generations and metagenerations; all preconditions on reads, writes, deletions, compose,
copy and rewrite; multipart, media and resumable uploads with offsets and questions how far they got; ranged reads;
listings with prefix, delimiter and pages; announced CRC32C and MD5 checked. An object has an `md5Hash` only where its
upload announced one, as composed objects have none in the service. `python -m tests.support.fakes.cloud_storage BUCKET`
is the same in a process of its own (`in_own_process`).
"""

from tests.support.fakes.cloud_storage.buckets import Object
from tests.support.fakes.cloud_storage.faults import MIXED, Chance, Fault
from tests.support.fakes.cloud_storage.own_process import in_own_process
from tests.support.fakes.cloud_storage.server import FakeCloudStorage

__all__ = ["MIXED", "Chance", "FakeCloudStorage", "Fault", "Object", "in_own_process"]
