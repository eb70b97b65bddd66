"""The pages: the site builds without a warning and without the network, and every command in them is run.

A command is run as it stands, in a directory that has what GIVEN says, against a Hub and a Cloud Storage of our own. A
command that nobody can run here ends with a comment that says what it needs, which readers see too: NEEDS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from conversion_lib.demo.local_hub import LocalHub
from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3
from conversion_lib.record import CHOSEN_FIELDS
from tests.support.airflow.environment import airflow_environment
from tests.support.fakes.cloud_storage import FakeCloudStorage
from tests.support.paths import ROOT
from tests.support.tiny_models import make_tiny

TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = (*TOP, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))

NEEDS = ("the package index", "a cluster", "a cloud", "the Hub", "MaxText")
"""What a command may need that is not here, after `# needs`."""

LANGUAGES = {"sh", "text", "python", "yaml", "mermaid"}
"""A block of commands is `sh`; any other way to write one would be seen by no test."""

PYTHON = {
    "docs/guides/python.md": "tests/conversion_lib/test_api.py",
    "docs/guides/on_the_fly.md": "tests/conversion_lib/test_api.py",
    "docs/add_a_family.md": "tests/conversion_lib/families/test_add_a_family.py",
}
"""Pages with Python, and the tests that run it or compare it with the code."""

V3, MAXTEXT, QWEN3 = "v3/hf", "v3/maxtext", "qwen3/hf"
GIVEN: Mapping[str, tuple[str, ...]] = {
    "docs/concepts/check.md": (V3, MAXTEXT),
    "docs/concepts/layout.md": (QWEN3,),
    "docs/concepts/quantization.md": (V3,),
    "docs/concepts/runs.md": (QWEN3,),
    "docs/concepts/strangers.md": (V3, MAXTEXT),
    "docs/guides/export.md": (V3, MAXTEXT),
    "docs/guides/parts.md": (V3,),
    "docs/guides/publish.md": (V3,),
}
"""What a page takes as there, by example names."""

PUBLISHED = re.compile(r"gs://bucket/(\S+/)<model>/<commit>/<target>")
OF_AIRFLOW = ("airflow ", "python -m ferry_airflow")


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it; `needs` is what its comment says that it needs."""

    line: int
    text: str
    needs: str


