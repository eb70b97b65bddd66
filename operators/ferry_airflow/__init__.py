"""Ferry in Airflow: one operator a stage, scheduling, pools, pages. Where a stage runs is in `execution/`."""

from pathlib import Path

DAGS_FOLDER = Path(__file__).parent / "dags"
"""The DAG files, as the wheel carries them: the path of a DAG bundle. In a checkout, a link to `dags/`."""
