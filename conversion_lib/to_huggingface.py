"""`python -m conversion_lib.to_huggingface` takes the arguments of MaxText's `checkpoint_conversion.to_huggingface`.

Config and tokenizer come from --hf_model_path, else from hf/ beside the checkpoint, which Ferry wrote, else from the
model's repository on the Hub. The dimensions come from that config.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from conversion_lib.conversions.opening import known_directory
from conversion_lib.errors import BadInput
from conversion_lib.maxtext.arguments import Arguments, Command, begin, output, run_as_command
from conversion_lib.models.hf_config import CONFIG_NAME
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter
from conversion_lib.publish.upload import HUB_SCHEME, upload
from conversion_lib.record import HF_DIR_NAME
from conversion_lib.runs.options import Options
from conversion_lib.sources.orbax import open_orbax, root_of
from conversion_lib.storage.files import expanded
from conversion_lib.storage.interface import SCHEME, Location
from conversion_lib.storage.locations import location

COMMAND = Command(
    flags=("override_model_architecture", "nooverride_model_architecture"),
    settings=("load_parameters_path", "weight_dtype"),
    switches=("overwrite", "override_model_architecture", "nooverride_model_architecture"),
)
DTYPES = ("float32", "bfloat16", "float16")


def run(words: Sequence[str], reporter: Reporter) -> Outcome:
    """Exports a checkpoint as MaxText's command line asks.

    Raises:
        BadInput: As for `export`; or an argument is missing or wrong.
        OutsideFailure: As for `export`; or the Hub or Cloud Storage failed.
    """
    from conversion_lib.conversions.export import export

    arguments, model = begin(words, COMMAND, reporter)
    given = arguments.text("load_parameters_path")
    if not given:
        raise BadInput("load_parameters_path is missing: write load_parameters_path=DIR/0/items")
    if "://" not in given:
        given = str(expanded(given))
    dtype = arguments.choice("weight_dtype", DTYPES, "float32")
    destination = output(arguments, SCHEME, HUB_SCHEME)
    options = Options(overwrite=arguments.flag("overwrite", False))
    checkpoint = location(given)
    with _written_here(destination) as directory:
        _refuse_other_layout(checkpoint, given, arguments)
        with _config_directory(arguments.text("hf_model_path"), checkpoint, model.repo, reporter) as hf_config:
            result = export(
                checkpoint,
                directory,
                hf_config=hf_config,
                dtype=dtype,
                model=model.name,
                options=options,
                reporter=reporter,
            )
        if isinstance(destination, str):
            message = f"Export of {model.name} from MaxText"
            upload(directory, destination, private=True, message=message, reporter=reporter)
            result = result.model_copy(update={"path": destination})
    return Outcome(result, [str(result)])


@contextmanager
def _written_here(destination: Path | str) -> Iterator[Path]:
    """Yields the directory to export to: a temporary one if the destination is a bucket or the Hub."""
    if isinstance(destination, Path):
        yield destination
        return
    with tempfile.TemporaryDirectory(prefix="ferry-export-") as name:
        yield Path(name) / "hf"


def _refuse_other_layout(checkpoint: Location, given: str, arguments: Arguments) -> None:
    """Raises BadInput if scan_layers on the command line contradicts the checkpoint.

    If only a configuration file contradicts it, the checkpoint wins, as in MaxText.
    """
    saved = open_orbax(checkpoint).scan_layers
    if "scan_layers" in arguments.stated and saved is not None and arguments.flag("scan_layers", saved) != saved:
        raise BadInput(f"scan_layers={arguments.text('scan_layers')}, but {given} was saved with scan_layers={saved}")


@contextmanager
def _config_directory(path: str, checkpoint: Location, repo: str, reporter: Reporter) -> Iterator[Path | None]:
    """Yields a directory with config and tokenizer; None for the one beside the checkpoint."""
    if not path and (root_of(checkpoint) / HF_DIR_NAME).children():
        yield None
    elif path and (directory := known_directory(path)) is not None:
        if not (directory / CONFIG_NAME).is_file():
            raise BadInput(f"hf_model_path={path} has no {CONFIG_NAME}: give a directory with config and tokenizer")
        yield directory
    else:
        with tempfile.TemporaryDirectory(prefix="ferry-config-") as name:
            _fetch_all_but_weights(path or repo, Path(name), reporter)
            yield Path(name)


def _fetch_all_but_weights(repo: str, directory: Path, reporter: Reporter) -> None:
    """Downloads the repository's files except the weights. Raises what `resolve` raises."""
    from conversion_lib import hub
    from conversion_lib.core.retry import Backoff
    from conversion_lib.hub.files import Fetcher

    resolved = hub.resolve(repo, reporter=reporter)
    fetcher = Fetcher(resolved.repo, resolved.commit, hub.hub_endpoint(), directory / hub.WORK_NAME, directory)
    for file in hub.side_files(resolved):
        Backoff().run(partial(fetcher.fetch, file, lambda nbytes: None, afresh=True), reporter=reporter)


if __name__ == "__main__":
    run_as_command(run, COMMAND, str(__doc__))
