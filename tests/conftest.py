"""Fixtures that any test may use."""

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from infra.torchvision_ops import define_missing_ops
from tests.services import ObjectStore, seaweedfs_server

# One thread, here and in processes that tests start: the order of a sum, and so its last bit, depends on the number.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
os.environ["COLUMNS"] = "200"  # tables of the command line are folded to the width of the terminal, which is not always one
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # how fast it is, no test asks
settings.load_profile("any-machine")
define_missing_ops()  # before any test module imports transformers or diffusers by itself


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: a long file that begins last would keep one process while the other has nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def restored_process() -> Iterator[None]:
    """For commands that run in this process: put back what they change of it."""
    root, handler = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    yield
    signal.signal(signal.SIGTERM, handler)
    root.handlers[:] = handlers
    root.setLevel(level)


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
