"""How fast Orbax restores what Ferry wrote, sharded, against what MaxText wrote of the same model."""

from __future__ import annotations

import json
import sys

from tests.benchmarks.contest import HERE, Contest, ratio
from tests.benchmarks.processes import measure, settle
from tests.benchmarks.results import Figure


def restore_figures(contest: Contest) -> list[Figure]:
    """Both checkpoints of one model, sharded over 16 simulated devices on the first axis and on the last."""
    contest.ferry()
    contest.maxtext()
    figures = []
    for axis in ("first", "last"):
        seconds: dict[str, list[float]] = {"ferry": [], "maxtext": []}
        cpu: dict[str, list[float]] = {"ferry": [], "maxtext": []}
        for _ in range(contest.rounds):
            for name, checkpoint in (("ferry", contest.ours), ("maxtext", contest.theirs)):
                settle(checkpoint, cold=contest.cold)
                found = json.loads(measure([sys.executable, HERE / "restore.py", checkpoint, axis]).output)
                assert found["bytes"] == contest.wanted.nbytes, "not the whole model was restored"
                seconds[name].append(found["seconds"])
                cpu[name].append(found["cpu_seconds"])
                print(f"  restore, {axis} axis, {name}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
        figures += [
            Figure.median(f"{axis} axis, ferry's checkpoint", seconds["ferry"], "s"),
            Figure.median(f"{axis} axis, MaxText's checkpoint", seconds["maxtext"], "s"),
            Figure(f"{axis} axis, ferry's / MaxText's", ratio(seconds["ferry"], seconds["maxtext"]), "x", at_most=1.0),
            Figure(f"{axis} axis, processor time", ratio(cpu["ferry"], cpu["maxtext"]), "x"),
        ]
    return figures
