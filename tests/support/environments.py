"""Environments with what pyproject declares and nothing else, made from what is installed here: nothing is fetched."""

import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(*extras):
    """The requirements of the base install and these extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def build_wheel(directory):
    """The wheel of this checkout, built from a copy: building leaves files beside the sources."""
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("conversion_lib", "operators", "dags"):
        # the link to the DAG files stays one, as in a clone
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source)
    (wheel,) = directory.glob("*.whl")
    return wheel


def install(wheel, target):
    """The wheel as `pip install` lays it out, in a directory for PYTHONPATH."""
    _pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def make_environment(directory, wheel, *extras):
    """A virtual environment with the wheel and what it declares with these extras; its interpreter.

    What is installed here already is linked, not copied. The checkout is on no path of it.
    """
    venv.EnvBuilder(symlinks=True).create(directory)
    python = directory / "bin" / "python"
    (packages,) = (directory / "lib").glob("python*/site-packages")
    for found in _closure(declared(*extras)):
        for name in {PurePosixPath(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            link, path = packages / name, Path(found.locate_file(name))
            if not link.exists() and path.exists():
                link.symlink_to(path)
    _pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def _closure(requirements):
    """The distributions that pip would install for these, as far as they are installed here."""
    found, asked = {}, [(requirement, frozenset(requirement.extras)) for requirement in requirements]
    seen = set()
    while asked:
        requirement, extras = asked.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # a marker of another platform, which the lock leaves out
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                asked.append((needed, frozenset(needed.extras)))
    return found.values()


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
