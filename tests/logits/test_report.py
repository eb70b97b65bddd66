"""The report as a page: whole in itself, and safe whatever the names are."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from conversion_lib.logits.compare import LayerDifference, compare_logits
from conversion_lib.logits.report import ReportData, render


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    reference = [rng.normal(size=(4, 30)).astype(np.float32), rng.normal(size=(9, 30)).astype(np.float32)]
    candidate = [logits + np.float32(1e-3) * rng.normal(size=logits.shape).astype(np.float32) for logits in reference]
    return ReportData(
        title="tiny",
        verdict="fail",
        reason="layer 1 of 2 is the first that departs from the original.",
        threshold=1e-5,
        tolerance=1e-4,
        figures=[("mean KL", "1e-7")],
        notes=["experts that no token visited: 3"],
        identity={"digest": "sha256:abc", "commit": ""},
        prompts=[np.zeros(4, np.int32), np.zeros(9, np.int32)],
        reference=reference,
        candidate=candidate,
        comparison=compare_logits(reference, candidate),
        layers=[LayerDifference(layer=n, max_abs_diff=0.1, relative=10.0 ** (n - 5)) for n in (-1, 0, 1)],
    )


def test_one_file_with_everything(data):
    html = render(data)
    assert html.count("<svg") == 2
    assert not re.search(r"<(script|link|img)|src=|url\(http", html)
    for text in ("fail", data.reason, "sha256:abc", "Prompt 2, token 9 of 9", "no token visited: 3"):
        assert text in html
    assert "commit" not in html
    worst = int(np.argmax(data.comparison.kl))
    assert f"{data.comparison.kl[worst]:.2e}" in html


def test_without_layers_there_is_no_layer_plot(data):
    assert render(replace(data, layers=[])).count("<svg") == 1


def test_names_are_escaped(data):
    html = render(replace(data, title="<script>alert(1)</script>"))
    assert "<script>" not in html


def test_what_is_not_finite_can_be_drawn(data):
    candidate = [data.candidate[0].copy(), np.full_like(data.candidate[1], np.nan)]
    comparison = compare_logits(data.reference, candidate)
    layers = [LayerDifference(layer=0, max_abs_diff=np.nan, relative=np.nan)]
    assert "inf" in render(replace(data, candidate=candidate, comparison=comparison, layers=layers))


def test_logits_that_are_equal_throughout(data):
    same = replace(data, candidate=data.reference, comparison=compare_logits(data.reference, data.reference))
    assert 'class="other"' not in render(same)


def test_the_same_run_gives_the_same_page(data):
    assert render(data) == render(data)
