"""The demo's table of URLs: real drawings above and below 1024 px, and beside them everything that goes wrong on the web.

The faults are planted, and said to be: dead addresses, a refused connection, truncated and foreign files, pictures smaller than the table
claims, blurred copies, low scores, a repeated address, an empty caption. The aesthetic scores are planted too; OpenMoji has none.
"""

import io
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter, ImageOps

from infra.demo.controlnet import write_controlnet
from infra.demo.emoji import ImageFormat, captions, render, variant

LARGE: Final = (1088, 1152, 1216, 1280)
SMALL: Final = (512, 768, 1000)
TINY: Final = (64, 80, 96, 128)
"""Pixels on a side."""
LOOKS: Final[Mapping[str, tuple[str, str]]] = {"in sepia": ("#3a1f0a", "#fdf0d0"), "at night": ("#f4e9a0", "#10183c")}
"""What a caption says of a picture's colours: those that black and white become."""
_EVERY: Final = 8
FORMATS: Final[tuple[ImageFormat, ...]] = ("png", "jpg")
_CLOSED_PORT: Final = 9  # discard: nothing listens there
_SCHEMA: Final = pa.schema(
    [("url", pa.string()), ("caption", pa.string()), ("width", pa.int64()), ("height", pa.int64()), ("aesthetic", pa.float64())]
)
Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Collection:
    """Pictures on disk and the table that points to them."""

    pictures: Path
    table: Path
    port: int
    """The table's addresses name 127.0.0.1 and this port."""


def make_collection(folder: Path, *, large: int = 176, small: int = 32, seed: int = 0) -> Collection:
    """The demo's pictures, `large` of them above 1024 px and `small` below, and its table with the planted faults.

    A folder that is complete already is used as it is.
    """

    def rows(pictures: Path) -> Rows:
        sides = [LARGE[index % len(LARGE)] if index < large else SMALL[index % len(SMALL)] for index in range(large + small)]
        good = _good(pictures, sides, seed)
        return good + _planted(pictures, good, seed)

    return _collect(folder, {"large": large, "small": small, "seed": seed}, rows)


def make_small_collection(folder: Path, *, count: int, seed: int) -> Collection:
    """Many small pictures, none broken, in poses of their own for each seed: enough to train a tiny network on for hours."""

    def rows(pictures: Path) -> Rows:
        return _good(pictures, [TINY[index % len(TINY)] for index in range(count)], seed)

    return _collect(folder, {"count": count, "seed": seed}, rows)


def make_looks_collection(folder: Path, *, count: int, seed: int) -> Collection:
    """As `make_small_collection`, an eighth of the pictures in the colours of each of `LOOKS`, which their captions then name. Beside them, in
    `controlnet/`, a ControlNet for the demo's teacher."""
    write_controlnet(folder / "controlnet")

    def rows(pictures: Path) -> Rows:
        good = _good(pictures, [TINY[index % len(TINY)] for index in range(count)], seed)
        for number, (look, colours) in enumerate(LOOKS.items()):
            for row in good[number::_EVERY]:
                _recolour(pictures / str(row["url"]), *colours)
                row["caption"] = f"{row['caption']} {look}"
        return good

    return _collect(folder, {"count": count, "seed": seed, "looks": len(LOOKS)}, rows)


def _recolour(path: Path, dark: str, light: str) -> None:
    """Take a picture's lightness through two colours."""
    picture = ImageOps.colorize(Image.open(path).convert("L"), dark, light)
    picture.save(path, quality=95)


def _collect(folder: Path, made_of: dict[str, int], rows_of: Callable[[Path], Rows]) -> Collection:
    """Draw pictures and write the table of their addresses, unless it is there.

    The port is chosen once and kept, because it stands in the addresses, the addresses in the table, and the table's digest in every identity.
    """
    stamp = folder / "collection.json"
    pictures, table = folder / "pictures", folder / "urls.parquet"
    if stamp.exists():
        kept = json.loads(stamp.read_text())
        if kept["made_of"] == made_of:
            return Collection(pictures, table, kept["port"])
    pictures.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    rows = rows_of(pictures)
    for row in rows:
        if "://" not in str(row["url"]):
            row["url"] = f"http://127.0.0.1:{port}/{row['url']}"
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), table)
    stamp.write_text(json.dumps({"made_of": made_of, "port": port}))
    return Collection(pictures, table, port)


def _good(pictures: Path, sides: Sequence[int], seed: int) -> Rows:
    rows: Rows = []
    for index, (one, side) in enumerate(zip(captions(seed, len(sides)), sides, strict=True)):
        image_format = FORMATS[index % len(FORMATS)]
        name = f"{index:05d}.{image_format}"
        (pictures / name).write_bytes(render(one, side, variant(seed, index), image_format))
        rows.append(_row(name, one.caption, side, 5.6 + (index % 20) / 10))
    return rows


def _planted(pictures: Path, good: Rows, seed: int) -> Rows:
    """Rows that must not survive, each for one reason."""
    whole = [(pictures / str(row["url"])).read_bytes() for row in good[:8]]
    rows = [_row(f"gone-{index}.png", "a picture that is gone", 1200, 6.0) for index in range(6)]
    rows += [_row(f"http://127.0.0.1:{_CLOSED_PORT}/{index}.png", "a host that is down", 1200, 6.0) for index in range(2)]
    for index in range(4):
        (pictures / f"truncated-{index}.png").write_bytes(whole[2 * index][: len(whole[2 * index]) // 2])
        rows.append(_row(f"truncated-{index}.png", "a broken download", 1200, 6.0))
    for index in range(2):
        (pictures / f"page-{index}.jpg").write_text("<html><body>This picture has moved.</body></html>")
        rows.append(_row(f"page-{index}.jpg", "a page in a picture's place", 1200, 6.0))
    for index in range(6):
        (pictures / f"blurred-{index}.jpg").write_bytes(_blurred(whole[index]))
        rows.append(_row(f"blurred-{index}.jpg", "a blurred picture", 1200, 6.0))
    for index, one in enumerate(captions(seed + 1, 4)):
        (pictures / f"claims-{index}.png").write_bytes(render(one, 640, variant(seed + 1, index)))
        rows.append(_row(f"claims-{index}.png", one.caption, 2048, 6.0))
    rows += [{**row, "url": f"{row['url']}?low", "aesthetic": 4.9} for row in good[:4]]
    rows += [dict(row) for row in good[:3]]
    rows += [{**row, "url": f"{row['url']}?silent", "caption": ""} for row in good[:2]]
    return rows


def _row(url: str, caption: str, side: int, aesthetic: float) -> dict[str, object]:
    return {"url": url, "caption": caption, "width": side, "height": side, "aesthetic": aesthetic}


def _blurred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").filter(ImageFilter.GaussianBlur(24)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
