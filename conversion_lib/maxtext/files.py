"""Files that a MaxText run takes: `maxtext_settings.yml`, and the model's settings beside it.

MaxText reads its own `configs/models/NAME.yml` over the file that it is given, unless a folder `models` beside that
file has one of the name. So there are two: the one to give, and the one that keeps MaxText's from being read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion_lib.maxtext.model import MaxTextModel, yaml_value
from conversion_lib.maxtext.names import TARGET_SETTINGS, model_files
from conversion_lib.record import MAXTEXT_MODELS_NAME, MAXTEXT_SETTINGS_NAME, Target
from conversion_lib.storage.files import write_atomically

USAGE = """\
# MaxText {maxtext}'s settings for this checkpoint, written by Ferry. A run takes this file in place of base.yml:
#   python -m maxtext.trainers.pre_train.train {settings} load_parameters_path=$PWD/0/items run_name=...
# It belongs with {model} beside it: without that one MaxText takes its own settings for the name.
"""


def settings_of(model: MaxTextModel, target: Target) -> dict[str, Any]:
    """Every setting that a run needs for the model and the way that its checkpoint is stored."""
    stored = {TARGET_SETTINGS.get(name, name): getattr(target, name) for name in ("scan_layers", "ocdbt", "zarr3")}
    return {"model_name": model.name, "override_model_config": True, **stored, **model.settings}


def settings_files(model: MaxTextModel, target: Target) -> dict[str, str]:
    """The files by their path beside the checkpoint."""
    own = f"{MAXTEXT_MODELS_NAME}/{model.name}.yml"
    header = USAGE.format(maxtext=target.maxtext, settings=MAXTEXT_SETTINGS_NAME, model=own)
    if model.differences:
        header += f"# {model.reason}: no setting changes that.\n"
    return {
        MAXTEXT_SETTINGS_NAME: header + _yaml({"base_config": "base.yml", **settings_of(model, target)}),
        own: _yaml(model_files()[model.name] | model.settings),
    }


def write_settings(directory: Path, model: MaxTextModel, target: Target) -> None:
    """Writes the files into `directory`. Several may do this at once."""
    for path, text in settings_files(model, target).items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / path, text.encode())


def _yaml(settings: Mapping[str, Any]) -> str:
    return "".join(f"{name}: {_quoted(value)}\n" for name, value in settings.items())


def _quoted(value: Any) -> str:
    """As `yaml_value`; a text with characters that YAML takes for its own stands between quotes."""
    special = isinstance(value, str) and not value.replace(".", "").replace("_", "").replace("-", "").isalnum()
    return f'"{value}"' if special else yaml_value(value)
