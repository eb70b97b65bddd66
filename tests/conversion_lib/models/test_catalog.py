"""The catalogue: what a repository's checkpoint is published as."""

from __future__ import annotations

import pytest

from conversion_lib.models.catalog import MODELS, published_name


def test_no_repository_is_listed_twice():
    repos = [repo.lower() for model in MODELS for repo in (model.repo, *model.also)]
    assert len(repos) == len(set(repos))


@pytest.mark.parametrize("repo", ["openai/gpt-oss-20b", "unsloth/gpt-oss-20b-BF16", "OpenAI/GPT-OSS-20B"])
def test_every_form_of_a_model_has_its_name(repo):
    assert published_name(repo, "hf") == "gpt-oss-20b"


def test_what_is_not_listed_is_named_for_its_repository():
    assert published_name("someone/Gpt OSS 20b mine", "hf") == "gpt-oss-20b-mine"
    assert published_name(None, "a/Directory") == "directory"
