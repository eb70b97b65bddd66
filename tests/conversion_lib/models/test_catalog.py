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


@pytest.mark.parametrize(
    ("repo", "name"),
    [
        ("mallory/gpt-oss-20b", "mallory--gpt-oss-20b"),
        ("someone/Gpt OSS 20b--mine", "someone--gpt-oss-20b-mine"),
        ("Qwen/Qwen3-8B-Base", "qwen--qwen3-8b-base"),
        ("gpt-oss/20b", "gpt-oss--20b"),
        ("../..", "model--model"),
        ("qwen3-8b", "local-qwen3-8b"),
        ("gpt2", "gpt2"),
    ],
)
def test_what_is_not_listed_keeps_its_owner(repo, name):
    assert published_name(repo, "hf") == name


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("a/Directory", "directory"),
        ("a/Qwen3-0.6B/", "local-qwen3-0.6b"),
        ("mallory--gpt-oss-20b", "mallory-gpt-oss-20b"),
        ("..", "model"),
    ],
)
def test_a_directory_has_no_name_of_a_repository(directory, name):
    assert published_name(None, directory) == name
