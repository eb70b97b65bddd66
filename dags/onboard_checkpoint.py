"""Converts a Hugging Face checkpoint to MaxText, checks it and publishes it.

- **resolve** pins the commit of the revision and plans the run.
- **download** downloads it. **dequantize** writes quantized weights in bf16.
- **convert** converts it in `parts`. **finalize** merges the parts.
- **check** compares the logits with the original's.
- **approval** waits for a person, if the run asks for it.
- **publish** copies the checkpoint to the destination. **clean_up** removes files from the workers' disk.

The manifest of each stage is its XCom: bytes, seconds, peak memory. If a run stops, clear the failed task or start the
run again: it resumes where the last one stopped. A checkpoint that is already published and checked is not converted
again. Wrong input and a failed check fail at once. Outages are retried, with growing waits. Publishing updates the
model's Asset, `<destination>/<model>`, through the alias `ferry_published`.

| setting (environment) | read by | meaning |
| --- | --- | --- |
| `FERRY_WORK_DIR` | workers | where the stages keep their files; default `~/ferry-work`; all workers share it |
| `FERRY_EXECUTION` | workers | a YAML file that says where stages run, such as in Kubernetes; default: on the worker |
| `FERRY_DESTINATION` | DAG processor | default of the param `destination` |
| `FERRY_HF_CONN_ID` | DAG processor | Airflow connection whose password is the Hub token |
| `FERRY_DEADLINE_HOURS` | DAG processor | a run that takes longer is reported as late; default 24; 0 disables this |
| `FERRY_RETRY_SECONDS` | both | seconds before the first retry; default 30 |
| `FERRY_WAIT_HOURS` | workers | how long a stage waits for another run at the same place; default 24 |
| `FERRY_ON_SUCCESS`, `FERRY_ON_FAILURE` | DAG processor | called when a run has ended: `package.module:function` |
| `FERRY_ON_DEADLINE` | triggerer | called when a run is late: `package.module:function` |
| `HF_ENDPOINT`, `HF_TOKEN` | workers | another Hub; the token, if there is no connection |
"""

from __future__ import annotations

import os
from typing import Any

from airflow.sdk import AssetAlias, Param, TriggerRule
from airflow.sdk import task as stage

from ferry_airflow.approval import OptionalApprovalOperator
from ferry_airflow.callbacks import on_failure, on_success
from ferry_airflow.check import CheckOperator
from ferry_airflow.choices import DEQUANTIZE_MODES, KEEP_ON_FAILURE, OVERWRITE, POLICIES, STAGED
from ferry_airflow.clean_up import CleanUpOperator
from ferry_airflow.convert import ConvertOperator
from ferry_airflow.dag import StagesDag, deadline
from ferry_airflow.dequantize import DequantizeOperator
from ferry_airflow.download import DownloadOperator
from ferry_airflow.finalize import FinalizeOperator
from ferry_airflow.form import MODEL_NAMES, REPOSITORIES, max_model_kl_param, target_params
from ferry_airflow.links import report_of, tab_of
from ferry_airflow.publish import PublishOperator
from ferry_airflow.resolve import ResolveOperator
from ferry_airflow.retries import stage_defaults

PUBLISHED = AssetAlias("ferry_published")
DOWNLOAD_POOL, MEMORY_POOL = "hub_download", "high_memory"
"""Created when Airflow starts, or by `python -m ferry_airflow.setup.pools`."""

SOURCE, LAYOUT, RUN = "Source", "What to write", "How to run"


def destination_param() -> Param:
    """The param `destination`. Required, unless the environment has a default."""
    default: dict[str, Any] = {}
    if os.environ.get("FERRY_DESTINATION"):
        default["default"] = os.environ["FERRY_DESTINATION"]
    return Param(
        **default,
        type="string",
        pattern="^(gs://[^/]+|/.).*$",
        section=RUN,
        title="Destination",
        description_md="`gs://bucket/prefix` or an absolute directory. The checkpoint is published to "
        "`<destination>/<model>/<commit>/<target>/`.",
    )


