"""Each stage's command line, manifest and failure, as Airflow would see them."""

import inspect
import json
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from airflow.providers.standard.exceptions import HITLRejectException
from airflow.sdk import Asset, AssetAlias, BaseHook
from airflow.sdk.definitions.retry_policy import RetryAction
from airflow.sdk.exceptions import AirflowNotFoundException, AirflowSkipException

from conversion_lib.errors import BadInput, CheckFailed, OutsideFailure, Terminated
from conversion_lib.record import CHOSEN_FIELDS, Target
from ferry_airflow.approval import OptionalApprovalOperator
from ferry_airflow.base import OutputLink, StageOperator
from ferry_airflow.check import CheckOperator
from ferry_airflow.clean_up import CleanUpOperator
from ferry_airflow.convert import ConvertOperator
from ferry_airflow.dequantize import DequantizeOperator
from ferry_airflow.download import DownloadOperator
from ferry_airflow.execution.base import ExecutionMode
from ferry_airflow.export import ExportOperator
from ferry_airflow.finalize import FinalizeOperator
from ferry_airflow.layout import run_report, save_manifest
from ferry_airflow.publish import PublishOperator
from ferry_airflow.resolve import ResolveOperator
from ferry_airflow.target import TargetOperator
from ferry_airflow.upload import UploadOperator

KEY = SimpleNamespace(dag_id="onboard", run_id="manual__1+00:00")
TAB = "/dags/onboard/runs/manual__1%2B00%3A00/plugin/ferry"
STAGES = (
    *(ResolveOperator, DownloadOperator, DequantizeOperator, ConvertOperator, FinalizeOperator, CheckOperator),
    *(PublishOperator, CleanUpOperator, ExportOperator, UploadOperator),
)


class RecordingMode(ExecutionMode):
    """Answers with a set result; remembers what it was asked to run."""

    def __init__(self, **result):
        self.result = {"seconds": 2.0, "bytes_in": 10, "bytes_out": 20, "peak_bytes": 30, "layers": [1, 2], **result}
        self.arguments, self.secrets, self.killed, self.interrupt = None, None, False, lambda: None

    def run(self, command, secrets, task, log):
        self.arguments, self.secrets = list(command.arguments), dict(secrets)
        self.interrupt()
        return self.result

    def kill(self):
        self.killed = True


@pytest.fixture
def source():
    """The manifest of a downloaded fp8 checkpoint."""
    return {"repo": "acme/tiny", "commit": "c0ffee", "path": "/w/hf", "work_dir": "/w", "quantized": True}


TARGET_OPTIONS = "--scan-layers --save-dtype bfloat16 --ocdbt --zarr3 --maxtext 0.2.5"


def test_resolve(context):
    plan = {"bytes_in": 1, "disk_bytes": 2}
    recorder = RecordingMode(repo="a/b", commit="c", path="/w/hf", work_dir="/w", published=None, plan=plan, model="b")
    manifest = ResolveOperator(task_id="t", repo="a/b", destination="/d", model_name="m", execution=recorder).execute(
        context
    )
    given = "resolve a/b --revision main --destination /d --run dag@manual__1 --dequantize staged --model m"
    assert recorder.arguments == [*given.split(), *TARGET_OPTIONS.split()]
    assert (manifest["commit"], manifest["plan"], manifest["published"]) == ("c", plan, None)


def test_download(context, source):
    recorder = RecordingMode(path="/w/hf", files=9, bytes=20, bytes_downloaded=5)
    manifest = DownloadOperator(task_id="t", source=source, execution=recorder).execute(context)
    assert recorder.arguments == ["download", "acme/tiny", "/w/hf", "--revision", "c0ffee"]
    figures = {"files": 9, "bytes": 20, "bytes_downloaded": 5, "seconds": 2.0, "bytes_in": 10, "bytes_out": 20}
    assert manifest == {"stage": "download", **source, **figures, "peak_bytes": 30}


def test_download_passes_a_directory_on(context, source):
    recorder = RecordingMode()
    manifest = DownloadOperator(task_id="t", source={**source, "commit": None}, execution=recorder).execute(context)
    assert recorder.arguments is None
    assert (manifest["path"], manifest["commit"]) == (source["path"], None)


