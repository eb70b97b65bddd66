"""The whole DAG with the real ferry: a small fp8 DeepSeek-V3 from a Hub to a published MaxText checkpoint.

The repository is gated, so that every run needs the token, and the token can be looked for where it must not be.
"""

import json
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from conversion_lib.demo.local_hub import Faults, LocalHub
from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3
from tests.support.airflow.onboarding import Onboarding, manifests
from tests.support.buckets import upload
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.fakes.hub_uploads import UploadHub

REPO, OPEN_REPO = "acme/tiny-deepseek-v3", "acme/open"
TOKEN = "hf_thisMustNotBeSeenAnywhere"
pytestmark = pytest.mark.timeout(1200)  # of a machine that has other work

STAGES = ["resolve", "download", "dequantize", "convert-0", "convert-1", "finalize", "check", "publish", "clean_up"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("onboarding")


@pytest.fixture(scope="module")
def hub(directory):
    path = make_tiny_deepseek_v3(directory / "source")
    with LocalHub({REPO: path, OPEN_REPO: path}, faults=Faults(gated={REPO: TOKEN})) as hub:
        yield hub


@pytest.fixture(scope="module")
def onboarding(airflow_home, directory, hub):
    environment = {"FERRY_WORK_DIR": str(directory / "work"), "HF_HOME": str(directory / "hf-home")}
    onboarding = Onboarding(airflow_home, directory, environment)
    connection = json.dumps({"conn_type": "http", "password": TOKEN})
    own = {"FERRY_HF_CONN_ID": "hub", "AIRFLOW_CONN_HUB": connection, "HF_ENDPOINT": hub.endpoint}
    onboarding.environment = own
    yield onboarding
    onboarding.close()


@pytest.fixture(scope="module")
def conf(directory):
    return {"repo": REPO, "destination": str(directory / "published"), "parts": 2}


@contextmanager
def process_list():
    """Every command line that there was meanwhile, looked at a hundred times a second."""
    seen, stopped = set(), threading.Event()

    def look():
        while not stopped.wait(0.01):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(process.read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


@pytest.fixture(scope="module")
def first(onboarding, conf):
    """The first run; `log` and `command_lines` are what was to be seen of it."""
    with process_list() as command_lines:
        answer = onboarding.run(conf)
    assert answer["state"] == "success", onboarding.log[-8000:]
    return {**answer, "log": onboarding.log, "command_lines": command_lines}


@pytest.fixture(scope="module")
def second(onboarding, conf, first, hub):
    hub.requests.clear()
    answer = onboarding.run(conf)
    assert answer["state"] == "success", onboarding.log[-8000:]
    return answer


def test_every_stage_leaves_a_manifest(first, hub):
    left = manifests(first)
    stages = {name: manifest for name, manifest in left.items() if name in STAGES}
    assert sorted(stages) == sorted(STAGES)
    for name, manifest in stages.items():
        assert manifest["stage"] == name.split("-")[0]
        assert manifest["commit"] == hub.repos[REPO].commit
        assert manifest["seconds"] >= 0
        assert manifest["peak_bytes"] > 0
        assert len(json.dumps(manifest)) < 2000
    for stage in ("download", "dequantize", "convert-0", "convert-1", "publish"):
        assert left[stage]["bytes_in"] > 0
        assert left[stage]["bytes_out"] > 0
    assert left["check"]["verdict"] == "pass"
    assert left["check"]["max_kl"] < 1e-5
    assert left["publish"]["digest"] == left["check"]["digest"]


def test_plan_is_told(first):
    plan, converted = manifests(first)["resolve"]["plan"], manifests(first)
    assert plan["bytes_out"] == converted["convert-0"]["bytes_out"] + converted["convert-1"]["bytes_out"]
    assert plan["disk_bytes"] < plan["free_bytes"]
    assert "plan: acme--tiny-deepseek-v3 (deepseek_v3)" in first["log"]


def test_only_the_download_stays(first):
    work = Path(manifests(first)["resolve"]["work_dir"])
    assert [path.name for path in work.iterdir() if not path.name.startswith(".")] == ["hf"]


def test_checkpoint_is_published_with_what_belongs_to_it(first, directory, hub):
    published = Path(manifests(first)["publish"]["url"])
    expected = directory / "published" / "acme--tiny-deepseek-v3" / hub.repos[REPO].commit
    assert published == expected / "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
    for name in ("0/items/_METADATA", "manifest.json", "provenance.json", "report/report.html"):
        assert (published / name).is_file(), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (published / "hf" / name).is_file(), name
    assert "quantization_config" not in (published / "hf" / "config.json").read_text()


def test_log_has_the_commands_lines(first):
    assert "Running: ferry convert" in first["log"]
    assert "convert, part 0/2:" in first["log"]


def test_second_run_does_nothing(second, first, onboarding, hub):
    assert manifests(second)["resolve"]["published"] == manifests(first)["publish"]["url"]
    ended = {name: task["state"] for name, task in second["tasks"].items()}
    assert {ended.pop(name) for name in ("resolve", "split", "clean_up")} == {"success"}
    assert set(ended.values()) == {"skipped"}
    assert "already published and checked, nothing to do" in onboarding.log
    whole = [path for method, path in hub.requests if method == "GET" and path.endswith("tokenizer.json")]
    assert not whole  # headers and configs are looked at


def test_token_is_nowhere_to_be_seen(second, onboarding, directory, airflow_home):
    """Not in XCom, logs, rendered templates or anything that the run wrote, the database included."""
    assert TOKEN not in json.dumps(second)
    for root in (directory, airflow_home):
        for path in root.rglob("*"):
            if path.is_file():
                assert TOKEN.encode() not in path.read_bytes(), path


def test_token_is_in_no_command_line(first):
    modules = (b"\0conversion_lib\0", b"\0ferry_airflow.steps.redo\0")
    commands = {line.split(b"\0")[3] for line in first["command_lines"] if any(name in line for name in modules)}
    assert commands >= {b"download", b"convert", b"check", b"publish"}  # the commands were seen
    assert not [line for line in first["command_lines"] if TOKEN.encode() in line]


def test_fused_run_of_another_target(onboarding, conf, first):
    """Uses what is downloaded; reads the fp8 checkpoint itself and checks against it."""
    answer = onboarding.run({**conf, "dequantize": "fused", "scan_layers": False, "save_dtype": "float32"})
    assert answer["state"] == "success", onboarding.log[-8000:]
    left = manifests(answer)
    assert left["download"]["bytes_downloaded"] == 0
    assert left["dequantize"]["skipped"] is True
    assert left["dequantize"]["path"] == left["download"]["path"]
    assert left["finalize"]["target"] == "unscanned-f32-ocdbt-zarr3-maxtext0.2.5"
    assert left["check"]["verdict"] == "pass"
    assert Path(left["publish"]["url"]).name == left["finalize"]["target"]


@pytest.mark.parametrize(
    ("wrong", "stage", "says"),
    [
        ({"repo": "acme/missing"}, "resolve", "acme/missing"),
        ({"revision": "no-such-branch"}, "resolve", "no-such-branch"),
        ({"model_name": "no-such-model"}, "resolve", "no-such-model"),
        ({"destination": f"{__file__}/below"}, "resolve", "cannot be written"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_input_fails_once(onboarding, conf, first, wrong, stage, says):
    answer = onboarding.run({**conf, **wrong})
    assert answer["state"] == "failed"
    assert (answer["tasks"][stage]["state"], answer["tasks"][stage]["tries"]) == ("failed", 1)
    (line,) = [line for line in onboarding.log.splitlines() if "BadInput: ferry: " in line]
    assert says in line and len(line) < 500


def test_repository_that_the_token_does_not_open_fails_once(onboarding, conf, hub):
    hub.faults.gated[OPEN_REPO] = "hf_another"
    answer = onboarding.run({**conf, "repo": OPEN_REPO})
    assert (answer["state"], answer["tasks"]["resolve"]["tries"]) == ("failed", 1)


def test_failed_check_publishes_nothing(onboarding, conf, directory, first):
    """A threshold that no float32 comparison meets: one try, a report, and no checkpoint."""
    elsewhere = directory / "not-published"
    answer = onboarding.run({**conf, "max_kl": 1e-30, "destination": str(elsewhere), "dequantize": "fused"})
    assert answer["state"] == "failed"
    assert answer["tasks"]["check"]["tries"] == 1
    assert answer["tasks"]["check"]["xcom"]["_link_OutputLink"].endswith("/plugin/ferry")
    # nothing but the report, which the run's page shows
    assert [path.parent.name for path in elsewhere.rglob("*") if path.is_file()] == [".ferry-reports"]
    assert Path(manifests(answer)["finalize"]["path"]).exists()  # kept: somebody will want to see why


EXPORTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def export(onboarding, checkpoint, destination, **environment):
    conf = {"checkpoint": checkpoint, "destination": destination}
    answer = onboarding.run(conf, dag="export_checkpoint", environment=environment)
    assert answer["state"] == "success", onboarding.log[-8000:]
    return manifests(answer)["upload"]


def test_export_to_a_directory(onboarding, directory, first):
    left = export(onboarding, manifests(first)["publish"]["url"], str(directory / "exported"))
    assert left["url"] == str(directory / "exported")
    assert {path.name for path in (directory / "exported").iterdir()} >= EXPORTED


def test_export_from_and_to_cloud_storage(onboarding, first):
    with FakeCloudStorage(["bucket"]) as cloud:
        published = upload(cloud, Path(manifests(first)["publish"]["url"]), "models/tiny")
        service = {"STORAGE_EMULATOR_HOST": cloud.endpoint, "TENSORSTORE_GCS_HTTP_URL": cloud.endpoint}
        service["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "token"
        left = export(onboarding, published, "gs://bucket/exports/tiny", **service)
        assert set(cloud.names("bucket")) >= {f"exports/tiny/{name}" for name in EXPORTED}
    assert left["url"] == "gs://bucket/exports/tiny"


def test_export_to_the_hub_in_one_commit(onboarding, first):
    with UploadHub(TOKEN) as hub:
        checkpoint = manifests(first)["publish"]["url"]
        left = export(onboarding, checkpoint, "hf://acme/exported", HF_ENDPOINT=hub.endpoint)
        (commit,) = hub.repos["acme/exported"]["commits"]
    assert set(commit["files"]) >= EXPORTED
    assert len(left["commit"]) == 40
    assert TOKEN not in onboarding.log
