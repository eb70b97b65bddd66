"""Fixtures of the tests that read and write a bucket."""

from tests.support.bucket_fixtures import beside, fake, source  # noqa: F401
