"""The table of MaxText's models (`conversion_lib/maxtext/table.py`) against the installed MaxText.

Every key that changes the function is given another value, on the same weights. The table says what MaxText then
computes, as a config.json; Ferry's own forward pass runs that, and MaxText has to agree with it. Where the table says
that MaxText does not follow, it must not agree with the changed original.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conversion_lib.conversions.convert import convert
from conversion_lib.logits.by_maxtext.settings import EXACT, model_settings
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.forward import ForwardPass
from conversion_lib.logits.verdict.compare import compare_logits
from conversion_lib.maxtext.entries import Entry, InWeights
from conversion_lib.maxtext.files import settings_files, settings_of
from conversion_lib.maxtext.model import MaxTextModel, maxtext_model
from conversion_lib.maxtext.names import _facts, model_files
from conversion_lib.maxtext.table import DEEPSEEK, DELTA_NETS, FULL, GEMMA4_SMALL, MODELS, SIZES, SLIDING
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.record import Target
from conversion_lib.sources.orbax import open_orbax
from tests.parity.harness import MAXTEXT_PYTHON
from tests.support.family import Changed, descriptions
from tests.support.tiny_models import make_tiny, prompt

CONFIGS = MAXTEXT_PYTHON.parents[1] / "lib" / "python3.12" / "site-packages" / "maxtext" / "configs"
TOKENS = 96
AGREES, DEPARTS = 1e-6, 1e-5
"""The largest KL of a token: of one function computed twice, and of two functions."""

SIZE_KEYS = {
    *SIZES,
    *("head_dim", "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "top_k_experts"),
    *("n_shared_experts", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim"),
    *(key for key in DELTA_NETS if key.startswith("linear_")),
    *("global_head_dim", "num_global_key_value_heads", "attention_k_eq_v"),
    *(set(GEMMA4_SMALL) - set(DEEPSEEK) - {"final_logit_softcapping", "sliding_window", "use_bidirectional_attention"}),
} - {"rms_norm_eps", "hidden_activation"}
"""Other values are other tensors: the parity tests run models of several sizes."""

ELSEWHERE = {
    "tie_word_embeddings": "a head of its own is another tensor: tied and untied models are among the parity cases",
    "attention_bias": "has tensors, which the conversion refuses",
    "mlp_bias": "has tensors, which the conversion refuses",
    "hidden_act": "the logit check refuses any but the class's own",
    "hidden_activation": "the logit check refuses any but the class's own",
    "layer_types": "the conversion refuses any other order",
    "use_bidirectional_attention": "the logit check refuses it",
    "latent_norm_eps": "follows rms_norm_eps: seen where that is changed",
    "swiglu_alpha": "the logit check has the one value",
}


QWEN3_MOE = {"norm_topk_prob": True}
PLAIN = {"rope_type": "default", "rope_theta": 777.0}
LINEAR = {"rope_type": "linear", "rope_theta": 777.0, "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 777.0,
    "factor": 3.0,
    "original_max_position_embeddings": 40,
    "beta_fast": 5.0,
    "beta_slow": 2.0,
    "truncate": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 777.0,
    "factor": 32.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}
EPS = {"rms_norm_eps": 0.05}
MLA_YARN = YARN | {"mscale": 0.8, "mscale_all_dim": 0.8}


def halves(kind: str, family: str, changes: dict[str, Any], **more: Any) -> Iterator[Changed]:
    """A family whose RoPE turns halves, under each kind of scaling."""
    yield Changed(kind, family, EPS | changes, rope=PLAIN, name="default", **more)
    yield Changed(kind, family, EPS | changes, rope=LINEAR, name="linear", **more)
    yield Changed(kind, family, EPS | changes, rope=YARN, name="yarn", core=kind == "qwen3", **more)
    unscaled = YARN | {"attention_factor": 1.0}
    if kind == "qwen2":
        fractions = YARN | {"rope_theta": 777.7, "factor": 2.4, "beta_fast": 5.3, "beta_slow": 1.8}
        yield Changed(kind, family, EPS, False, rope=fractions, name="fractions")
        yield Changed(kind, family, EPS | changes, rope=unscaled, name="yarn_without_temperature", **more)
        other = YARN | {"attention_factor": 1.7}
        yield Changed(kind, family, EPS, False, rope=other, name="yarn_with_another_temperature", **more)
        yield Changed(kind, family, EPS, False, rope=LLAMA3, name="llama3", **more)


CASES = (
    Changed("llama", "llama3.1", EPS, rope=PLAIN),
    Changed("llama", "llama3.1", EPS, False, rope=LLAMA3, name="llama3", core=True),
    Changed("llama", "llama3.1", EPS, False, rope=YARN, name="yarn"),
    *halves("qwen2", "qwen2.5", {}),
    *halves("qwen3", "qwen3", {}),
    *halves("qwen3_moe", "qwen3_moe", {"num_experts_per_tok": 2}, make=QWEN3_MOE),
    *(
        Changed(kind, family, {"use_sliding_window": True, "sliding_window": 7, **more}, False, name="window")
        for kind, family, more in (
            ("qwen2", "qwen2.5", {"max_window_layers": 1, "layer_types": None}),
            ("qwen3", "qwen3", {"max_window_layers": 1, "layer_types": [FULL, SLIDING]}),
            ("qwen3_moe", "qwen3_moe", QWEN3_MOE),
        )
    ),
    Changed("mixtral", "mixtral", {"sliding_window": 7}, False, name="window"),
    Changed(
        "qwen3_moe",
        "qwen3_moe",
        {"norm_topk_prob": False},
        False,
        rope=PLAIN,
        name="not_normalized",
        core=True,
        make=QWEN3_MOE,
    ),
    *halves("mixtral", "mixtral", {"num_experts_per_tok": 3}),
    *halves("gpt_oss", "gpt_oss", {"num_experts_per_tok": 3, "swiglu_limit": 0.4, "sliding_window": 7}),
    Changed(
        "qwen3_next",
        "qwen3_next",
        EPS | {"num_experts_per_tok": 2},
        rope=PLAIN | {"partial_rotary_factor": 0.5},
        layers=4,
    ),
    Changed("qwen3_next", "qwen3_next", {"norm_topk_prob": False}, False, layers=4, name="not_normalized"),
    Changed(
        "qwen3_5_moe",
        "qwen3.5",
        EPS | {"num_experts_per_tok": 2},
        rope=PLAIN | {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]},
        layers=4,
    ),
    Changed(
        "gemma2",
        "gemma2",
        {"sliding_window": 7, "final_logit_softcapping": 0.7, "attn_logit_softcapping": 0.3},
        rope=LINEAR,
        name="linear",
    ),
    Changed("gemma2", "gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}, rope=YARN),
    Changed("gemma2", "gemma2", EPS, False, name="eps"),
    Changed(
        "gemma3",
        "gemma3",
        {"sliding_window": 7, "final_logit_softcapping": 0.7},
        rope={SLIDING: {"rope_type": "default", "rope_theta": 333.0}, FULL: LINEAR},
        layers=6,
        name="linear",
        core=True,
    ),
    Changed(
        "gemma3",
        "gemma3",
        {"query_pre_attn_scalar": 16},
        rope={SLIDING: {"rope_type": "default", "rope_theta": 333.0}, FULL: PLAIN},
        layers=6,
        name="as_27b",
    ),
    Changed("gemma3", "gemma3", {"query_pre_attn_scalar": 5}, False, layers=6, name="another_scalar"),
    Changed("gemma3", "gemma3", EPS, False, layers=6, name="eps"),
    *(
        Changed(
            kind,
            family,
            {"sliding_window": 7, "final_logit_softcapping": 0.7},
            rope={
                SLIDING: {"rope_type": "default", "rope_theta": 333.0},
                FULL: {"rope_type": "proportional", "rope_theta": 777.0, "partial_rotary_factor": 0.5},
            },
            **more,
        )
        for kind, family, more in (
            ("gemma4", "gemma4", {"layers": 6, "make": {"enable_moe_block": True}}),
            ("gemma4_dense", "gemma4", {"layers": 6, "make": {"enable_moe_block": False}}),
            ("gemma4_e2b", "gemma4_small", {"layers": 10, "scan": False}),
        )
    ),
    Changed("gemma4_dense", "gemma4", EPS, False, layers=6, make={"enable_moe_block": False}, name="eps"),
    Changed("deepseek_v2", "deepseek_v2", {"routed_scaling_factor": 3.0, "num_experts_per_tok": 2}, rope=PLAIN),
    Changed("deepseek_v2", "deepseek_v2", {"routed_scaling_factor": 3.0}, rope=MLA_YARN, name="yarn"),
    Changed("deepseek_v2", "deepseek_v2", EPS, False, rope=PLAIN, name="eps"),
    Changed(
        "deepseek_v2",
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 2},
        False,
        rope=PLAIN,
        name="groups",
    ),
    *(
        Changed(
            kind,
            kind,
            {"routed_scaling_factor": 3.0, "num_experts_per_tok": 3, "n_group": 5, "topk_group": 3, **more},
            rope=rope,
            name=name,
            core=(kind, name) == ("deepseek_v3", "yarn"),
        )
        for kind, more in (("deepseek_v3", {}), ("deepseek_v32", {"index_topk": 5}))
        for name, rope in (("default", PLAIN), ("yarn", MLA_YARN))
    ),
    Changed("deepseek_v3", "deepseek_v3", {"rope_interleave": False}, rope=MLA_YARN, name="not_interleaved"),
    Changed("deepseek_v3", "deepseek_v3", {}, rope=YARN, name="temperature_on_rope"),
    Changed("deepseek_v3", "deepseek_v3", {"norm_topk_prob": False}, False, rope=PLAIN, name="not_normalized"),
    Changed("deepseek_v3", "deepseek_v3", EPS, False, rope=PLAIN, name="eps"),
    *(case for described in descriptions().values() for case in described.parity.changed),
)


LIKE = {"gemma4": "gemma4_dense", "gemma4_e2b": "gemma4_dense", "gemma4_e4b": "gemma4_dense"}
LIKE["deepseek_v32"] = "deepseek_v3"
"""Models that share MaxText's code for the keys that are changed for another."""


