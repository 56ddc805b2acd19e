from datetime import timedelta
from pathlib import Path

import pytest

from infra.store import ArtifactStore, GcReport
from schemas.base import digest
from schemas.errors import BadInput, CorruptArtifact
from tests.infra.conftest import CONTENT, LINEAGE, Write, tree
from tests.infra.test_store_lease import record_of_another_host

ID = digest("unfinished")
NOW = timedelta(seconds=-60)  # older than a minute ahead: everything


def keys(store: ArtifactStore, prefix: str = "") -> list[str]:
    return sorted(info.key for info in store._storage.objects(prefix))


def gc(store: ArtifactStore, **settings: object) -> GcReport:
    """Look, check that looking changed nothing, then collect."""
    before = keys(store)
    seen = store.gc(older_than=NOW, **settings)
    assert keys(store) == before
    done = store.gc(older_than=NOW, dry_run=False, **settings)
    assert (seen.dry_run, done.dry_run) == (True, False)
    assert seen.items == done.items
    assert set(keys(store)) == set(before) - {item.key for item in done.items}
    assert store.gc(older_than=NOW, **settings).items == ()
    return done


def test_parts_come_back(store: ArtifactStore, write: Write, tmp_path: Path) -> None:
    second = store.save_part(ID, "shard-00001", write("1", {"x/y": b"1", "z": b""}), {"samples": 3})
    first = store.save_part(ID, "shard-00000", write("0", {"x": b"0"}))
    assert store.parts(ID) == [first, second]
    assert second.note == {"samples": 3}
    folder = store.load_part(ID, second, tmp_path / "loaded")
    assert tree(folder) == {"x/y": b"1", "z": b""}
    (folder / "z").write_bytes(b"the caller's own")
    assert tree(store.load_part(ID, second, folder)) == {"x/y": b"1", "z": b""}
    assert store.find(ID) is None
    store.delete_parts(ID, ["shard-00000", "never"])
    assert store.parts(ID) == [second]
    store.delete_parts(ID)
    assert store.parts(ID) == []
    assert keys(store) == []


