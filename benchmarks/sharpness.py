"""How the two numbers of sharpness fall with blur and enlargement, on real photographs: `python -m benchmarks.sharpness --photos DIR`.

Every photograph above 1024 px below DIR is taken whole and as its centre square, and the square is spoilt: Gaussian blur and motion blur (strengths
in pixels at the scale where sharpness is measured, short side 1024), enlargement (shrunk first, so that the size stays), noise, strong JPEG. Printed
are the quartiles of both numbers for each, the share that the default thresholds of `select` drop, and as the last line JSON: `recall`, the share of
unspoilt pictures that pass; `precision`, the share of unspoilt ones among those that pass where as many are spoilt as not, every spoiling that
must be found being equally frequent; `caught`, the share of those spoilt that are dropped. `--curve FILE` writes what the report of `select` draws.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.data import MeasureConfig, SelectConfig
from stages.measure.sharpness import Tiles, high_frequency, sharpness, shrink

Rgb = NDArray[np.uint8]
Kind = tuple[str, float]
"""What was done to a picture, and how strongly."""
Figures = tuple[float, float]
"""Sharpness and share of high frequencies."""

ANALYSIS_PX: Final = MeasureConfig().analysis_px
GOOD: Final[tuple[Kind, ...]] = (("whole", 0), ("square", 0))
BAD: Final[tuple[Kind, ...]] = (
    *(("Gaussian blur", sigma) for sigma in (2, 3, 4, 6)),
    *(("Gaussian blur, JPEG 75", sigma) for sigma in (2, 4)),
    *(("motion blur", length) for length in (21, 41)),
    *((name, scale) for scale in (2, 3, 4) for name in ("bicubic", "bicubic, JPEG 90", "Lanczos")),
)
"""What must be found; the rest of the table is for knowing."""
_PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp")


def spoilt(square: Rgb) -> Iterator[tuple[Kind, Rgb]]:
    """Every spoiling of a picture, at its size."""
    height, width = square.shape[:2]
    scale = min(height, width) / ANALYSIS_PX
    random = np.random.default_rng(0)
    for quality in (90, 75, 50, 30):
        yield ("JPEG", quality), _jpeg(square, quality)
    for sigma in (0.5, 1, 1.5, 2, 3, 4, 6):
        blurred = _blur(square, sigma * scale)
        yield ("Gaussian blur", sigma), blurred
        if sigma in (1, 2, 4):
            yield ("Gaussian blur, JPEG 75", sigma), _jpeg(blurred, 75)
        if sigma == 3:
            yield ("Gaussian blur 3, noise", 3), _noisy(blurred, 3, random)
            yield ("Gaussian blur 3, noise", 8), _noisy(blurred, 8, random)
    for length in (5, 11, 21, 41):
        yield ("motion blur", length), _motion(square, max(3, round(length * scale) | 1))
    for times in (1.25, 1.5, 2, 3, 4):
        small = cv2.resize(square, (round(width / times), round(height / times)), interpolation=cv2.INTER_AREA)
        bicubic = _pixels(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
        yield ("bicubic", times), bicubic
        yield ("bicubic, JPEG 90", times), _jpeg(bicubic, 90)
        yield ("Lanczos", times), _pixels(cv2.resize(small, (width, height), interpolation=cv2.INTER_LANCZOS4))
    for levels in (3, 8):
        yield ("noise", levels), _noisy(square, levels, random)


def _pixels(values: Any) -> Rgb:
    return np.asarray(values, dtype=np.uint8)


def _blur(picture: Rgb, sigma: float) -> Rgb:
    return _pixels(cv2.GaussianBlur(picture, (0, 0), sigma))


def _jpeg(picture: Rgb, quality: int) -> Rgb:
    data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]  # the order of the colours matters little here
    return _pixels(cv2.imdecode(data, cv2.IMREAD_COLOR))


def _motion(picture: Rgb, length: int) -> Rgb:
    """A straight line of `length` pixels, 30 degrees from level."""
    line = np.zeros((length, length), np.float32)
    line[length // 2] = 1
    centre = (length - 1) / 2
    kernel = cv2.warpAffine(line, cv2.getRotationMatrix2D((centre, centre), 30, 1), (length, length))
    return _pixels(cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT))


def _noisy(picture: Rgb, levels: float, random: np.random.Generator) -> Rgb:
    grey = random.normal(0, levels, picture.shape[:2])[..., None]
    return _pixels((picture + grey).clip(0, 255).round())


def figures(picture: Rgb) -> Figures:
    """Both numbers of a picture, as `measure` has them."""
    luma = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    tiles = Tiles.of(shrink(luma, ANALYSIS_PX))
    return sharpness(tiles), high_frequency(luma, tiles)


def measured(path: Path) -> list[tuple[Kind, Figures]]:
    """Both numbers of a photograph and of all that is made of it."""
    cv2.setNumThreads(1)
    whole = np.asarray(Image.open(path).convert("RGB"))
    side = min(whole.shape[:2])
    top, left = ((length - side) // 2 for length in whole.shape[:2])
    square = np.ascontiguousarray(whole[top : top + side, left : left + side])
    unspoilt = [(("whole", 0.0), figures(whole)), (("square", 0.0), figures(square))]
    return unspoilt + [(kind, figures(picture)) for kind, picture in spoilt(square)]


def photographs(folder: Path) -> list[Path]:
    """Every picture below `folder` whose short side is above 1024 px."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file() and not path.is_symlink())
    return [path for path in found if min(Image.open(path).size) > 1024]