@dataclass
class Seen:
    """MaxText's logits of a case, and Ferry's: of what the table says of MaxText, of the changed config, and before."""

    theirs: list[np.ndarray]
    expected: list[np.ndarray]
    changed: list[np.ndarray]
    model: MaxTextModel


class Runs:
    """Every selected case, run once; MaxText does all of them in two processes."""

    def __init__(self, work: Path, cases: list[Changed]) -> None:
        self._work, self.errors = work, {}
        self.seen: dict[str, Seen] = {}
        jobs = {str(case): self._prepare(case) for case in cases}
        names = list(jobs)
        workers = [(names[half::2], self._start(half, [jobs[name] for name in names[half::2]])) for half in (0, 1)]
        for half, (mine, process) in enumerate(workers):
            assert process.wait() == 0, (work / f"{half}.log").read_text()[-2000:]
            for name, answer in zip(mine, json.loads((work / f"{half}.answers.json").read_text()), strict=True):
                if "error" in answer:
                    self.errors[name] = answer["error"]
                else:
                    self.seen[name].theirs = [np.load(work / f"{name}.npy")]

    def _prepare(self, case: Changed) -> dict[str, Any]:
        directory = self._model(case)
        hf = directory / "hf"
        raw = changed_config(json.loads((hf / "config.json").read_text()), case)
        model = maxtext_model(ModelConfig(raw, hf))
        assert model is not None
        tokens = prompt(TOKENS, raw.get("text_config", raw)["vocab_size"])
        np.save(directory / "tokens.npy", tokens)
        checkpoint = open_orbax(directory / "ckpt")

        def logits(config: dict[str, Any]) -> list[np.ndarray]:
            return ForwardPass(checkpoint, parse_config(config), [tokens], bias_order="layers_first").run()

        expected = logits(model.config)
        self.seen[str(case)] = Seen([], expected, logits(raw) if model.differs else expected, model)
        return {
            "kind": "logits",
            "checkpoint": str(directory / "ckpt"),
            "settings": [*model_settings(ModelConfig(raw, hf), case.scan), *EXACT],
            "tokens": str(directory / "tokens.npy"),
            "out": str(self._work / f"{case}.npy"),
        }

    def _model(self, case: Changed) -> Path:
        """The weights are those of all cases of a model."""
        directory = self._work / f"{case.kind}-{case.layers}"
        if not directory.exists():
            make_tiny(case.family, directory / "hf", layers=case.layers, **case.make)
            convert(directory / "hf", directory / "ckpt", Target(save_dtype="float32", scan_layers=case.scan))
        return directory

    def _start(self, half: int, jobs: list[dict[str, Any]]) -> subprocess.Popen[bytes]:
        asked, answers = (self._work / f"{half}.{word}.json" for word in ("jobs", "answers"))
        asked.write_text(json.dumps(jobs))
        script = Path(__file__).with_name("maxtext_worker.py")
        with (self._work / f"{half}.log").open("wb") as log:
            return subprocess.Popen([MAXTEXT_PYTHON, script, asked, answers], stdout=log, stderr=subprocess.STDOUT)


