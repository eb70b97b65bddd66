"""Each stage's command line, manifest and failure, as Airflow would see them."""

import inspect
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from conversion_lib.errors import BadInput, OutsideFailure
from operators.base import OutputLink, StageOperator
from operators.check import CheckOperator
from operators.convert import ConvertOperator
from operators.dequantize import DequantizeOperator
from operators.download import DownloadOperator
from operators.layout import save_manifest
from operators.publish import PublishOperator
from operators.resolve import ResolveOperator

STAGES = (ResolveOperator, DownloadOperator, DequantizeOperator, ConvertOperator, CheckOperator, PublishOperator)


class RecordingPlace:
    """Answers with a set result; remembers what it was asked to run."""

    def __init__(self, **result):
        self.result = {"seconds": 2.0, "bytes_in": 10, "bytes_out": 20, "peak_bytes": 30, "layers": [1, 2], **result}
        self.arguments, self.secrets, self.killed = None, None, False

    def run(self, arguments, secrets, log):
        self.arguments, self.secrets = list(arguments), dict(secrets)
        return self.result

    def kill(self):
        self.killed = True


@pytest.fixture
def source(work_dir, tmp_path):
    """The manifest of a downloaded fp8 checkpoint."""
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    return {"repo": "acme/tiny", "commit": "c0ffee", "path": str(path), "work_dir": "/w"}


def test_download(context, source):
    place = RecordingPlace(path="/w/hf", files=9, bytes=20, bytes_downloaded=5)
    manifest = DownloadOperator(task_id="t", source=source, place=place).execute(context)
    assert place.arguments == ["download", "acme/tiny", source["path"], "--revision", "c0ffee", "--json"]
    assert manifest == {
        "stage": "download",
        "path": "/w/hf",
        "files": 9,
        "bytes": 20,
        "bytes_downloaded": 5,
        "repo": "acme/tiny",
        "commit": "c0ffee",
        "work_dir": "/w",
        "seconds": 2.0,
        "bytes_in": 10,
        "bytes_out": 20,
        "peak_bytes": 30,
    }


def test_download_passes_a_directory_on(context, source):
    place = RecordingPlace()
    manifest = DownloadOperator(task_id="t", source={**source, "commit": None}, place=place).execute(context)
    assert place.arguments is None
    assert manifest["path"] == source["path"]
    assert manifest["commit"] is None


def test_dequantize(context, source):
    place = RecordingPlace(path="/w/bf16", fingerprint="f", already=True)
    manifest = DequantizeOperator(task_id="t", source=source, place=place).execute(context)
    assert place.arguments == ["dequantize", source["path"], "/w/bf16", "--json"]
    assert (manifest["path"], manifest["already"], manifest["skipped"]) == ("/w/bf16", True, False)


@pytest.mark.parametrize(("mode", "config"), [("fused", {"quantization_config": {}}), ("staged", {})])
def test_dequantize_passes_on(context, source, tmp_path, mode, config):
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    place = RecordingPlace()
    manifest = DequantizeOperator(task_id="t", source=source, mode=mode, place=place).execute(context)
    assert place.arguments is None
    assert (manifest["path"], manifest["skipped"]) == (source["path"], True)


def test_convert(context, source):
    place = RecordingPlace(path="/w/x", fingerprint="f", pieces=4, pieces_skipped=1, already=False)
    manifest = ConvertOperator(task_id="t", source=source, place=place).execute(context)
    slug = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
    options = "--scan-layers --save-dtype bfloat16 --ocdbt --zarr3 --maxtext 0.2.5 --json"
    assert place.arguments == ["convert", source["path"], f"/w/{slug}", *options.split()]
    assert manifest["target"] == slug
    assert manifest["pieces_skipped"] == 1
    assert manifest["commit"] == "c0ffee"


def test_convert_with_everything_else(context):
    place = RecordingPlace(path="/out")
    other = {"scan_layers": False, "save_dtype": "float32", "ocdbt": False, "zarr3": False, "maxtext": "main"}
    operator = ConvertOperator(
        task_id="t", source="/data/hf", destination="/out", model_name="qwen3-0.6b", place=place, **other
    )
    operator.execute(context)
    options = "--model qwen3-0.6b --no-scan-layers --save-dtype float32 --no-ocdbt --no-zarr3 --maxtext main --json"
    assert place.arguments == ["convert", "/data/hf", "/out", *options.split()]