def test_parts_become_files_of_the_artifact_without_leaving_the_store(
    store: ArtifactStore, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = store.save_part(ID, "shard-00000", write("0", {"data": b"0" * 3000, "index": b"i"}))
    assert tree(store.load_part(ID, part, tmp_path / "index", ["index"])) == {"index": b"i"}
    folder = write("rest", {"all": b"all"})
    kept = {"shards/0": (part, "data")}
    read = type(store._storage).read
    with monkeypatch.context() as patch:
        patch.setattr(type(store._storage), "read", lambda storage, key: _refuse() if "/files/" in key else read(storage, key))
        patch.setattr(type(store._storage), "read_range", _refuse)
        manifest = store.publish(folder, identity=ID, content=CONTENT, lineage=LINEAGE, kept=kept)
    store.delete_parts(ID)
    assert [entry.path for entry in manifest.files] == ["all", "shards/0"]
    assert store.verify(manifest) == []
    assert tree(store.fetch(manifest)) == {"all": b"all", "shards/0": b"0" * 3000}
    assert store.read_range(manifest, "shards/0", 2990, 4000) == b"0" * 10
    with pytest.raises(BadInput, match="part shard-00000 holds no file 'other'"):
        store.publish(folder, identity=digest("x"), content=CONTENT, lineage=LINEAGE, kept={"a": (part, "other")})
    with pytest.raises(BadInput, match="holds no file 'other'"):
        store.read_range(manifest, "other", 0, 1)


def _refuse(*_arguments: object) -> bytes:
    raise AssertionError("bytes left the store")


def test_a_part_saved_again_replaces_the_first(store: ArtifactStore, write: Write, tmp_path: Path) -> None:
    store.save_part(ID, "checkpoint-00000001", write("a", {"a": b"1"}))
    again = store.save_part(ID, "checkpoint-00000001", write("b", {"a": b"2"}))
    assert store.parts(ID) == [again]
    assert tree(store.load_part(ID, again, tmp_path / "loaded")) == {"a": b"2"}
    assert [item.reason for item in gc(store).items] == ["file no part names"]
    assert store.parts(ID) == [again]


def test_a_torn_part_does_not_exist_and_a_damaged_one_is_named(store: ArtifactStore, write: Write, tmp_path: Path) -> None:
    for number in range(3):
        store.save_part(ID, f"shard-{number}", write(str(number), {"data": bytes([number]) * 10}))
    store._storage.delete([f"parts/{ID}/shard-0/part.json"])
    store._storage.delete([key for key in keys(store, f"parts/{ID}/shard-1/") if key.endswith("/data")])
    (whole,) = store.parts(ID)
    assert whole.name == "shard-2"
    (key,) = (key for key in keys(store, f"parts/{ID}/shard-2/") if key.endswith("/data"))
    store._storage.delete([key])
    store._storage.put(key, b"\x02" * 9 + b"\x03")
    with pytest.raises(CorruptArtifact, match=r"shard-2 is damaged: data: expected SHA-256"):
        store.load_part(ID, whole, tmp_path / "loaded")
    assert tree(tmp_path / "loaded") == {}
    with pytest.raises(ValueError, match="JSON"):
        store.save_part(ID, "shard-3", write("3", {}), {"step": object()})
    with pytest.raises(BadInput, match=r"part name '\.\./x'"):
        store.save_part(ID, "../x", tmp_path)


def test_gc_removes_what_nothing_needs(store: ArtifactStore, write: Write) -> None:
    finished, half = digest("finished"), digest("half")
    manifest = store.publish(write("f", {"a": b"1"}), identity=finished, content=CONTENT, lineage=LINEAGE)
    store.save_part(finished, "shard-0", write("p", {"a": b"1"}))
    store._storage.put(f"artifacts/{finished}/files/0123456789abcdef/loser", b"lost the race")
    store._storage.put(f"artifacts/{half}/files/0123456789abcdef/data", b"killed")
    for number in (5, 40, 300):
        store.save_part(half, f"checkpoint-{number:08d}", write(f"c{number}", {"state": bytes(number)}))
    store.save_part(half, "shard-0", write("s", {"a": b"1"}))
    store._storage.put(f"parts/{half}/shard-1/files/0123456789abcdef/data", b"torn")
    store._storage.put(f"leases/{half}/00000001.json", record_of_another_host(released=True).model_dump_json().encode())

    assert store.gc(older_than=timedelta(hours=1)).bytes < 500  # of these only parts of the finished, and old checkpoints, have no age
    report = gc(store)
    assert sorted({item.reason for item in report.items}) == [
        "checkpoint older than the newest 2",
        "file no manifest names",
        "lease of a run that is no more",
        "part of a finished artifact",
        "part that was never finished",
    ]
    assert report.bytes == sum(item.bytes for item in report.items) > 0
    assert list(store.manifests()) == [manifest]
    assert store.verify(manifest) == []
    assert [part.name for part in store.parts(half)] == ["checkpoint-00000040", "checkpoint-00000300", "shard-0"]
    assert [item.reason for item in gc(store, keep_checkpoints=0).items].count("checkpoint older than the newest 0") == 4


def test_gc_leaves_alone_what_is_being_made(store: ArtifactStore, write: Write) -> None:
    with store.lease(ID):
        store._storage.put(f"artifacts/{ID}/files/0123456789abcdef/data", b"on its way")
        store._storage.put(f"parts/{ID}/shard-0/files/0123456789abcdef/data", b"on its way")
        store.save_part(ID, "checkpoint-00000001", write("c", {"state": b"1"}))
        assert store.gc(older_than=NOW, dry_run=False, keep_checkpoints=0).items == ()
    assert len(gc(store, keep_checkpoints=0).items) == 5


def test_gc_removes_unfinished_writes(store: ArtifactStore, address: str) -> None:
    if address.startswith("file"):
        (store._storage.root / ".tmp" / "half").write_bytes(b"half")
    else:
        store._storage._call("create_multipart_upload", Key=store._storage._key("artifacts/x"))
    assert store.gc(older_than=timedelta(hours=1)).items == ()
    assert [item.reason for item in gc(store).items] == ["unfinished write"]
