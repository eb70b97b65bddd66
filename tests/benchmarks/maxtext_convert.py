"""Converts one checkpoint with the real MaxText in its default mode: lazy, sharded over 16 simulated devices.

    python maxtext_convert.py SRC OUT

Run by MaxText's environment; imports nothing of Ferry. Measured as a whole process, as `ferry convert` is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

DEVICES = 16

if __name__ == "__main__":
    # before jax starts
    os.environ.update(
        XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}", JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1"
    )
    sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
    import maxtext_worker

    maxtext_worker.convert(sys.argv[1], sys.argv[2], scan=True, save_dtype="bfloat16", ocdbt=True, zarr3=True)
