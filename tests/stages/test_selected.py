"""The pictures of a selection: where they lie, and reading them shard by shard or one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import ArtifactStore
from schemas.errors import BadInput, CorruptArtifact
from schemas.manifest import ImageShards, Manifest, Selection
from stages.offsets import OFFSETS, offsets_name, read_offsets, write_offsets
from stages.selected import SelectedPictures, read_picture
from stages.shards import Sample, ShardWriter, index_shard, shard_names
from tests.stages.pictures import encoded, noise, sample
from tests.workspaces import make_workspace, open_store

FORMATS = ("PNG", "JPEG", "WEBP")
SAMPLES = [
    Sample(one.key, one.extension if kind == "PNG" else {"JPEG": "jpg", "WEBP": "webp"}[kind], one.image, one.caption, one.row)
    for number, kind in enumerate(FORMATS * 3)
    for one in [sample(number, encoded(noise(number, 9, 9 + number), kind))]
]


def publish(folder: Path, store: ArtifactStore, *, with_offsets: bool, dropped: Sequence[int] = (4,)) -> tuple[Any, Any]:
    workspace = make_workspace(folder, store, identity=f"images {with_offsets}")
    with workspace.folder("images") as place:
        writer = ShardWriter(place, 4)
        for one in SAMPLES:
            writer.add(one)
        writer.close()
        if with_offsets:
            for shard in sorted(place.glob("*.tar")):
                write_offsets(shard)
        images = workspace.publish(place, ImageShards(rows_in_table=9, images=9, shards=3))
    rows = [
        {"key": one.key, "caption": f"cleaned {i}", "passed": i not in dropped, "width": 9, "height": 9 + i, "more": 1.5}
        for i, one in enumerate(SAMPLES)
    ]
    return images, publish_verdicts(folder, store, images, rows)


def publish_verdicts(folder: Path, store: ArtifactStore, images: Manifest[ImageShards], rows: list[dict[str, Any]]) -> Manifest[Selection]:
    workspace = make_workspace(folder, store, identity=f"selection {images.identity} {rows}")
    with workspace.folder("selection") as place:
        pq.write_table(pa.Table.from_pylist(rows), place / "verdicts.parquet", row_group_size=2)
        return workspace.publish(place, Selection(source=images.identity, images_in=len(rows), images=len(rows)))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(tmp_path)


@pytest.mark.parametrize("with_offsets", [True, False])
def test_offsets_are_those_of_the_tar(tmp_path: Path, store: ArtifactStore, *, with_offsets: bool) -> None:
    images, _ = publish(tmp_path, store, with_offsets=with_offsets)
    assert (offsets_name("shard-00001.tar") in {entry.path for entry in images.files}) is with_offsets
    tables = read_offsets(images, make_workspace(tmp_path, store))
    for name, table in zip(shard_names(images), tables, strict=True):
        assert table.schema == OFFSETS
        places = index_shard(store.fetch(images) / name)
        expected = [(place.key, place.extension, *place.members[place.extension], *place.members["json"]) for place in places]
        assert [tuple(row.values()) for row in table.to_pylist()] == expected


@pytest.mark.parametrize("with_offsets", [True, False])
def test_they_come_in_order_with_their_cleaned_captions_one_shard_at_a_time(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, *, with_offsets: bool
) -> None:
    images, selection = publish(tmp_path, store, with_offsets=with_offsets)
    workspace = make_workspace(tmp_path, store)
    pictures = SelectedPictures.open(images, selection, workspace)
    assert len(pictures) == 8
    events: list[tuple[str, Sequence[str] | None]] = []
    fetch, release = ArtifactStore.fetch, ArtifactStore.release
    monkeypatch.setattr(
        ArtifactStore, "fetch", lambda one, manifest, paths=None: events.append(("+", paths)) or fetch(one, manifest, paths)
    )
    monkeypatch.setattr(
        ArtifactStore, "release", lambda one, manifest=None, paths=None: events.append(("-", paths)) or release(one, manifest, paths)
    )
    found = list(pictures)
    expected = [Sample(one.key, one.extension, one.image, f"cleaned {i}", one.row) for i, one in enumerate(SAMPLES) if i != 4]
    assert found == expected
    assert events == [(sign, [f"shard-0000{i}.tar"]) for i in range(3) for sign in "+-"]
    names = shard_names(images)
    assert [read_picture(workspace, images, names[row["shard"]], row) for row in pictures.table.to_pylist()] == expected


def test_what_does_not_belong_together_is_refused(tmp_path: Path, store: ArtifactStore) -> None:
    images, selection = publish(tmp_path, store, with_offsets=True)
    other, _ = publish(tmp_path, store, with_offsets=False)
    workspace = make_workspace(tmp_path, store)
    with pytest.raises(BadInput, match=f"made from the images {images.identity[:12]}; expected from {other.identity[:12]}"):
        SelectedPictures.open(other, selection, workspace)
    row = {"key": "0000000099", "caption": "", "passed": True, "width": 9, "height": 9}
    with pytest.raises(CorruptArtifact, match="hold 0 of the 1 selected pictures"):
        SelectedPictures.open(images, publish_verdicts(tmp_path, store, images, [row]), workspace)


def test_a_shard_that_is_no_tar_is_named(tmp_path: Path, store: ArtifactStore) -> None:
    workspace = make_workspace(tmp_path, store, identity="torn")
    with workspace.folder("images") as place:
        (place / "shard-00000.tar").write_bytes(b"no tar" * 1000)
        images = workspace.publish(place, ImageShards(rows_in_table=1, images=1, shards=1))
    with pytest.raises(CorruptArtifact, match=r"shard-00000\.tar: not a whole tar file"):
        read_offsets(images, workspace)