def test_download_skips_what_is_published(context, source):
    with pytest.raises(AirflowSkipException, match=r"nothing to do: gs://models/x$"):
        DownloadOperator(task_id="t", source={**source, "published": "gs://models/x"}).execute(context)


def test_dequantize(context, source):
    recorder = RecordingMode(path="/w/bf16", fingerprint="f", already=True)
    manifest = DequantizeOperator(task_id="t", source=source, execution=recorder).execute(context)
    assert recorder.arguments == ["dequantize", source["path"], "/w/bf16"]
    assert (manifest["path"], manifest["already"], manifest["skipped"]) == ("/w/bf16", True, False)


@pytest.mark.parametrize(("mode", "quantized"), [("fused", True), ("staged", False)])
def test_dequantize_passes_on(context, source, mode, quantized):
    recorder = RecordingMode()
    operator = DequantizeOperator(task_id="t", source={**source, "quantized": quantized}, mode=mode, execution=recorder)
    manifest = operator.execute(context)
    assert recorder.arguments is None
    assert (manifest["path"], manifest["skipped"]) == (source["path"], True)


def test_convert(context, source):
    recorder = RecordingMode(path="/w/x", fingerprint="f", pieces=4, pieces_skipped=1, already=False)
    manifest = ConvertOperator(task_id="t", source=source, execution=recorder).execute(context)
    slug = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
    assert recorder.arguments == ["convert", source["path"], f"/w/{slug}", *TARGET_OPTIONS.split()]
    assert (manifest["target"], manifest["pieces_skipped"], manifest["commit"]) == (slug, 1, "c0ffee")


@pytest.mark.parametrize(("part", "options"), [("0/1", []), ("2/4", ["--part", "2/4"])])
def test_convert_a_part(context, source, part, options):
    recorder = RecordingMode(path="/w/x")
    ConvertOperator(task_id="t", source=source, part=part, execution=recorder).execute(context)
    assert recorder.arguments[3:] == [*TARGET_OPTIONS.split(), *options]


def test_convert_with_everything_else(context):
    recorder = RecordingMode(path="/out")
    other = {"scan_layers": False, "save_dtype": "float32", "ocdbt": False, "zarr3": False, "maxtext": "main"}
    operator = ConvertOperator(
        task_id="t", source="/data/hf", destination="/out", model_name="qwen3-0.6b", execution=recorder, **other
    )
    operator.execute(context)
    options = "--model qwen3-0.6b --no-scan-layers --save-dtype float32 --no-ocdbt --no-zarr3 --maxtext main"
    assert recorder.arguments == ["convert", "/data/hf", "/out", *options.split()]


@pytest.mark.parametrize("wrong", [{"save_dtype": "float8_e4m3fn"}, {"maxtext": "0.1"}, {"ocdbt": "perhaps"}])
def test_convert_refuses_a_wrong_target(context, source, wrong):
    recorder = RecordingMode()
    with pytest.raises(BadInput, match=next(iter(wrong))):
        ConvertOperator(task_id="t", source=source, execution=recorder, **wrong).execute(context)
    assert recorder.arguments is None


def test_a_path_needs_a_destination(context):
    with pytest.raises(BadInput, match="needs a destination"):
        ConvertOperator(task_id="t", source="/data/hf", execution=RecordingMode()).execute(context)


def test_finalize(context, source):
    recorder = RecordingMode(path="/w/x", fingerprint="f", chunks=7, already=False)
    parts = [{**source, "path": "/w/x", "target": "scanned"} for _ in range(2)]
    manifest = FinalizeOperator(task_id="t", parts=iter(parts), execution=recorder)
    manifest.parts = parts  # what a mapped task's output is rendered to
    manifest = manifest.execute(context)
    assert recorder.arguments == ["finalize", "/w/x"]
    assert (manifest["parts"], manifest["chunks"], manifest["target"], manifest["commit"]) == (
        2,
        7,
        "scanned",
        "c0ffee",
    )


def test_finalize_refuses_parts_of_two_conversions(context):
    with pytest.raises(BadInput, match=r"\['/a', '/b'\]"):
        FinalizeOperator(task_id="t", parts=[{"path": "/a"}, {"path": "/b"}], execution=RecordingMode()).execute(
            context
        )


