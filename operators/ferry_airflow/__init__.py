"""Ferry in Airflow: one operator for each stage, scheduling, pools and pages. `execution/` says where stages run."""

from pathlib import Path

DAGS_FOLDER = Path(__file__).parent / "dags"
"""The directory of the DAG files in the installed package, for a DAG bundle. In a checkout, a link to `dags/`."""
