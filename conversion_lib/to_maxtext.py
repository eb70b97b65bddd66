"""`python -m conversion_lib.to_maxtext` takes the command line of `python -m maxtext.checkpoint_conversion.to_maxtext`.

The output is at the same place, `base_output_directory/0/items`. The dimensions come from the source's config.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from conversion_lib.conversions.opening import named
from conversion_lib.errors import BadInput
from conversion_lib.maxtext.arguments import Arguments, Command, begin, output, run_as_command
from conversion_lib.maxtext.names import TARGET_SETTINGS
from conversion_lib.program import Outcome
from conversion_lib.progress import Reporter
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from conversion_lib.sources.files import Files
from conversion_lib.storage.interface import SCHEME

FIELDS = ("scan_layers", "save_dtype", "ocdbt", "zarr3", "shards")
"""The fields of a Target that MaxText's converter lets its users choose. Its defaults are the same."""
SETTINGS = {**TARGET_SETTINGS, "save_dtype": "save_dtype"}

COMMAND = Command(
    flags=("lazy_load_tensors", "eager_load_method", "revision", "save_dtype", "simulated_cpu_devices_count"),
    settings=(
        "checkpoint_storage_use_ocdbt",
        "checkpoint_storage_use_zarr3",
        "eager_load_method",
        "revision",
        "save_dtype",
        "simulated_cpu_devices_count",
    ),
)


def target_of(arguments: Arguments) -> Target:
    """Builds the Target from the arguments, with MaxText's defaults.

    Raises:
        BadInput: Ferry cannot write what an argument asks for.
    """
    default = Target()

    def value(field: str) -> object:
        name, fallback = SETTINGS.get(field, field), getattr(default, field)
        if isinstance(fallback, bool):
            return arguments.flag(name, fallback)
        return arguments.count(name, fallback) if isinstance(fallback, int) else arguments.text(name, fallback)

    return Target.parse({field: value(field) for field in FIELDS}, lambda field: f"--{SETTINGS.get(field, field)}=")


def run(words: Sequence[str], reporter: Reporter) -> Outcome:
    """Converts a checkpoint as MaxText's command line asks.

    Raises:
        BadInput: As for `convert`; or an argument is missing or wrong, or the Hub has no such repository.
        OutsideFailure: As for `convert`; or the Hub failed.
    """
    from conversion_lib.conversions.convert import convert
    from conversion_lib.conversions.opening import opened

    arguments, model = begin(words, COMMAND, reporter)
    target = target_of(arguments)
    loader = arguments.choice("eager_load_method", ("safetensors", "transformers"), "safetensors")
    destination = output(arguments, SCHEME)
    source = arguments.text("hf_model_path", model.repo)
    options = Options(overwrite=arguments.flag("overwrite", False), among_others=True)
    with opened(
        source,
        str(destination),
        None,
        memory_budget=options.memory_budget,
        revision=_revision(source, arguments, reporter),
        stream=False,
        reporter=reporter,
    ) as given:
        if not isinstance(given, Files):
            raise BadInput(f"hf_model_path={source} is a MaxText checkpoint: give a Hugging Face checkpoint")
        result = convert(
            given,
            destination,
            target,
            model=model.name,
            loader=loader,
            options=options,
            reporter=reporter,
        )
    return Outcome(result, [str(result), f"MaxText's load_parameters_path: {result.path}/0/items"])


def _revision(source: str, arguments: Arguments, reporter: Reporter) -> str | None:
    """Returns the revision of a Hub repository. Like MaxText, ignores a revision for anything else."""
    revision = arguments.text("revision") or None
    if revision and named(source) is not None:
        reporter.say(f"warning: revision={revision} is ignored: {source} is not a Hub repository")
        return None
    return revision


if __name__ == "__main__":
    run_as_command(run, COMMAND, str(__doc__))
