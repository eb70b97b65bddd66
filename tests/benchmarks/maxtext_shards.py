"""How the real MaxText cuts each parameter of a model over devices: what a reader of a checkpoint asks for.

    python maxtext_shards.py MODEL DEVICES fsdp|expert

Run by MaxText's environment; imports nothing of Ferry. Prints one JSON object, path of a scanned parameter -> its
`shape` and the `parts` that each axis is cut into. Nothing is allocated: the model stays abstract.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def shards(model: str, devices: int, axis: str) -> dict[str, dict[str, list[int]]]:
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.layers import moe
    from maxtext.utils import model_creation_utils
    from maxtext_worker import _mesh

    base = Path(sys.modules["maxtext"].__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(
        [
            "maxtext",
            str(base),
            f"model_name={model}",
            f"ici_{axis}_parallelism={devices}",
            *(["ici_fsdp_parallelism=1"] if axis != "fsdp" else []),
            "scan_layers=true",
            "run_name=shards",
            "hardware=cpu",
            "skip_jax_distributed_system=true",
            "attention=dot_product",
            "log_config=false",
        ]
    )
    mesh = _mesh(config)
    _, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(abstract, (nnx.Param, moe.MoEBiasVar))):
        value = leaf.get_value()
        shard = value.sharding.shard_shape(value.shape)
        parts = [whole // part for whole, part in zip(value.shape, shard, strict=True)]
        found["/".join(map(str, path))] = {"shape": list(value.shape), "parts": parts}
    return found


if __name__ == "__main__":
    model, devices, axis = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    # before jax starts
    os.environ.update(
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1"
    )
    sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
    import maxtext.configs.pyconfig  # noqa: F401 - so that the package is there to be asked for its place

    print(json.dumps(shards(model, devices, axis)))