def test_check_leaves_the_threshold_to_ferry(context, source):
    recorder = RecordingMode(verdict="pass", max_kl=1e-9, digest="d", report="/w/x/report/report.html")
    CheckOperator(task_id="t", checkpoint={**source, "path": "/w/x"}, reference=source, execution=recorder).execute(
        context
    )
    options = ["--reference", source["path"], "--report", "/w/x/report", "--max-model-kl", "0.001"]
    assert recorder.arguments == ["check", "/w/x", *options]


def test_check(context, source):
    model = {"verdict": "pass", "max_kl": 1.5e-5, "threshold": 0.5, "differs": "RoPE factor 8", "settings": {}}
    recorder = RecordingMode(verdict="pass", model=model, max_kl=1e-9, digest="d", report="/w/x/report/report.html")
    checkpoint = {**source, "path": "/w/x", "target": "scanned"}
    limits = {"max_kl": 1e-6, "max_model_kl": 0.5}
    operator = CheckOperator(task_id="t", checkpoint=checkpoint, reference=source, **limits, execution=recorder)
    manifest = operator.execute(context)
    options = ["--reference", source["path"], "--report", "/w/x/report", "--max-kl", "1e-06", "--max-model-kl", "0.5"]
    assert recorder.arguments == ["check", "/w/x", *options]
    assert manifest["model"] == model
    assert "layers" not in manifest  # manifests are small
    assert (manifest["path"], manifest["report_dir"], manifest["target"]) == ("/w/x", "/w/x/report", "scanned")
    assert OutputLink().get_link(operator, ti_key=KEY) == TAB


@pytest.mark.parametrize(
    ("root", "link", "uri"),
    [
        ("gs://models/b", "https://console.cloud.google.com/storage/browser/models/b/m/c/t", "gs://models/b/m"),
        ("/models", TAB, "file:///models/m"),
    ],
)
def test_publish(context, source, root, link, uri):
    recorder = RecordingMode(url=f"{root}/m/c/t", files=3, bytes=20, digest="d")
    alias = AssetAlias("published")
    events = []

    class Accessor:
        def add(self, asset, extra):
            events.append((asset, extra))

    context["outlet_events"] = {alias: Accessor()}
    checked = {**source, "path": "/w/x", "report_dir": "/w/r", "verdict": "pass", "max_kl": 1e-9}
    operator = PublishOperator(task_id="t", checkpoint=checked, destination=root, execution=recorder, outlets=[alias])
    manifest = operator.execute(context)
    left = ["--run-report", run_report(root, operator.dag_id, "manual__1")]  # which publishing removes
    assert recorder.arguments == ["publish", "/w/x", root, "--report", "/w/r", *left]
    assert (manifest["url"], manifest["verdict"]) == (f"{root}/m/c/t", "pass")
    assert OutputLink().get_link(operator, ti_key=KEY) == link
    extra = {
        "url": f"{root}/m/c/t",
        "commit": "c",
        "target": "t",
        "verdict": "pass",
        "max_kl": 1e-9,
        "digest": "d",
        "model": None,
    }
    assert events == [(Asset(uri), extra)]


class TestApproval:
    @pytest.fixture
    def operator(self):
        return OptionalApprovalOperator(task_id="t", subject="Publish?", wanted=False)

    def test_is_skipped_where_nobody_asked_for_it(self, context, operator):
        with pytest.raises(AirflowSkipException):
            operator.execute(context)

    def test_rejection_fails_for_good(self, context, operator):
        answer = {"chosen_options": ["Reject"], "params_input": {}, "responded_by_user": {"id": "1", "name": "a"}}
        with pytest.raises(HITLRejectException) as rejected:
            operator.execute_complete(context, {**answer, "responded_at": datetime.now(UTC)})
        assert operator.retry_policy.evaluate(rejected.value, 1, 3).action is RetryAction.FAIL

    def test_anything_else_is_asked_again(self, operator):
        assert operator.retry_policy.evaluate(RuntimeError("died"), 1, 3).action is not RetryAction.FAIL


