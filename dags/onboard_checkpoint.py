"""### Onboard a checkpoint

Brings a Hugging Face checkpoint to MaxText: **resolve** the revision to a commit, **download**, **dequantize**
(fp8 to bf16), **convert**, **check** the logits against the original's, **publish**.

Every stage leaves a manifest (its XCom) with bytes, seconds and peak memory. A stage whose output is there and
whole does nothing, so a retry, or another run of the same commit and target, goes on where the last one stopped.
Wrong input and a failed check fail once; outages are retried with back-off.

| setting of the workers (environment) | meaning |
| --- | --- |
| `FERRY_WORK_DIR` | where a worker keeps what it works on; default `~/ferry-work`; all tasks of a run need to see it |
| `FERRY_DESTINATION` | default of the param `destination` (the DAG processor reads it) |
| `FERRY_HF_CONN_ID` | Airflow connection whose password is the Hub token (the DAG processor and workers read it) |
| `HF_ENDPOINT`, `HF_TOKEN` | another Hub; the token where there is no connection |
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Param

from operators.check import CheckOperator
from operators.convert import ConvertOperator
from operators.dequantize import DequantizeOperator
from operators.download import DownloadOperator
from operators.publish import PublishOperator
from operators.resolve import ResolveOperator

SOURCE, LAYOUT, RUN = "Source", "What to write", "How to get there"


def destination_param() -> Param:
    """Required, unless the environment has a default."""
    default: dict[str, Any] = {}
    if os.environ.get("FERRY_DESTINATION"):
        default["default"] = os.environ["FERRY_DESTINATION"]
    return Param(
        **default,
        type="string",
        pattern="^(gs://[^/]+|/.).*$",
        section=RUN,
        title="Destination",
        description="`gs://bucket/prefix` or an absolute directory. The checkpoint goes to "
        "`<model>/<commit>/<target>/` under it.",
    )


PARAMS = {
    "repo": Param(
        type="string",
        pattern=r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*|/.+)$",
        section=SOURCE,
        title="Repository",
        description="Hub repository such as `deepseek-ai/DeepSeek-V3`, or the absolute path of a directory that "
        "the workers see.",
    ),
    "revision": Param(
        "main",
        type="string",
        minLength=1,
        section=SOURCE,
        title="Revision",
        description="Branch, tag or commit. It is resolved to a commit once, and the whole run uses that commit. "
        "A directory has none.",
    ),
    "model_name": Param(
        None,
        type=["null", "string"],
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        section=SOURCE,
        title="Model name",
        description="As `ferry models` lists it, such as `deepseek3-671b`. Empty: told by the repository's config.",
    ),
    "scan_layers": Param(
        True,
        type="boolean",
        section=LAYOUT,
        title="Scanned layers",
        description="Stack the layers, as MaxText does for training (`scan_layers=true`). Off: one array a layer.",
    ),
    "save_dtype": Param(
        "bfloat16",
        type="string",
        enum=["bfloat16", "float32"],
        section=LAYOUT,
        title="Data type",
        description="Of the weights that are written.",
    ),
    "ocdbt": Param(
        True,
        type="boolean",
        section=LAYOUT,
        title="OCDBT",
        description="Few large files instead of many small ones. Off, together with zarr3, for Pathways.",
    ),
    "zarr3": Param(True, type="boolean", section=LAYOUT, title="zarr3", description="Off: zarr2."),
    "maxtext": Param(
        "0.2.5",
        type="string",
        enum=["0.2.5", "main"],
        section=LAYOUT,
        title="MaxText",
        description="The MaxText that will load it. They differ in the layout of DeepSeek-V3's scanned gate bias.",
    ),
    "dequantize": Param(
        "staged",
        type="string",
        enum=["staged", "fused"],
        values_display={
            "staged": "staged: a bf16 checkpoint first, each stage its own retry",
            "fused": "fused: while converting, one pass less over the data, no bf16 copy on disk",
        },
        section=RUN,
        title="Dequantize",
        description="For fp8 sources; the bits are the same. Others are passed on as they are.",
    ),
    "max_kl": Param(
        None,
        type=["null", "number"],
        exclusiveMinimum=0,
        section=RUN,
        title="Largest KL",
        description="The check fails where any token's Kullback-Leibler divergence, in nats, is larger. Empty: 1e-5, "
        "or what the rounding of a Llama's query in bfloat16 makes of it (1e-3).",
    ),
    "destination": destination_param(),
}

with DAG(
    "onboard_checkpoint",
    description="Hugging Face checkpoint to MaxText: download, dequantize, convert, check, publish",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    # A worker's disk and memory are shared by the runs. Two runs of one source do not harm each other: ferry locks
    # what it writes, and the second waits, by its retries.
    max_active_runs=4,
    params=PARAMS,
    tags=["ferry", "maxtext"],
    default_args={
        "owner": "ferry",
        "retries": 3,
        "retry_delay": timedelta(seconds=30),
        "retry_exponential_backoff": 2,
        "max_retry_delay": timedelta(minutes=10),
    },
) as dag:
    hf_conn_id = os.environ.get("FERRY_HF_CONN_ID") or None

    resolve = ResolveOperator(
        task_id="resolve", repo=dag.param("repo"), revision=dag.param("revision"), hf_conn_id=hf_conn_id
    )
    download = DownloadOperator(task_id="download", source=resolve.output, hf_conn_id=hf_conn_id)
    dequantize = DequantizeOperator(task_id="dequantize", source=download.output, mode=dag.param("dequantize"))
    convert = ConvertOperator(
        task_id="convert",
        source=dequantize.output,
        model_name=dag.param("model_name"),
        scan_layers=dag.param("scan_layers"),
        save_dtype=dag.param("save_dtype"),
        ocdbt=dag.param("ocdbt"),
        zarr3=dag.param("zarr3"),
        maxtext=dag.param("maxtext"),
    )
    check = CheckOperator(
        task_id="check",
        checkpoint=convert.output,
        reference=dequantize.output,  # in bf16 where staged; of an fp8 source the check dequantizes for itself
        max_kl=dag.param("max_kl"),
    )
    publish = PublishOperator(task_id="publish", checkpoint=check.output, destination=dag.param("destination"))

    resolve >> download >> dequantize >> convert >> check >> publish
