"""The catalogue: what it means, and that a wrong entry says where it is wrong and stops no other."""

import pytest

from conversion_lib.errors import BadInput
from ferry_airflow.scheduling.catalog import Revision, TargetChoice, catalog_path, load_catalog
from tests.support.paths import DAGS

SHIPPED = DAGS / "catalog.yaml"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.delenv("FERRY_DESTINATION", raising=False)

    def load(text):
        path = tmp_path / "catalog.yaml"
        path.write_text(text)
        return load_catalog(path)

    return load


def test_shipped_catalogue_is_right(monkeypatch):
    monkeypatch.setenv("FERRY_DESTINATION", "gs://bucket/models")
    catalog = load_catalog(SHIPPED)
    assert not catalog.problems
    assert {entry.destination for entry in catalog.entries} == {"gs://bucket/models"}


def test_shipped_catalogue_without_a_destination_says_so(monkeypatch):
    monkeypatch.delenv("FERRY_DESTINATION", raising=False)
    catalog = load_catalog(SHIPPED)
    assert not catalog.entries
    assert all("destination: Field required" in problem for problem in catalog.problems)


def test_defaults_are_taken_and_overridden(load):
    catalog = load(
        """
        schedule: "0 3 * * *"
        at_most: 3
        defaults: {destination: gs://bucket/models, max_kl: 0.001, max_model_kl: 0.1, revision: {tag: "v*"}}
        models:
          - repo: acme/one
          - repo: acme/two
            revision: {branch: main}
            destination: /published
            targets: [{scan_layers: false, save_dtype: float32}, {ocdbt: false, zarr3: false}]
        """
    )
    assert (catalog.schedule, catalog.at_most, catalog.problems) == ("0 3 * * *", 3, ())
    one, two = catalog.entries
    assert (one.revision, one.destination, one.max_kl) == (Revision(tag="v*"), "gs://bucket/models", 0.001)
    assert one.conf("c", one.targets[0])["max_model_kl"] == 0.1
    assert (two.revision, two.destination, two.max_kl) == (Revision(branch="main"), "/published", 0.001)
    assert [target.slug for target in two.targets] == [
        "unscanned-f32-ocdbt-zarr3-maxtext0.2.5",
        "scanned-bf16-pathways-maxtext0.2.5",
    ]


def test_conf_of_an_onboarding(load):
    (entry,) = load(
        "models: [{repo: Qwen/Qwen3-0.6B, destination: /p, parts: 2, dequantize: fused, approval: true}]"
    ).entries
    assert entry.conf(COMMIT, TargetChoice(scan_layers=False)) == {
        "repo": "Qwen/Qwen3-0.6B",
        "revision": COMMIT,
        "destination": "/p",
        "dequantize": "fused",
        "parts": 2,
        "approval": True,
        "scan_layers": False,
        "save_dtype": "bfloat16",
        "ocdbt": True,
        "zarr3": True,
        "maxtext": "0.2.5",
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("repo: 7", "line 5: repo: 7: Input should be a valid string"),
        ("repo: no-slash", "line 5: repo: 'no-slash'"),
        ("destination: /other", "line 5: repo: Field required"),
        ("repo: a/b\n    revision: {branch: x, tag: y}", "line 6: revision: expected one of branch, tag and commit"),
        ("repo: a/b\n    revision:\n      commit: main", "line 7: revision.commit: 'main'"),
        ("repo: a/b\n    targets: []", "line 6: targets: List should have at least 1 item"),
        ("repo: a/b\n    targets:\n      - {}\n      - save_dtype: fp8", "line 8: targets.1.save_dtype: 'fp8'"),
        ("repo: a/b\n    targets: [{scan_layers: 1}]", "line 6: targets.0.scan_layers: 1"),
        ("repo: a/b\n    max_kl: 0", "line 6: max_kl: 0: Input should be greater than 0"),
        ("repo: a/b\n    max_kl: .inf", "line 6: max_kl: inf: Input should be a finite number"),
        ("repo: a/b\n    max_kl: small", "line 6: max_kl: 'small': Input should be a valid number"),
        ("repo: a/b\n    parts: two", "line 6: parts: 'two'"),
        ("repo: a/b\n    model_name: qwen3-0.6", "line 6: model_name: 'qwen3-0.6': no model is named qwen3-0.6"),
        ("repo: a/b\n    trust_remote_code: true", "line 6: trust_remote_code: no such key"),
        ("repo: a/b\n    destination: bucket", "line 6: destination: 'bucket'"),
        ("repo: acme/good", "line 5: acme/good as scanned-bf16-ocdbt-zarr3-maxtext0.2.5 is already in line 4"),
    ],
)
def test_wrong_entry_names_its_line_and_stops_no_other(load, wrong, says):
    catalog = load(
        f"""\
schedule: null
defaults: {{destination: /published}}
models:
  - repo: acme/good
  - {wrong}
  - repo: acme/last
"""
    )
    assert [entry.repo for entry in catalog.entries] == ["acme/good", "acme/last"]
    (problem,) = catalog.problems
    assert problem.startswith(f"catalog.yaml, {says}")


