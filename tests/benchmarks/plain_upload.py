"""What publishing is measured against: every file of a directory by the client's own transfer manager.

python plain_upload.py DIRECTORY BUCKET: as many workers as it takes by default, and threads, with which it is faster
on few cores than with processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from google.cloud import storage
from google.cloud.storage import transfer_manager

if __name__ == "__main__":
    directory, bucket = Path(sys.argv[1]), storage.Client(project="none").bucket(sys.argv[2])
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    for answer in transfer_manager.upload_many_from_filenames(
        bucket, names, source_directory=str(directory), worker_type=transfer_manager.THREAD
    ):
        if answer is not None:
            raise answer
