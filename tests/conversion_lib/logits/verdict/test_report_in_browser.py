"""The report as people see it, in a real Chromium."""

from __future__ import annotations

import pytest

from conversion_lib.logits.check import Options, run_check
from tests.conversion_lib.logits.conftest import write_orbax
from tests.support.browser import browser, watched_page  # noqa: F401
from tests.support.maxtext_by_hand import maxtext_leaves


@pytest.fixture(scope="module", params=["pass", "fail"])
def report(request, tmp_path_factory, model_dir):
    """The page of a real check, and its verdict."""
    leaves = maxtext_leaves(model_dir("llama"), scanned=False)
    if request.param == "fail":
        gate, up = (f"decoder/layers_1/mlp/wi_{index}/kernel" for index in (0, 1))
        leaves[gate], leaves[up] = leaves[up], leaves[gate]
    root = write_orbax(tmp_path_factory.mktemp("report") / "ckpt", leaves, scanned=False)
    result = run_check(root, model_dir("llama"), options=Options(tokens=64))
    assert result.verdict == request.param
    return root / "report" / "report.html", result


@pytest.mark.parametrize("width", [1280, 400])
def test_it_reads_well(report, width, browser):  # noqa: F811
    page_file, result = report
    with watched_page(browser, width=width) as (page, seen):
        page.goto(page_file.as_uri())
        verdict = page.locator(".verdict")
        assert result.verdict in verdict.inner_text().lower()
        assert result.reason in verdict.inner_text()
        box = verdict.bounding_box()
        assert box["y"] + box["height"] < 400  # to be seen without scrolling
        # asks for nothing but itself, and complains of nothing
        assert (seen.requests, seen.errors) == ([page_file.as_uri()], [])
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for plot in page.locator("svg").all():
            drawn = plot.evaluate(
                "svg => { const box = svg.getBBox(); return [box.width, box.height, svg.clientWidth] }"
            )
            assert min(drawn) > 100
            assert plot.locator("path, use").count() > 10


def test_every_point_is_drawn(report, browser):  # noqa: F811
    """A mark for each token on the plot of KL, and one for each layer on that of the streams."""
    page_file, result = report
    with watched_page(browser) as (page, _):
        page.goto(page_file.as_uri())
        kl, streams = page.locator("svg").nth(0), page.locator("svg").nth(1)
        assert kl.locator("g[clip-path] > use").count() == result.tokens_compared
        assert streams.locator("g[clip-path] > use").count() == len(result.layers)


def test_the_tables_have_both_sides_next_to_each_other(report, browser):  # noqa: F811
    page_file, _ = report
    with watched_page(browser) as (page, _):
        page.goto(page_file.as_uri())
        row = page.locator(".pairs table").first.locator("tr").nth(1)
        original, checkpoint = (row.locator("td").nth(index).bounding_box() for index in (0, 2))
        assert original["y"] == checkpoint["y"]
        assert original["x"] + original["width"] <= checkpoint["x"]
        assert page.locator(".pairs table").first.locator("tr").count() == 11
