"""The pools that the DAGs' tasks run in. `python -m ferry_airflow.setup.pools` creates them.

The package's plugin also creates them when Airflow starts. Airflow does not schedule a task whose pool does not exist.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

POOLS = Path(__file__).with_name("pools.json")
"""In the format of `airflow pools import`."""

log = logging.getLogger(__name__)


def create_missing_pools() -> list[str]:
    """Creates the pools that do not exist and returns their names. Existing pools are not changed.

    Raises:
        IntegrityError: Another component creates them at the same time.
    """
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session

    made = []
    with create_session() as session:
        there = {pool.pool for pool in Pool.get_pools(session=session)}
        for name, pool in json.loads(POOLS.read_text()).items():
            if name not in there:
                Pool.create_or_update_pool(name, session=session, **pool)
                made.append(name)
    return made


if __name__ == "__main__":
    for name in create_missing_pools():
        print(f"created the pool {name}")
