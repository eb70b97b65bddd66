"""The whole check on checkpoints that Orbax wrote: right ones pass, and every planted mistake is found."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion_lib.errors import BadInput
from conversion_lib.logits import check
from conversion_lib.logits.check import Options, run_check
from conversion_lib.logits.reference.prompts import fixed_prompts
from conversion_lib.logits.reference.reference import transformers_reference
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import Spot, compare_logits, first_departing
from conversion_lib.logits.verdict.result import CheckResult
from conversion_lib.logits.verdict.rounding import EXACT_KL
from conversion_lib.publish.staged import checkpoint_digest
from conversion_lib.record import CheckpointRecord, Origin, Target
from tests.conversion_lib.logits.conftest import Seen, findings, write_orbax
from tests.conversion_lib.logits.verdict.test_report import result as some_result
from tests.support.logit_models import build_model
from tests.support.maxtext_by_hand import BF16, maxtext_leaves, read_weights
from tests.support.memory_checkpoint import MemoryCheckpoint
from tests.support.mistakes import ATTENTION, DEEPSEEK_MISTAKES, LLAMA_MISTAKES, swap


def write_record(root, *, exact, save_dtype="float32", maxtext="0.2.5", family="llama"):
    record = CheckpointRecord(
        ferry_version="0",
        fingerprint="f",
        identity={},
        family=family,
        model_name="tiny",
        origin=Origin(path="somewhere", repo="some/model", commit="c0ffee" * 6 + "c0de"),
        target=Target(save_dtype=save_dtype, maxtext=maxtext),
        arrays=1,
        bytes_in=1,
        bytes_out=1,
        exact=exact,
    )
    (root / "ferry.json").write_text(record.model_dump_json())


@pytest.mark.parametrize(("name", "scanned"), [("llama", True), ("qwen3", False), ("deepseek_v3", True)])
def test_a_right_checkpoint_passes(name, scanned, tmp_path, model_dir):
    root = write_orbax(tmp_path / "ckpt", maxtext_leaves(model_dir(name), scanned=scanned), scanned=scanned)
    result = run_check(root / "0" / "items", model_dir(name))
    assert result.verdict == "pass"
    assert result.max_kl < 1e-9
    assert result.threshold == EXACT_KL
    assert (result.top1, result.top10, result.jaccard, result.rank_agreement) == (
        1.0,
        1.0,
        1.0,
        pytest.approx(1, abs=0.01),
    )
    assert (result.first_departing, result.not_finite) == (None, None)
    assert {block.departs for layer in result.layers for block in layer.blocks.values()} == {False}
    assert result.digest == checkpoint_digest(root)
    assert CheckResult.model_validate_json((root / "report" / "check.json").read_bytes()) == result
    html = (root / "report" / "report.html").read_text()
    assert html.count("<svg") == 4
    assert result.digest in html
    assert {path.name for path in (root / "report").iterdir()} - {"sums.json"} == {"check.json", "report.html"}


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("plant", "layer", "block"), LLAMA_MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_mistakes_in_llama(plant, layer, block, dtype, tmp_path, model_dir):
    """At the defaults; also where the query was rounded, and more is allowed for that."""
    leaves = maxtext_leaves(model_dir("llama"), scanned=False, dtype=dtype)
    plant(leaves)
    leaves = {name: array.astype(dtype) for name, array in leaves.items()}
    root = write_orbax(tmp_path / "ckpt", leaves, scanned=False)
    result = run_check(root, model_dir("llama"))
    assert result.verdict == "fail"
    assert result.first_departing == (None if layer is None else Spot(layer=layer, block=block))
    assert json.loads((root / "report" / "check.json").read_text())["verdict"] == "fail"
    assert "fail" in (root / "report" / "report.html").read_text()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A Llama of 24 layers, its logits, and what its layers put out."""
    hf = build_model("llama", tmp_path_factory.mktemp("deep") / "hf", num_hidden_layers=24)
    states = {}
    reference = transformers_reference(hf, fixed_prompts(211, 100, 1024), observe=states.__setitem__)
    return hf, Seen(reference, states)


