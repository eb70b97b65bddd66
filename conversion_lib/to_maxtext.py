"""`python -m conversion_lib.to_maxtext` takes the command line of `python -m maxtext.checkpoint_conversion.to_maxtext`.

The output is the same, `base_output_directory/0/items`; dimensions come from the source's own config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conversion_lib.cloud.place import SCHEME
from conversion_lib.command import Outcome
from conversion_lib.commands.options import build_target, done_line, known_directory
from conversion_lib.config import CONFIG_NAME, load_config
from conversion_lib.errors import BadInput
from conversion_lib.maxtext_arguments import (
    Arguments,
    Command,
    output_directory,
    parse,
    run_as_command,
    tell_ignored,
    use_token,
)
from conversion_lib.maxtext_names import model_of, size_differences
from conversion_lib.progress import Reporter
from conversion_lib.record import Target

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
    """What the arguments ask to be written, with MaxText's defaults. Raises BadInput for what Ferry does not write."""
    target = build_target(
        scan_layers=arguments.flag("scan_layers", True),
        save_dtype=arguments.text("save_dtype", "bfloat16"),
        ocdbt=arguments.flag("checkpoint_storage_use_ocdbt", True),
        zarr3=arguments.flag("checkpoint_storage_use_zarr3", True),
    )
    return target.model_copy(update={"shards": arguments.count("simulated_cpu_devices_count", target.shards)})


def run(words: Sequence[str], reporter: Reporter) -> Outcome:
    """Converts as the words say. Raises BadInput and OutsideFailure as `convert` and `cached_download` do."""
    arguments = parse(words, COMMAND)
    target = target_of(arguments)
    if not arguments.text("model_name"):
        raise BadInput("model_name is missing: write model_name=NAME, a name of `ferry models`")
    model = model_of(arguments.text("model_name"))
    loader = arguments.choice("eager_load_method", ("safetensors", "transformers"), "safetensors")
    tell_ignored(arguments, COMMAND, reporter)
    use_token(arguments, reporter)
    directory = _source(arguments.text("hf_model_path", model.repo), arguments, reporter)
    if other := size_differences(model, load_config(directory)):
        counts = f"{directory / CONFIG_NAME} is what counts"
        reporter.say(f"warning: {counts}, and is not MaxText's {model.name} in {', '.join(other)}")

    from conversion_lib import convert as conversions

    options = conversions.Options(overwrite=arguments.flag("overwrite", False), among_others=True)
    gs = arguments.text("base_output_directory").startswith(SCHEME)
    destination = arguments.text("base_output_directory") if gs else output_directory(arguments)
    result = conversions.convert(
        directory, destination, target, model=model.name, loader=loader, options=options, reporter=reporter
    )
    return Outcome(result, [done_line(result), f"MaxText's load_parameters_path: {result.path}/0/items"])


def _source(path: str, arguments: Arguments, reporter: Reporter) -> Path:
    """The directory of a Hugging Face checkpoint; a repository is downloaded first."""
    revision = arguments.text("revision", "main")
    if (directory := known_directory(path)) is not None:
        if arguments.text("revision"):
            reporter.say(f"warning: revision={revision} is without meaning: {path} is a directory")
        return directory
    from conversion_lib import hub

    return hub.cached_download(path, revision=revision, reporter=reporter)


if __name__ == "__main__":
    run_as_command(run, COMMAND, str(__doc__))
