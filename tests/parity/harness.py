"""Makes the models, converts them with Ferry and with MaxText, and has MaxText load what Ferry wrote.

All of it happens at once, in few processes, since starting MaxText costs more than what it is then asked to do. The
tests look at the outcome.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.export import export
from conversion_lib.logits.by_maxtext.settings import EXACT, model_settings
from conversion_lib.models.hf_config import load_config
from conversion_lib.record import Target
from tests.parity.cases import BASES, CASES, CONTROL, IMPOSSIBLE, TRAINED, Case, Model
from tests.support.paths import ROOT
from tests.support.there_and_back import differing, tensors
from tests.support.tiny_models import make_tiny, prompt, reference_logits

MAXTEXT_PYTHON = ROOT / ".parity" / "maxtext" / "bin" / "python"

DEVICES = 16
"""Simulated, over which MaxText shards what it converts: its own default."""

Job = dict[str, Any]


class Harness:
    """`results[case or model name, kind of job]` is what the worker said.

    whole: whether it is everything there is; the controls run only then.
    wrong: by the name of a case, what Ferry raised where it did not convert it, or not back.
    changed: by the name of a case, the tensors that were not the same after a conversion and an export.
    trees: by the name of a model and the layout, the shapes of the parameters of MaxText's model.
    """

    def __init__(self, work: Path, cases: Sequence[Case]) -> None:
        self.work, self.cases = work, cases
        self.whole = len(cases) == len(CASES)
        self.wrong: dict[str, str] = {}
        self.changed: dict[str, list[str]] = {}
        self.trees: dict[tuple[str, str], dict[str, list[int]]] = {}
        self.results: dict[tuple[str, str], dict[str, Any]] = {}
        self._references: dict[str, np.ndarray] = {}

    def run(self) -> None:
        for model in {case.model.name: case.model for case in self._converted()}.values():
            self._make(model)
        conversions = self._start_worker("convert", self._maxtext_conversions(), devices=DEVICES)
        for case in self._converted():
            try:
                self._there_and_back(case)
            except Exception as error:  # the others still run
                self.wrong[case.name] = f"{type(error).__name__}: {error}"
        self._finish([conversions])
        halves = [dict(list(self._looks().items())[half::2]) for half in (0, 1)]
        self._finish([self._start_worker(f"load{half}", jobs) for half, jobs in enumerate(halves)])
        for case in self._converted():
            for kind, name in (("logits", case.name), ("tree", f"{case.model.name}-{case.layers}")):
                value = self.results.get((name, kind), {}).get("value")
                if value is not None:
                    self.trees[case.model.name, case.layers] = value["tree"]

    def seconds(self) -> list[tuple[str, int, float]]:
        """For each kind of job how many there were, and what they took together; without MaxText's start."""
        counts, seconds = Counter[str](), Counter[str]()
        for (_, kind), result in self.results.items():
            counts[kind] += 1
            seconds[kind] += result["seconds"]
        return [(kind, counts[kind], seconds[kind]) for kind in counts]

    def _converted(self) -> list[Case]:
        return [*self.cases, CONTROL] if self.whole else [*self.cases]

    def source(self, model: Model) -> Path:
        return self.work / "models" / model.name

    def plain(self, model: Model) -> Path:
        """The source, dequantized by the formula where it is quantized."""
        return self.work / "models" / f"{model.name}-dequantized" if model.fp8 else self.source(model)

    def ours(self, case: Case) -> Path:
        return self.work / "ferry" / case.name

    def theirs(self, case: Case) -> Path:
        return self.work / "maxtext" / case.name

    def trained(self, case: Case) -> Path:
        """What MaxText's training leaves that begins with our checkpoint."""
        return self.work / "trained" / case.name

    def max_kl(self, case: Case) -> float:
        """The largest divergence of a token's distribution, transformers' from MaxText's."""
        reference = log_softmax(self._references[case.model.name])
        ours = log_softmax(np.load(self.work / f"{case.name}.npy"))
        return float((np.exp(reference) * (reference - ours)).sum(-1).max())

    def _make(self, model: Model) -> None:
        source = self.source(model)
        if model.fp8:
            from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3

            make_tiny_deepseek_v3(source)
            dequantized(source, self.plain(model))
        else:
            make_tiny(model.family, source, **model.config)
        config = json.loads((source / "config.json").read_text())
        tokens = prompt(model.tokens, config.get("text_config", config)["vocab_size"])
        np.save(source / "tokens.npy", tokens)
        self._references[model.name] = reference_logits(self.plain(model), tokens)

    def _there_and_back(self, case: Case) -> None:
        target = Target(
            scan_layers=case.scan,
            save_dtype=case.save_dtype,
            ocdbt=case.ocdbt,
            zarr3=case.zarr3,
            maxtext=case.maxtext,
        )
        convert(self.source(case.model), self.ours(case), target)
        self.changed[case.name] = self.changed_by_export(self.ours(case), case.model)

    def changed_by_export(self, checkpoint: Path, model: Model) -> list[str]:
        """The tensors of the source that an export of `checkpoint` does not give back bit for bit."""
        back, plain = self.work / "back", self.plain(model)
        export(checkpoint, back, hf_config=plain)
        before, after = tensors(plain), tensors(back)
        shutil.rmtree(back)
        if model.config.get("own_names") is False:  # Qwen 3.5's experts, one by one: an export has them as published
            before, after = ({name: of[name] for name in before.keys() & after.keys()} for of in (before, after))
        return differing(before, after)

    def _settings(self, case: Case) -> list[str]:
        """What MaxText is told of a case's model and its storage."""
        return model_settings(load_config(self.source(case.model)), case.scan, case.ocdbt, case.zarr3)

    def _maxtext_conversions(self) -> dict[tuple[str, str], Job]:
        """Also what it cannot do, once for each kind: to notice when it can."""
        impossible = [case for case in self.cases if case in IMPOSSIBLE]
        return {
            (case.name, "convert"): {
                "kind": "convert",
                "source": str(self.source(case.model)),
                "out": str(self.theirs(case)),
                "settings": self._settings(case),
                "save_dtype": case.save_dtype,
            }
            for case in [*(case for case in self.cases if case.maxtext_converts), *impossible]
        }

    def _looks(self) -> dict[tuple[str, str], Job]:
        """Everything that is asked of MaxText and Orbax about checkpoints that are written."""
        jobs: dict[tuple[str, str], Job] = {}
        for case in self._converted():
            ours, source = str(self.ours(case)), str(self.source(case.model))
            if case.maxtext_converts:
                jobs[case.name, "compare"] = {"kind": "compare", "ours": ours, "theirs": str(self.theirs(case))}
            else:
                jobs[case.name, "leaves"] = {"kind": "leaves", "checkpoint": ours}
            if case.logits:
                jobs[case.name, "logits"] = {
                    "kind": "logits",
                    "checkpoint": ours,
                    "settings": [*self._settings(case), *EXACT],
                    "tokens": f"{source}/tokens.npy",
                    "out": str(self.work / f"{case.name}.npy"),
                }
            if case in TRAINED:
                jobs[case.name, "train"] = {
                    "kind": "train",
                    "checkpoint": ours,
                    "settings": self._settings(case),
                    "out": str(self.trained(case)),
                }
        run = {(case.model.name, case.layers) for case in self._converted() if case.logits}
        for case in self._converted():
            if (case.model.name, case.layers) not in run:
                job = {"kind": "tree", "settings": self._settings(case)}
                jobs[f"{case.model.name}-{case.layers}", "tree"] = job
        if self.whole:
            one, other = (Case(BASES["qwen3"], True, dtype) for dtype in ("bfloat16", "float32"))
            jobs["control", "compare"] = {
                "kind": "compare",
                "ours": str(self.ours(one)),
                "theirs": str(self.theirs(other)),
            }
        return jobs

    def _start_worker(self, name: str, jobs: dict[tuple[str, str], Job], devices: int = 1) -> Worker:
        asked, answers, log = (self.work / f"{name}.{suffix}" for suffix in ("jobs.json", "results.json", "log"))
        asked.write_text(json.dumps(list(jobs.values())))
        script = Path(__file__).with_name("maxtext_worker.py")
        command = [MAXTEXT_PYTHON, script, asked, answers, "--devices", str(devices)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        return Worker(process, list(jobs), answers, log)

    def _finish(self, workers: list[Worker]) -> None:
        codes = [worker.process.wait() for worker in workers]
        for worker, code in zip(workers, codes, strict=True):
            assert code == 0, f"{worker.log} ends with:\n{worker.log.read_text()[-2000:]}"
            self.results.update(zip(worker.keys, json.loads(worker.answers.read_text()), strict=True))


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    keys: list[tuple[str, str]]
    answers: Path
    log: Path


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def dequantized(source: Path, destination: Path) -> Path:
    """The fp8 checkpoint at `source` in bfloat16, by the formula: value times its block's scale, in float32.

    transformers' own fp8 loader is no reference: it gets blocks at ragged edges wrong.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    rows, columns = config.pop("quantization_config")["weight_block_size"]
    stored = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv") or name.startswith(f"model.layers.{config['num_hidden_layers']}."):
            continue  # a scale, or the layer for multi-token prediction
        if (scales := stored.get(f"{name}_scale_inv")) is not None:
            i, j = np.indices(tensor.shape, sparse=True)
            values = tensor.float().numpy() * scales.numpy()[i // rows, j // columns]
            tensor = torch.from_numpy(values).bfloat16()
        plain[name] = tensor
    destination.mkdir()
    (destination / "config.json").write_text(json.dumps(config))
    save_file(plain, destination / "model.safetensors", {"format": "pt"})
    return destination