def changed_config(raw: dict[str, Any], case: Changed) -> dict[str, Any]:
    text = raw.get("text_config", raw)
    text.update(case.changes)
    if case.rope is not None:
        text.pop("rope_scaling", None)
        text["rope_parameters"] = case.rope
    return raw


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if not MAXTEXT_PYTHON.exists():
        pytest.exit("the MaxText environment is missing: run tests/parity/run.sh", returncode=2)
    asked = [item.callspec.params.get("changed") for item in request.session.items if hasattr(item, "callspec")]
    return Runs(tmp_path_factory.mktemp("table"), [case for case in CASES if case in asked])


def cases() -> list[Any]:
    return [pytest.param(case, id=str(case), marks=[pytest.mark.core] if case.core else []) for case in CASES]


@pytest.mark.parametrize("changed", cases())
def test_maxtext_computes_what_the_table_says(runs: Runs, changed: Changed) -> None:
    assert runs.errors.get(str(changed)) is None
    seen = runs.seen[str(changed)]
    assert compare_logits(seen.expected, seen.theirs).max_kl < AGREES
    assert seen.model.differs is not changed.follows
    if not changed.follows:
        assert compare_logits(seen.changed, seen.theirs).max_kl > DEPARTS


@pytest.mark.core
@pytest.mark.parametrize("name", model_files())
def test_the_files_of_models_are_maxtexts(name: str) -> None:
    assert settings_in(CONFIGS / "models" / f"{name}.yml") == model_files()[name]


