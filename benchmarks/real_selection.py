"""Real photographs and emoji, and planted bad rows of each kind, through `measure` and `select`: `python -m benchmarks.real_selection --photos DIR`.

A photograph whose short side is above 2048 px is brought to half its size, so that it is sharp to the pixel where it is in focus; it and its centre
square are right. Beside each stand spoilt copies, which are wrong: a Gaussian blur (3 pixels at the scale where sharpness is measured), the picture
enlarged three times to the size it had, a copy just too small, one cut short, one with a low score, one without a score, and the same file again.
Emoji are drawn above 1024 px, sharp and blurred. Printed is each picture that got another verdict than it should, and as the last line JSON: the
pictures, how many got the wrong verdict, and of each kind how many got the verdict that is for it.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from benchmarks.select import workspace
from infra.demo.emoji import captions, render, variant
from schemas.base import digest
from schemas.data import MeasureConfig, SelectConfig
from schemas.manifest import ImageShards
from stages import measure, select
from stages.shards import Sample, ShardWriter

EMOJI: Final = 24
_FOUND: Final = {"sharp": None, "square": None, "blurred": "sharpness", "enlarged": "upscaled", "small": "resolution"}


@dataclass(frozen=True)
class Case:
    """A picture and the verdict it should get."""

    name: str
    data: bytes
    reasons: tuple[str | None, ...]
    """Those that are right; None: it passes."""
    aesthetic: float | None = 6.0


def jpeg(picture: Image.Image, quality: int = 92) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def of_photograph(path: Path) -> Iterator[Case]:
    """A photograph at half its size, and its spoilt copies."""
    whole = Image.open(path).convert("RGB")
    picture = whole.reduce(2)
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    square = picture.crop((left, top, left + side, top + side))
    scale = side / MeasureConfig().analysis_px
    third = picture.resize((picture.width // 3, picture.height // 3), Image.Resampling.LANCZOS)
    small = picture.resize((round(1024 * picture.width / side), round(1024 * picture.height / side)), Image.Resampling.LANCZOS)
    sharp = jpeg(picture)
    yield Case(f"{path.stem}: sharp", sharp, (None,))
    # Where the subject is not in the middle, a square may show what is out of focus; then it may not pass.
    yield Case(f"{path.stem}: square", jpeg(square), (None, "duplicate"))
    yield Case(f"{path.stem}: blurred", jpeg(picture.filter(ImageFilter.GaussianBlur(3 * scale))), ("sharpness",))
    yield Case(f"{path.stem}: enlarged", jpeg(third.resize(picture.size, Image.Resampling.BICUBIC)), ("upscaled", "sharpness"))
    yield Case(f"{path.stem}: small", jpeg(small), ("resolution",))
    yield Case(f"{path.stem}: cut short", sharp[: len(sharp) // 2], ("unreadable",))
    yield Case(f"{path.stem}: low score", jpeg(picture, 91), ("aesthetic",), 5.5)
    yield Case(f"{path.stem}: no score", jpeg(picture, 90), ("no aesthetic score",), None)
    yield Case(f"{path.stem}: again", sharp, ("duplicate",))


def of_emoji() -> Iterator[Case]:
    """Drawings, sharp and blurred."""
    for index, one in enumerate(captions(0, EMOJI)):
        data = render(one, 1088 + 64 * (index % 3), variant(0, index))
        yield Case(f"emoji {index}: sharp", data, (None,))
        blurred = Image.open(io.BytesIO(data)).convert("RGB").filter(ImageFilter.GaussianBlur(6))
        yield Case(f"emoji {index}: blurred", jpeg(blurred), ("sharpness",))


def verdicts(cases: list[Case], folder: Path) -> dict[str, str | None]:
    """The reason of each case's drop, by name, from the stages themselves."""
    place = workspace(folder, "images")
    with place.folder("images") as shards:
        writer = ShardWriter(shards, 50)
        for number, case in enumerate(cases):
            row = {
                "url": f"http://example.org/{number}",
                "width": 0,
                "height": 0,
                "aesthetic": case.aesthetic,
                "sha256": digest(case.data.hex()),
            }
            writer.add(Sample(f"{number:010d}", "jpg", case.data, f"{case.name}, a picture for the test", row))
        writer.close()
        images = place.publish(shards, ImageShards(rows_in_table=len(cases), images=len(cases), shards=writer.shards))
    measured = measure.run(MeasureConfig(), measure.Inputs(images=images), workspace(folder, "measure"))
    selection = select.run(SelectConfig(), select.Inputs(measurements=measured), workspace(folder, "select"))
    found = workspace(folder, "read").fetch(selection, ["verdicts.parquet"]) / "verdicts.parquet"
    rows = pq.read_table(found, columns=["key", "reason"]).to_pylist()
    return {cases[int(row["key"])].name: row["reason"] for row in rows}


def main() -> None:
    """Judge, and write what went wrong and the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_selection", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched through")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.is_file())
    large = [path for path in paths if min(Image.open(path).size) > 2048]
    if not large:
        sys.exit(f"{arguments.photos}: no picture above 2048 px")
    cases = [case for path in large for case in of_photograph(path)] + list(of_emoji())
    with tempfile.TemporaryDirectory(prefix="real-") as folder:
        found = verdicts(cases, Path(folder))
    wrong = [case for case in cases if found[case.name] not in case.reasons]
    lines = [f"{case.name}: {found[case.name] or 'passes'}, expected {' or '.join(r or 'to pass' for r in case.reasons)}" for case in wrong]
    by_kind = {kind: sum(found[case.name] == reason for case in cases if case.name.endswith(kind)) for kind, reason in _FOUND.items()}
    result = {"photographs": len(large), "pictures": len(cases), "wrong": len(wrong)} | by_kind
    sys.stdout.write("\n".join([*lines, json.dumps(result)]) + "\n")


if __name__ == "__main__":
    main()