TARGET = target_params(LAYOUT)
PARAMS = {
    "repo": Param(
        type="string",
        pattern=r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*|/.+)$",
        section=SOURCE,
        title="Repository",
        examples=REPOSITORIES,
        description_md="Hub repository such as `deepseek-ai/DeepSeek-V3`, or an absolute directory that the workers "
        "can read.",
    ),
    "revision": Param(
        "main",
        type="string",
        minLength=1,
        section=SOURCE,
        title="Revision",
        description="Branch, tag or commit. The whole run uses the commit that it has at the start. Ignored for a "
        "directory.",
    ),
    "model_name": Param(
        None,
        type=["null", "string"],
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        section=SOURCE,
        title="Model name",
        examples=MODEL_NAMES,
        description_md="A name that `ferry models` lists, such as `deepseek3-671b`. Empty: found from the config.",
    ),
    **TARGET,
    "dequantize": Param(
        STAGED,
        type="string",
        enum=list(DEQUANTIZE_MODES),
        values_display=DEQUANTIZE_MODES,
        section=RUN,
        title="Dequantize",
        description="For quantized sources only. Both give the same bits.",
    ),
    "parts": Param(
        1,
        type="integer",
        minimum=1,
        maximum=256,
        section=RUN,
        title="Parts",
        description="Number of tasks to split the conversion into. They run at the same time if there are enough "
        "workers. All workers must share the working directory. The bits are the same.",
    ),
    "max_kl": Param(
        None,
        type=["null", "number"],
        exclusiveMinimum=0,
        section=RUN,
        title="Largest KL",
        description="The check fails if any token's Kullback-Leibler divergence, in nats, is larger. Empty: 1e-5, or "
        "more if the conversion rounds or the model has delta nets. The check measures how much.",
    ),
    "max_model_kl": max_model_kl_param(RUN),
    "approval": Param(
        False,
        type="boolean",
        section=RUN,
        title="Approval",
        description="After the check, a person must approve publishing, under Required Actions.",
    ),
    "keep_files": Param(
        KEEP_ON_FAILURE,
        type="string",
        enum=list(POLICIES),
        values_display=POLICIES,
        section=RUN,
        title="Keep files",
        description="Which files stay on the workers' disk after the run.",
    ),
    "overwrite": Param(
        None,
        type=["null", "string"],
        enum=[None, *OVERWRITE],
        values_display=OVERWRITE,
        section=RUN,
        title="Overwrite",
        description="Stage from which on earlier results on the workers' disk are not used. Empty: all are used. What "
        "is published stays.",
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
| MaxText's model | {{ check.get("model", {}).get("differs") or "computes what the original does" }} |
| largest KL that this makes | {{ check.get("model", {}).get("max_kl") }} nats |
| share of tokens with the same first choice | {{ check.get("top1") }} |
| report | [alone]({{ report_of(dag.dag_id, run_id) }}), or [with the stages]({{ tab_of(dag.dag_id, run_id) }}) |
| destination | {{ params.destination }} |
"""


@stage(task_id="split", retries=0)
def split(parts: int) -> list[str]:
    """Returns the parts of the conversion, one for each mapped task."""
    return [f"{index}/{parts}" for index in range(parts)]


with StagesDag(
    "onboard_checkpoint",
    description="Hugging Face checkpoint to MaxText: download, dequantize, convert, check, publish",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    # The runs share a worker's disk and memory. Two runs of one source do not harm each other: ferry locks what it
    # writes, and the second waits, deferred.
    max_active_runs=4,
    params=PARAMS,
    tags=["ferry", "maxtext"],
    deadline=deadline(),
    on_success_callback=on_success,
    on_failure_callback=on_failure,
    default_args=stage_defaults(),
    user_defined_macros={"report_of": report_of, "tab_of": tab_of},
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
        overwrite=dag.param("overwrite"),
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
        reference=dequantize.output,  # bf16 if staged; the check dequantizes a quantized source itself
        max_kl=dag.param("max_kl"),
        max_model_kl=dag.param("max_model_kl"),
        destination=dag.param("destination"),
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
