"""Uploads an exported checkpoint, a Hugging Face directory, to Cloud Storage or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversion_lib.core.retry import Backoff
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.hub import hub_endpoint
from conversion_lib.hub.errors import explain
from conversion_lib.models.hf_config import CONFIG_NAME
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.storage.checksums import list_files
from conversion_lib.storage.interface import SCHEME
from conversion_lib.storage.names import OWN_PREFIX, safe_path

HUB_SCHEME = "hf://"
THREADS = 8


def upload(source: Path, destination: str, *, private: bool, message: str, reporter: Reporter) -> dict[str, Any]:
    """Uploads every file of a directory but Ferry's own.

    On the Hub, it is one commit of all files, or none if nothing changed. In Cloud Storage, config.json comes last:
    without it, readers do not take the files for a checkpoint.

    Args:
        source: A directory with config.json.
        destination: `hf://org/name` or `gs://bucket/prefix`.
        private: Whether a repository that is created is private.
        message: The commit message on the Hub.
        reporter: Shows messages.

    Returns:
        `url`, `commit` (None for Cloud Storage), `files`, `bytes_in` and `bytes_out`.

    Raises:
        BadInput: There is no config.json, or the destination cannot be written.
        OutsideFailure: The service failed.
    """
    found = list_files(source) if (source / CONFIG_NAME).is_file() else {}
    sizes = {safe_path(name, source): size for name, size in found.items() if not name.startswith(OWN_PREFIX)}
    if not sizes:
        raise BadInput(f"{source} is not a Hugging Face checkpoint (no {CONFIG_NAME}): export first")
    size = sum(sizes.values())
    reporter.say(f"uploading {len(sizes)} files, {format_bytes(size)}, to {destination}")
    if destination.startswith(HUB_SCHEME):
        repo = destination.removeprefix(HUB_SCHEME)
        commit = Backoff().run(lambda: _to_hub(source, list(sizes), repo, private, message), reporter=reporter)
    elif destination.startswith(SCHEME):
        commit = None
        _to_cloud(source, list(sizes), destination)
    else:
        raise BadInput(f"{destination}: expected gs://bucket/prefix or hf://org/name")
    reporter.say(f"uploaded to {destination}" + (f" as commit {commit}" if commit else ""))
    return {"url": destination, "commit": commit, "files": len(sizes), "bytes_in": size, "bytes_out": size}


def _to_hub(source: Path, names: list[str], repo: str, private: bool, message: str) -> str:
    """Returns the commit. The client's `upload_folder` would make several commits of a large directory."""
    import huggingface_hub

    endpoint = hub_endpoint()
    files = [huggingface_hub.CommitOperationAdd(name, str(source / name)) for name in names]
    try:
        api = huggingface_hub.HfApi(endpoint)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, files, commit_message=message).oid)
    except Exception as error:
        raise explain(error, f"uploading {source} to {repo}", repo, endpoint) from error


def _to_cloud(source: Path, names: list[str], destination: str) -> None:
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from google.cloud.storage import transfer_manager

    bucket, _, prefix = destination.removeprefix(SCHEME).rstrip("/").partition("/")
    root = f"{prefix}/" if prefix else ""
    try:
        place = storage.Client().bucket(bucket)
        for group in ([name for name in names if name != CONFIG_NAME], [CONFIG_NAME]):
            done = transfer_manager.upload_many_from_filenames(
                place,
                group,
                source_directory=str(source),
                blob_name_prefix=root,
                worker_type=transfer_manager.THREAD,
                max_workers=THREADS,
                raise_exception=True,
            )
            assert len(done) == len(group)
    except (exceptions.NotFound, exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise BadInput(f"{destination} cannot be written: {_one_line(error)}") from error
    except (exceptions.GoogleAPIError, GoogleAuthError, OSError) as error:
        raise OutsideFailure(f"uploading to {destination}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
