import os
import time
from pathlib import Path

import pytest

from infra.store import ArtifactStore, StoreSettings, cache
from schemas.base import digest
from schemas.errors import BadInput, RunFailed
from schemas.manifest import Manifest
from tests.infra.conftest import CONTENT, LINEAGE, Write, tree


@pytest.fixture
def small(address: str, tmp_path: Path) -> ArtifactStore:
    """A store whose read cache holds 2,500 bytes."""
    return ArtifactStore.open(address, StoreSettings(cache_dir=tmp_path / "cache", cache_bytes=2500))


def published(store: ArtifactStore, write: Write, name: str, size: int = 1000) -> Manifest:
    return store.publish(write(name, {"data": os.urandom(size)}), identity=digest(name), content=CONTENT, lineage=LINEAGE)


def new_process(store: ArtifactStore) -> None:
    """Forget what this process knows and holds of the cache, as its end would."""
    owner = cache._owners.pop(store._cache.folder, None)
    if owner is not None:
        owner.lock.close()


def in_cache(store: ArtifactStore, *manifests: Manifest) -> list[bool]:
    names = [f"{manifest.identity[:16]}-{manifest.files_digest[:16]}" for manifest in manifests]
    return [(store._cache.folder / "artifacts" / name / "data").exists() for name in names]


def test_the_least_recently_used_goes_first(small: ArtifactStore, write: Write) -> None:
    a, b, c = (published(small, write, name) for name in "abc")
    for manifest in (a, b, a):  # a was used after b
        small.fetch(manifest)
        small.release()
        time.sleep(0.01)
    assert in_cache(small, a, b, c) == [True, True, False]
    small.fetch(c)
    assert in_cache(small, a, b, c) == [True, False, True]
    assert tree(small.fetch(b)) == {"data": small._storage.read(f"artifacts/{b.identity}/files/{b.files[0].sha256[:16]}/data")}
    assert in_cache(small, a, b, c) == [False, True, True]


def test_what_this_process_uses_stays_whatever_the_limit(small: ArtifactStore, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    manifests = [published(small, write, name) for name in "abcd"]
    for manifest in manifests:
        small.fetch(manifest)
    assert in_cache(small, *manifests) == [True] * 4
    assert "more than its limit of 2500" in caplog.text
    small.release(manifests[0])
    small.release(manifests[1], ["data"])
    assert in_cache(small, *manifests) == [False, False, True, True]


@pytest.mark.parametrize("address", ["file"], indirect=True)
def test_what_another_process_uses_stays_until_it_ends(small: ArtifactStore, address: str, write: Write, other_process) -> None:
    theirs, mine = (published(small, write, name, 2000) for name in "ab")
    process = other_process("fetch", address, theirs.identity)
    assert Path(process.stdout.readline().strip()).is_relative_to(small._cache.folder)
    small.fetch(mine)
    assert in_cache(small, theirs, mine) == [True, True]
    process.kill()
    process.wait()
    small.release()
    small.fetch(mine)
    assert in_cache(small, theirs, mine) == [False, True]


def test_damage_in_the_cache_is_mended(small: ArtifactStore, write: Write) -> None:
    manifest = published(small, write, "a")
    target = small.fetch(manifest) / "data"
    good = target.read_bytes()
    small.fetch(manifest)
    for bad in (good[:-1], bytes(1000)):  # the size is looked at every time, the hash once a process
        target.unlink()
        target.write_bytes(bad)
        if len(bad) == len(good):
            new_process(small)
        assert (small.fetch(manifest) / "data").read_bytes() == good
    target.unlink()
    assert (small.fetch(manifest) / "data").read_bytes() == good


def test_a_cached_file_needs_no_store(small: ArtifactStore, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = published(small, write, "a")
    small.fetch(manifest)
    small._storage.delete([info.key for info in small._storage.objects("")])
    new_process(small)
    assert len((small.fetch(manifest) / "data").read_bytes()) == 1000


def test_half_written_files_of_dead_processes_are_cleared(small: ArtifactStore, write: Write) -> None:
    small.fetch(published(small, write, "a"))
    half = small._cache.temporary()
    half.write_bytes(b"half")
    new_process(small)
    small.fetch(published(small, write, "b"))
    assert not half.exists()
    assert len(list((small._cache.folder / "owners").iterdir())) == 1


def test_a_folder_store_shares_its_bytes_read_only(tmp_path: Path, write: Write) -> None:
    store = ArtifactStore.open(str(tmp_path / "store"), StoreSettings(cache_dir=tmp_path / "cache"))
    path = store.fetch(published(store, write, "a")) / "data"
    assert path.stat().st_nlink == 2
    assert path.stat().st_mode & 0o222 == 0


def test_a_cache_that_cannot_be_used(tmp_path: Path, write: Write) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = ArtifactStore.open(str(tmp_path / "store"), StoreSettings(cache_dir=tmp_path / "cache"))
    manifest = published(store, write, "a")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.sqlite").write_bytes(b"not an index" * 500)
    with pytest.raises(RunFailed, match="delete that folder"):
        store.fetch(manifest)
    with pytest.raises((BadInput, OSError)):
        ArtifactStore.open(str(tmp_path / "store"), StoreSettings(cache_dir=tmp_path / "file")).fetch(manifest)
