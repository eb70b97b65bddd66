"""How the tests are shared out among processes (pytest-xdist): a file stays together, and so does one Airflow."""

import pytest

LONGEST_FIRST = ("standalone", "tests/dags/", "tests/logits/", "tests/test_kills.py")
"""Groups that take minutes; begun last, one of them would run alone at the end."""


# before xdist, which reads the groups
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=lambda item: _rank(_group(item)))


def _group(item):
    """A file makes its models once for all of its tests; the tests of the standalone Airflow share one server."""
    return "standalone" if "standalone" in item.fixturenames else item.nodeid.partition("::")[0]


def _rank(group):
    return next((place for place, start in enumerate(LONGEST_FIRST) if group.startswith(start)), len(LONGEST_FIRST))
