import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from infra.store import ArtifactStore, StoreSettings
from schemas.base import digest
from schemas.errors import BadInput, CorruptArtifact, RunFailed
from schemas.manifest import Manifest
from tests.infra.conftest import CONTENT, LINEAGE, Write, tree

ID = digest("an artifact")
BIG = 40 * 2**20  # several parts of an upload, several ranges of a download

segment = st.text(st.characters(exclude_categories=("C",), exclude_characters="/\\"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
files = st.dictionaries(st.lists(segment, min_size=1, max_size=3).map("/".join), st.binary(max_size=300), max_size=6).filter(
    lambda found: not any(a.startswith(f"{b}/") for a in found for b in found)
)


def published(store: ArtifactStore, folder: Path, identity: str = ID) -> Manifest:
    return store.publish(folder, identity=identity, content=CONTENT, lineage=LINEAGE)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=files)
def test_any_files_come_back_under_their_names(store: ArtifactStore, write: Write, found: dict[str, bytes]) -> None:
    identity = digest(sorted((name, data.hex()) for name, data in found.items()))
    manifest = published(store, write(f"{identity}{time.monotonic_ns()}", found), identity)
    assert store.find(identity) == manifest
    assert store.is_complete(manifest)
    assert store.verify(manifest) == []
    assert tree(store.fetch(manifest)) == found


def test_big_file_and_single_paths(store: ArtifactStore, write: Write, tmp_path: Path) -> None:
    data = os.urandom(BIG + 17)
    manifest = published(store, write("big", {"big.bin": data, "small": b"s", "unet/config.json": b"{}"}))
    assert store.verify(manifest) == []
    folder = store.fetch(manifest, ["unet/config.json"])
    assert list(tree(folder)) == ["unet/config.json"]
    assert (store.fetch(manifest) / "big.bin").read_bytes() == data
    with pytest.raises(BadInput, match=r"holds no file '\.\./secret'"):
        store.fetch(manifest, ["../secret"])


def test_find_resolve_and_list(store: ArtifactStore, write: Write) -> None:
    identities = ["abcdef" + "0" * 58, "abcdef" + "1" * 58, "1" * 64]
    manifests = [published(store, write(identity, {"a": identity.encode()}), identity) for identity in identities]
    assert store.find(digest("nothing")) is None
    assert list(store.manifests()) == sorted(manifests, key=lambda manifest: manifest.identity)
    assert store.resolve("111111") == manifests[2]
    assert store.resolve(f"{store.address}/artifacts/{identities[1]}") == manifests[1]
    assert store.resolve("abcdef0") == manifests[0]
    for reference, why in (
        ("abcdef", "ambiguous"),
        ("222222", "no such"),
        ("1111", "6 or more"),
        ("not-hex!", "6 or more"),
        ("3" * 64, "no such"),
    ):
        with pytest.raises(BadInput, match=why):
            store.resolve(reference)


def test_publish_again_adopts_and_remove_forgets(store: ArtifactStore, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    first = published(store, write("one", {"a": b"1"}))
    assert published(store, write("same", {"a": b"1"})) == first
    assert "other bytes" not in caplog.text
    assert published(store, write("two", {"a": b"2"})) == first
    assert "other bytes in ['a']" in caplog.text
    store.remove(ID)
    assert store.find(ID) is None
    assert list(store._storage.objects("artifacts/")) == []
    assert tree(store.fetch(published(store, write("three", {"a": b"3"})))) == {"a": b"3"}


def test_pickles_and_still_works(store: ArtifactStore, write: Write) -> None:
    manifest = published(store, write("one", {"a": b"1"}))
    assert pickle.loads(pickle.dumps(store)).find(ID) == manifest


def test_works_on_both_sides_of_a_fork(store: ArtifactStore, write: Write) -> None:
    manifest = published(store, write("one", {"a": b"1"}))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(store.find, [ID] * 4).get(timeout=60) == [manifest] * 4
        assert tree(pool.apply_async(store.fetch, [manifest]).get(timeout=60)) == {"a": b"1"}
    assert store.find(ID) == manifest


def test_eight_racing_writers_have_one_winner(store: ArtifactStore, address: str, write: Write, tmp_path: Path, other_process) -> None:
    start, processes = tmp_path / "start", []
    for number in range(2):
        folders = [str(write(f"{number}-{thread}", {"a": os.urandom(64), "b": b"same"})) for thread in range(4)]
        processes.append(other_process("race", address, ID, str(start), *folders))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    start.touch()
    ended_with = [line for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert len(ended_with) == 8
    winner = store.find(ID)
    assert winner is not None
    assert set(ended_with) == {winner.files_digest}
    assert store.verify(winner) == []


def test_killed_writer_leaves_nothing_visible(store: ArtifactStore, address: str, write: Write, other_process) -> None:
    many = 600 if address.startswith("file") else 200  # long enough to be killed in the middle
    folder = write("many", {f"{number:03d}.bin": os.urandom(2000) for number in range(many)})
    process = other_process("publish", address, ID, str(folder))
    assert process.stdout.readline() == "ready\n"
    while len(list(store._storage.objects(f"artifacts/{ID}/"))) < 3:
        time.sleep(0.01)
    process.kill()
    assert process.communicate()[0] == ""  # it was in the middle
    assert store.find(ID) is None
    assert list(store.manifests()) == []
    manifest = published(store, folder)
    assert store.is_complete(manifest)
    assert tree(store.fetch(manifest)) == tree(folder)


def damage(store: ArtifactStore, manifest: Manifest, path: str, data: bytes | None) -> None:
    entry = manifest.file(path)
    key = f"artifacts/{manifest.identity}/files/{entry.sha256[:16]}/{path}"
    store._storage.delete([key])
    if data is not None:
        store._storage.put(key, data)


@pytest.mark.parametrize(
    ("made_of", "found"),
    [
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "found [0-9a-f]{64}"),
        (lambda data: data[:-1], "expected 20000000 bytes, found 19999999"),
        (lambda _: b"", "expected 20000000 bytes, found 0"),
        (lambda _: None, "expected 20000000 bytes .* found no object"),
    ],
    ids=["flipped byte", "truncated", "empty", "gone"],
)
def test_damage_is_found_and_named(store: ArtifactStore, write: Write, made_of, found: str) -> None:
    data = os.urandom(20_000_000)
    manifest = published(store, write("one", {"good": b"g", "unet/weights": data}))
    changed = made_of(data)
    damage(store, manifest, "unet/weights", changed)
    with pytest.raises(CorruptArtifact, match=f"unet/weights: .*{found}"):
        store.fetch(manifest)
    assert tree(store.fetch(manifest, ["good"])) == {"good": b"g"}
    problems = store.verify(manifest)
    assert len(problems) == 1
    assert problems[0].startswith("unet/weights: ")
    assert store.is_complete(manifest) == (changed is not None and len(changed) == len(data))


def test_lost_object_is_mended_by_publishing_again(store: ArtifactStore, write: Write) -> None:
    manifest = published(store, write("one", {"a": b"1", "b": b"2"}))
    damage(store, manifest, "a", None)
    assert published(store, write("again", {"a": b"1", "b": b"2"})) == manifest
    assert store.verify(manifest) == []
    damage(store, manifest, "a", b"")
    other = published(store, write("differently", {"a": b"3"}))
    assert other.files_digest != manifest.files_digest
    assert store.find(ID) == other


def test_damaged_manifest_is_named(store: ArtifactStore) -> None:
    store._storage.put(f"artifacts/{ID}/manifest.json", b"{}")
    with pytest.raises(CorruptArtifact, match=f"{ID}/manifest.json is not a manifest"):
        store.find(ID)
    assert list(store.manifests()) == []


def test_a_path_out_of_the_artifact_is_refused(store: ArtifactStore, write: Write) -> None:
    manifest = published(store, write("one", {"a": b"1"}))
    text = manifest.model_dump_json().replace('"path":"a"', '"path":"../../a"')
    store._storage.put(f"artifacts/{ID}/manifest.json", text.encode())
    with pytest.raises(CorruptArtifact, match="inside the artifact"):
        store.find(ID)


def test_what_cannot_be_published(store: ArtifactStore, write: Write, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected a folder"):
        published(store, tmp_path / "nothing")
    folder = write("odd", {"a\\b": b""})
    with pytest.raises(BadInput, match="file named"):
        published(store, folder)
    with pytest.raises(BadInput, match="64 lower-case hex"):
        store.find("abc")


def test_a_file_that_changes_while_published(store: ArtifactStore, tmp_path: Path) -> None:
    for size in (10, BIG):
        path = tmp_path / "changing"
        path.write_bytes(b"x" * size)
        with pytest.raises(RunFailed, match="changed while"):
            store._storage.upload(path, "artifacts/x", size, digest("other bytes"))
        assert list(store._storage.objects("artifacts/")) == []


def test_headers_and_tensors_by_range_read(store: ArtifactStore, tmp_path: Path) -> None:
    folder = tmp_path / "tensors"
    folder.mkdir()
    generator = np.random.default_rng(0)
    tensors = {
        f"block.{i}.{'w' * 60}": generator.standard_normal((i % 7, 3)).astype(np.float32) for i in range(900)
    }  # a header over 64 KiB
    tensors["half"] = np.arange(6, dtype=np.float16).reshape(2, 3)
    save_file(tensors, folder / "t.safetensors", metadata={"format": "pt"})
    (folder / "broken.safetensors").write_bytes((folder / "t.safetensors").read_bytes()[:70_000])
    (folder / "text.safetensors").write_bytes(b"not tensors at all")
    manifest = published(store, folder)
    header = store.read_header(manifest, "t.safetensors")
    with safe_open(folder / "t.safetensors", "np") as reader:
        assert header.pop("__metadata__") == reader.metadata()
        assert set(header) == set(reader.keys())
        for name in header:
            assert header[name]["shape"] == reader.get_slice(name).get_shape()
            assert header[name]["dtype"] == reader.get_slice(name).get_dtype()
    wanted = ["half", *list(tensors)[:10]]
    for name, tensor in store.read_tensors(manifest, "t.safetensors", wanted).items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name])
    for broken in ("broken", "text"):
        with pytest.raises(CorruptArtifact, match=f"{broken}.safetensors: "):
            store.read_header(manifest, f"{broken}.safetensors")
    with pytest.raises(CorruptArtifact, match="no tensor named 'absent'"):
        store.read_tensors(manifest, "t.safetensors", ["absent"])


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.settings import Settings

    monkeypatch.setenv("DISTILL_STORE_ADDRESS", "s3://bucket/runs")
    monkeypatch.setenv("DISTILL_STORE_CACHE_BYTES", "1000")
    loaded = Settings.load()
    assert (loaded.store_address, loaded.store.cache_bytes) == ("s3://bucket/runs", 1000)
    assert StoreSettings().cache_bytes == 1000
    monkeypatch.setenv("DISTILL_STORE_CACHE_BYTES", "many")
    with pytest.raises(BadInput, match="DISTILL_STORE_CACHE_BYTES='many'"):
        Settings.load()