class TestManyLayers:
    """The more layers, the less a mistake in one of them does to the logits: so no block may depart either."""

    WRONG = 13

    @pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
    def test_a_right_one(self, dtype, seen):
        hf, original = seen
        leaves = maxtext_leaves(hf, scanned=False, dtype=dtype)
        found = findings(MemoryCheckpoint(leaves, False), original)
        assert (first_departing(found.layers), found.output.departs) == (None, False)
        assert compare_logits(original.reference.logits, found.logits).max_kl < found.allowed

    @pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("leaf", "block"),
        [
            (f"{ATTENTION}/query/kernel", blocks.ATTENTION),
            (f"{ATTENTION}/value/kernel", blocks.ATTENTION),
            ("mlp/wi_0/kernel", blocks.MLP),
            ("mlp/wo/kernel", blocks.MLP),
            ("post_self_attention_layer_norm/scale", blocks.NORM_BEFORE_MLP),
        ],
    )
    def test_a_noise_of_a_percent_in_one_tensor(self, leaf, block, dtype, seen):
        hf, original = seen
        leaves = maxtext_leaves(hf, scanned=False, dtype=dtype)
        name = f"decoder/layers_{self.WRONG}/{leaf}"
        noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(leaves[name].shape)
        leaves[name] = (leaves[name] * noise).astype(BF16).astype(dtype)
        found = findings(MemoryCheckpoint(leaves, False), original)
        departing = {entry.layer: [n for n, b in entry.blocks.items() if b.departs] for entry in found.layers}
        assert first_departing(found.layers) == Spot(layer=self.WRONG, block=block)
        assert not any(blocks for layer, blocks in departing.items() if layer != self.WRONG)

    @pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
    def test_noise_in_the_output(self, dtype, seen):
        hf, original = seen
        leaves = maxtext_leaves(hf, scanned=False, dtype=dtype)
        name = "decoder/logits_dense/kernel"
        noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(leaves[name].shape)
        leaves[name] = (leaves[name] * noise).astype(BF16).astype(dtype)
        found = findings(MemoryCheckpoint(leaves, False), original)
        assert (first_departing(found.layers), found.output.departs) == (None, True)

    def test_the_verdict(self, seen, tmp_path):
        """Where the logits alone would pass."""
        hf, _ = seen
        leaves = maxtext_leaves(hf, scanned=False, dtype=BF16)
        name = f"decoder/layers_{self.WRONG}/mlp/wi_1/kernel"
        noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(leaves[name].shape)
        leaves[name] = (leaves[name] * noise).astype(BF16)
        root = write_orbax(tmp_path / "ckpt", leaves, scanned=False)
        result = run_check(root, hf, options=Options(tokens=100))
        assert (result.verdict, result.first_departing) == ("fail", Spot(layer=self.WRONG, block=blocks.MLP))
        assert result.mean_kl < result.mean_threshold
        assert re.search(
            rf"layer {self.WRONG}, MLP .* of a token's length on average \(allowed 5.0e-04\)", result.reason
        )


@pytest.mark.parametrize(
    ("tensor", "value", "spot"),
    [
        ("model.layers.1.self_attn.o_proj.weight", np.nan, "from layer 1, attention on"),
        ("model.embed_tokens.weight", np.inf, "from the embedding on"),
    ],
)
def test_values_that_are_not_finite_in_the_source(tensor, value, spot, tmp_path, model_dir):
    """They are the source's, and told as such: the checkpoint has what the source has."""
    hf = tmp_path / "hf"
    shutil.copytree(model_dir("llama"), hf)
    weights = read_weights(hf)
    weights[tensor] = weights[tensor].copy()
    weights[tensor][:, 0] = value
    for shard in hf.glob("*.safetensors*"):
        shard.unlink()
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    result = run_check(write_orbax(tmp_path / "ckpt", maxtext_leaves(hf, scanned=True), scanned=True), hf)
    kind = "a NaN" if np.isnan(value) else "an infinity"
    said = f"{spot}: the source's tensor {tensor} in {hf}/model.safetensors has {kind}"
    assert (result.verdict, result.source_not_finite) == ("fail", said)
    assert result.reason.endswith(f": the original's own values are not finite {said}.")


