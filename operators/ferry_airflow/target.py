"""The base of stages that have a target: the parameters that make up a Target, defined and documented once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conversion_lib.record import CHOSEN_FIELDS, Target
from ferry_airflow.base import StageOperator

DEFAULT = Target()


class TargetOperator(StageOperator):
    """A stage with a target. `conversion_lib.record.Target` defines the allowed values and the defaults.

    :param scan_layers: stack the layers, as MaxText scans them, or store each one separately (templated); default True
    :param save_dtype: dtype of the arrays: `bfloat16` (default) or `float32` (templated)
    :param ocdbt: write Orbax's OCDBT format (templated); default True
    :param zarr3: write zarr3 instead of zarr2 (templated); default True. For Pathways, `ocdbt` and `zarr3` are False
    :param maxtext: MaxText release that will load the checkpoint: `0.2.5` (default) or `main` (templated)
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
        """The target that the rendered parameters describe.

        Raises:
            BadInput: A parameter has a value that Target does not allow.
        """
        return Target.parse({name: getattr(self, name) for name in CHOSEN_FIELDS})

    def target_arguments(self) -> list[str]:
        """Returns the target as options of a command line.

        Raises:
            BadInput: A parameter has a value that Target does not allow.
        """
        return self.target.arguments(CHOSEN_FIELDS)
