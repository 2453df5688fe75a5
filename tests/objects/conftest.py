"""The S3 server, once a session, and a bucket for each test that wants one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import servers
from tests.objects.s3 import Bucket, new_bucket, s3_server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with servers.short_folder() as folder, s3_server(folder) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str) -> Bucket:
    return new_bucket(s3_endpoint)