def test_values_that_are_not_finite(tmp_path, model_dir):
    leaves = maxtext_leaves(model_dir("llama"), scanned=False)
    leaves["decoder/layers_2/mlp/wo/kernel"][0, 0] = np.nan
    root = write_orbax(tmp_path / "ckpt", leaves, scanned=False)
    result = run_check(root, model_dir("llama"))
    assert (result.verdict, result.max_kl, result.not_finite) == ("fail", math.inf, Spot(layer=2, block=blocks.MLP))
    assert result.source_not_finite is None
    assert "not finite from layer 2, MLP on" in result.reason
    # also against a file, which has no layers
    golden = tmp_path / "golden.npz"
    run_check(root, model_dir("llama"), options=Options(save_golden=golden))
    again = run_check(root, golden)
    assert (again.verdict, again.not_finite, again.layers) == ("fail", Spot(layer=2, block=blocks.MLP), [])


def test_a_query_divided_twice_in_qwen(tmp_path, model_dir):
    """An inverse scale, and a wrong tie: the family that has neither."""
    leaves = maxtext_leaves(model_dir("qwen3_one_layer"), scanned=True)
    leaves[f"decoder/layers/{ATTENTION}/query_norm/scale"] /= np.float32(4)
    root = write_orbax(tmp_path / "scaled", leaves, scanned=True)
    result = run_check(root, model_dir("qwen3_one_layer"))
    assert (result.verdict, result.first_departing) == ("fail", Spot(layer=0, block=blocks.ATTENTION))


def test_a_wrong_tie(tmp_path, model_dir):
    """The output projection is the embedding, where the model has one of its own."""
    leaves = maxtext_leaves(model_dir("llama"), scanned=True)
    leaves["decoder/logits_dense/kernel"] = np.ascontiguousarray(leaves["token_embedder/embedding"].T)
    result = run_check(write_orbax(tmp_path / "ckpt", leaves, scanned=True), model_dir("llama"))
    assert (result.verdict, result.first_departing) == ("fail", None)
    assert "output projection" in result.reason


def test_layers_stacked_on_the_wrong_axis(tmp_path):
    """As many layers as the norm has dimensions: the shape does not tell."""
    hf = build_model(
        "llama_tied", tmp_path / "hf", num_hidden_layers=8, hidden_size=8, num_attention_heads=2, head_dim=4
    )
    leaves = maxtext_leaves(hf, scanned=True)
    name = "decoder/layers/post_self_attention_layer_norm/scale"
    leaves[name] = np.ascontiguousarray(leaves[name].T)
    result = run_check(write_orbax(tmp_path / "ckpt", leaves, scanned=True), hf)
    assert (result.verdict, result.first_departing) == ("fail", Spot(layer=0, block=blocks.NORM_BEFORE_MLP))


@pytest.mark.parametrize(
    ("plant", "layer", "block"), DEEPSEEK_MISTAKES, ids=lambda value: getattr(value, "__name__", "")
)
def test_mistakes_in_deepseek(plant, layer, block, tmp_path, model_dir):
    leaves = maxtext_leaves(model_dir("deepseek_v3"), scanned=True)
    plant(leaves)
    result = run_check(write_orbax(tmp_path / "ckpt", leaves, scanned=True), model_dir("deepseek_v3"))
    assert (result.verdict, result.first_departing) == ("fail", Spot(layer=layer, block=block))
    assert f"layer {layer}, {block}" in result.reason


def test_a_mistake_in_the_indexer(tmp_path, model_dir):
    leaves = maxtext_leaves(model_dir("deepseek_v32"), scanned=True)
    leaves[f"decoder/moe_layers/{ATTENTION}/indexer/k_norm/bias"][:, 1] = 0
    root = write_orbax(tmp_path / "ckpt", leaves, scanned=True)
    result = run_check(root, model_dir("deepseek_v32"))
    assert (result.verdict, result.first_departing) == ("fail", Spot(layer=2, block=blocks.ATTENTION))
    assert result.notes == []
    # prompts that the indexer keeps whole do not put it to the test, and the report says so
    short = run_check(root, build_model("deepseek_v32", tmp_path / "hf", index_topk=1024))
    assert short.verdict == "pass"
    assert "indexer" in short.notes[0]


