"""What is said to be verified: README.md and `ferry models` show what `make parity-all` wrote, of every family."""

from __future__ import annotations

import json

from conversion_lib.cli import show
from conversion_lib.families import FAMILIES
from conversion_lib.models.verified import LAYOUTS, Layout, load
from tests.support.checkpoints import ferry_here
from tests.support.verified_table import PAGE, page


def test_the_readme_shows_it():
    text = PAGE.read_text()
    assert page(text) == text
    assert all(f"\n| {family} | " in text for family in FAMILIES)


def test_every_family_has_what_it_has_layouts_for():
    seen = load()
    assert set(seen.families) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert set(seen.families[name]) == {layout for layout in LAYOUTS if getattr(family, layout)}
        assert all(layout.ran and layout.returned for layout in seen.families[name].values())


def test_ferry_models_says_when_and_with_what():
    result = ferry_here("models", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    seen = load()
    assert (answer["commit"], answer["date"], answer["versions"]) == (seen.commit, seen.date, seen.versions)
    assert "maxtext" in seen.versions and "transformers" in seen.versions
    row = next(row for row in answer["models"] if row["name"] == "mixtral-8x7b")
    assert row["verified"]["unscanned"] == seen.families["mixtral"]["unscanned"].model_dump()
    text = " ".join(str(line) for line in show.models_text()[1:])
    assert seen.date in text and "main branch is not on the package index" in text


def test_a_layout_in_words():
    good = Layout(compared=2, same_bits=True, ran=1, kl_below=[1e-6], returned=2, not_returned=[])
    assert str(good) == "same bits; KL < 1e-6; back"
    poor = Layout(compared=0, same_bits=True, ran=1, kl_below=[], returned=1, not_returned=["q_proj.weight"])
    assert str(poor) == "MaxText cannot convert it; LOGITS DIFFER; back but for q_proj.weight"
    wide = good.model_copy(update={"kl_below": [1e-6, 1e-3], "same_bits": False})
    assert str(wide) == "OTHER BITS; KL < 1e-6 to 1e-3; back"
