"""What a run in Airflow chooses besides its target, for operators, steps, form and catalogue: values and meanings."""

from __future__ import annotations

from typing import Literal

DequantizeMode = Literal["staged", "fused"]
STAGED: DequantizeMode = "staged"
FUSED: DequantizeMode = "fused"
DEQUANTIZE_MODES: dict[DequantizeMode, str] = {
    STAGED: "staged: a bf16 checkpoint first, each stage its own retry",
    FUSED: "fused: while converting, one pass less over the data, no bf16 copy on disk",
}

KEEP, KEEP_ON_FAILURE, REMOVE = "keep", "keep_on_failure", "remove"
POLICIES = {
    KEEP: "keep: everything stays",
    KEEP_ON_FAILURE: "keep_on_failure: of a run that did well only the download stays, for other targets",
    REMOVE: "remove: nothing stays, whether the run did well or not",
}
"""Values of `keep_files`, and what each means."""
