"""The base of stages that are told what to write: the parameters that make a Target, defined and documented once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conversion_lib.record import CHOSEN_FIELDS, Target
from ferry_airflow.base import StageOperator

DEFAULT = Target()


class TargetOperator(StageOperator):
    """A stage with a target. What each parameter may be, and its default, is said in `conversion_lib.record.Target`.

    :param scan_layers: write the layers stacked, as MaxText scans them (templated); default True
    :param save_dtype: `bfloat16` (default) or `float32` (templated)
    :param ocdbt: write Orbax's OCDBT format (templated); default True
    :param zarr3: write zarr3 instead of zarr2 (templated); default True; neither of the two: for Pathways
    :param maxtext: the MaxText that is to load it, `0.2.5` (default) or `main` (templated)
    """

    template_fields: Sequence[str] = CHOSEN_FIELDS

    def __init__(
        self,
        *,
        scan_layers: bool = DEFAULT.scan_layers,
        save_dtype: str = DEFAULT.save_dtype,
        ocdbt: bool = DEFAULT.ocdbt,
        zarr3: bool = DEFAULT.zarr3,
        maxtext: str = DEFAULT.maxtext,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scan_layers = scan_layers
        self.save_dtype = save_dtype
        self.ocdbt = ocdbt
        self.zarr3 = zarr3
        self.maxtext = maxtext

    @property
    def target(self) -> Target:
        """What the parameters say, rendered. Raises BadInput for a value that there is not."""
        return Target.parse({name: getattr(self, name) for name in CHOSEN_FIELDS})

    def target_arguments(self) -> list[str]:
        """The target as a command line takes it."""
        return self.target.arguments(CHOSEN_FIELDS)
