"""MaxText's command line: `[base.yml] name=value ... --flag=value ...`, for the commands that stand in for its own.

Every setting that MaxText has is taken; what has no meaning here is named in a warning, what would be answered wrongly
is refused, and so is what MaxText does not know, with the nearest name.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conversion_lib.core.process import collect_rarely, leave, reuse_freed_memory
from conversion_lib.errors import BadInput
from conversion_lib.maxtext.names import model_of, setting_names
from conversion_lib.models.catalog import Model
from conversion_lib.program import Outcome, run_command
from conversion_lib.progress import Reporter

TRUE, FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")

COMMON = (
    "model_name",
    "base_output_directory",
    "scan_layers",
    "param_scan_axis",
    "hf_access_token",
    "use_multimodal",
    "hf_model_path",
    "overwrite",
)
"""What both commands take; `overwrite` is Ferry's own, the rest is MaxText's."""

DEFAULT_OUTPUT = "maxtext_output"
"""Where MaxText writes without a base_output_directory."""

NO_MODEL = "default"
"""The model_name of MaxText's base.yml."""

DEFAULTS_FILE = "base.yml"
"""MaxText's own configuration, which has the defaults; it is named also where MaxText is not installed."""

OVERRIDE = "M_"
"""Before the name of a setting, in capitals, in the environment: its value where the command line has none."""

REFUSED = {
    "hf_lora_adapter_path": "ferry converts no LoRA adapters",
    "lora.lora_restore_path": "ferry converts no LoRA adapters",
    "load_full_state_path": "give load_parameters_path: the optimizer's state in it is left out",
}
"""Settings with which MaxText would write something else: taken only where they are empty."""

WHY_IGNORED = {
    "lazy_load_tensors": "everything is streamed",
    "weight_dtype": "save_dtype is what the weights are written in",
    "override_model_architecture": "dimensions come from the source's own config.json",
    "override_model_config": "dimensions come from the source's own config.json",
}


@dataclass(frozen=True)
class Command:
    """What one command takes. flags: MaxText's that begin with `--`. settings: those that have a meaning."""

    flags: tuple[str, ...]
    settings: tuple[str, ...]
    switches: tuple[str, ...] = ("overwrite",)
    """Flags that stand without a value."""

    @property
    def meant(self) -> frozenset[str]:
        return frozenset((*COMMON, *self.settings))

    @property
    def names(self) -> list[str]:
        """Every name that is taken, those with a meaning first."""
        return list(dict.fromkeys((*COMMON, *self.settings, *self.flags, *setting_names())))


@dataclass(frozen=True)
class Arguments:
    """The values by name, as text.

    stated: names that the command line or the environment gives, not a file. ignored: those without a meaning here.
    """

    values: Mapping[str, str]
    stated: frozenset[str]
    ignored: tuple[str, ...]

    def text(self, name: str, default: str = "") -> str:
        """The value; empty, `None` and `null` are what MaxText takes for none."""
        value = self.values.get(name, "")
        return default if value in ("", "None", "null") else value

    def flag(self, name: str, default: bool) -> bool:
        """A truth in any of MaxText's spellings. Raises BadInput for anything else."""
        value = self.text(name).lower()
        if value and value not in (*TRUE, *FALSE):
            raise BadInput(f"{name}={self.values[name]}: write true or false")
        return value in TRUE if value else default

    def count(self, name: str, default: int) -> int:
        """A number of at least 1. Raises BadInput for anything else."""
        value = self.text(name, str(default))
        if not value.isdecimal() or int(value) < 1:
            raise BadInput(f"{name}={value}: write a number of at least 1")
        return int(value)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """One of `allowed`. Raises BadInput for anything else."""
        value = self.text(name, default)
        if value not in allowed:
            raise BadInput(f"{name}={value}: ferry takes {' and '.join(allowed)}")
        return value


def parse(words: Iterable[str], command: Command, environment: Mapping[str, str] = os.environ) -> Arguments:
    """Reads the words after the program's name.

    As in MaxText, a file that comes first gives values that neither the words nor M_NAME in the environment do, and
    flags are taken with their dashes and without. Raises BadInput for a name that MaxText does not know, a missing
    value, and what is REFUSED.
    """
    left = list(words)
    names = command.names
    values: dict[str, str] = {}
    if left and left[0].endswith((".yml", ".yaml")):
        values = _settings_in(Path(left.pop(0)), names)
    given = _given(left, command, names)
    overridden = _overridden(command, environment)
    for name in overridden.keys() & given.keys():
        raise BadInput(f"{name} is given, and {OVERRIDE}{name.upper()} in the environment: MaxText takes one of them")
    arguments = Arguments(
        values | overridden | given,
        frozenset({*overridden, *given}),
        tuple(name for name in given if name not in (*command.meant, *REFUSED)),
    )
    for name, why in REFUSED.items():
        if arguments.text(name):
            raise BadInput(f"{name}={arguments.text(name)}: {why}")
    _refuse_other_models(arguments)
    return arguments


