"""Runs what the selected tests ask for once, and ends with a table; a whole run writes it to `.parity` as well.

`make parity` selects the tests marked `core`: those of the cases that are, and those of a file or a test that says so.
"""

from __future__ import annotations

import json
import subprocess
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from conversion_lib import __version__
from conversion_lib.models.verified import Layout, Verified
from tests.parity.cases import CANNOT_CONVERT, CASES, Case
from tests.parity.harness import MAXTEXT_PYTHON, ROOT, Harness
from tests.support.family import MAX_KL
from tests.support.verified_table import SEEN

RUN = pytest.StashKey[Harness]()
LOCK = Path(__file__).with_name("requirements.lock")
OF_MAXTEXT = ("maxtext", "jax", "flax", "orbax-checkpoint")
"""Packages of MaxText's environment whose versions are noted."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "core: what a change can break; run by `make parity`")


def pytest_itemcollected(item: pytest.Item) -> None:
    case = item.callspec.params.get("case") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    if isinstance(case, Case) and case.core:
        item.add_marker("core")


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
        took = {f"{name} {kind}": result["seconds"] for (name, kind), result in harness.results.items()}
        report = {"maxtext": "0.2.5", "max_kl_allowed": MAX_KL, "rows": rows, "seconds": took}
        (ROOT / ".parity" / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        SEEN.write_text(verified(rows).model_dump_json(indent=1) + "\n")
    columns = ("model", "layers", "save_dtype", "storage", "same_bits", "max_kl", "training_loader", "not_returned")
    table = [columns, *([show(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    terminalreporter.section("Ferry and MaxText 0.2.5")
    for line in table:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    for kind, count, seconds in harness.seconds():
        terminalreporter.write_line(f"{kind}: {count} jobs of MaxText, {seconds:.0f} s")
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
        "not_returned": ", ".join(_ends(harness.changed.get(case.name, ["error"]))),
    }


def _ends(names: list[str]) -> list[str]:
    """What tensors of all layers have in common: the ends of their names."""
    return sorted({name.rpartition(".layers.")[2].partition(".")[2] or name for name in names})


def verified(rows: list[dict[str, Any]]) -> Verified:
    """What `ferry models` says of each family, by layout."""
    families: dict[str, dict[str, Layout]] = {}
    for family in dict.fromkeys(line["family"] for line in rows):
        of_family = [line for line in rows if line["family"] == family]
        families[family] = {
            layers: _layout([line for line in of_family if line["layers"] == layers])
            for layers in sorted({line["layers"] for line in of_family})
        }
    locked = dict(line.split("==") for line in LOCK.read_text().splitlines() if "==" in line)
    ours = {"ferry": __version__, "transformers": version("transformers")}
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return Verified(
        commit=subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None,
        date=datetime.now(UTC).date().isoformat(),
        versions=ours | {name: locked[name] for name in OF_MAXTEXT},
        families=families,
    )


def _layout(rows: list[dict[str, Any]]) -> Layout:
    compared = [line["same_bits"] for line in rows if line["same_bits"] is not None]
    ran = [line for line in rows if line["max_kl"] is not None]
    close = all(isinstance(line["max_kl"], float) and line["max_kl"] < line["max_kl_allowed"] for line in ran)
    return Layout(
        compared=len(compared),
        same_bits=all(same is True for same in compared),
        ran=len(ran),
        kl_below=sorted({line["max_kl_allowed"] for line in ran}) if close else [],
        returned=len(rows),
        not_returned=sorted({line["not_returned"] for line in rows if line["not_returned"]}),
    )


def show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.1e}" if isinstance(value, float) else "n.a." if value is None else str(value)
