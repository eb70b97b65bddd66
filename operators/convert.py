"""The stage `convert`: a Hugging Face checkpoint to a MaxText one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import ValidationError

from conversion_lib.errors import BadInput
from conversion_lib.record import Target
from operators.base import Manifest, StageOperator, directory_for, handed_on, path_in, picked


class ConvertOperator(StageOperator):
    """Converts. A conversion that was killed goes on from its journal at the next try.

    :param source: the manifest of `dequantize`, or the path of a Hugging Face checkpoint (templated)
    :param model_name: name of the model in Ferry's catalogue (templated); default None: told by the config
    :param scan_layers: write the layers stacked, as MaxText scans them (templated); default True
    :param save_dtype: `bfloat16` (default) or `float32` (templated)
    :param ocdbt: write Orbax's OCDBT format (templated); default True
    :param zarr3: write zarr3 instead of zarr2 (templated); default True; neither of the two: for Pathways
    :param maxtext: the MaxText that is to load it, `0.2.5` (default) or `main` (templated)
    :param destination: directory to write (templated); default: one named after the target in the manifest's
        working directory
    :param place: as in StageOperator
    :returns: manifest with `path` (the MaxText checkpoint), `target`, `fingerprint`, `pieces`,
        `pieces_skipped` (finished by an earlier try) and `already` (it was there and whole)
    """

    stage: ClassVar[str] = "convert"
    template_fields: Sequence[str] = (
        "source",
        "model_name",
        "scan_layers",
        "save_dtype",
        "ocdbt",
        "zarr3",
        "maxtext",
        "destination",
    )

    def __init__(
        self,
        *,
        source: str | Mapping[str, Any],
        model_name: str | None = None,
        scan_layers: bool = True,
        save_dtype: str = "bfloat16",
        ocdbt: bool = True,
        zarr3: bool = True,
        maxtext: str = "0.2.5",
        destination: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.model_name = model_name
        self.scan_layers = scan_layers
        self.save_dtype = save_dtype
        self.ocdbt = ocdbt
        self.zarr3 = zarr3
        self.maxtext = maxtext
        self.destination = destination

    def work(self) -> Manifest:
        target = self._target()
        destination = str(directory_for(self.destination, self.source, target.slug))
        result = self.ferry(
            "convert",
            path_in(self.source),
            destination,
            *(["--model", self.model_name] if self.model_name else []),
            *_target_options(target),
        )
        self.link_target = destination
        kept = picked(result, "path", "fingerprint", "pieces", "pieces_skipped", "already")
        return {**kept, "target": target.slug, **handed_on(self.source)}

    def _target(self) -> Target:
        fields = {name: getattr(self, name) for name in ("scan_layers", "save_dtype", "ocdbt", "zarr3", "maxtext")}
        try:
            return Target.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from None


def _target_options(target: Target) -> list[str]:
    """The target as `ferry convert` takes it."""
    return [
        "--scan-layers" if target.scan_layers else "--no-scan-layers",
        "--save-dtype",
        target.save_dtype,
        "--ocdbt" if target.ocdbt else "--no-ocdbt",
        "--zarr3" if target.zarr3 else "--no-zarr3",
        "--maxtext",
        target.maxtext,
    ]