def test_threshold_as_people_write_it(load):
    (entry,) = load("models: [{repo: a/b, destination: /p, max_kl: 1e-5}]").entries
    assert entry.max_kl == 1e-5


def test_entry_that_is_no_mapping(load):
    catalog = load("models:\n  - acme/good\n  - {repo: acme/last, destination: /p}\n")
    assert catalog.problems == ("catalog.yaml, line 2: expected a model with a repo",)
    assert [entry.repo for entry in catalog.entries] == ["acme/last"]


def test_wrong_default_is_reported_once_and_spares_who_says_otherwise(load):
    catalog = load(
        """\
defaults: {destination: /published, dequantize: never}
models:
  - repo: acme/one
  - repo: acme/two
  - repo: acme/three
    dequantize: fused
"""
    )
    assert [entry.repo for entry in catalog.entries] == ["acme/three"]
    (problem,) = catalog.problems
    assert problem.startswith("catalog.yaml, line 1: dequantize: 'never'")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [", "line 1: expected the node content"),
        ("models:\n  - repo: a/b\n    repo: c/d\n", "line 3: repo is given twice, first in line 2"),
        ("defaults: &all {parts: 1}\nmodels: [*all]\n", "line 1: anchors are not allowed"),
        ("models: 7", "line 1: models: 7: Input should be a valid list"),
        ("schedule: null", "line 1: models: Field required"),
        ("", "line 1: model: Input should be a valid dictionary"),
        ("models: []\nschedule: sometimes\n", "line 2: schedule: 'sometimes': expected a cron expression or one of"),
        ("models: []\nat_most: 0\n", "line 2: at_most: 0"),
        ("models: []\nmodel: []\n", "line 2: model: no such key"),
        ("defaults:\n  parts: 1\n  part: 2\nmodels: []\n", "line 3: defaults.part cannot be a default of models"),
        ("defaults: {repo: a/b}\nmodels: []\n", "line 1: defaults.repo cannot be a default of models"),
        ("models: [{repo: a/b, revision: {commit: 2026-02-30}}]", "day is out of range"),
    ],
)
def test_catalogue_that_is_wrong_as_a_whole(load, text, says):
    with pytest.raises(BadInput) as raised:
        load(text)
    assert says in str(raised.value)
    assert str(raised.value).startswith("catalog.yaml")


def test_catalogue_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        load_catalog(tmp_path / "nothing.yaml")


def test_another_catalogue_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("FERRY_CATALOG", raising=False)
    assert catalog_path(SHIPPED) == SHIPPED
    monkeypatch.setenv("FERRY_CATALOG", str(tmp_path / "other.yaml"))
    assert catalog_path(SHIPPED) == tmp_path / "other.yaml"
