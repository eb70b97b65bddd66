"""The executor's limits: memory does not grow with the model, and errors in a worker come out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion_lib.engine import buffers
from tests.support.checkpoints import QWEN3, ferry, incompressible_tensors, write_checkpoint
from tests.support.sparse_checkpoints import DEEPSEEK_V3_CONFIG, deepseek_tensors, llama_tensors, write_sparse

MIB = 1 << 20


SLACK = 512 * MIB
"""What a conversion may take above its budget: Python, the libraries, the plan."""


def measured(directory: Path, destination: Path, budget: int) -> dict[str, Any]:
    """What a conversion in a process of its own reports: peak_bytes is the kernel's own figure, VmHWM."""
    options = ("--memory-budget", budget, "--threads", 2, "--json", "--quiet")
    done = ferry("convert", directory, destination, *options)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(destination)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def of_layers(tmp_path_factory) -> Callable[[int], Path]:
    """Makes a Qwen 3 of so many layers, 36 MB each, that zstd cannot make smaller: encoded chunks take room too."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "vocab_size": 8000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}

    @cache
    def make(layers: int) -> Path:
        config = QWEN3 | sizes | heads | {"num_hidden_layers": layers}
        tensors = incompressible_tensors(llama_tensors(config))
        return write_checkpoint(tmp_path_factory.mktemp("layers"), config, tensors, shards=4)

    return make


@pytest.fixture(scope="module")
def converted(tmp_path_factory, of_layers) -> Callable[[int, int], dict[str, Any]]:
    """What the conversion of so many layers under a budget reports; each runs once."""
    return cache(lambda layers, budget: measured(of_layers(layers), tmp_path_factory.mktemp("out") / "out", budget))


@pytest.mark.parametrize("budget", [64 * MIB, 512 * MIB, 2048 * MIB])
def test_memory_keeps_to_the_budget(converted, budget):
    """1.2 GB: many times the smallest budget; under the largest, all of it could be held at once, but once only."""
    assert converted(32, budget)["peak_bytes"] <= budget + SLACK


def test_memory_does_not_grow_with_the_model(converted):
    """Four times the layers, each of which has more bytes than half of the budget."""
    few, many = converted(8, 64 * MIB), converted(32, 64 * MIB)
    assert many["bytes_out"] > 3.5 * few["bytes_out"]
    timing = 16 * MIB  # what two threads hold at once differs from run to run
    assert many["peak_bytes"] <= 1.1 * few["peak_bytes"] + timing


def test_memory_keeps_to_the_budget_when_experts_are_dequantized(tmp_path):
    """fp8 of five layers of 0.4 GB, under a budget smaller than one layer's experts, let alone a stacked array."""
    config = DEEPSEEK_V3_CONFIG | {
        "num_hidden_layers": 5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "moe_intermediate_size": 1024,
        "n_routed_experts": 32,
        "num_attention_heads": 8,
        "vocab_size": 4096,
    }
    source = write_sparse(tmp_path / "source", config, deepseek_tensors(config), shards=3)
    assert measured(source, tmp_path / "out", 128 * MIB)["peak_bytes"] <= 128 * MIB + SLACK


def test_buffers_are_used_again():
    pool = buffers.BufferPool(1000)
    first = pool.acquire(600)
    assert first is not None
    pool.release(first)
    assert pool.acquire(600) is first


def test_idle_buffers_make_way():
    pool = buffers.BufferPool(1000)
    first = pool.acquire(600)
    assert first is not None
    pool.release(first)
    second = pool.acquire(700)
    assert second is not None
    assert second.nbytes == 700
    assert pool._idle == []


def test_one_buffer_always_fits():
    pool = buffers.BufferPool(10)
    assert isinstance(pool.acquire(1000), np.ndarray)


def test_closing_lets_those_who_wait_go():
    pool = buffers.BufferPool(10)
    pool.acquire(10)
    pool.close()
    assert pool.acquire(10) is None
