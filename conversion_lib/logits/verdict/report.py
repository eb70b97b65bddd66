"""The report of a check: one HTML file without any other files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from conversion_lib.core.tensors import Array
from conversion_lib.logits.verdict import plots
from conversion_lib.logits.verdict.compare import Comparison, log_softmax, top_tokens
from conversion_lib.logits.verdict.result import CheckResult
from conversion_lib.maxtext.model import arguments
from conversion_lib.shown import one_line, visible

TAG = re.compile(r"<(?=[A-Za-z/!?])")


@dataclass(frozen=True)
class ReportData:
    """Everything that the report shows.

    Attributes:
        title: The model's name, or the path of the checkpoint.
        prompts: Token ids, int32 (tokens,) each.
        reference: The original's logits, float32 (tokens, vocabulary) for each prompt.
        candidate: The checkpoint's logits, in the same shapes.
    """

    title: str
    result: CheckResult
    prompts: Sequence[Array]
    reference: Sequence[Array]
    candidate: Sequence[Array]
    comparison: Comparison


def render(data: ReportData) -> str:
    """Returns the report as one HTML page, plots included."""
    environment = Environment(
        loader=PackageLoader("conversion_lib.logits.verdict", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
    )
    result, comparison, layers = data.result, data.comparison, data.result.layers
    drawn = {
        "kl": plots.kl_by_token(comparison, result.threshold, data.prompts),
        "differences": plots.logit_differences(comparison),
        "streams": plots.streams(layers) if layers else "",
        "blocks": plots.blocks_by_layer(layers) if layers else "",
    }
    return environment.get_template("report.html").render(
        title=data.title,
        result=result,
        figures=figures(result),
        parts=parts(result),
        settings=arguments(result.model.settings),
        plots={name: Markup(svg) for name, svg in drawn.items()},  # noqa: S704 - our own SVG
        positions=[_position(data, index) for index in _positions(comparison, data.prompts)],
    )


def summary(result: CheckResult) -> list[str]:
    """Returns verdict and figures as lines of Markdown, for a terminal or a pull request."""
    settings = " ".join(arguments(result.model.settings))
    rows = [f"| {name} | {value} |" for name, value in figures(result)]
    notes = [f"Note: {_markdown(note)}." for note in result.notes]
    return [
        f"**{_markdown(result.verdict)}**: {_markdown(result.reason)}",
        "",
        *(f"- {name}: {_markdown(verdict)}" for name, verdict in parts(result)),
        "",
        "| figure | value |",
        "| --- | --- |",
        *rows,
        "",
        *notes,
        *([f"MaxText runs it with `{_markdown(settings)}`"] if settings else []),
        f"The report is {_markdown(result.report)}",
    ]


def parts(result: CheckResult) -> list[tuple[str, str]]:
    """Both parts of the verdict: name, and pass or fail."""
    return [("weights", result.weights), ("model", result.model.verdict)]


def _markdown(text: str) -> str:
    """Returns a text that may hold names from outside as Markdown that shows it: no tags, links or columns."""
    return TAG.sub("&lt;", one_line(text)).replace("](", "]\\(").replace("|", "\\|")


def figures(result: CheckResult) -> list[tuple[str, str]]:
    """Returns the figures of a check as (name, value), both as text for display."""
    mean = "mean KL" if result.mean_threshold is None else f"mean KL (threshold {result.mean_threshold:.2g})"
    return [
        ("largest KL of a token", f"{result.max_kl:.2e}"),
        ("threshold on it", f"{result.threshold:.2g}"),
        (mean, f"{result.mean_kl:.2e}"),
        ("largest difference of a logit", f"{result.max_abs_diff:.2e}"),
        ("same most likely token", f"{result.top1:.2%}"),
        ("ten most likely in common", f"{result.top10:.2%}"),
        ("Jaccard of the ten", f"{result.jaccard:.4f}"),
        ("ranks that agree", f"{result.rank_agreement:.2%}"),
        ("tokens compared", f"{result.tokens_compared}"),
        ("largest KL between the original's function and MaxText's", f"{result.model.max_kl:.2e}"),
        ("limit on it", f"{result.model.threshold:.2g}"),
    ]


def _positions(comparison: Comparison, prompts: Sequence[Array]) -> list[int]:
    """The worst token and the last tokens of the first and the last prompt, counted over all prompts."""
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
