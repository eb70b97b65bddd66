"""`ferry convert` of a MaxText checkpoint: the same weights in another layout, dtype or storage."""

from __future__ import annotations

import json
from dataclasses import replace

from conversion_lib.identity import orbax_content
from conversion_lib.maxtext_input import MaxTextInput
from conversion_lib.record import Target
from conversion_lib.restack import plan_to_other_layout
from conversion_lib.running import Job, bytes_in

CACHE_SHARE = 4
"""One in so many bytes of the memory budget keeps decoded chunks; the engine leaves as much beside its buffers."""


def prepare_other_layout(given: MaxTextInput, target: Target, chunk_limit: int) -> Job:
    """Plans to write `given` as `target` says. Raises BadInput where its leaves are not as they must be."""
    identity = {
        "source": json.dumps(orbax_content(given.source.stored.items)),
        "config": json.dumps(given.config.raw, sort_keys=True),
        "family": given.family.name,
        "target": target.model_dump_json(),
        "written_by": given.maxtext or "",
    }
    plan = plan_to_other_layout(
        given.source.tensors,
        given.config,
        given.family,
        target,
        scan_layers=given.scan_layers,
        maxtext=given.maxtext,
        identity=identity,
        model_name=given.model_name,
        chunk_limit=chunk_limit,
        chunk_of=given.source.chunk_shape,
    )
    known = given.record
    exact = plan.exact and (known is None or known.exact)
    plan = replace(plan, exact=exact, dropped=(*given.source.not_read, *plan.dropped))
    return Job(
        source=given.source,
        directory=given.hf,
        config=given.config,
        origin=given.origin,
        plan=plan,
        bytes_in=bytes_in(plan, given.source),
        chunk_limit=chunk_limit,
        weights=given.source.stored.items,
    )
