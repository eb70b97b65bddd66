"""Looks up, downloads and streams repositories of the Hugging Face Hub."""

from conversion_lib.hub.downloading import (
    DownloadResult,
    cache_directory,
    cached_download,
    download,
    now,
    resolve,
)
from conversion_lib.hub.files import Resolved, hub_endpoint
from conversion_lib.hub.needed import needed_files, side_files
from conversion_lib.record import WORK_NAME

__all__ = [
    "WORK_NAME",
    "DownloadResult",
    "Resolved",
    "cache_directory",
    "cached_download",
    "download",
    "hub_endpoint",
    "needed_files",
    "now",
    "resolve",
    "side_files",
]
