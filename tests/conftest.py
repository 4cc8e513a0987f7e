"""Fixtures for every test: S3 servers, started when first asked for and stopped with the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import servers


@pytest.fixture(scope="session")
def aws_environment() -> Iterator[None]:
    """The test servers' credentials in the environment, the user's own AWS settings out of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in servers.aws_environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory, aws_environment: None) -> Iterator[servers.S3Server]:
    """A SeaweedFS server with a bucket, for the whole run (each xdist worker starts its own)."""
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory, aws_environment: None) -> Iterator[servers.S3Server]:
    """An ``rclone serve s3`` with a bucket, for the whole run."""
    with servers.rclone_s3(tmp_path_factory.mktemp("rclone")) as server:
        yield server
