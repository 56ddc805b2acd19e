"""Fixtures that any test may use."""

from collections.abc import Iterator
from typing import Any

import pytest

from infra.torchvision_ops import define_missing_ops
from tests.services import ObjectStore, seaweedfs_server

define_missing_ops()  # before any test module imports transformers or diffusers by itself


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real object store for the session. Its secrets are not in the environment: put `seaweedfs.environment` there."""
    with seaweedfs_server(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real server with an empty database. Results and heartbeats would otherwise leak between runs and cost a second each."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    import flows  # noqa: F401 - its settings, before Prefect's

    results = tmp_path_factory.mktemp("prefect-results")
    updates: dict[Any, Any] = {PREFECT_RESULTS_LOCAL_STORAGE_PATH: results, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with prefect_test_harness(server_startup_timeout=180), temporary_settings(updates):
        yield str(PREFECT_API_URL.value())
