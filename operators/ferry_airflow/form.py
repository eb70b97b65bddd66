"""What the trigger form of `onboard_checkpoint` is made of: the target's params, and names of Ferry's catalogue."""

from __future__ import annotations

from airflow.sdk import Param

from conversion_lib.models.catalog import MODELS
from conversion_lib.record import CHOSEN_FIELDS, Target

MODEL_NAMES = [model.name for model in MODELS]
REPOSITORIES = list({model.family: model.repo for model in MODELS}.values())
"""One of each family: what is typed wrong is refused with the whole schema."""


def target_params(section: str) -> dict[str, Param]:
    """The params that make a Target, by name, in a section of the form: as its definition has them."""
    return {name: _param(name, section) for name in CHOSEN_FIELDS}


def _param(name: str, section: str) -> Param:
    field, values = Target.model_fields[name], Target.values_of(name)
    schema = {"type": "string", "enum": list(values)} if values else {"type": "boolean"}
    return Param(field.default, **schema, section=section, title=field.title, description=field.description)
