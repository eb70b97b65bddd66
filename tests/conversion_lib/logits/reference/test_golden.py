"""Golden logits in place of the original: Ferry's own file, and those of MaxText's scripts."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest

from conversion_lib.errors import BadInput
from conversion_lib.logits.check import Options, run_check
from tests.conversion_lib.logits.conftest import write_orbax
from tests.support.maxtext_by_hand import maxtext_leaves


class TestGolden:
    @pytest.fixture
    def checkpoint(self, tmp_path, model_dir):
        return write_orbax(tmp_path / "ckpt", maxtext_leaves(model_dir("llama_tied"), scanned=True), scanned=True)

    def test_there_and_back(self, checkpoint, tmp_path, model_dir):
        golden = tmp_path / "kept" / "golden.npz"
        direct = run_check(checkpoint, model_dir("llama_tied"), options=Options(save_golden=golden))
        again = run_check(checkpoint, golden, report_dir=tmp_path / "elsewhere")
        assert (again.verdict, again.max_kl, again.layers) == ("pass", direct.max_kl, [])
        assert (tmp_path / "elsewhere" / "report.html").exists()
        with pytest.raises(BadInput, match="golden file already"):
            run_check(checkpoint, golden, options=Options(save_golden=golden))

    def test_of_another_model(self, checkpoint, tmp_path, model_dir, reference_of):
        from conversion_lib.logits.reference.golden import save_golden

        golden = tmp_path / "golden.npz"
        save_golden(golden, reference_of("qwen3_one_layer").reference)
        (checkpoint / "hf").mkdir()
        shutil.copy(model_dir("llama_tied") / "config.json", checkpoint / "hf")
        with pytest.raises(BadInput, match=r"of another model than .*family 'llama' against 'qwen3'"):
            run_check(checkpoint, golden)
        shutil.rmtree(checkpoint / "hf")
        with pytest.raises(BadInput, match=r"no leaf|requires"):
            run_check(checkpoint, golden)

    def test_not_a_golden_file(self, checkpoint, tmp_path):
        text = tmp_path / "golden.npz"
        text.write_text("no")
        with pytest.raises(BadInput, match="not a golden file"):
            run_check(checkpoint, text)
        np.savez(text, tokens_0=np.zeros(1))
        with pytest.raises(BadInput, match="not a golden file"):
            run_check(checkpoint, text)

    def test_a_name_that_could_not_be_read_again(self, checkpoint, tmp_path, model_dir):
        with pytest.raises(BadInput, match=r"--save-golden .*should end in \.npz"):
            run_check(checkpoint, model_dir("llama_tied"), options=Options(save_golden=tmp_path / "golden.bin"))


class TestMaxTextsGolden:
    """Golden logits as MaxText's scripts write them: a list of prompt, tokens, logits; they have no config."""

    @pytest.fixture
    def checkpoint(self, tmp_path, model_dir):
        root = write_orbax(tmp_path / "ckpt", maxtext_leaves(model_dir("llama_tied"), scanned=True), scanned=True)
        (root / "hf").mkdir()
        shutil.copy(model_dir("llama_tied") / "config.json", root / "hf")
        return root

    @pytest.fixture
    def points(self, reference_of):
        reference = reference_of("llama_tied").reference
        return [
            {"prompt": "text", "tokens": tokens, "logits": logits}
            for tokens, logits in zip(reference.prompts, reference.logits, strict=True)
        ]

    def lines(self, points):
        return "".join(
            json.dumps({"prompt": p["prompt"], "tokens": p["tokens"].tolist(), "logits": p["logits"].tolist()}) + "\n"
            for p in points
        )

    @pytest.mark.parametrize("name", ["golden.jsonl", "golden.pickle", "golden.pkl"])
    def test_both_formats(self, name, checkpoint, points, tmp_path):
        if name.endswith(".jsonl"):
            (tmp_path / name).write_text(self.lines(points))
        else:
            (tmp_path / name).write_bytes(pickle.dumps(points))
        result = run_check(checkpoint, tmp_path / name)
        assert (result.verdict, result.tokens_compared) == ("pass", 560)
        assert result.max_kl < 1e-9

    def test_a_pickle_that_would_run_code(self, checkpoint, tmp_path):
        class Runs:
            def __reduce__(self):
                return (print, ("it ran",))

        (tmp_path / "golden.pkl").write_bytes(pickle.dumps([{"tokens": Runs(), "logits": []}]))
        with pytest.raises(BadInput, match=r"names builtins\.print: golden logits are arrays"):
            run_check(checkpoint, tmp_path / "golden.pkl")

    @pytest.mark.parametrize("name", ["golden.jsonl", "golden.pkl"])
    def test_cut_off(self, name, checkpoint, points, tmp_path):
        content = self.lines(points).encode() if name.endswith("jsonl") else pickle.dumps(points)
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(BadInput, match=r"is not a golden file, or is truncated|line \d is not JSON"):
            run_check(checkpoint, tmp_path / name)

    def test_npz_cut_off(self, checkpoint, model_dir, tmp_path):
        golden = tmp_path / "golden.npz"
        run_check(checkpoint, model_dir("llama_tied"), options=Options(save_golden=golden))
        golden.write_bytes(golden.read_bytes()[:-1000])
        with pytest.raises(BadInput, match="is not a golden file, or is truncated"):
            run_check(checkpoint, golden)

    def test_logits_of_another_vocabulary(self, checkpoint, points, tmp_path):
        points[1]["logits"] = points[1]["logits"][:, :-1]
        (tmp_path / "golden.pkl").write_bytes(pickle.dumps(points))
        with pytest.raises(BadInput, match=r"prompt 2 has logits \(16, 127\).*a vocabulary of 128"):
            run_check(checkpoint, tmp_path / "golden.pkl")

    def test_without_a_config(self, checkpoint, points, tmp_path):
        shutil.rmtree(checkpoint / "hf")
        (tmp_path / "golden.pkl").write_bytes(pickle.dumps(points))
        with pytest.raises(BadInput, match=r"has no config, and the checkpoint no hf/config\.json"):
            run_check(checkpoint, tmp_path / "golden.pkl")
