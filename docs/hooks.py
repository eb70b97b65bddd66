"""What mkdocs calls while it builds the site: the reference that is generated from the code, and links out of docs/.

A page holds `<!-- generated: NAME -->` where a table of that name goes, so that it also exists where nobody builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from conversion_lib.cli.main import app
from conversion_lib.models.catalog import MODELS
from conversion_lib.models.verified import LAYOUTS, LEGEND, load

ROOT = Path(__file__).parents[1]
PLACEHOLDER = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
SHARED = ("json_output", "quiet", "log_format", "version")
GROUPS = {
    "Look": ("models", "plan", "inspect", "compare"),
    "Convert": ("dequantize", "convert", "finalize", "export", "clean"),
    "Check": ("check",),
    "Bring in and out": ("download", "publish", "verify", "prune"),
    "Try": ("demo",),
}


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what is generated, and shows links to files outside docs/ as their names: they are not in the site."""
    text = PLACEHOLDER.sub(lambda found: "\n".join(_generated(found[1], page)), markdown)
    return LINK.sub(lambda found: _link(found, page, Path(config.docs_dir)), text)


def _generated(name: str, page: Page) -> Iterator[str]:
    generators = {"commands": commands, "models": models}
    if name not in generators:
        raise PluginError(f"{page.file.src_uri}: nothing generates {name}")
    return generators[name]()


def _link(found: re.Match[str], page: Page, docs: Path) -> str:
    text, address, _ = found.groups()
    target = (docs / page.file.src_uri).parent.joinpath(address).resolve()
    if target.is_relative_to(docs):
        return found[0]
    if not target.exists():
        raise PluginError(f"{page.file.src_uri}: {address} does not exist")
    name = target.relative_to(ROOT).as_posix()
    return text if text.strip("`") == name else f"{text} (`{name}`)"


def commands() -> Iterator[str]:
    """Every command of `ferry` with its arguments and options, as `--help` has them."""
    group: Any = get_command(app)
    top = group.context_class(group, info_name="ferry")
    if missing := set(group.commands) ^ {name for names in GROUPS.values() for name in names}:
        raise PluginError(f"docs/hooks.py and the command line disagree about {sorted(missing)}")
    yield from ("## Options of every command", "")
    first = group.commands["plan"]
    yield from _table("option", [p for p in first.params if p.name in SHARED], first, top)
    for title, names in GROUPS.items():
        yield from (f"## {title}", "")
        for name in names:
            yield from _command(group.commands[name], name, top)


def _command(command: Any, name: str, top: Any) -> Iterator[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in SHARED]
    words = [param.metavar or param.name.upper() for param in arguments]
    required = [f"{p.opts[0]} {_metavar(p, command, top)}" for p in options if p.required]
    usage = " ".join(["ferry", name, *words, *required, *(["[options]"] if len(options) > len(required) else [])])
    yield from (f"### ferry {name}", "", str(command.help), "", "```text", usage, "```", "")
    yield from _table("argument", arguments, command, top)
    yield from _table("option", options, command, top)


def _table(kind: str, params: list[Any], command: Any, top: Any) -> Iterator[str]:
    if not params:
        return
    yield from (f"| {kind} | meaning |", "| --- | --- |")
    context = command.context_class(command, info_name=command.name, parent=top)
    for param in params:
        name, meaning = param.get_help_record(context)
        if kind == "argument":
            name, meaning = param.metavar or param.name.upper(), meaning.removesuffix("[required]").strip()
        name = name.replace(" <str>", " TEXT").replace(" <path>", " PATH").replace(" <int range>", " N")
        name = re.sub(r" <(int|float)>", " N", re.sub(r" <([\w|]+\|[\w|]+)>", r" \1", name))
        yield f"| {_code(name)} | {_plain(meaning)} |"
    yield ""


def _metavar(param: Any, command: Any, top: Any) -> str:
    context = command.context_class(command, info_name=command.name, parent=top)
    return str(param.get_help_record(context)[0].split(" ", 1)[1]).strip("<>").upper()


def _code(text: str) -> str:
    return "<br>".join(f"`{part}`" for part in text.split(" / "))


def _plain(text: str) -> str:
    """Help as Markdown: its pipes and angle brackets are no markup; what is in [brackets] at its end stays."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def models() -> Iterator[str]:
    """The catalogue, with what the real MaxText was seen to do with each family."""
    seen = load()
    yield f"| model | family | Hub | {' | '.join(LAYOUTS)} |"
    yield f"| --- | --- | --- |{' --- |' * len(LAYOUTS)}"
    for model in MODELS:
        cells = (f"`{model.name}`", model.family, model.repo, *(seen.of(model.family, layout) for layout in LAYOUTS))
        yield f"| {' | '.join(cells)} |"
    yield from ("", seen.origin, "")
    for paragraph in LEGEND:
        yield from (paragraph, "")
