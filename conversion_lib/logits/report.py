"""The report of a check: one HTML file that needs nothing beside it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from conversion_lib.errors import BadInput
from conversion_lib.logits.compare import Comparison, LayerDifference, log_softmax, top_tokens
from conversion_lib.sources.base import Array

KL_FLOOR = 1e-17
"""What a KL of zero is drawn as, on a scale of logarithms."""

BLUE, RED, GREY = "#2f5fb3", "#b42318", "#aeb6c2"


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. reason: one sentence; figures: what CheckResult holds, ready for display."""

    title: str
    verdict: str
    reason: str
    threshold: float
    tolerance: float
    figures: Sequence[tuple[str, str]]
    notes: Sequence[str]
    identity: Mapping[str, str]
    prompts: Sequence[Array]
    reference: Sequence[Array]
    candidate: Sequence[Array]
    comparison: Comparison
    layers: Sequence[LayerDifference]


def require_plotting() -> None:
    """Raises BadInput where matplotlib is missing: better before an hour's work than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "the report's plots need matplotlib, which is not installed: pip install ferry[check]"
        ) from error


def render(data: ReportData) -> str:
    """The report as HTML with its plots inside."""
    environment = Environment(
        loader=PackageLoader("conversion_lib.logits", "."), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html").render(
        title=data.title,
        verdict=data.verdict,
        reason=data.reason,
        figures=data.figures,
        notes=data.notes,
        kl_plot=Markup(_kl_plot(data)),  # noqa: S704 - our own SVG
        layer_plot=Markup(_layer_plot(data)) if data.layers else "",  # noqa: S704
        positions=[_position(data, index) for index in _positions(data.comparison, data.prompts)],
        identity=[(name, text) for name, text in data.identity.items() if text],
    )


def _positions(comparison: Comparison, prompts: Sequence[Array]) -> list[int]:
    """The worst token, and the last of the first and of the last prompt, counted over all prompts."""
    ends = np.cumsum([len(prompt) for prompt in prompts]) - 1
    return list(dict.fromkeys([int(np.argmax(comparison.kl)), int(ends[0]), int(ends[-1])]))


def _position(data: ReportData, index: int) -> dict[str, Any]:
    starts = np.cumsum([0, *(len(prompt) for prompt in data.prompts)])
    prompt = int(np.searchsorted(starts, index, side="right")) - 1
    token = index - int(starts[prompt])
    sides = []
    for logits in (data.reference[prompt][token], data.candidate[prompt][token]):
        best = top_tokens(logits[None], 10)[0]
        with np.errstate(invalid="ignore", over="ignore"):
            log_p = log_softmax(logits)
        sides.append([(int(token_id), f"{log_p[token_id]:.4f}") for token_id in best])
    rows = [
        {"wanted": a, "wanted_log_p": log_a, "found": b, "found_log_p": log_b, "other": a != b}
        for (a, log_a), (b, log_b) in zip(*sides, strict=True)
    ]
    name = f"Prompt {prompt + 1}, token {token + 1} of {len(data.prompts[prompt])}"
    return {"name": name, "kl": f"{data.comparison.kl[index]:.2e}", "rows": rows}


def _kl_plot(data: ReportData) -> str:
    kl = data.comparison.kl
    figure, axes = _axes("token", "KL, nats")
    where = np.arange(1, len(kl) + 1)
    finite = np.isfinite(kl)
    drawn = np.maximum(kl, KL_FLOOR)
    for some, color in ((finite & (kl <= data.threshold), BLUE), (finite & (kl > data.threshold), RED)):
        axes.plot(where[some], drawn[some], ".", color=color, markersize=4)
    for lost in where[~finite]:
        axes.axvline(lost, color=RED, linewidth=0.5)
    axes.axhline(data.threshold, color=RED, linewidth=1, linestyle="--", label=f"threshold {data.threshold:g}")
    for end in np.cumsum([len(prompt) for prompt in data.prompts])[:-1]:
        axes.axvline(end + 0.5, color=GREY, linewidth=0.6)
    _finish(axes, [data.threshold, *drawn[finite]])
    return _svg(figure)


def _layer_plot(data: ReportData) -> str:
    figure, axes = _axes("layer", "relative difference")
    known = [(entry.layer, max(entry.relative, KL_FLOOR)) for entry in data.layers if np.isfinite(entry.relative)]
    lost = [entry.layer for entry in data.layers if not np.isfinite(entry.relative)]
    axes.plot(*zip(*known, strict=True) if known else ([], []), "-", color=GREY, linewidth=1)
    for layer, value in known:
        axes.plot([layer], [value], "o", markersize=4, color=BLUE if value <= data.tolerance else RED)
    for layer in lost:
        axes.axvline(layer, color=RED, linewidth=0.5)
    axes.axhline(data.tolerance, color=RED, linewidth=1, linestyle="--", label=f"tolerance {data.tolerance:g}")
    _finish(axes, [data.tolerance, *(value for _, value in known)])
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_yscale("log")
    axes.set_autoscaley_on(False)  # _finish sets the range
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(axes: Any, values: Sequence[float]) -> None:
    """A range that shows all of `values` and the floor, and the legend above the plot, out of the points' way."""
    axes.set_ylim(KL_FLOOR / 3, 3 * max(values))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderpad=0)


def _svg(figure: Any) -> str:
    """The figure as an <svg> element; text stays text, in the page's fonts."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ferry", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
