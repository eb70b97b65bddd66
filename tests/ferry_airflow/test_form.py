"""One definition of a target: command line, form and catalogue have its names, defaults, values and descriptions."""

import pytest
from airflow.sdk.exceptions import ParamValidationError

from conversion_lib.cli.options import TARGET
from conversion_lib.record import CHOSEN_FIELDS, Target
from ferry_airflow.form import target_params
from ferry_airflow.scheduling.catalog import TargetChoice

OPTIONS = {option.name: option for option in TARGET.options}


@pytest.mark.parametrize("name", CHOSEN_FIELDS)
def test_field(name):
    field, param = Target.model_fields[name], target_params("Layout")[name]
    assert OPTIONS[name].default == param.value == TargetChoice.model_fields[name].default == field.default
    assert OPTIONS[name].annotation.__metadata__[0].help == param.description == field.description
    assert param.schema["title"] == field.title
    assert TargetChoice.model_fields[name].annotation == field.annotation
    assert tuple(param.schema.get("enum", ())) == Target.values_of(name)
    with pytest.raises(ParamValidationError):
        param.resolve("neither")


def test_options_of_the_command_line():
    assert {*OPTIONS} == {*Target.model_fields, "pathways"} - {"shards"}


def test_arguments_are_read_back():
    target = Target(scan_layers=False, save_dtype="float32", zarr3=False, maxtext="main")
    words = "--no-scan-layers --save-dtype float32 --ocdbt --no-zarr3 --maxtext main"
    assert target.arguments(CHOSEN_FIELDS) == words.split()


def test_sizes_are_written_as_they_are_read():
    assert TARGET.build(**{name: option.default for name, option in OPTIONS.items()}) == Target()
