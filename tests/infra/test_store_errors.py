import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.store import ArtifactStore, StoreSettings
from infra.store.retry import LONGEST_WAIT_SECONDS, retried, wait_seconds
from schemas.base import digest
from schemas.errors import BadInput, StoreUnreachable, Transient
from tests.infra.conftest import CONTENT, LINEAGE, Write, tree
from tests.services import FlakyProxy, ObjectStore

ID = digest("an artifact")


@pytest.fixture
def credentials(seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISTILL_STORE_CACHE_DIR", str(tmp_path / "cache"))
    return seaweedfs


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("gopher://x/y", "unknown scheme 'gopher': expected file://, s3:// or a path"),
        ("s3://", "names no bucket"),
        ("file://", "names no folder"),
        ("", "names no folder"),
        ("/proc/no/such", "cannot be used: .*: expected a writable folder"),
    ],
)
def test_a_wrong_address(address: str, expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        ArtifactStore.open(address)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInput, match="cannot be used"):
        ArtifactStore.open(str(tmp_path / "file" / "store"))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(BadInput, match="Permission denied"):
        ArtifactStore.open(str(tmp_path / "store"))


@pytest.mark.service
def test_what_an_s3_store_can_refuse(credentials: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"s3://{credentials.bucket}/errors"
    with pytest.raises(BadInput, match=r"the bucket 'nowhere' does not exist at http"):
        ArtifactStore.open("s3://nowhere/x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"reader{credentials.access_key}")
    with pytest.raises(BadInput, match=r"refused the credentials or the action .*AccessDenied"):
        ArtifactStore.open(address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", credentials.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(BadInput, match=r"refused the credentials or the action .*SignatureDoesNotMatch"):
        ArtifactStore.open(address)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(BadInput, match=r"no credentials for .*AWS_ACCESS_KEY_ID"):
        ArtifactStore.open(address)


@pytest.mark.service
def test_an_endpoint_that_is_not_there(credentials: ObjectStore) -> None:
    with pytest.raises(StoreUnreachable, match=r"cannot be reached at http://127.0.0.1:9"):
        ArtifactStore.open("s3://bucket/x", StoreSettings(endpoint_url="http://127.0.0.1:9", retries=1))


@pytest.mark.service
@pytest.mark.parametrize("after_bytes", [0, 3000], ids=["before the answer", "within the answer"])
def test_dropped_connections_are_tried_again(credentials: ObjectStore, write: Write, after_bytes: int) -> None:
    proxy = FlakyProxy(credentials.endpoint)
    store = ArtifactStore.open(f"s3://{credentials.bucket}/flaky{after_bytes}", StoreSettings(endpoint_url=proxy.endpoint, retries=4))
    folder = write("one", {"big": os.urandom(40 * 2**20), **{f"small-{i}": bytes(5000) + bytes([i]) for i in range(5)}})
    proxy.drop_next(0 if after_bytes else 4, after_bytes)
    manifest = store.publish(folder, identity=ID, content=CONTENT, lineage=LINEAGE)
    assert store.verify(manifest) == []
    published_drops = proxy.dropped
    proxy.drop_next(4, after_bytes)
    assert tree(store.fetch(manifest)) == tree(folder)
    assert (published_drops, proxy.dropped) == (0 if after_bytes else 4, 4)
    proxy.close()


@pytest.mark.service
def test_a_lost_answer_to_a_winning_create_still_wins(credentials: ObjectStore) -> None:
    proxy = FlakyProxy(credentials.endpoint)
    store = ArtifactStore.open(f"s3://{credentials.bucket}/lost", StoreSettings(endpoint_url=proxy.endpoint, retries=4))
    proxy.drop_next(1, after_bytes=20)  # the object is written; of the answer only the first bytes arrive
    assert store._storage.put_new("x", b"mine")
    assert proxy.dropped == 1
    assert not store._storage.put_new("x", b"other")
    proxy.close()


@pytest.mark.service
def test_a_store_that_stays_away_is_transient(credentials: ObjectStore) -> None:
    proxy = FlakyProxy(credentials.endpoint)
    store = ArtifactStore.open(f"s3://{credentials.bucket}/away", StoreSettings(endpoint_url=proxy.endpoint, retries=2))
    proxy.drop_next(1000)
    with pytest.raises(Transient, match="failed 3 times, last with"):
        store.find(ID)
    assert proxy.dropped >= 3  # the HTTP library may open a connection again by itself
    proxy.close()


def test_only_what_may_pass_is_tried_again() -> None:
    tries: list[int] = []

    def call(attempt: int) -> None:
        tries.append(attempt)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        retried(call, passing=lambda error: isinstance(error, ConnectionError), retries=5, what="write")
    assert tries == [0]


def test_waits_grow_and_are_bounded() -> None:
    for attempt in range(12):
        longest = min(0.2 * 2**attempt, LONGEST_WAIT_SECONDS)
        assert longest / 2 <= wait_seconds(attempt) <= longest


def limited(megabytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, megabytes * 2**20))


FULL_DISK = """
import sys
from pathlib import Path
from infra.store import ArtifactStore
from schemas.errors import RunFailed
from tests.infra.conftest import CONTENT, LINEAGE
store = ArtifactStore.open(sys.argv[1])
try:
    if sys.argv[2] == "publish":
        store.publish(Path(sys.argv[3]), identity=sys.argv[4], content=CONTENT, lineage=LINEAGE)
    else:
        store.fetch(store.resolve(sys.argv[4]))
except RunFailed as error:
    sys.stdout.write(str(error))
"""


def test_a_full_disk(store: ArtifactStore, address: str, write: Write) -> None:
    """A limit on the size of files stands in for a full disk: the same call fails in the same place (EFBIG for ENOSPC).

    Publishing to a folder writes here; of an S3 store, fetching does.
    """
    folder = write("big", {"big": os.urandom(10 * 2**20)})
    action = "publish" if address.startswith("file") else "fetch"
    if action == "fetch":
        store.publish(folder, identity=ID, content=CONTENT, lineage=LINEAGE)
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, address, action, str(folder), ID],
        preexec_fn=lambda: limited(4),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("disk full: cannot write")
    if action == "publish":
        assert store.find(ID) is None
        assert list((store._storage.root / ".tmp").iterdir()) == []
    else:
        assert list((store._cache.folder / "tmp").iterdir()) == []


@pytest.mark.service
def test_a_permanent_error_is_not_tried_again(credentials: ObjectStore) -> None:
    store = ArtifactStore.open(f"s3://{credentials.bucket}/missing", StoreSettings(retries=10))
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        store._storage.read("nothing")
    assert time.monotonic() - began < 2