@pytest.mark.parametrize("wrong", [{"save_dtype": "float8_e4m3fn"}, {"maxtext": "0.1"}, {"ocdbt": "perhaps"}])
def test_convert_refuses_a_wrong_target(context, source, wrong):
    place = RecordingPlace()
    with pytest.raises(AirflowFailException, match=next(iter(wrong))):
        ConvertOperator(task_id="t", source=source, place=place, **wrong).execute(context)
    assert place.arguments is None


def test_a_path_needs_a_destination(context):
    with pytest.raises(AirflowFailException, match="needs a destination"):
        ConvertOperator(task_id="t", source="/data/hf", place=RecordingPlace()).execute(context)


def test_check_leaves_the_threshold_to_ferry(context, source):
    place = RecordingPlace(verdict="pass", max_kl=1e-9, digest="d", report="/w/x/report/report.html")
    CheckOperator(task_id="t", checkpoint={**source, "path": "/w/x"}, reference=source, place=place).execute(context)
    assert place.arguments == ["check", "/w/x", "--reference", source["path"], "--report", "/w/x/report", "--json"]


def test_check(context, source):
    place = RecordingPlace(verdict="pass", max_kl=1e-9, digest="d", report="/w/x/report/report.html")
    checkpoint = {**source, "path": "/w/x"}
    operator = CheckOperator(task_id="t", checkpoint=checkpoint, reference=source, max_kl=1e-6, place=place)
    manifest = operator.execute(context)
    options = ["--reference", source["path"], "--report", "/w/x/report", "--max-kl", "1e-06", "--json"]
    assert place.arguments == ["check", "/w/x", *options]
    assert manifest["path"] == "/w/x"
    assert "layers" not in manifest  # manifests are small
    assert manifest["report_dir"] == "/w/x/report"
    assert OutputLink().get_link(operator, ti_key=None) == "file:///w/x/report/report.html"


@pytest.mark.parametrize(
    ("url", "link"),
    [
        ("gs://models/ds/c", "https://console.cloud.google.com/storage/browser/models/ds/c"),
        ("/models/ds/c", "file:///models/ds/c"),
    ],
)
def test_publish(context, source, url, link):
    place = RecordingPlace(url=url, files=3, bytes=20, digest="d")
    operator = PublishOperator(
        task_id="t", checkpoint={**source, "path": "/w/x", "report_dir": "/w/r"}, destination="gs://models", place=place
    )
    manifest = operator.execute(context)
    assert place.arguments == ["publish", "/w/x", "gs://models", "--report", "/w/r", "--json"]
    assert manifest["url"] == url
    assert OutputLink().get_link(operator, ti_key=None) == link


class FakeHub(ModuleType):
    """Stands in for conversion_lib.hub, which is tested by itself."""

    def __init__(self, answer):
        super().__init__("conversion_lib.hub")
        self.answer, self.token = answer, None

    def resolve(self, repo, revision, reporter):
        reporter.say("asking")
        self.token = os.environ.get("HF_TOKEN")
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(repo=repo, commit=self.answer, files=["a", "b"])


def test_resolve_pins_the_commit(context, work_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "conversion_lib.hub", FakeHub("c0ffee"))
    manifest = ResolveOperator(task_id="t", repo="acme/tiny").execute(context)
    assert manifest["commit"] == "c0ffee"
    assert manifest["work_dir"] == str(work_dir / "acme--tiny" / "c0ffee")
    assert manifest["path"] == manifest["work_dir"] + "/hf"
    assert manifest["files"] == 2


@pytest.mark.parametrize(
    ("error", "kind"), [(BadInput("no repository"), AirflowFailException), (OutsideFailure("503"), AirflowException)]
)
def test_resolve_tells_wrong_from_unreachable(context, monkeypatch, error, kind):
    monkeypatch.setitem(sys.modules, "conversion_lib.hub", FakeHub(error))
    with pytest.raises(AirflowException, match=str(error)) as caught:
        ResolveOperator(task_id="t", repo="acme/tiny").execute(context)
    assert caught.type is kind


def test_resolve_directory(context, source, work_dir):
    def resolve():
        return ResolveOperator(task_id="t", repo=source["path"]).execute(context)

    manifest = resolve()
    assert (manifest["commit"], manifest["path"]) == (None, source["path"])
    assert manifest["work_dir"].startswith(str(work_dir / "local" / "hf-"))
    assert resolve()["work_dir"] == manifest["work_dir"]
    with open(source["path"] + "/config.json", "a") as config:
        config.write(" ")
    assert resolve()["work_dir"] != manifest["work_dir"]  # another source now


