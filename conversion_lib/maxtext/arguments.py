"""MaxText's command line, `[base.yml] name=value ... --flag=value ...`, for the commands that replace MaxText's own.

Every setting of MaxText is accepted. Settings without effect are named in a warning. Settings with which MaxText would
write something else are refused, and so are unknown names, with the nearest known name.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion_lib.core.documents import parse_yaml, read_limited
from conversion_lib.core.process import collect_rarely, leave, reuse_freed_memory
from conversion_lib.errors import BadInput
from conversion_lib.limits import YAML_BYTES
from conversion_lib.maxtext.names import model_of, setting_names
from conversion_lib.models.catalog import Model
from conversion_lib.program import Outcome, run_command
from conversion_lib.progress import Reporter
from conversion_lib.storage.files import expanded
from conversion_lib.storage.locations import local_path

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
"""Settings of both commands. `overwrite` is Ferry's, the others are MaxText's."""

DEFAULT_OUTPUT = "maxtext_output"
"""MaxText's output directory if base_output_directory is not given."""

NO_MODEL = "default"
"""The model_name of MaxText's base.yml."""

DEFAULTS_FILE = "base.yml"
"""MaxText's file of default settings. A command line may name it even if MaxText is not installed."""

OVERRIDE = "M_"
"""Prefix of environment variables for settings: M_NAME applies if the command line does not have the setting."""

REFUSED = {
    "hf_lora_adapter_path": "ferry does not convert LoRA adapters",
    "lora.lora_restore_path": "ferry does not convert LoRA adapters",
    "load_full_state_path": "give load_parameters_path; the optimizer's state is left out",
}
"""Settings with which MaxText would write something else. They must be empty; otherwise the text says why."""

WHY_IGNORED = {
    "lazy_load_tensors": "ferry always streams",
    "weight_dtype": "save_dtype sets the dtype of the weights",
    "override_model_architecture": "dimensions come from the source's own config.json",
    "override_model_config": "dimensions come from the source's own config.json",
}


@dataclass(frozen=True)
class Command:
    """The settings of one command.

    Attributes:
        flags: MaxText's flags, which start with `--`.
        settings: The settings that have an effect, in addition to COMMON.
        switches: Flags that may be given without a value.
    """

    flags: tuple[str, ...]
    settings: tuple[str, ...]
    switches: tuple[str, ...] = ("overwrite",)

    @property
    def meant(self) -> frozenset[str]:
        """The names of settings that have an effect."""
        return frozenset((*COMMON, *self.settings))

    @property
    def names(self) -> list[str]:
        """All names that are accepted, those with an effect first."""
        return list(dict.fromkeys((*COMMON, *self.settings, *self.flags, *setting_names())))


@dataclass(frozen=True)
class Arguments:
    """The parsed settings.

    Attributes:
        values: Values by name, as text.
        stated: Names from the command line or the environment, not from a file.
        ignored: Names from the command line that have no effect.
    """

    values: Mapping[str, str]
    stated: frozenset[str]
    ignored: tuple[str, ...]

    def text(self, name: str, default: str = "") -> str:
        """Returns the value, or `default` for a value that MaxText takes as none: empty, `None` or `null`."""
        value = self.values.get(name, "")
        return default if value in ("", "None", "null") else value

    def flag(self, name: str, default: bool) -> bool:
        """Returns a truth value.

        Raises:
            BadInput: The value is none of MaxText's spellings, which are in TRUE and FALSE.
        """
        value = self.text(name).lower()
        if value and value not in (*TRUE, *FALSE):
            raise BadInput(f"{name}={self.values[name]}: write true or false")
        return value in TRUE if value else default

    def count(self, name: str, default: int) -> int:
        """Returns a number of at least 1.

        Raises:
            BadInput: The value is anything else.
        """
        value = self.text(name, str(default))
        if not value.isdecimal() or int(value) < 1:
            raise BadInput(f"{name}={value}: write a number of at least 1")
        return int(value)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """Returns one of `allowed`.

        Raises:
            BadInput: The value is anything else.
        """
        value = self.text(name, default)
        if value not in allowed:
            raise BadInput(f"{name}={value}: ferry takes {' and '.join(allowed)}")
        return value


def parse(words: Iterable[str], command: Command, environment: Mapping[str, str] = os.environ) -> Arguments:
    """Parses the words after the program's name.

    As in MaxText, a file as the first word gives values for settings that neither the other words nor the environment
    have, and flags are accepted with and without dashes.

    Args:
        words: The words.
        command: The settings that the command has.
        environment: The variables, for M_NAME.

    Raises:
        BadInput: A name is not known to MaxText, a value is missing, a setting is given twice, or a setting is refused.
    """
    left = list(words)
    names = command.names
    values: dict[str, str] = {}
    if left and left[0].endswith((".yml", ".yaml")):
        values = _settings_in(Path(left.pop(0)), names)
    given = _given(left, command, names)
    overridden = _overridden(command, environment)
    for name in overridden.keys() & given.keys():
        raise BadInput(
            f"{name} is given, and {OVERRIDE}{name.upper()} in the environment: MaxText accepts only one of them"
        )
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
    """Returns the values of the command line. Raises BadInput for a name that is not in `names` or a missing value."""
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
    """Returns the values of M_NAME in the environment, for settings that have an effect."""
    names = {*command.meant, *REFUSED} & set(setting_names())
    return {
        name: environment[f"{OVERRIDE}{name.upper()}"] for name in names if f"{OVERRIDE}{name.upper()}" in environment
    }


