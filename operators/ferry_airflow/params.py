"""A DAG's params as arguments of mapped stages."""

from __future__ import annotations

from typing import Any

from airflow.sdk.definitions.param import DagParam


class StableParam(DagParam):
    """A `dag.param` whose text is the same in each process.

    Airflow 3.3.2 serializes an argument of `partial` as its text. A DagParam's text has the object's address in it, so
    Airflow would store a new version of the DAG each time that it parses the file.
    """

    def __repr__(self) -> str:
        return f"dag.param({self._name!r})"

    @classmethod
    def in_place_of(cls, value: Any) -> Any:
        """Returns an argument with a StableParam for each DagParam in it, at any depth."""
        if type(value) is DagParam:
            return cls(value.current_dag, value._name, value._default)
        if isinstance(value, dict):
            return {key: cls.in_place_of(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return type(value)(cls.in_place_of(item) for item in value)
        return value