def test_resolve_missing_directory(context, tmp_path):
    with pytest.raises(AirflowFailException, match="is not a directory"):
        ResolveOperator(task_id="t", repo=str(tmp_path / "none")).execute(context)


@pytest.mark.parametrize("code", [1, 2, 3, 143, 9])
def test_exit_codes(context, source, fake, work_dir, code):
    """Wrong input and a failed check are final, all else may be retried; the line and the figures stay."""
    place = fake("fail")
    operator = DownloadOperator(task_id="download", source=source, place=place)
    operator.ferry = lambda *_: place.run([str(code)], {}, operator.log)
    with pytest.raises(AirflowException, match=r"^ferry: model\.safetensors: no such tensor$") as caught:
        operator.execute(context)
    assert caught.type is (AirflowFailException if code in (1, 2) else AirflowException)
    saved = json.loads((work_dir / "runs" / "manual__1" / "download.json").read_text())
    assert saved["error"] == str(caught.value)
    assert (saved["exit_code"], saved["max_kl"]) == (code, 0.5)


def test_manifest_is_saved(context, source, work_dir):
    operator = DownloadOperator(task_id="download", source=source, place=RecordingPlace(path="/w/hf"))
    manifest = operator.execute(context)
    assert json.loads((work_dir / "runs" / "manual__1" / "download.json").read_text()) == manifest
    context["ti"].map_index = 0
    operator.execute(context)
    assert (work_dir / "runs" / "manual__1" / "download-0.json").exists()


def test_saving_stays_in_its_directory(work_dir):
    assert save_manifest("../../x", "t", {}).parent.parent == work_dir / "runs"


def test_on_kill_reaches_the_place(source):
    place = RecordingPlace()
    DownloadOperator(task_id="t", source=source, place=place).on_kill()
    assert place.killed


class TestToken:
    """The Hub token goes through the environment, and nowhere else."""

    def test_of_the_environment(self, context, source, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_inherited")
        place = RecordingPlace(path="/w/hf")
        manifest = DownloadOperator(task_id="t", source=source, place=place).execute(context)
        assert place.secrets == {"HF_TOKEN": "hf_inherited"}
        assert "hf_inherited" not in str(place.arguments) + str(manifest)

    def test_of_a_connection(self, context, source, fake, monkeypatch, work_dir, capfd):
        monkeypatch.setenv("AIRFLOW_CONN_HUB", '{"conn_type": "http", "password": "hf_connected"}')
        seen = []
        place = fake("echo")
        operator = DownloadOperator(task_id="t", source=source, place=place, hf_conn_id="hub")
        run = place.run
        place.run = lambda *arguments: seen.append(run(*arguments)) or {"path": "/w/hf", **seen[0]}
        manifest = operator.execute(context)
        assert seen[0]["environment"]["HF_TOKEN"] == "hf_connected"
        rendered = str([getattr(operator, name) for name in operator.template_fields])
        written = "".join(path.read_text() for path in work_dir.rglob("*.json"))
        assert "hf_connected" not in str(manifest) + rendered + written + str(seen[0]["arguments"])
        assert "hf_connected" not in "".join(capfd.readouterr())

    def test_for_work_in_this_process(self, context, monkeypatch):
        hub = FakeHub("c0ffee")
        monkeypatch.setitem(sys.modules, "conversion_lib.hub", hub)
        monkeypatch.setenv("AIRFLOW_CONN_HUB", '{"conn_type": "http", "password": "hf_connected"}')
        ResolveOperator(task_id="t", repo="acme/tiny", hf_conn_id="hub").execute(context)
        assert hub.token == "hf_connected"
        assert "HF_TOKEN" not in os.environ


@pytest.mark.parametrize("operator", STAGES, ids=lambda operator: operator.stage)
def test_docstrings_name_every_parameter(operator):
    names = [n for n, p in inspect.signature(operator.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert "task_id" not in names and len(names) >= 1
    missing = [name for name in names if f":param {name}:" not in operator.__doc__]
    assert not missing
    assert set(operator.template_fields) <= {*names}
    assert issubclass(operator, StageOperator)