class TestThreshold:
    """What a check allows where the conversion rounds: what that rounding does to this model."""

    @pytest.mark.parametrize("seed", range(4))
    def test_a_rounded_query(self, seed, tmp_path):
        hf = build_model("llama", tmp_path / "hf", seed=seed)
        root = write_orbax(tmp_path / "ckpt", maxtext_leaves(hf, scanned=True, dtype=BF16), scanned=True)
        result = run_check(root, hf)
        assert result.verdict == "pass"
        assert 2 * result.max_kl < result.threshold < 100 * result.max_kl
        assert 2 * result.mean_kl < result.mean_threshold < 5 * result.mean_kl
        assert result.threshold_rests_on.startswith("the measured effect of rounding the values of 1 leaves")
        assert {block.departs for layer in result.layers for block in layer.blocks.values()} == {False}
        strict = run_check(root, hf, options=Options(max_kl=1e-9))
        assert (strict.verdict, strict.threshold, strict.threshold_rests_on) == ("fail", 1e-9, "--max-kl")

    def test_a_query_whose_scale_is_a_power_of_two(self, tmp_path, model_dir):
        """The head dimension 16 makes it a quarter."""
        leaves = maxtext_leaves(model_dir("llama_tied"), scanned=True, dtype=BF16)
        result = run_check(write_orbax(tmp_path / "ckpt", leaves, scanned=True), model_dir("llama_tied"))
        assert (result.verdict, result.threshold) == ("pass", EXACT_KL)
        assert result.max_kl < 1e-9

    def test_float32_is_held_to_the_strict_threshold(self, tmp_path, model_dir):
        root = write_orbax(tmp_path / "ckpt", maxtext_leaves(model_dir("llama"), scanned=True), scanned=True)
        assert run_check(root, model_dir("llama")).threshold == EXACT_KL

    def test_a_float32_source_saved_in_bfloat16(self, tmp_path):
        hf = build_model("qwen3", tmp_path / "hf", dtype="float32")
        leaves = maxtext_leaves(hf, scanned=True, dtype=BF16)
        root = write_orbax(tmp_path / "ckpt", leaves, scanned=True)
        result = run_check(root, hf)
        assert result.verdict == "pass"
        assert f"{len(leaves)} leaves" in result.threshold_rests_on
        swapped_gate = {**leaves}
        swap(swapped_gate, "decoder/layers/mlp/wi_0/kernel", "decoder/layers/mlp/wi_1/kernel")
        wrong = run_check(write_orbax(tmp_path / "wrong", swapped_gate, scanned=True), hf)
        assert (wrong.verdict, wrong.first_departing) == ("fail", Spot(layer=0, block=blocks.MLP))


class TestRecord:
    """What the checkpoint's own record changes."""

    @pytest.mark.parametrize(
        ("maxtext", "order", "verdict"),
        [
            ("0.2.5", "layers_first", "pass"),
            ("main", "experts_first", "pass"),
            ("main", "layers_first", "fail"),
        ],
    )
    def test_gate_bias_where_the_shape_is_silent(self, maxtext, order, verdict, tmp_path):
        hf = build_model("deepseek_v3", tmp_path / "hf", num_hidden_layers=9)
        leaves = maxtext_leaves(hf, scanned=True, bias_order=order)
        root = write_orbax(tmp_path / "ckpt", leaves, scanned=True)
        write_record(root, exact=True, maxtext=maxtext, family="deepseek_v3")
        result = run_check(root, hf)
        assert result.verdict == verdict
        assert result.first_departing == (None if verdict == "pass" else Spot(layer=1, block=blocks.ROUTER))


