"""Where things lie in the checkout that the tests run from."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DAGS = ROOT / "dags"
