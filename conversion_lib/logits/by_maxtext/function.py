"""Whether MaxText computes what the original does: the checkpoint's own weights by both functions.

Right weights are not enough. MaxText's model of an architecture has constants of its own, and lacks what some models
have. `conversion_lib.maxtext.table` says what; here the forward pass runs what the table says of a config.json, so that
the table and the forward pass are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.forward import ForwardPass
from conversion_lib.logits.run import Subject
from conversion_lib.logits.verdict.compare import compare_logits
from conversion_lib.logits.verdict.result import ModelPart
from conversion_lib.maxtext.model import MaxTextModel
from conversion_lib.progress import Reporter


def maxtext_function_logits(
    subject: Subject, model: MaxTextModel | None, prompts: Sequence[Array], reporter: Reporter
) -> list[Array] | None:
    """What the checkpoint's weights give by MaxText's function: float32 (tokens, vocabulary) for each prompt.

    None where that is the original's, or nothing is known of it: nothing is run.
    """
    if model is None or not model.differs:
        return None
    total = sum(info.nbytes for info in subject.checkpoint.tensors.values())
    with reporter.task("logits by MaxText's function", total) as task:
        return ForwardPass(
            subject.checkpoint,
            parse_config(model.config, "what MaxText computes"),
            prompts,
            bias_order=subject.bias_order,
            memory=subject.memory,
            task=task,
        ).run()


def model_part(
    model: MaxTextModel | None, original: Sequence[Array], theirs: Sequence[Array] | None, limit: float
) -> ModelPart:
    """The verdict on MaxText's model.

    Args:
        model: What is known of it; None: nothing.
        original: Logits of the checkpoint's weights by the original's function.
        theirs: The same by MaxText's; None where the functions are one.
        limit: The largest KL of a token, in nats.
    """
    kl = 0.0 if theirs is None else compare_logits(original, theirs).max_kl
    return ModelPart(
        verdict="pass" if math.isfinite(kl) and kl <= limit else "fail",
        max_kl=kl,
        threshold=limit,
        differs=model.reason if model else "",
        settings=model.run_settings if model else {},
    )
