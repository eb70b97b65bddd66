"""The executor's limits: memory does not grow with the model, and errors in a worker come out."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from conversion_lib import engine
from conversion_lib.engine import Limits
from conversion_lib.errors import BadInput
from tests.sparse_checkpoints import DEEPSEEK_V3_CONFIG, deepseek_tensors, write_sparse

MIB = 1 << 20


def peak_of(directory, destination, budget: str) -> dict:
    command = [sys.executable, "-m", "conversion_lib", "convert", str(directory), str(destination), "--json", "--quiet"]
    done = subprocess.run([*command, "--memory-budget", budget, "--threads", "2"], capture_output=True, check=True)
    return json.loads(done.stdout)


def sparse(directory, layers: int):
    """Experts' arrays of 134 MB a layer each, 0.4 GB a layer in all."""
    config = DEEPSEEK_V3_CONFIG | {
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 32,
        "num_attention_heads": 8,
        "vocab_size": 4096,
    }
    return write_sparse(directory, config, deepseek_tensors(config), shards=3)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two and five layers, under a budget smaller than one layer's experts, let alone a stacked array."""
    small = peak_of(sparse(tmp_path / "small", 2), tmp_path / "a", "128MiB")
    large = peak_of(sparse(tmp_path / "large", 5), tmp_path / "b", "128MiB")
    assert large["bytes_out"] > 3 * small["bytes_out"]
    assert large["peak_bytes"] < (128 + 512) * MIB
    assert large["peak_bytes"] < 1.2 * small["peak_bytes"]


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_a_budget_is_shared_out_within_itself(threads):
    limits = Limits.of(2 << 30, threads)
    assert limits.buffers <= 1 << 30
    assert threads * limits.piece <= limits.buffers
    assert limits.group <= limits.buffers


def test_a_budget_that_is_too_small_says_the_least():
    with pytest.raises(BadInput, match="64MiB"):
        Limits.of(1 << 20, 2)


def test_buffers_are_used_again():
    room = engine._Room(1000)
    first = room.take(600)
    assert first is not None
    room.give(first)
    assert room.take(600) is first


def test_idle_buffers_make_way():
    room = engine._Room(1000)
    first = room.take(600)
    assert first is not None
    room.give(first)
    second = room.take(700)
    assert second is not None
    assert second.nbytes == 700
    assert room._idle == []


def test_one_buffer_always_fits():
    room = engine._Room(10)
    assert isinstance(room.take(1000), np.ndarray)


def test_closing_lets_those_who_wait_go():
    room = engine._Room(10)
    room.take(10)
    room.close()
    assert room.take(10) is None