@pytest.mark.parametrize(("published", "ended"), [({"url": "gs://m"}, "--succeeded"), (None, "--failed")])
def test_clean_up(context, source, published, ended):
    recorder = RecordingMode(removed=["/w/bf16"], bytes_freed=5)
    operator = CleanUpOperator(task_id="t", source=source, published=published, keep_files="remove", execution=recorder)
    manifest = operator.execute(context)
    options = ["--run", "dag@manual__1", "--target", "scanned-bf16-ocdbt-zarr3-maxtext0.2.5", "--keep", "remove", ended]
    assert recorder.arguments == ["clean-up", "/w", *options]
    assert (manifest["removed"], manifest["bytes_freed"]) == (["/w/bf16"], 5)


@pytest.mark.parametrize("wrote_nothing", [None, {"published": "gs://models/m"}])
def test_clean_up_after_a_run_that_wrote_nothing(context, wrote_nothing):
    recorder = RecordingMode()
    operator = CleanUpOperator(task_id="t", source=wrote_nothing, published=None, execution=recorder)
    assert operator.execute(context)["removed"] == []
    assert recorder.arguments is None


def test_export_to_a_directory(context):
    recorder = RecordingMode(path="/out")
    operator = ExportOperator(task_id="t", checkpoint="/c", destination="/out", hf_config="/hf", execution=recorder)
    manifest = operator.execute(context)
    assert recorder.arguments == ["export", "/c", "/out", "--dtype", "bfloat16", "--hf-config", "/hf"]
    uploaded = UploadOperator(task_id="u", source=manifest, execution=RecordingMode()).execute(context)
    assert uploaded["url"] == "/out"


def test_export_to_the_hub(context, work_dir):
    def export():
        recorder = RecordingMode(path="/out")
        operator = ExportOperator(task_id="t", checkpoint="/c/x", destination="hf://acme/x", execution=recorder)
        return operator.execute(context), recorder.arguments

    manifest, arguments = export()
    assert arguments[2].startswith(str(work_dir / "exports" / "x-"))
    assert export()[1] == arguments  # a retry finds what is there
    recorder = RecordingMode(url="hf://acme/x", commit="c", files=3)
    operator = UploadOperator(task_id="u", source=manifest, private=False, message="m", execution=recorder)
    assert operator.execute(context)["commit"] == "c"
    assert recorder.arguments == ["upload", "/out", "hf://acme/x", "--public", "--message", "m"]
    assert OutputLink().get_link(operator, ti_key=KEY) == "https://huggingface.co/acme/x"


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, CheckFailed), (2, BadInput), (3, OutsideFailure), (143, Terminated), (9, OutsideFailure)],
)
def test_exit_codes(context, source, fake, work_dir, code, kind):
    """The type of the error says whether another try may help; the line and the figures stay."""
    operator = DownloadOperator(
        task_id="download", source={**source, "repo": str(code)}, execution=fake("fail_with_repo")
    )
    with pytest.raises(kind, match=r"^ferry: model\.safetensors: no such tensor$") as caught:
        operator.execute(context)
    saved = json.loads((work_dir / "runs" / "dag@manual__1" / "download.json").read_text())
    assert saved["error"] == str(caught.value)
    assert (saved["exit_code"], saved["max_kl"]) == (code, 0.5)
    assert {"stage": "download", "exit_code": code, "max_kl": 0.5}.items() <= context["ti"].pushed["failure"].items()


def test_manifest_is_saved(context, source, work_dir):
    operator = DownloadOperator(task_id="t", source=source, execution=RecordingMode(path="/w/hf"))
    manifest = operator.execute(context)
    assert json.loads((work_dir / "runs" / "dag@manual__1" / "t.json").read_text()) == manifest
    context["ti"].map_index = 0
    operator.execute(context)
    assert (work_dir / "runs" / "dag@manual__1" / "t-0.json").exists()


def test_runs_of_two_dags_are_two(context, source, work_dir):
    """Scheduled runs of two DAGs have one id."""
    given = []
    for dag_id in ("daily", "nightly"):
        context["ti"].dag_id = dag_id
        recorder = RecordingMode(removed=[], bytes_freed=0)
        CleanUpOperator(task_id="t", source=source, published=None, execution=recorder).execute(context)
        given.append(recorder.arguments[recorder.arguments.index("--run") + 1])
    assert given == ["daily@manual__1", "nightly@manual__1"]
    assert {path.name for path in (work_dir / "runs").iterdir()} == set(given)


