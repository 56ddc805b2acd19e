"""Fixtures that any test may use."""

from collections.abc import Iterator

import pytest

from tests.services import ObjectStore, seaweedfs_server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real object store for the session. Its secrets are not in the environment: put `seaweedfs.environment` there."""
    with seaweedfs_server(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store
