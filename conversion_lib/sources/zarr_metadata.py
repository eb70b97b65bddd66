"""Opens zarr arrays after their metadata have been checked.

TensorStore's own JSON parser recurses: metadata that are nested deeply end the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from conversion_lib.core.documents import parse_json

NAMES = {"zarr3": "zarr.json", "zarr": ".zarray"}
"""The file with an array's metadata, by TensorStore's driver."""


def open_arrays(specs: Mapping[str, dict[str, Any]], context: ts.Context, where: object) -> dict[str, Any]:
    """Opens arrays after their metadata have been checked.

    Args:
        specs: TensorStore's specs by the names of leaves.
        context: TensorStore's context.
        where: What messages call the checkpoint.

    Returns:
        For each leaf, the future of its array.

    Raises:
        BadInput: Metadata are no JSON object, or beyond the limits on JSON.
        ValueError: As TensorStore raises it, if the store cannot be read.
    """
    stores = {leaf: ts.KvStore.open(spec["kvstore"], context=context) for leaf, spec in specs.items()}
    reads = {leaf: store.result().read(NAMES[specs[leaf]["driver"]]) for leaf, store in stores.items()}
    for leaf, read in reads.items():
        found = read.result()
        if found.state == "value":  # TensorStore explains best what is missing
            parse_json(found.value, f"{where}: {NAMES[specs[leaf]['driver']]} of {leaf}")
    return {leaf: ts.open(spec, open=True, read=True, context=context) for leaf, spec in specs.items()}
