"""The demo's pictures: the same bytes from the same seeds, captions from the package, any size."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.demo import concepts, emoji
from schemas.errors import BadInput


def test_every_concept_named_has_a_drawing() -> None:
    assert {one.name for one in emoji.known_emoji()} == {emoji.clean_name(name) for name in concepts.ALL}


def test_captions_follow_from_the_seed_and_cover_every_concept() -> None:
    count = len(emoji.known_emoji())
    first = emoji.captions(7, count)
    assert first == emoji.captions(7, 2 * count)[:count] != emoji.captions(8, count)
    assert {one.name for one in first} == {one.name for one in emoji.known_emoji()}
    assert all(one.name in one.caption for one in first)


def test_a_picture_is_the_same_bytes_again_and_differs_between_variants() -> None:
    apple = next(one for one in emoji.known_emoji() if one.name == "red apple")
    assert emoji.render(apple, 64, 3) == emoji.render(apple, 64, 3) != emoji.render(apple, 64, 4)


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_the_drawing_lies_on_the_background_at_any_size(image_format: emoji.ImageFormat) -> None:
    heart = next(one for one in emoji.known_emoji() if one.name == "red heart")
    for size in (48, 300):
        pixels = np.asarray(Image.open(io.BytesIO(emoji.render(heart, size, 1, image_format))).convert("RGB")).astype(int)
        assert pixels.shape == (size, size, 3)
        red, green, _ = pixels[size // 2, size // 2]
        assert red - green > 80, "the middle of a red heart is red"
        assert pixels[1, 1].min() > 60, "the corner shows the light background"


def test_write_collection_lists_what_it_wrote(tmp_path: Path) -> None:
    table = emoji.write_collection(tmp_path, 5, sizes=[32, 40], seed=2)
    assert pq.read_table(tmp_path / "collection.parquet").equals(table)
    for row in table.to_pylist():
        assert Image.open(tmp_path / row["file"]).size == (row["width"], row["height"])
    assert [row["width"] for row in table.to_pylist()] == [32, 40, 32, 40, 32]


def test_sizes_that_are_not_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="sizes must be positive"):
        emoji.write_collection(tmp_path, 1, sizes=[0], seed=0)
