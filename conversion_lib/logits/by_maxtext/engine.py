"""The real MaxText as the engine of a check: it runs in its own interpreter, on the same tokens, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import deque
from pathlib import Path

import numpy as np

from conversion_lib.core.child import Child
from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.logits.by_maxtext.settings import EXACT, model_settings
from conversion_lib.logits.reference.reference import Reference
from conversion_lib.models.hf_config import CONFIG_NAME, ModelConfig
from conversion_lib.progress import Reporter
from conversion_lib.sources.orbax import Where, open_orbax

WORKER = Path(__file__).with_name("worker.py")
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Not passed on: the worker downloads nothing."""
ENDING_SECONDS = 5.0
"""Time for MaxText to exit when the check is interrupted."""


def require_maxtext(python: Path | None) -> None:
    """Checks the interpreter for the engine `maxtext`.

    Raises:
        BadInput: It is None, cannot be run, or has no package maxtext.
    """
    if python is None:
        raise BadInput("--engine maxtext needs --maxtext-python, the interpreter of an environment that has MaxText")
    look = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('maxtext') else 3)"
    try:
        found = subprocess.run([str(python), "-c", look], capture_output=True, check=False).returncode
    except OSError as error:
        raise BadInput(f"--maxtext-python {python} cannot be run: {error.strerror}") from None
    if found:
        raise BadInput(f"--maxtext-python {python} has no package maxtext: pip install maxtext==0.2.5 there")


def maxtext_logits(python: Path, checkpoint: Where, reference: Reference, reporter: Reporter) -> list[Array]:
    """Computes the logits of a checkpoint with MaxText, which holds the whole model in memory, in float32.

    Args:
        python: The interpreter that has MaxText.
        checkpoint: DST, DST/0 or DST/0/items.
        reference: Its config and its prompts are used.
        reporter: Shows messages.

    Returns:
        float32 (tokens, vocabulary) for each prompt, with MaxText's padding of the vocabulary.

    Raises:
        BadInput: There are no settings for MaxText's model of this architecture, or the checkpoint does not say
            whether its layers are scanned.
        OutsideFailure: MaxText ended with an error; the message has its last line.
    """
    source = open_orbax(checkpoint)
    scanned = source.scan_layers
    if scanned is None:
        raise BadInput(f"{checkpoint} does not say whether its layers are scanned, and MaxText needs to know")
    settings = model_settings(ModelConfig(reference.config, CONFIG_NAME), scanned, source.ocdbt, source.zarr3)
    reporter.say("computing the checkpoint's logits with MaxText, which holds the whole model in memory")
    with tempfile.TemporaryDirectory(prefix="ferry-maxtext-") as scratch:
        tokens, logits, job = (Path(scratch) / name for name in ("tokens.npz", "logits.npz", "job.json"))
        np.savez(tokens, *reference.prompts)
        content = {
            "settings": [*settings, *EXACT],
            "items": str(source.items),
            "tokens": str(tokens),
            "logits": str(logits),
        }
        job.write_text(json.dumps(content))
        environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
        environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        command = [str(python.absolute()), "-P", str(WORKER), str(job)]
        with Child(command, grace_seconds=ENDING_SECONDS, env=environment, cwd=scratch) as child:
            last = deque(child.lines(), maxlen=1)
            code = child.wait()
        if code:
            said = last[0] if last else "no message"
            raise OutsideFailure(f"MaxText failed on {checkpoint} (exit {code}): {said[:500]}")
        with np.load(logits) as arrays:
            return [arrays[f"arr_{index}"] for index in range(len(reference.prompts))]
