"""Parts of the trigger form of `onboard_checkpoint`: the target's params, and suggestions from Ferry's catalogue."""

from __future__ import annotations

from airflow.sdk import Param

from conversion_lib.models.catalog import MODELS
from conversion_lib.record import CHOSEN_FIELDS, MAX_MODEL_KL, MAX_MODEL_KL_HELP, Target

MODEL_NAMES = [model.name for model in MODELS]
REPOSITORIES = list({model.family: model.repo for model in MODELS}.values())
"""One for each family. The list is short, since Airflow shows the whole schema when it refuses a value."""


def target_params(section: str) -> dict[str, Param]:
    """Returns the params that make up a Target, by name. Titles, descriptions and values come from Target.

    Args:
        section: The heading under which the form shows them.
    """
    return {name: _param(name, section) for name in CHOSEN_FIELDS}


def _param(name: str, section: str) -> Param:
    field, values = Target.model_fields[name], Target.values_of(name)
    schema = {"type": "string", "enum": list(values)} if values else {"type": "boolean"}
    return Param(field.default, **schema, section=section, title=field.title, description=field.description)


def max_model_kl_param(section: str) -> Param:
    """The limit on how far MaxText's function may be from the original's, in a section of the form."""
    return Param(
        MAX_MODEL_KL,
        type="number",
        minimum=0,
        section=section,
        title="Largest KL of MaxText's model",
        description=MAX_MODEL_KL_HELP,
    )
