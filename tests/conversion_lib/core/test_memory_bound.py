"""A command that takes far more memory than expected is ended with one line."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from conversion_lib.core import memory_bound
from conversion_lib.errors import BadInput


@pytest.fixture
def ended(monkeypatch):
    """What would end the process: the errors, and an event that is set by the first."""
    errors, event = [], threading.Event()

    def leave(error):
        errors.append(error)
        event.set()

    monkeypatch.setattr(memory_bound, "_leave", leave)
    monkeypatch.setattr(memory_bound, "SLACK_BYTES", 8 << 20)
    return errors, event


def test_more_memory_than_expected_ends_the_process(ended):
    errors, event = ended
    with memory_bound.memory_bound(8 << 20, "DST"):
        held = np.ones(64 << 20, np.uint8)
        assert event.wait(10)
    assert isinstance(errors[0], BadInput)
    assert str(errors[0]).startswith("DST: reading it takes more than")
    assert held.nbytes


def test_as_much_as_expected_does_not(ended):
    _, event = ended
    with memory_bound.memory_bound(64 << 20, "DST"):
        held = np.ones(64 << 20, np.uint8)
        assert not event.wait(0.2)
    assert held.nbytes
