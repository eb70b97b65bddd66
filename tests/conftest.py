"""How the tests are shared out among processes (pytest-xdist): a file stays together, and so does one Airflow."""

import pytest
from xdist.scheduler import LoadFileScheduling

# tests that other files inherit: where one fails, its values are to be seen
pytest.register_assert_rewrite("tests.support.check_tests", "tests.support.family_tests")

pytest_plugins = (
    "tests.support.airflow.environment",
    "tests.support.airflow.standalone",
    "tests.support.airflow.scheduled",
)
"""Fixtures of the session: one definition, so that there is one Airflow a process."""

OF_ONE_SERVER = (
    *(f"tests/dags/test_{name}.py" for name in ("browser_onboarding", "in_airflow", "in_pods", "scheduled_onboarding")),
    "tests/ferry_airflow/plugin/test_pages.py",
)
"""These use the `standalone` of tests/support/airflow/standalone.py, which is there once a process."""

LONGEST_FIRST = (
    *OF_ONE_SERVER,
    "tests/dags/",
    "tests/test_docs.py",
    "tests/conversion_lib/logits/",
    "tests/conversion_lib/conversions/test_kills.py",
)
"""Files that take minutes; begun last, one of them would run alone at the end."""


class FilesAndServers(LoadFileScheduling):
    """Gives out files as wholes, and those of one server as one. (xdist's own groups do nothing under pytest 9.2.)"""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "standalone" if file in OF_ONE_SERVER else file


def pytest_xdist_make_scheduler(config, log):
    return FilesAndServers(config, log)


def pytest_collection_modifyitems(items):
    for item in items:
        file = item.nodeid.partition("::")[0]
        assert "standalone" not in item.fixturenames or file in OF_ONE_SERVER, f"{file} belongs in OF_ONE_SERVER"
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(nodeid):
    return next((place for place, start in enumerate(LONGEST_FIRST) if nodeid.startswith(start)), len(LONGEST_FIRST))