@pytest.mark.core
def test_the_base_file_is_maxtexts() -> None:
    assert _facts()["base_file"].items() <= settings_in(CONFIGS / "base.yml").items()


@pytest.mark.core
@pytest.mark.parametrize("kind", MODELS)
def test_every_key_is_changed_in_some_case(kind: str) -> None:
    known: dict[str, Entry] = MODELS[kind].keys
    changed = {key for case in CASES if case.kind in (kind, LIKE.get(kind)) for key in case.changes}
    left = {key for key, entry in known.items() if not isinstance(entry, InWeights)} - changed - SIZE_KEYS
    assert left - set(ELSEWHERE) == set()


@pytest.mark.core
def test_maxtext_takes_the_settings_that_lie_beside_a_checkpoint(tmp_path: Path) -> None:
    """Given alone, as a run's configuration, and pasted on a command line."""
    hf = make_tiny("gemma3", tmp_path / "hf", layers=6)
    model = maxtext_model(ModelConfig(json.loads((hf / "config.json").read_text()), hf))
    assert model is not None
    target = Target(scan_layers=False, zarr3=False)
    for path, text in settings_files(model, target).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    wanted = settings_of(model, target)
    program = (
        "import json, sys\nfrom maxtext.configs import pyconfig\nconfig = pyconfig.initialize(sys.argv[2:])\n"
        "json.dump({name: getattr(config, name) for name in json.loads(sys.argv[1])}, sys.stdout,"
        " default=lambda value: getattr(value, 'value', str(value)))"
    )
    from conversion_lib.maxtext.model import arguments

    quiet = ["run_name=x", "log_config=false", "hardware=cpu", "skip_jax_distributed_system=true"]
    for given in ([str(tmp_path / "maxtext_settings.yml")], [str(CONFIGS / "base.yml"), *arguments(wanted)]):
        command = [MAXTEXT_PYTHON, "-c", program, json.dumps(list(wanted)), "maxtext", *given, *quiet]
        answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
        found = json.loads(answer.splitlines()[-1])
        # MaxText keeps a soft cap of 0 as none
        assert {name: 0 if found[name] is None else found[name] for name in wanted} == wanted


def settings_in(path: Path) -> dict[str, Any]:
    """A file of MaxText's. YAML 1.1, which PyYAML reads, takes 1e-6 for a text."""

    def number(value: Any) -> Any:
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    return {name: number(value) for name, value in yaml.safe_load(path.read_text()).items()}
