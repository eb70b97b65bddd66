"""Patterns of configs: the same matches as Python's `re`, in linear time."""

from __future__ import annotations

import re

import pytest

from conversion_lib.core.patterns import compile_pattern
from conversion_lib.errors import BadInput

NAMES = [
    "lm_head",
    "model.layers.3.self_attn.q_proj",
    "model.layers.12.mlp.gate",
    "model.layers.12.mlp.gate_proj",
    "mtp.layers.0.mlp.experts.3.up_proj",
    "model.layers.0.mlp.shared_experts.up_proj",
    "b(|]",
    "",
]


@pytest.mark.parametrize(
    "pattern",
    [
        ".*",
        "lm_head",
        ".*gate$",
        r".*self_attn.(q|k|v|o)_proj.*",
        r"model\.layers\.\d+\.mlp\.(gate|up|gate_up|down)_proj.*",
        r"^(?!mtp\.).*layers\.\d+\.",
        r"^(?!.*shared_experts).*$",
        r"(?!(?:lm_head|mtp))(?:.*proj)",
        r"^(?=.*mlp)(?!.*gate).*proj$",
        r"[(|\]b]+(?:x|\|)?",
        r"[^(?!a]",
        r"(?i)LM_HEAD",
    ],
)
def test_matches_what_re_matches(pattern):
    found = compile_pattern(pattern, "config.json")
    assert [found.matches(name) for name in NAMES] == [re.match(pattern, name) is not None for name in NAMES]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", ["(a+)+c", "(a|aa)+$", "^(?!(a+)+c)(a*)*b", "(.*a){20}c", "((a*)*)*c"])
def test_takes_linear_time(pattern):
    assert not compile_pattern(pattern, "x").matches("a" * 5000 + "!")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "[", "*", "a**", r"(a)\1", "(?P=x)", "(?<=a)b", "a(?!b)", "^((?!x).)*$", "(?!a", "(?!a)*b", "x{5000}"),
        *("((a{100}){100}){100}", "^(?!a)b|c", r"a\Z", "\ud800", "a" * 5000, "(" * 1500 + ")" * 1500),
    ],
)
def test_refuses_in_one_line(pattern):
    with pytest.raises(BadInput, match=r"^config.json: ignore: .*(regular expression|lookahead|characters)"):
        compile_pattern(pattern, "config.json: ignore")
