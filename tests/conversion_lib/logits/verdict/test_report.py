"""The report as a page: whole in itself, and safe whatever the names are."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import BlockDifference, LayerDifference, Relative, Spot, compare_logits
from conversion_lib.logits.verdict.report import ReportData, render, summary
from conversion_lib.logits.verdict.result import CheckResult


def layer(number, relative):
    names = [blocks.EMBEDDING] if number < 0 else [blocks.ATTENTION, blocks.MLP, blocks.STREAM]
    off, allowed = Relative(mean=relative / 2, largest=relative), Relative(mean=1e-4, largest=1e-3)
    found = {name: BlockDifference(relative=off, allowed=allowed) for name in names}
    return LayerDifference(layer=number, max_abs_diff=0.1, relative=relative, blocks=found)


MODEL = {
    "verdict": "pass",
    "max_kl": 1.5e-5,
    "threshold": 1e-3,
    "differs": "MaxText's model has RoPE factor 8, the original 32",
    "settings": {"model_name": "llama3.1-8b", "override_model_config": True, "head_dim": 64},
}


def result(**changes):
    values = {
        "verdict": "fail",
        "weights": "fail",
        "model": MODEL,
        "reason": "Layer 1, attention is the first that departs from the original.",
        "max_kl": 0.25,
        "mean_kl": 1e-7,
        "max_abs_diff": 0.5,
        "top1": 1,
        "top10": 0.9,
        "jaccard": 0.8,
        "rank_agreement": 0.7,
        "threshold": 1e-5,
        "mean_threshold": None,
        "threshold_rests_on": "the order of float32 sums",
        "layers": [layer(-1, 0.0), layer(0, 1e-6), layer(1, 1e-2)],
        "output": None,
        "first_departing": Spot(layer=1, block=blocks.ATTENTION),
        "not_finite": None,
        "engine": "ferry",
        "digest": "sha256:abc",
        "covers": {},
        "notes": ["no token went to 3 experts"],
        "report": "report/report.html",
        "reference": "0",
        "tokens": 9,
        "tokens_compared": 13,
        "bytes_in": 0,
        "seconds": 1,
        "identity": {"digest": "sha256:abc", "repository": "some/model"},
        "peak_bytes": 1,
    }
    return CheckResult.model_validate(values | changes)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    reference = [rng.normal(size=(4, 30)).astype(np.float32), rng.normal(size=(9, 30)).astype(np.float32)]
    candidate = [logits + np.float32(1e-3) * rng.normal(size=logits.shape).astype(np.float32) for logits in reference]
    return ReportData(
        title="tiny",
        result=result(),
        prompts=[np.zeros(4, np.int32), np.zeros(9, np.int32)],
        reference=reference,
        candidate=candidate,
        comparison=compare_logits(reference, candidate),
    )


def test_one_file_with_everything(data):
    html = render(data)
    assert html.count("<svg") == 4
    assert not re.search(r"<(script|link|img)|src=|url\(http", html)
    for text in (
        "fail",
        data.result.reason,
        "sha256:abc",
        "Prompt 2, token 9 of 9",
        "no token went to 3",
        "0.8000",
        "some/model",
    ):
        assert text in html
    for block in (blocks.ATTENTION, blocks.MLP, blocks.STREAM):
        assert f">{block}<" in html
    worst = int(np.argmax(data.comparison.kl))
    assert f"{data.comparison.kl[worst]:.2e}" in html


def test_without_layers_there_are_no_plots_of_them(data):
    assert render(replace(data, result=result(layers=[]))).count("<svg") == 2


def test_names_are_escaped(data):
    html = render(replace(data, title="<script>alert(1)</script>"))
    assert "<script>" not in html


def test_what_is_not_finite_can_be_drawn(data):
    candidate = [data.candidate[0].copy(), np.full_like(data.candidate[1], np.nan)]
    comparison = compare_logits(data.reference, candidate)
    lost = result(layers=[layer(0, np.nan)], max_kl=np.inf, max_abs_diff=np.inf)
    assert "inf" in render(replace(data, result=lost, candidate=candidate, comparison=comparison))


def test_logits_that_are_equal_throughout(data):
    same = replace(data, candidate=data.reference, comparison=compare_logits(data.reference, data.reference))
    assert 'class="other"' not in render(same)


def test_the_same_run_gives_the_same_page(data):
    assert render(data) == render(data)


def test_the_summary_is_markdown():
    lines = summary(result())
    assert lines[0] == "**fail**: Layer 1, attention is the first that departs from the original."
    assert "| largest KL of a token | 2.50e-01 |" in lines
    assert all(line.count("|") == 3 for line in lines if line.startswith("|"))
    assert lines[-1] == "The report is report/report.html"


def test_it_shows_both_parts_and_what_a_run_passes(data):
    page = render(data)
    assert "<b>weights: fail</b> · <b>model: pass</b>" in page
    assert "1.50e-05" in page
    assert "model_name=llama3.1-8b\noverride_model_config=true\nhead_dim=64\n" in page
    lines = summary(data.result)
    assert "- model: pass" in lines
    assert "MaxText runs it with `model_name=llama3.1-8b override_model_config=true head_dim=64`" in lines
