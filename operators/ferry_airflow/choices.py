"""Choices of a run besides its target: values and meanings, for operators, steps, form and catalogue."""

from __future__ import annotations

from typing import Literal

DequantizeMode = Literal["staged", "fused"]
STAGED: DequantizeMode = "staged"
FUSED: DequantizeMode = "fused"
DEQUANTIZE_MODES: dict[DequantizeMode, str] = {
    STAGED: "staged: write a bf16 checkpoint first; each step has its own retry",
    FUSED: "fused: dequantize while converting; reads the data one time less, no bf16 copy on disk",
}

OVERWRITE = {
    "download": "download: download again, and all that follows",
    "dequantize": "dequantize: dequantize again, and all that follows",
    "convert": "convert: convert and check again",
    "check": "check: check again",
}
"""Values of `overwrite`, and what each means: the stage from which on earlier results are not used."""

KEEP, KEEP_ON_FAILURE, REMOVE = "keep", "keep_on_failure", "remove"
POLICIES = {
    KEEP: "keep: keep everything",
    KEEP_ON_FAILURE: "keep_on_failure: keep everything after a failure, only the download after success",
    REMOVE: "remove: keep nothing",
}
"""Values of `keep_files`, and what each means."""