class TestMaxTextEngine:
    """What is asked for before MaxText is started; `tests/parity` runs it."""

    def test_needs_an_interpreter(self, tmp_path):
        with pytest.raises(BadInput, match="--engine maxtext needs --maxtext-python"):
            run_check(tmp_path, tmp_path, options=Options(engine="maxtext"))

    def test_that_is_there(self, tmp_path):
        with pytest.raises(BadInput, match="cannot be run"):
            run_check(tmp_path, tmp_path, options=Options(engine="maxtext", maxtext_python=tmp_path / "python"))

    def test_that_has_maxtext(self, tmp_path):
        with pytest.raises(BadInput, match="has no package maxtext"):
            run_check(tmp_path, tmp_path, options=Options(engine="maxtext", maxtext_python=Path(sys.executable)))

    def test_is_not_given_for_nothing(self, tmp_path):
        with pytest.raises(BadInput, match="--maxtext-python is for --engine maxtext"):
            run_check(tmp_path, tmp_path, options=Options(maxtext_python=Path(sys.executable)))


class TestInputs:
    def test_no_checkpoint(self, tmp_path, model_dir):
        with pytest.raises(BadInput, match="no Orbax checkpoint"):
            run_check(tmp_path, model_dir("llama"))

    def test_no_reference(self, tmp_path, model_dir):
        root = write_orbax(tmp_path / "ckpt", maxtext_leaves(model_dir("llama_tied"), scanned=True), scanned=True)
        with pytest.raises(BadInput, match="neither a Hugging Face directory nor a golden file"):
            run_check(root, tmp_path / "nowhere")
        (tmp_path / "hf").mkdir()
        shutil.copy(model_dir("llama_tied") / "config.json", tmp_path / "hf")
        with pytest.raises(BadInput, match="only safetensors weights are read"):
            run_check(root, tmp_path / "hf")
        with pytest.raises(BadInput, match="at least one token"):
            run_check(root, model_dir("llama_tied"), options=Options(tokens=0))

    def test_a_budget_that_is_too_small(self, tmp_path, model_dir):
        root = write_orbax(tmp_path / "ckpt", maxtext_leaves(model_dir("llama_tied"), scanned=True), scanned=True)
        with pytest.raises(BadInput, match=r"--memory-budget 0.9GiB: checking 560 tokens .* at least 1.0GiB"):
            run_check(root, model_dir("llama_tied"), options=Options(memory_budget=900 << 20))

    def test_prompt_is_cut_to_the_models_positions(self, tmp_path):
        hf = build_model("llama_tied", tmp_path / "hf", max_position_embeddings=40)
        root = write_orbax(tmp_path / "ckpt", maxtext_leaves(hf, scanned=True), scanned=True)
        assert run_check(root, hf).verdict == "pass"
        assert "40 tokens" in (root / "report" / "report.html").read_text()


def test_a_check_that_passed_is_not_done_again(tmp_path, model_dir, monkeypatch):
    hf = model_dir("llama_tied")
    root = write_orbax(tmp_path / "ckpt", maxtext_leaves(hf, scanned=True), scanned=True)
    first = run_check(root, hf, options=Options(tokens=20))
    with monkeypatch.context() as patched:
        patched.setattr(check, "_run", lambda *a, **k: pytest.fail("checked again"))
        again = run_check(root, hf, options=Options(tokens=20))
    assert (first.already, again.already) == (False, True)
    assert again.max_kl == first.max_kl
    assert not run_check(root, hf, options=Options(tokens=21)).already
    assert not run_check(root, hf, options=Options(tokens=21, max_kl=1e-3)).already
    assert not run_check(root, hf, options=Options(tokens=21)).already  # not by the threshold that was given
    (root / "0" / "items" / "note").write_text("another checkpoint now")
    assert not run_check(root, hf, options=Options(tokens=21)).already


def test_json_has_no_bare_infinity():
    result = some_result(max_kl=math.inf, mean_kl=math.inf, max_abs_diff=math.inf, layers=[])
    text = result.model_dump_json()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["max_kl"] == "Infinity"
    assert CheckResult.model_validate_json(text) == result
