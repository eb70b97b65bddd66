"""The logit check on a family's small model: what `ferry convert` writes computes what transformers does.

The forward pass and the converter's tables were written apart: that they agree is a check of both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from conversion_lib.conversions.convert import convert
from conversion_lib.logits.check import run_check
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.verdict.rounding import EXACT_KL
from conversion_lib.record import Target
from tests.support.family import Description
from tests.support.family_tests import changed


class CheckTests:
    described: ClassVar[Description]

    def test_the_same_function_in_float32(self, hf: Path, scan_layers: bool, tmp_path: Path):
        convert(hf, tmp_path / "ckpt", Target(scan_layers=scan_layers, save_dtype="float32"))
        result = run_check(tmp_path / "ckpt", hf)
        assert (result.verdict, result.threshold) == ("pass", EXACT_KL)
        assert result.max_kl < 1e-10
        assert max(block.relative.largest for layer in result.layers for block in layer.blocks.values()) < 3e-5

    def test_in_bfloat16_no_more_is_allowed_than_rounding_does(self, hf: Path, tmp_path: Path):
        convert(hf, tmp_path / "ckpt", Target(scan_layers=True))
        result = run_check(tmp_path / "ckpt", hf)
        assert result.verdict == "pass"
        assert (result.mean_threshold is not None) == self.described.scaled_query
        if self.described.scaled_query:
            assert 2 * result.mean_kl < result.mean_threshold < 6 * result.mean_kl
        else:
            assert (result.threshold, result.max_kl < 1e-10) == (EXACT_KL, True)

    def test_a_setting_that_the_forward_pass_reads_makes_a_difference(self, hf: Path):
        """No setting is read and left aside: the reference with another one is another function."""
        raw = json.loads((hf / "config.json").read_text())
        assert parse_config(changed(raw, self.described.mistake)) != parse_config(raw)
