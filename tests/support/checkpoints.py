"""Small Hugging Face checkpoints made in milliseconds, without torch; and `ferry` run on them.

The lists of tensors come from `sparse_checkpoints`, written by hand from the published repositories. Here they are
filled with random values and may be spoilt one by one.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from conversion_lib.cli.main import app
from tests.support.sparse_checkpoints import DEEPSEEK_V3_CONFIG, Tensor

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
INDEX = "model.safetensors.index.json"

WRITTEN = ["0", "ferry.json", "hf", "maxtext_settings.yml", "models"]
"""What a conversion leaves at a destination of its own."""

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 101,
}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 77,
}

# No size but the value heads' is a multiple of the quantization's block of 128: every grid has ragged edges.
DEEPSEEK_V3 = DEEPSEEK_V3_CONFIG | {
    "first_k_dense_replace": 1,
    "hidden_size": 136,
    "intermediate_size": 200,
    "kv_lora_rank": 40,
    "moe_intermediate_size": 56,
    "n_group": 2,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "q_lora_rank": 72,
    "qk_nope_head_dim": 80,
    "qk_rope_head_dim": 24,
    "topk_group": 1,
    "v_head_dim": 64,
    "vocab_size": 211,
}


def random_tensors(listing: Iterable[Tensor], seed: int = 0) -> Tensors:
    """Values for a listing: normal ones in bfloat16, any finite byte in fp8, scales between 1e-4 and 1e-2."""
    rng = np.random.default_rng(seed)
    return {name: _random(rng, shape, dtype, name) for name, shape, dtype in listing}


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, name: str) -> Array:
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 0x7F, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
        return codes.view(FP8)
    if name.endswith("_scale_inv"):
        return rng.uniform(1e-4, 1e-2, shape).astype(np.float32)
    values = rng.standard_normal(shape, np.float32)
    return values if dtype == "F32" else values.astype(BF16)


def incompressible_tensors(listing: Iterable[Tensor], seed: int = 0) -> Tensors:
    """Random bits, NaNs among them, for a listing in bfloat16: zstd cannot make them smaller."""
    bits = np.random.default_rng(seed)
    return {name: np.frombuffer(bits.bytes(2 * math.prod(shape)), BF16).reshape(shape) for name, shape, _ in listing}


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 2) -> Path:
    """Writes config.json and the tensors, over `shards` files with an index or in one `model.safetensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_shard(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for number, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_shard(directory / file, {str(name): tensors[str(name)] for name in names})
        weight_map |= {str(name): file for name in names}
    total = sum(array.nbytes for array in tensors.values())
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return directory


def write_shard(path: Path, tensors: Tensors) -> None:
    """One safetensors file, written by the format's own library."""
    kept = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in kept.items()
    }
    safetensors.serialize_file(specs, path, {"format": "pt"})


def command(*arguments: object) -> list[str]:
    """The command line of `ferry`."""
    return [sys.executable, "-m", "conversion_lib", *(str(argument) for argument in arguments)]


Result = subprocess.CompletedProcess[str]


def ferry(*arguments: object) -> Result:
    """Runs `ferry` to its end, as a process."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, check=False)


def ferry_here(*arguments: object) -> Result:
    """Runs `ferry` in this process: the same from its arguments to its exit code, but without a second of start-up.

    What ferry does not catch, and would show as a traceback, is raised.
    """
    out, err, words = io.StringIO(), io.StringIO(), [str(argument) for argument in arguments]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app(words, prog_name="ferry")
        except SystemExit as end:
            return Result(words, int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("a command ends with SystemExit")


def answer(result: Result, code: int = 0) -> Any:
    """The one JSON object that a command with --json puts on standard output."""
    assert result.returncode == code, result.stderr
    assert len(result.stdout.splitlines()) == 1, result.stdout
    return json.loads(result.stdout)


def refused(result: Result, *words: str, code: int = 2) -> str:
    """Asserts the exit code and the one line, that it has all of `words`; returns it."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("ferry: ")]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    for word in words:
        assert word in errors[0]
    if result.stdout:
        assert json.loads(result.stdout) == {"error": errors[0].removeprefix("ferry: "), "exit_code": code}
    return errors[0]