def dropped(values: NDArray[np.float64], config: SelectConfig) -> NDArray[np.bool_]:
    """Which (N, 2) figures the thresholds drop."""
    fails: NDArray[np.bool_] = (values[:, 0] < config.min_sharpness) | (values[:, 1] < config.min_high_frequency)
    return fails


def summary(found: dict[Kind, NDArray[np.float64]], config: SelectConfig) -> dict[str, float]:
    """Precision and recall of the thresholds, and what they catch."""
    recall = 1 - float(np.mean([dropped(found[kind], config).mean() for kind in GOOD]))
    caught = float(np.mean([dropped(found[kind], config).mean() for kind in BAD]))
    return {"recall": recall, "precision": recall / max(recall + 1 - caught, 1e-9), "caught": caught}


def table(found: dict[Kind, NDArray[np.float64]], config: SelectConfig) -> list[str]:
    """A line for each spoiling: quartiles of both numbers, and the share dropped by each threshold and by both."""
    lines = [f"{'':28}{'sharpness (quartiles)':>28}{'high frequency (quartiles)':>32}{'dropped by':>12} 1     2  both"]
    for (name, strength), values in found.items():
        quartiles = np.percentile(values, [25, 50, 75], axis=0)
        first, second = (values < [config.min_sharpness, config.min_high_frequency]).mean(axis=0)
        mark = "+" if (name, strength) in GOOD else "-" if (name, strength) in BAD else " "
        lines.append(
            f"{mark} {name:22}{strength:4g}"
            + "".join(f"{value:9.4f}" for value in quartiles[:, 0])
            + "  "
            + "".join(f"{value:10.5f}" for value in quartiles[:, 1])
            + f"{first:14.2f}{second:6.2f}{dropped(values, config).mean():6.2f}"
        )
    return lines


def curve(found: dict[Kind, NDArray[np.float64]], figures_: dict[str, float], photos: int, note: str) -> dict[str, Any]:
    """What the report of `select` draws: medians by strength, and all quartiles below them."""

    def series(column: int, names: Sequence[str], start: float) -> list[dict[str, Any]]:
        original = [start, _short(np.median(found["square", 0][:, column]))]
        return [
            {"name": name, "points": [original] + [[s, _short(np.median(v[:, column]))] for (n, s), v in found.items() if n == name]}
            for name in names
        ]

    return {
        "x_label": f"strength of the blur (pixels at a short side of {ANALYSIS_PX}: sigma, or length of the motion)",
        "note": f"Medians of {photos} photographs above 1024 px. {note}".strip(),
        "series": series(0, ("Gaussian blur", "Gaussian blur, JPEG 75", "motion blur"), 0),
        "high_frequency": {"x_label": "enlarged by", "series": series(1, ("bicubic", "bicubic, JPEG 90", "Lanczos"), 1)},
        "at_default": {name: round(value, 3) for name, value in figures_.items()},
        "quartiles": [
            {"name": name, "strength": strength}
            | {
                label: [_short(value) for value in np.percentile(values[:, column], [25, 50, 75])]
                for column, label in enumerate(("sharpness", "high_frequency"))
            }
            for (name, strength), values in found.items()
        ],
    }


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")


def main() -> None:
    """Measure, and write the table and the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharpness", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched through")
    parser.add_argument("--curve", type=Path, help="JSON file for the report of select")
    parser.add_argument("--note", default="", help="where the photographs come from, for the curve")
    parser.add_argument("--figures", type=Path, help="save all figures (.npz)")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    if not photos:
        sys.exit(f"{arguments.photos}: no picture above 1024 px")
    gathered: defaultdict[Kind, list[Figures]] = defaultdict(list)
    with ProcessPoolExecutor(arguments.processes) as pool:
        for one in pool.map(measured, photos):
            for kind, values in one:
                gathered[kind].append(values)
    found = {kind: np.array(values) for kind, values in gathered.items()}
    config = SelectConfig()
    result = summary(found, config)
    if arguments.figures is not None:
        np.savez(arguments.figures, names=[p.name for p in photos], **{f"{name}|{strength:g}": v for (name, strength), v in found.items()})
    if arguments.curve is not None:
        text = json.dumps(curve(found, result, len(photos), arguments.note), indent=1)
        arguments.curve.write_text(text + "\n", encoding="utf-8")
    heading = f"{len(photos)} photographs; dropped below sharpness {config.min_sharpness:g} or high frequency {config.min_high_frequency:g}"
    lines = [heading, *table(found, config), json.dumps({name: round(value, 3) for name, value in result.items()})]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
