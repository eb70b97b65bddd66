"""MaxText's command line: `[base.yml] name=value ... --flag=value ...`, for the commands that stand in for its own.

Every setting that MaxText has is taken; what has no meaning here is named in a warning, what would be answered wrongly
is refused, and so is what MaxText does not know, with the nearest name.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conversion_lib.command import Outcome, run_command
from conversion_lib.errors import BadInput
from conversion_lib.maxtext_names import setting_names
from conversion_lib.process import collect_rarely, reuse_freed_memory
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
    """The values by name, as text. ignored: names that were given and have no meaning here."""

    values: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

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


def parse(words: Iterable[str], command: Command) -> Arguments:
    """Reads the words after the program's name.

    A file that comes first gives values that the words do not; flags are taken with their dashes and without, as
    MaxText does. Raises BadInput for a name that MaxText does not know, a missing value, and what is REFUSED.
    """
    left = list(words)
    from_file: dict[str, str] = {}
    if left and left[0].endswith((".yml", ".yaml")):
        from_file = _settings_in(Path(left.pop(0)), command.meant)
    given: dict[str, str] = {}
    names = command.names
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
    for name, why in REFUSED.items():
        if given.get(name):
            raise BadInput(f"{name}={given[name]}: {why}")
    ignored = tuple(name for name in given if name not in command.meant and name not in REFUSED)
    arguments = Arguments({**from_file, **given}, ignored)
    _refuse_other_models(arguments)
    return arguments


def _refuse_other_models(arguments: Arguments) -> None:
    if arguments.flag("use_multimodal", False):
        raise BadInput("use_multimodal=true: ferry converts the text model alone; write use_multimodal=false")
    if arguments.text("param_scan_axis", "1") != "1":
        raise BadInput(
            f"param_scan_axis={arguments.text('param_scan_axis')}: ferry stacks layers on axis 1, MaxText's default"
        )


def tell_ignored(arguments: Arguments, command: Command, reporter: Reporter) -> None:
    """One warning for the arguments that have no meaning here, with the reason where there is one to know."""
    if not arguments.ignored:
        return
    reasons = {name: why for name, why in WHY_IGNORED.items() if name not in command.meant}
    named = [f"{name} ({reasons[name]})" if name in reasons else name for name in arguments.ignored]
    reporter.say(f"warning: without meaning here, and ignored: {', '.join(named)}")


def use_token(arguments: Arguments, reporter: Reporter) -> None:
    """Puts the Hub's token where its client looks: of hf_access_token, or of HF_AUTH_TOKEN, as MaxText's guide says."""
    if token := arguments.text("hf_access_token"):
        reporter.say("warning: hf_access_token on a command line is seen by others on this machine; set HF_TOKEN")
        os.environ["HF_TOKEN"] = token
    elif os.environ.get("HF_AUTH_TOKEN"):
        os.environ.setdefault("HF_TOKEN", os.environ["HF_AUTH_TOKEN"])


def output_directory(arguments: Arguments) -> Path:
    """Where to write. Raises BadInput for what is no directory."""
    given = arguments.text("base_output_directory", DEFAULT_OUTPUT)
    if "://" in given:
        raise BadInput(f"base_output_directory={given}: give a directory")
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
    raise SystemExit(run_command(lambda reporter: run(words, reporter)))


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest is {near[0]}" if near else ": MaxText has no such setting"


def _settings_in(path: Path, names: frozenset[str]) -> dict[str, str]:
    """The values of `names` at the top level of a MaxText configuration file.

    None where there is no such file: MaxText's own base.yml is named where MaxText need not be installed, and has
    the defaults. Raises BadInput where another file is missing.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        if path.name == "base.yml":
            return {}
        raise BadInput(f"{path}: no such configuration file") from None
    lines = re.findall(r"^(\w+):[ \t]*([^#\n]*)", text, re.MULTILINE)
    return {name: value.strip().strip("\"'") for name, value in lines if name in names}
