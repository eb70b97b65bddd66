"""Params of a DAG as arguments of mapped stages arrive as the run has them. tests/dags runs a mapped `convert`."""

from types import SimpleNamespace

import pytest
from airflow.sdk import DAG

from ferry_airflow.check import CheckOperator
from ferry_airflow.convert import ConvertOperator

CONF = {"source": "/s", "scan_layers": False, "max_kl": 0.25, "name": None}


@pytest.mark.parametrize(
    ("stage", "arguments", "mapped", "expected"),
    [
        (ConvertOperator, {"model_name": "name", "scan_layers": "scan_layers"}, "part", (None, False)),
        (CheckOperator, {"max_kl": "max_kl", "reference": "source"}, "checkpoint", (0.25, "/s")),
        (ConvertOperator, {"source": {"path": "source"}}, "part", ({"path": "/s"},)),
        (ConvertOperator, {"source": ["source", ("source",)]}, "part", (["/s", ("/s",)],)),
    ],
)
def test_values_keep_their_types(stage, arguments, mapped, expected):
    with DAG("d", schedule=None, params=dict(CONF)) as dag:

        def param(name):
            if isinstance(name, dict):
                return {key: param(one) for key, one in name.items()}
            return type(name)(map(param, name)) if isinstance(name, list | tuple) else dag.param(name)

        given = {"source": "/x"} if stage is ConvertOperator else {}
        given |= {name: param(one) for name, one in arguments.items()}
        operator = stage.partial(task_id="t", **given).expand(**{mapped: ["0/1"]}).unmap({mapped: "0/1"})
    context = {"dag_run": SimpleNamespace(conf=CONF), "params": CONF}
    operator.render_template_fields(context)
    assert tuple(getattr(operator, name) for name in arguments) == expected
