"""What Airflow needs once: the pools that the DAGs' tasks run in. `python -m ferry_airflow.setup.pools` makes them.

Airflow makes them too when it starts, where the package's plugin is installed: Airflow does not schedule a task
whose pool there is not.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

POOLS = Path(__file__).with_name("pools.json")
"""As `airflow pools import` reads it."""

log = logging.getLogger(__name__)


def create_missing_pools() -> list[str]:
    """Makes the pools that there are not and returns their names; one that somebody made or changed stays as it is."""
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
        print(f"made the pool {name}")