def _given(words: list[str], command: Command, names: list[str]) -> dict[str, str]:
    """The values of the command line. Raises BadInput for a name that is not in `names`, and a missing value."""
    given: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if name not in names:
            raise BadInput(f"{word.partition('=')[0]} is not known{_nearest(name, names)}")
        if not equals and name in command.switches:
            value = "true"
        elif not equals:
            if not word.startswith("--") or not left:
                raise BadInput(f"{word} has no value: write {word}=VALUE")
            value = left.pop(0)
        given[name] = value
    return given


def _overridden(command: Command, environment: Mapping[str, str]) -> dict[str, str]:
    """What M_NAME in the environment says of the settings that have a meaning."""
    names = {*command.meant, *REFUSED} & set(setting_names())
    return {
        name: environment[f"{OVERRIDE}{name.upper()}"] for name in names if f"{OVERRIDE}{name.upper()}" in environment
    }


def _refuse_other_models(arguments: Arguments) -> None:
    if arguments.flag("use_multimodal", False):
        raise BadInput("use_multimodal=true: ferry converts the text model alone; write use_multimodal=false")
    if arguments.text("param_scan_axis", "1") != "1":
        raise BadInput(
            f"param_scan_axis={arguments.text('param_scan_axis')}: ferry stacks layers on axis 1, MaxText's default"
        )


def begin(words: Sequence[str], command: Command, reporter: Reporter) -> tuple[Arguments, Model]:
    """The arguments, and the model that they name, with a warning for what has no meaning and the token in place.

    Raises what `parse` does, and BadInput where no model is named that has a conversion here.
    """
    arguments = parse(words, command)
    name = arguments.text("model_name")
    if name in ("", NO_MODEL):
        raise BadInput("model_name is missing: write model_name=NAME, a name of `ferry models`")
    model = model_of(name)
    _tell_ignored(arguments, command, reporter)
    _use_token(arguments, reporter)
    return arguments, model


def _tell_ignored(arguments: Arguments, command: Command, reporter: Reporter) -> None:
    """One warning for the arguments that have no meaning here, with the reason where there is one to know."""
    if not arguments.ignored:
        return
    reasons = {name: why for name, why in WHY_IGNORED.items() if name not in command.meant}
    named = [f"{name} ({reasons[name]})" if name in reasons else name for name in arguments.ignored]
    reporter.say(f"warning: without meaning here, and ignored: {', '.join(named)}")


def _use_token(arguments: Arguments, reporter: Reporter) -> None:
    """Puts the Hub's token where its client looks: of hf_access_token, or of HF_AUTH_TOKEN, as MaxText's guide says."""
    if token := arguments.text("hf_access_token"):
        reporter.say("warning: hf_access_token on a command line is seen by others on this machine; set HF_TOKEN")
        os.environ["HF_TOKEN"] = token
    elif os.environ.get("HF_AUTH_TOKEN"):
        os.environ.setdefault("HF_TOKEN", os.environ["HF_AUTH_TOKEN"])


def output(arguments: Arguments, *schemes: str) -> Path | str:
    """Where to write: a directory, or what begins with one of `schemes`, as text. Raises BadInput for others."""
    given = arguments.text("base_output_directory", DEFAULT_OUTPUT)
    if given.startswith(schemes):
        return given
    if "://" in given:
        places = " or ".join(["a directory", *(f"{scheme}..." for scheme in schemes)])
        raise BadInput(f"base_output_directory={given}: give {places}")
    return Path(given).expanduser()


def run_as_command(run: Callable[[Sequence[str], Reporter], Outcome], command: Command, usage: str) -> None:
    """The life of the process: runs `run` on its words, and exits with the code that every command of Ferry has."""
    reuse_freed_memory()
    collect_rarely()
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        meant = ", ".join(sorted(command.meant))
        print(
            f"{usage}\n\nWith a meaning here: {meant}.\nMaxText's other settings are named in a warning, and ignored."
        )
        raise SystemExit(0 if words else 2)
    leave(run_command(lambda reporter: run(words, reporter)))


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest is {near[0]}" if near else ": MaxText has no such setting"


def _settings_in(path: Path, names: list[str]) -> dict[str, str]:
    """The settings of a MaxText configuration file and of those that it is based on; inner ones as `outer.inner`.

    None where there is no such file and it is MaxText's own. Raises BadInput where another is missing, is no YAML, or
    has a setting that is not in `names`.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        if path.name == DEFAULTS_FILE and isinstance(error, FileNotFoundError):
            return {}
        raise BadInput(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} has no settings: expected lines such as scan_layers: true")
    settings: dict[str, str] = {}
    if based_on := content.pop("base_config", None):
        # MaxText's own files name others from the directory of all of them
        candidates = [parent / str(based_on) for parent in path.absolute().parents]
        settings = _settings_in(next((one for one in candidates if one.is_file()), candidates[0]), names)
    known = {*names, *(part for name in names for part in name.split("."))}
    for name, value in content.items():
        if name not in known:
            raise BadInput(f"{path}: {name} is not known{_nearest(str(name), names)}")
        settings |= _flat(str(name), value)
    return settings


def _flat(name: str, value: Any) -> dict[str, str]:
    """A setting as the command line would give it, those within it by `name.inner`."""
    if isinstance(value, dict):
        return {key: text for inner, one in value.items() for key, text in _flat(f"{name}.{inner}", one).items()}
    return {name: "" if value is None else str(value)}
