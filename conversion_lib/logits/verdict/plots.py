"""The plots of a check's report, as <svg> elements. Text stays text, in the fonts of the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import HISTOGRAM_EDGES, Comparison, LayerDifference
from conversion_lib.models.transformers_library import INSTALL

FLOOR = 1e-17
"""Where zero is drawn on a logarithmic scale."""

BLUE, RED, GREY, INK = "#2f5fb3", "#b42318", "#aeb6c2", "#1c2330"


def require_plotting() -> None:
    """Checks that matplotlib is installed, before a check that may take an hour.

    Raises:
        BadInput: It is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadInput(f"the report's plots need matplotlib, which is not installed: {INSTALL}") from error


def kl_by_token(comparison: Comparison, threshold: float, prompts: Sequence[Array]) -> str:
    """Draws the KL of each token in nats, in the order of the prompts. `prompts`: token ids, (tokens,) each."""
    kl = comparison.kl
    figure, axes = _axes("token", "KL, nats")
    where, finite, drawn = np.arange(1, len(kl) + 1), np.isfinite(kl), np.maximum(kl, FLOOR)
    for some, color in ((finite & (kl <= threshold), BLUE), (finite & (kl > threshold), RED)):
        axes.plot(where[some], drawn[some], ".", color=color, markersize=4)
    for lost in where[~finite]:
        axes.axvline(lost, color=RED, linewidth=0.5)
    axes.axhline(threshold, color=RED, linewidth=1, linestyle="--", label=f"threshold {threshold:.2g}")
    for end in np.cumsum([len(prompt) for prompt in prompts])[:-1]:
        axes.axvline(end + 0.5, color=GREY, linewidth=0.6)
    _finish(axes, [threshold, *drawn[finite]])
    return _svg(figure)


def streams(layers: Sequence[LayerDifference]) -> str:
    """Draws the relative error of the residual stream after each layer; equal streams are at the bottom."""
    figure, axes = _axes("layer", "relative difference")
    known = [entry for entry in layers if np.isfinite(entry.relative)]
    other = [entry.relative for entry in known if entry.relative > 0] or [1.0]
    bottom, top = min(other) / 3, 3 * max(other)
    axes.plot([e.layer for e in known], [max(e.relative, bottom) for e in known], "-", color=GREY, linewidth=1)
    for entry in known:
        color = RED if entry.departs else BLUE
        axes.plot([entry.layer], [max(entry.relative, bottom)], "o", markersize=4, color=color)
    for entry in layers:
        if not np.isfinite(entry.relative):
            axes.axvline(entry.layer, color=RED, linewidth=0.5)
    axes.set_ylim(bottom / 1.1, top)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)


def blocks_by_layer(layers: Sequence[LayerDifference]) -> str:
    """Draws the relative error of each block of each layer as a grid of colours; blocks that depart are framed."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    decoder = [entry for entry in layers if entry.layer != blocks.EMBEDDING_LAYER]
    names = [name for name in blocks.ORDER if any(name in entry.blocks for entry in decoder)]
    grid = np.full((len(names), len(decoder)), np.nan)
    figure, axes = _axes("layer", "", height=0.7 + 0.28 * len(names))
    for column, entry in enumerate(decoder):
        for name, block in entry.blocks.items():
            grid[names.index(name), column] = np.clip(np.nan_to_num(block.relative.largest, nan=1), 1e-8, 1)
            if block.departs:
                frame = (column - 0.5, names.index(name) - 0.5)
                axes.add_patch(Rectangle(frame, 1, 1, fill=False, edgecolor=RED, linewidth=1.2))
    image = axes.imshow(grid, aspect="auto", cmap="YlOrBr", norm=LogNorm(1e-8, 1), interpolation="nearest")
    axes.set_yscale("linear")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, pad=0.01, label="relative difference")
    return _svg(figure)


def logit_differences(comparison: Comparison) -> str:
    """Draws the histogram of logit differences."""
    figure, axes = _axes("|difference| of a logit", "logits")
    edges = HISTOGRAM_EDGES[1:-1]
    counts = comparison.histogram[1:-1].astype(float)
    counts[0] += comparison.histogram[0]
    counts[-1] += comparison.histogram[-1]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, edgecolor="white", linewidth=0.4)
    axes.set_xscale("log")
    used = np.nonzero(counts)[0]
    if len(used):
        axes.set_xlim(edges[max(0, used[0] - 1)], edges[min(len(edges) - 1, used[-1] + 2)])
    axes.set_ylim(0.7, 2 * max(counts.max(), 1))
    return _svg(figure)


def _axes(x_label: str, y_label: str, height: float = 3) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_yscale("log")
    axes.set_autoscaley_on(False)  # each plot sets its own range
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(axes: Any, values: Sequence[float]) -> None:
    """Sets a range that shows all of `values` and the floor, and puts the legend above the points."""
    axes.set_ylim(FLOOR / 3, 3 * max(values))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderpad=0)


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "ferry", "font.family": "sans-serif", "text.color": INK}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
