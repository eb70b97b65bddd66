"""Runs what the selected tests ask for once, and ends with a table; a whole run writes it to `.parity` as well."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from tests.parity.cases import CANNOT_CONVERT, CASES, MAX_KL, Case
from tests.parity.harness import MAXTEXT_PYTHON, ROOT, Harness

RUN = pytest.StashKey[Harness]()
VERIFIED = ROOT / "conversion_lib" / "verified.json"
"""What `ferry models` shows; this run writes its own to .parity, to be copied there where they differ."""


@pytest.fixture(scope="session")
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    if not MAXTEXT_PYTHON.exists():
        pytest.exit("the MaxText environment is missing: run tests/parity/run.sh", returncode=2)
    asked = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    harness = Harness(tmp_path_factory.mktemp("parity"), [case for case in CASES if case in asked])
    try:
        harness.run()
    except Exception:  # once, not at each of the tests
        pytest.exit(traceback.format_exc(), returncode=1)
    request.config.stash[RUN] = harness
    yield harness


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    harness = config.stash.get(RUN, None)
    if harness is None:
        return
    rows = [row(harness, case) for case in CASES if case in harness.cases]
    if harness.whole:
        report = {"maxtext": "0.2.5", "max_kl_allowed": MAX_KL, "rows": rows}
        (ROOT / ".parity" / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        (ROOT / ".parity" / VERIFIED.name).write_text(json.dumps(verified(rows), indent=1) + "\n")
    columns = ("model", "layers", "save_dtype", "storage", "same_bits", "max_kl", "training_loader")
    table = [columns, *([show(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    terminalreporter.section("Ferry and MaxText 0.2.5")
    for line in table:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    terminalreporter.write_line("n.a.: what MaxText itself cannot convert:")
    for (family, scan), (reason, _) in CANNOT_CONVERT.items():
        terminalreporter.write_line(f"  {family} {'scanned' if scan else 'unscanned'}: {reason}")


def row(harness: Harness, case: Case) -> dict[str, Any]:
    """One line of the table; None where something was not asked for, `error` where it raised."""
    compared = harness.results.get((case.name, "compare"), {"value": None})
    loaded = harness.results.get((case.name, "logits"), {"value": None})
    bits, value = compared.get("value", "error"), loaded.get("value", "error")
    return {
        "model": case.model.name,
        "family": case.model.family,
        "layers": case.layers,
        "save_dtype": case.save_dtype,
        "storage": case.storage,
        "same_bits": not bits["differences"] if isinstance(bits, dict) else bits,
        "max_kl": harness.max_kl(case) if isinstance(value, dict) else value,
        "max_kl_allowed": case.model.max_kl,
        "training_loader": value["training_loader"] if isinstance(value, dict) else value,
    }


def verified(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `ferry models` says of each family, by layout: `same_bits` where MaxText converts it too, and `logits`."""
    said: dict[str, Any] = {}
    for line in rows:
        found = said.setdefault(line["family"], {}).setdefault(line["layers"], {"same_bits": [], "logits": []})
        found["same_bits"] += [] if line["same_bits"] is None else [line["same_bits"]]
        found["logits"] += [] if line["max_kl"] is None else [line["max_kl"] < line["max_kl_allowed"]]
    families = {
        family: {layers: {what: all(seen) for what, seen in found.items() if seen} for layers, found in by.items()}
        for family, by in said.items()
    }
    return {"maxtext": "0.2.5", "max_kl_allowed": MAX_KL, "families": families}


def show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.1e}" if isinstance(value, float) else "n.a." if value is None else str(value)