def shown(text: str) -> Iterator[Shown]:
    """The commands in a page's `sh` blocks: lines, joined where one ends with a backslash, and here-documents."""
    for block in re.finditer(r"^```sh[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first = text.count("\n", 0, block.start(1)) + 1
        lines = iter(enumerate(block[1].splitlines(), first))
        for number, line in lines:
            command = line
            while command.endswith("\\"):
                command += "\n" + next(lines)[1]
            if word := re.search(r"<<'?(\w+)'?$", command):
                while not command.endswith(f"\n{word[1]}"):
                    command += "\n" + next(lines)[1]
            if shlex.split(command.partition("<<")[0], comments=True):
                mark = re.search(r"# needs (.+)$", line)
                yield Shown(number, command, mark[1] if mark else "")


def every_command() -> list[tuple[str, Shown]]:
    return [(page, command) for page in PAGES for command in shown((ROOT / page).read_text())]


class Here:
    """Where a page's commands run, one after the other."""

    def __init__(self, directory: Path, cloud: FakeCloudStorage, environment: Mapping[str, str]) -> None:
        self._directory, self._cloud, self._environment = directory, cloud, environment

    def run(self, text: str, *, at: Path | None = None, **environment: str) -> None:
        done = subprocess.run(
            ["bash", "-ec", PUBLISHED.sub(self._published, text)],
            cwd=at or self._directory,
            env={**self._environment, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"

    def _published(self, address: re.Match[str]) -> str:
        """What a page leaves open in an address: where its `ferry publish` has put the checkpoint."""
        prefix = address[1]
        (marker,) = [name for name in self._cloud.names("bucket", prefix) if name.endswith("/ferry_commit.json")]
        return f"gs://bucket/{marker.removesuffix('/ferry_commit.json')}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    v3 = make_tiny_deepseek_v3(root / V3)
    qwen3 = make_tiny("qwen3", root / QWEN3)
    command = [sys.executable, "-m", "conversion_lib", "convert", v3, root / MAXTEXT, "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    return {V3: v3, QWEN3: qwen3, MAXTEXT: root / MAXTEXT}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def here(request: pytest.FixtureRequest, sources: dict[str, Path], compiled: Path, tmp_path: Path) -> Iterator[Here]:
    for name in GIVEN.get(request.getfixturevalue("page"), ()):
        shutil.copytree(sources[name], tmp_path / name)
    hub = LocalHub({"deepseek-ai/DeepSeek-V3": sources[V3], "Qwen/Qwen3-0.6B": sources[QWEN3]})
    with hub, FakeCloudStorage(["bucket"]) as cloud:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FERRY_", "HF_", "AIRFLOW"))}
        yield Here(
            tmp_path,
            cloud,
            {
                **kept,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path / ".hf"),
                "FERRY_CACHE": str(tmp_path / ".cache"),
                "STORAGE_EMULATOR_HOST": cloud.endpoint,
                "TENSORSTORE_GCS_HTTP_URL": cloud.endpoint,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                # the checks of all pages are of one model: each operation is compiled once
                "JAX_COMPILATION_CACHE_DIR": str(compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )


def of_make(command: str) -> str:
    """What make would run: itself under test here, or half an hour of work. It has to know the target."""
    return f"make -n {command.removeprefix('make ')}"


def of_ci(command: str) -> str:
    """.ci/run runs these, and this test with them."""
    program = shlex.split(command, comments=True)[0]
    return f"test -x {program}"


def of_pytest(command: str) -> str:
    """The tests that a page names run in the same suite as this one."""
    paths = [word for word in shlex.split(command, comments=True)[1:] if not word.startswith("-")]
    return "\n".join(f"test -e {path}" for path in paths)


OF_THE_CHECKOUT: Mapping[str, Callable[[str], str]] = {
    "make ": of_make,
    ".ci/run": of_ci,
    "tests/parity/run.sh": of_ci,
    ".venv/bin/pytest": of_pytest,
    ".venv/bin/pre-commit install": lambda command: "pre-commit validate-config",
}
"""Commands for whoever changes Ferry, by how they begin, and what is run of them: all but the suite itself."""


@pytest.mark.parametrize("page", [page for page in PAGES if any(shown((ROOT / page).read_text()))])
def test_the_commands_of(page: str, here: Here, request: pytest.FixtureRequest) -> None:
    for command in shown((ROOT / page).read_text()):
        if command.needs:
            assert command.needs.startswith(NEEDS), f"{page}:{command.line}: needs {command.needs}"
            continue
        handler = next((made for start, made in OF_THE_CHECKOUT.items() if command.text.startswith(start)), None)
        if handler:
            here.run(handler(command.text), at=ROOT)
        elif command.text.startswith(".venv/bin/"):
            here.run(command.text.removeprefix(".venv/bin/"), at=ROOT)
        elif command.text.startswith(OF_AIRFLOW):
            here.run(command.text, **request.getfixturevalue("airflow"))
        else:
            here.run(command.text)


@pytest.fixture(scope="module")
def airflow(airflow_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an Airflow that knows the DAGs, with a database of its own."""
    home = tmp_path_factory.mktemp("airflow") / "home"
    shutil.copytree(airflow_home, home)
    environment = {
        **airflow_environment(home),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
    }
    command = [sys.executable, "-m", "airflow", "dags", "reserialize"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: value for name, value in environment.items() if name.startswith("AIRFLOW")}


def test_few_commands_need_what_is_not_here() -> None:
    commands = every_command()
    assert len(commands) > 50
    assert len([command for _, command in commands if command.needs]) < 8


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_hold(page: str) -> None:
    fences = re.compile(r"^ *(?:```|~~~)(\w*)[^\n]*\n(.*?)^ *(?:```|~~~)$", re.MULTILINE | re.DOTALL)
    blocks = fences.findall((ROOT / page).read_text())
    assert {language for language, _ in blocks} <= LANGUAGES
    assert ("python" in [language for language, _ in blocks]) == (page in PYTHON)
    others = [line for language, block in blocks if language != "sh" for line in block.splitlines()]
    assert not [line for line in others if re.match(r"\$ |(ferry|airflow|kubectl|pip|make) \w", line)]


def test_python_in_pages_is_tested() -> None:
    assert all(Path(page).name in (ROOT / test).read_text() for page, test in PYTHON.items())


@pytest.mark.parametrize("page", TOP)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_extras_in_pages_are_extras() -> None:
    there = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [
        re.search(r"\[([\w,]+)\]", command.text) for _, command in every_command() if "pip install" in command.text
    ]
    assert named and {extra for found in named if found for extra in found[1].split(",")} <= set(there)


def test_params_are_those_of_the_dag() -> None:
    program = (ROOT / "dags" / "onboard_checkpoint.py").read_text()
    entries = program.partition("PARAMS = {")[2].partition("\n}")[0]
    # those of the target are made from its definition
    entries = entries.replace("    **TARGET,", "\n".join(f'    "{field}": Param(' for field in CHOSEN_FIELDS))
    params = re.findall(r'^    "(\w+)": (?:Param|\w+)\(', entries, re.M)
    page = (ROOT / "docs/guides/airflow.md").read_text()
    table = page.partition("| param |")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.M))) == params
    assert len(params) > 10


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, where every request would fail."""
    directory = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


def test_the_site_fetches_nothing(site: Path) -> None:
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(https?:[^\"]*)", page.read_text())
        fetched += re.findall(r"<link\b[^>]*\bhref=\"(https?:[^\"]*)", page.read_text())
        assert fetched == [], page


def test_the_reference_is_that_of_the_code(site: Path) -> None:
    commands = (site / "reference/command_line.html").read_text()
    assert all(word in commands for word in ("ferry convert", "--memory-budget", "--save-golden", "--older-than"))
    operators = (site / "reference/operators.html").read_text()
    assert all(word in operators for word in ("ConvertOperator", "save_dtype", "OptionalApprovalOperator"))
    assert "ensure_checkpoint" in (site / "reference/python.html").read_text()
    assert "deepseek3-671b" in (site / "reference/models.html").read_text()
