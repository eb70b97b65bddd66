"""Stages that are cleared: changed output is made again, and missing input is told with the task that makes it."""

import json
from pathlib import Path

import pytest
from airflow.sdk.exceptions import AirflowFailException

from conversion_lib.errors import BadInput
from conversion_lib.storage.locations import location
from ferry_airflow.check import CheckOperator
from ferry_airflow.convert import ConvertOperator
from ferry_airflow.dequantize import DequantizeOperator
from ferry_airflow.download import DownloadOperator
from ferry_airflow.finalize import FinalizeOperator
from ferry_airflow.layout import run_report
from ferry_airflow.publish import PublishOperator
from ferry_airflow.steps import redo
from ferry_airflow.upload import UploadOperator
from tests.support.checkpoints import DEEPSEEK_V3, LLAMA, random_tensors, write_checkpoint
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors

pytestmark = pytest.mark.timeout(600)  # each stage is a process, on a machine that has other work


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), LLAMA, random_tensors(llama_tensors(LLAMA)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("fp8"), DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3)))


HARM = b"not what was written"


def damage(path):
    with path.open("r+b") as file:
        file.write(HARM)


def remove(path):
    path.unlink()


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("harm", [damage, remove])
def test_converted_again(context, source, tmp_path, harm):
    """In one part, and once nothing is wrong any more it is done already."""

    def convert():
        return ConvertOperator(task_id="convert", source=str(source), destination=str(tmp_path / "x")).execute(context)

    assert convert()["already"] is False
    harm(largest(tmp_path / "x" / "0"))
    assert convert()["already"] is False
    assert not largest(tmp_path / "x" / "0").read_bytes().startswith(HARM)
    assert convert()["already"] is True


def test_converted_again_in_parts(context, source, tmp_path):
    def convert():
        parts = [
            ConvertOperator(
                task_id="convert", source=str(source), destination=str(tmp_path / "x"), part=f"{i}/2"
            ).execute(context)
            for i in range(2)
        ]
        FinalizeOperator(task_id="finalize", parts=parts).execute(context)
        return [part["already"] for part in parts]

    assert convert() == [False, False]
    damage(largest(tmp_path / "x" / "0"))
    assert convert() == [False, False]
    assert convert() == [True, True]


def test_dequantized_again(context, quantized, tmp_path):
    def dequantize():
        operator = DequantizeOperator(task_id="t", source=str(quantized), destination=str(tmp_path / "bf16"))
        return operator.execute(context)["already"]

    assert dequantize() is False
    damage(largest(tmp_path / "bf16"))
    assert (dequantize(), dequantize()) == (False, True)


GONE = {"path": "/gone/x", "work_dir": "/w"}


@pytest.mark.parametrize(
    ("operator", "arguments", "maker"),
    [
        (ConvertOperator, {"source": {**GONE, "stage": "dequantize"}}, "dequantize"),
        (ConvertOperator, {"source": {**GONE, "stage": "dequantize", "skipped": True}}, "download"),
        (DequantizeOperator, {"source": {**GONE, "stage": "download"}}, "download"),
        (FinalizeOperator, {"parts": [{**GONE, "stage": "convert"}]}, "convert"),
        (CheckOperator, {"checkpoint": {**GONE, "stage": "finalize"}, "reference": "/"}, "convert"),
        (CheckOperator, {"checkpoint": "/", "reference": {**GONE, "stage": "dequantize"}}, "dequantize"),
        (PublishOperator, {"checkpoint": {**GONE, "stage": "check"}, "destination": "/d"}, "convert"),
    ],
)
def test_input_that_is_gone(context, operator, arguments, maker):
    with pytest.raises(BadInput) as error:
        operator(task_id="t", **arguments).execute(context)
    assert str(error.value) == f"/gone/x is gone: clear the task `{maker}` as well"
    assert json.loads(json.dumps(context["ti"].pushed["failure"]))["exit_code"] == 2


def checked(tmp_path, code, page="<h1>the report</h1>"):
    """Leaves a page as `ferry check` does, and ends with that code."""
    report = tmp_path / "report"
    report.mkdir(exist_ok=True)
    (report / "report.html").write_text(page)
    return code, report


@pytest.mark.parametrize("code", [0, 1])
def test_report_is_left_at_the_destination_until_it_is_published(tmp_path, monkeypatch, code):
    url = run_report(str(tmp_path / "published"), "d", "r")
    ran = []
    monkeypatch.setattr(redo, "_run", lambda arguments: ran.append(arguments) or code)
    _, report = checked(tmp_path, code)
    check = ["check", str(tmp_path), "--reference", str(tmp_path), "--report", str(report)]
    assert redo.main([*check, "--run-report", url, "--json"]) == code
    assert ran == [[*check, "--json"]]
    assert Path(url).read_bytes() == (report / "report.html").read_bytes()
    redo.main(["publish", str(tmp_path), str(tmp_path / "published"), "--run-report", url])
    assert Path(url).exists() == (code != 0)  # what was not published is still shown


def test_report_is_left_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(redo, "_run", lambda arguments: 0)
    _, report = checked(tmp_path, 0)
    url = run_report("gs://bucket/models", "d", "r")
    check = ["check", str(tmp_path), "--reference", str(tmp_path), "--report", str(report)]
    with FakeCloudStorage(["bucket"]) as fake:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake.endpoint)
        redo.main([*check, "--run-report", url])
        assert location(url).read() == (report / "report.html").read_bytes()
        redo.main(["publish", str(tmp_path), "gs://bucket/models", "--run-report", url])
        assert location(url).read() is None


def test_destination_that_takes_no_report_leaves_the_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(redo, "_run", lambda arguments: 1)
    _, report = checked(tmp_path, 1)
    blocked = tmp_path / "file"
    blocked.touch()
    check = ["check", str(tmp_path), "--reference", str(tmp_path), "--report", str(report)]
    assert redo.main([*check, "--run-report", run_report(str(blocked), "d", "r")]) == 1
    assert "the report cannot be shown before publishing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (DownloadOperator, {"source": None}),
        (DequantizeOperator, {"source": None}),
        (ConvertOperator, {"source": None}),
        (FinalizeOperator, {"parts": None}),
        (FinalizeOperator, {"parts": [{"path": "/x"}, None]}),
        (CheckOperator, {"checkpoint": None, "reference": "/r"}),
        (CheckOperator, {"checkpoint": "/x", "reference": None}),
        (PublishOperator, {"checkpoint": None, "destination": "/d"}),
        (UploadOperator, {"source": None}),
    ],
)
def test_task_before_was_marked_successful_by_hand(context, operator, arguments):
    """One line, and no retries: it left no manifest."""
    with pytest.raises(AirflowFailException, match=r"^a task before this one left no result, .*: clear that one$"):
        operator(task_id="t", **arguments).execute(context)