def _refuse_other_models(arguments: Arguments) -> None:
    if arguments.flag("use_multimodal", False):
        raise BadInput("use_multimodal=true: ferry converts only the text model; write use_multimodal=false")
    if arguments.text("param_scan_axis", "1") != "1":
        raise BadInput(
            f"param_scan_axis={arguments.text('param_scan_axis')}: ferry stacks layers on axis 1, MaxText's default"
        )


def begin(words: Sequence[str], command: Command, reporter: Reporter) -> tuple[Arguments, Model]:
    """Parses the arguments, warns about settings without effect, and sets the token for the Hub's client.

    Args:
        words: The words after the program's name.
        command: The settings that the command has.
        reporter: Shows the warnings.

    Returns:
        The arguments, and the model that model_name means.

    Raises:
        BadInput: As for `parse`, model_name is missing, or Ferry has no conversion for the model.
    """
    arguments = parse(words, command)
    name = arguments.text("model_name")
    if name in ("", NO_MODEL):
        raise BadInput("model_name is missing: write model_name=NAME with a name from `ferry models`")
    model = model_of(name)
    _tell_ignored(arguments, command, reporter)
    _use_token(arguments, reporter)
    return arguments, model


def _tell_ignored(arguments: Arguments, command: Command, reporter: Reporter) -> None:
    """Shows one warning for all arguments that have no effect, with the reasons that are known."""
    if not arguments.ignored:
        return
    reasons = {name: why for name, why in WHY_IGNORED.items() if name not in command.meant}
    named = [f"{name} ({reasons[name]})" if name in reasons else name for name in arguments.ignored]
    reporter.say(f"warning: ignored, since they have no effect here: {', '.join(named)}")


def _use_token(arguments: Arguments, reporter: Reporter) -> None:
    """Sets HF_TOKEN from hf_access_token, or from HF_AUTH_TOKEN, which MaxText's guide uses."""
    if token := arguments.text("hf_access_token"):
        reporter.say(
            "warning: other users of this machine can see hf_access_token on a command line; set HF_TOKEN instead"
        )
        os.environ["HF_TOKEN"] = token
    elif os.environ.get("HF_AUTH_TOKEN"):
        os.environ.setdefault("HF_TOKEN", os.environ["HF_AUTH_TOKEN"])


def output(arguments: Arguments, *schemes: str) -> Path | str:
    """Returns base_output_directory.

    Args:
        arguments: The arguments.
        *schemes: URL schemes that are accepted, such as `gs://`.

    Returns:
        A directory, or a URL as text.

    Raises:
        BadInput: The URL has another scheme.
    """
    given = arguments.text("base_output_directory", DEFAULT_OUTPUT)
    if given.startswith(schemes):
        return given
    accepted = " or ".join(["a directory", *(f"{scheme}..." for scheme in schemes)])
    return expanded(local_path(given, f"{accepted}, for base_output_directory"))


def run_as_command(run: Callable[[Sequence[str], Reporter], Outcome], command: Command, usage: str) -> None:
    """Runs a command as the whole process, and exits with the exit code of Ferry's commands.

    Args:
        run: The command, called with the words after the program's name.
        command: Its settings, for the help text.
        usage: The first lines of the help text.

    Raises:
        SystemExit: The command succeeded, or only the help was shown. After a failure the process ends at once.
    """
    reuse_freed_memory()
    collect_rarely()
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        meant = ", ".join(sorted(command.meant))
        print(f"{usage}\n\nSettings with an effect: {meant}.\nMaxText's other settings are ignored, with a warning.")
        raise SystemExit(0 if words else 2)
    leave(run_command(lambda reporter: run(words, reporter)))


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest is {near[0]}" if near else ": MaxText has no such setting"


def _settings_in(path: Path, names: list[str], above: tuple[Path, ...] = ()) -> dict[str, str]:
    """Returns the settings of a MaxText configuration file and of its base files; nested ones as `outer.inner`.

    If the file is MaxText's own and does not exist, there are none. Raises BadInput if another file is missing, is not
    YAML, has a setting that is not in `names`, or is its own base (`above`: the files whose base it is).
    """
    if "\0" in str(path):
        raise BadInput(f"{path}: no such configuration file")
    if path.resolve() in above:
        raise BadInput(f"{above[-1]}: base_config names {path}, which is based on it")
    try:
        content = parse_yaml(read_limited(path, YAML_BYTES), path)
    except OSError as error:
        if path.name == DEFAULTS_FILE and isinstance(error, FileNotFoundError):
            return {}
        raise BadInput(f"{path}: no such configuration file") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} has no settings: expected lines such as scan_layers: true")
    settings: dict[str, str] = {}
    if based_on := content.pop("base_config", None):
        # MaxText's own files name others relative to the directory of all of them
        candidates = [parent / str(based_on) for parent in path.absolute().parents]
        try:
            base = next((one for one in candidates if one.is_file()), candidates[0])
        except OSError as error:
            raise BadInput(f"{path}: base_config is no file's name: {error.strerror}") from None
        settings = _settings_in(base, names, (*above, path.resolve()))
    known = {*names, *(part for name in names for part in name.split("."))}
    for name, value in content.items():
        if name not in known:
            raise BadInput(f"{path}: {name} is not known{_nearest(str(name), names)}")
        settings |= _flat(str(name), value)
    return settings


def _flat(name: str, value: Any) -> dict[str, str]:
    """Returns a setting as on the command line; nested ones as `name.inner`."""
    if isinstance(value, dict):
        return {key: text for inner, one in value.items() for key, text in _flat(f"{name}.{inner}", one).items()}
    return {name: "" if value is None else str(value)}
