"""### Onboard a checkpoint

Brings a Hugging Face checkpoint to MaxText: **resolve** the revision to a commit and plan, **download**, **dequantize**
(fp8 to bf16), **convert** in parts and **finalize** them, **check** the logits against the original's, wait for
**approval** where it is asked for, **publish**, **clean_up** the disk.

Every stage leaves a manifest (its XCom) with bytes, seconds and peak memory. A stage whose output is there and
whole does nothing, so a retry, or another run of the same commit and target, goes on where the last one stopped; what
is published and checked already is not done again. Wrong input and a failed check fail once; outages are retried with
back-off. Publishing updates an Asset for each model, `<destination>/<model>`, through the alias `ferry_published`.

| setting (environment) | read by | meaning |
| --- | --- | --- |
| `FERRY_WORK_DIR` | workers | where stages keep what they work on; default `~/ferry-work`; all need to see it |
| `FERRY_EXECUTION` | workers | a YAML file that says how stages run, such as in Kubernetes; default: on the worker |
| `FERRY_DESTINATION` | DAG processor | default of the param `destination` |
| `FERRY_HF_CONN_ID` | DAG processor | Airflow connection whose password is the Hub token |
| `FERRY_DEADLINE_HOURS` | DAG processor | a run that takes longer is reported as late; default 24; 0 disables |
| `FERRY_RETRY_SECONDS` | both | the wait before the first retry; default 30 |
| `FERRY_ON_SUCCESS`, `FERRY_ON_FAILURE` | DAG processor | called when a run has ended: `package.module:function` |
| `FERRY_ON_DEADLINE` | triggerer | the same, when a run is late |
| `HF_ENDPOINT`, `HF_TOKEN` | workers | another Hub; the token where there is no connection |
"""

from __future__ import annotations

import os
from typing import Any

from airflow.sdk import AssetAlias, Param, TriggerRule
from airflow.sdk import task as stage

from ferry_airflow.approval import OptionalApprovalOperator
from ferry_airflow.callbacks import on_failure, on_success
from ferry_airflow.check import CheckOperator
from ferry_airflow.choices import DEQUANTIZE_MODES, KEEP_ON_FAILURE, POLICIES, STAGED
from ferry_airflow.clean_up import CleanUpOperator
from ferry_airflow.convert import ConvertOperator
from ferry_airflow.dag import StagesDag, deadline
from ferry_airflow.dequantize import DequantizeOperator
from ferry_airflow.download import DownloadOperator
from ferry_airflow.finalize import FinalizeOperator
from ferry_airflow.form import MODEL_NAMES, REPOSITORIES, target_params
from ferry_airflow.publish import PublishOperator
from ferry_airflow.resolve import ResolveOperator
from ferry_airflow.retries import stage_defaults

PUBLISHED = AssetAlias("ferry_published")
DOWNLOAD_POOL, MEMORY_POOL = "hub_download", "high_memory"
"""Made when the scheduler starts, or by `python -m ferry_airflow.setup.pools`."""

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
        description_md="`gs://bucket/prefix` or an absolute directory. The checkpoint goes to "
        "`<model>/<commit>/<target>/` under it.",
    )


TARGET = target_params(LAYOUT)
PARAMS = {
    "repo": Param(
        type="string",
        pattern=r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*|/.+)$",
        section=SOURCE,
        title="Repository",
        examples=REPOSITORIES,
        description_md="Hub repository such as `deepseek-ai/DeepSeek-V3`, or the absolute path of a directory that "
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
        examples=MODEL_NAMES,
        description_md="As `ferry models` lists it, such as `deepseek3-671b`. Empty: told by the repository's config.",
    ),
    **TARGET,
    "dequantize": Param(
        STAGED,
        type="string",
        enum=list(DEQUANTIZE_MODES),
        values_display=DEQUANTIZE_MODES,
        section=RUN,
        title="Dequantize",
        description="For fp8 sources; the bits are the same. Others are passed on as they are.",
    ),
    "parts": Param(
        1,
        type="integer",
        minimum=1,
        maximum=256,
        section=RUN,
        title="Parts",
        description="Number of tasks to split the conversion into. They run at the same time where there are workers "
        "for them; all need to see one working directory. The bits are the same.",
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
    "approval": Param(
        False,
        type="boolean",
        section=RUN,
        title="Approval",
        description="A person has to approve between check and publish, under Required Actions.",
    ),
    "keep_files": Param(
        KEEP_ON_FAILURE,
        type="string",
        enum=list(POLICIES),
        values_display=POLICIES,
        section=RUN,
        title="Keep files",
        description="What the run leaves on the workers' disk.",
    ),
    "destination": destination_param(),
}

APPROVAL_BODY = """
{%- set check = ti.xcom_pull("check") or {} %}
| | |
| --- | --- |
| repository | {{ params.repo }} at {{ check.get("commit") }} |
| target | {{ check.get("target") }} |
| verdict | **{{ check.get("verdict") }}** |
| largest KL of a token | {{ check.get("max_kl") }} nats |
| share of tokens with the same first choice | {{ check.get("top1") }} |
| report | {{ check.get("report") }} |
| to be published to | {{ params.destination }} |
"""


@stage(task_id="split", retries=0)
def split(parts: int) -> list[str]:
    """The parts of the conversion, one for each mapped task."""
    return [f"{index}/{parts}" for index in range(parts)]


with StagesDag(
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
    deadline=deadline(),
    on_success_callback=on_success,
    on_failure_callback=on_failure,
    default_args=stage_defaults(),
) as dag:
    hub = {"hf_conn_id": os.environ.get("FERRY_HF_CONN_ID") or None}
    target = {name: dag.param(name) for name in TARGET}

    resolve = ResolveOperator(
        task_id="resolve",
        repo=dag.param("repo"),
        revision=dag.param("revision"),
        model_name=dag.param("model_name"),
        dequantize=dag.param("dequantize"),
        destination=dag.param("destination"),
        **target,
        **hub,
    )
    download = DownloadOperator(task_id="download", source=resolve.output, pool=DOWNLOAD_POOL, **hub)
    dequantize = DequantizeOperator(
        task_id="dequantize", source=download.output, mode=dag.param("dequantize"), pool=MEMORY_POOL
    )
    parts = split(dag.param("parts"))
    convert = ConvertOperator.partial(
        task_id="convert",
        source=dequantize.output,
        model_name=dag.param("model_name"),
        pool=MEMORY_POOL,
        map_index_template="part {{ task.part }}",
        **target,
    ).expand(part=parts)
    finalize = FinalizeOperator(task_id="finalize", parts=convert.output)
    check = CheckOperator(
        task_id="check",
        checkpoint=finalize.output,
        reference=dequantize.output,  # in bf16 where staged; of an fp8 source the check dequantizes for itself
        max_kl=dag.param("max_kl"),
        pool=MEMORY_POOL,
    )
    approval = OptionalApprovalOperator(
        task_id="approval",
        wanted=dag.param("approval"),
        subject="Publish {{ params.repo }} for MaxText?",
        body=APPROVAL_BODY,
    )
    publish = PublishOperator(
        task_id="publish",
        checkpoint=check.output,
        destination=dag.param("destination"),
        outlets=[PUBLISHED],
        # the approval may be skipped; the check may not
        trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
    )
    clean_up = CleanUpOperator(
        task_id="clean_up",
        source=resolve.output,
        published=publish.output,
        keep_files=dag.param("keep_files"),
        **target,
    ).as_teardown()

    resolve >> parts
    resolve >> download >> dequantize >> convert >> finalize >> check >> approval >> publish >> clean_up
    check >> publish