def test_saving_stays_in_its_directory(work_dir):
    assert save_manifest("../../x", "t", {}).parent.parent == work_dir / "runs"


def test_on_kill_reaches_the_place_that_works(context, source):
    recorder = RecordingMode(path="/w/hf")
    operator = DownloadOperator(task_id="t", source=source, execution=recorder)
    operator.on_kill()
    assert not recorder.killed  # nothing has begun
    recorder.interrupt = operator.on_kill
    operator.execute(context)
    assert recorder.killed


class TestToken:
    """The Hub token goes through the environment, and nowhere else."""

    def test_of_the_environment(self, context, source, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_inherited")
        recorder = RecordingMode(path="/w/hf")
        manifest = DownloadOperator(task_id="t", source=source, execution=recorder).execute(context)
        assert recorder.secrets == {"HF_TOKEN": "hf_inherited"}
        assert "hf_inherited" not in str(recorder.arguments) + str(manifest)

    def test_of_a_connection(self, context, source, fake, monkeypatch, work_dir, capfd):
        monkeypatch.setenv("AIRFLOW_CONN_HUB", '{"conn_type": "http", "password": "hf_connected"}')
        seen = []
        recorder = fake("echo")
        operator = DownloadOperator(task_id="t", source=source, execution=recorder, hf_conn_id="hub")
        run = recorder.run
        recorder.run = lambda *arguments: seen.append(run(*arguments)) or {"path": "/w/hf", **seen[0]}
        manifest = operator.execute(context)
        assert seen[0]["environment"]["HF_TOKEN"] == "hf_connected"
        rendered = str([getattr(operator, name) for name in operator.template_fields])
        written = "".join(path.read_text() for path in work_dir.rglob("*.json"))
        assert "hf_connected" not in str(manifest) + rendered + written + str(seen[0]["arguments"])
        assert "hf_connected" not in "".join(capfd.readouterr())

    def test_of_a_connection_that_there_is_not(self, context, source, monkeypatch):
        """It is not tried again, and the worker's own token does not go in its place."""
        monkeypatch.setenv("HF_TOKEN", "hf_inherited")
        monkeypatch.setattr(BaseHook, "get_connection", _no_connection)
        recorder = RecordingMode(path="/w/hf")
        with pytest.raises(BadInput, match="no Airflow connection hub"):
            DownloadOperator(task_id="t", source=source, execution=recorder, hf_conn_id="hub").execute(context)
        assert recorder.secrets is None


def _no_connection(conn_id):
    raise AirflowNotFoundException(f"The conn_id `{conn_id}` isn't defined")


@pytest.mark.parametrize("operator", STAGES, ids=lambda operator: operator.stage)
def test_docstrings_name_every_parameter(operator):
    names = parameters(operator)
    assert "task_id" not in names and len(names) >= 1
    missing = [name for name in (*names, "execution", "hf_conn_id") if f":param {name}:" not in operator.__doc__]
    assert not missing
    inherited = parameters(TargetOperator) if issubclass(operator, TargetOperator) else []
    assert not inherited or "are as in TargetOperator." in operator.__doc__
    assert all(f"`{name}`" in operator.__doc__ for name in inherited)
    assert set(operator.template_fields) <= {*names, *inherited}
    assert issubclass(operator, StageOperator)


def parameters(operator):
    """The parameters that a class adds to those of its base."""
    return [n for n, p in inspect.signature(operator.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY]


def test_parameters_of_a_target_are_its_fields():
    """They are written out for Airflow, which reads signatures, and for editors: nowhere but once."""
    taken = inspect.signature(TargetOperator.__init__).parameters
    assert tuple(parameters(TargetOperator)) == CHOSEN_FIELDS == TargetOperator.template_fields
    assert {name: taken[name].default for name in CHOSEN_FIELDS} == Target().model_dump(include={*CHOSEN_FIELDS})
    assert all(f":param {name}:" in TargetOperator.__doc__ for name in CHOSEN_FIELDS)
