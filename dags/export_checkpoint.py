"""Exports a MaxText checkpoint to Hugging Face.

- **export** writes a checkpoint that transformers loads.
- **upload** uploads it to Cloud Storage, or to the Hub in one commit. For a directory, there is nothing to upload.

The settings are those of `onboard_checkpoint`. For the Hub, the token of the connection that `FERRY_HF_CONN_ID` names
must allow writing.
"""

from __future__ import annotations

import os

from airflow.sdk import Param

from ferry_airflow.callbacks import on_failure, on_success
from ferry_airflow.dag import StagesDag
from ferry_airflow.export import ExportOperator
from ferry_airflow.retries import stage_defaults
from ferry_airflow.upload import UploadOperator

SOURCE, RESULT = "Source", "What to write"

PARAMS = {
    "checkpoint": Param(
        type="string",
        pattern="^(gs://[^/]+/|/).+$",
        section=SOURCE,
        title="Checkpoint",
        description_md="A MaxText checkpoint: an absolute directory that the workers can read, or `gs://bucket/...`.",
    ),
    "hf_config": Param(
        None,
        type=["null", "string"],
        pattern="^/.+$",
        section=SOURCE,
        title="Configuration",
        description_md="Directory with config.json and the tokenizer. Empty: `hf` in a checkpoint that Ferry wrote.",
    ),
    "dtype": Param(
        "bfloat16",
        type="string",
        enum=["bfloat16", "float32", "float16"],
        section=RESULT,
        title="Data type",
        description="Dtype of the weights.",
    ),
    "destination": Param(
        type="string",
        pattern=r"^(gs://[^/]+/.+|/.+|hf://[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)$",
        section=RESULT,
        title="Destination",
        description_md="An absolute directory, `gs://bucket/prefix`, or `hf://organization/name` for the Hub.",
    ),
    "private": Param(
        True,
        type="boolean",
        section=RESULT,
        title="Private",
        description="A new repository on the Hub is private.",
    ),
}

with StagesDag(
    "export_checkpoint",
    description="MaxText checkpoint to Hugging Face: a directory, Cloud Storage or the Hub",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    max_active_runs=4,
    params=PARAMS,
    tags=["ferry", "maxtext"],
    on_success_callback=on_success,
    on_failure_callback=on_failure,
    default_args=stage_defaults(),
) as dag:
    export = ExportOperator(
        task_id="export",
        checkpoint=dag.param("checkpoint"),
        hf_config=dag.param("hf_config"),
        dtype=dag.param("dtype"),
        destination=dag.param("destination"),
        pool="high_memory",
    )
    UploadOperator(
        task_id="upload",
        source=export.output,
        private=dag.param("private"),
        message="Export of {{ params.checkpoint }}",
        hf_conn_id=os.environ.get("FERRY_HF_CONN_ID") or None,
    )
