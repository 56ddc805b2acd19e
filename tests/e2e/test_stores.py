"""The same recipe on a real object store."""

from pathlib import Path

import pytest

from tests.e2e.conftest import Nano
from tests.e2e.nano import NODES, Place, assert_same
from tests.services import ObjectStore

pytestmark = [pytest.mark.slow, pytest.mark.service]


def test_same_on_seaweedfs(nano: Nano, undisturbed: Place, seaweedfs: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)  # for reading here
    place = Place(tmp_path, nano.recipe, nano.server, f"s3://{seaweedfs.bucket}/nano", seaweedfs.environment)
    assert place.run("run", str(nano.recipe)).started == list(NODES)
    assert_same(place, undisturbed.manifests())
