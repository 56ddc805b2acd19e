"""`measure` and `select` beside what cannot be avoided: `python -m benchmarks.select [--images 1200] [--photos DIR] [--metadata-rows N]`.

JPEG pictures of 1100 to 1700 px on the short side (crops of the photographs below DIR, else drawn with the spectrum of photographs) are put into
image shards on a store of a temporary folder. Timed on two processes: `measure` and `select`, whole, the start of their processes included; decoding
alone, by the faster of Pillow and OpenCV in processes that are up already (the floor); and in one process the plain loop that anybody would write:
Pillow decodes, OpenCV shrinks and takes the Laplacian, and nothing else is done. Then the peak memory of either stage in a process of its own for
1,000 to 100,000 rows (tiny pictures), and the metadata filter (`benchmarks.metadata`). The last line is JSON: `select_vs_loop`, `select_vs_decode`
(pictures per second over the loop's and the floor's), `memory_growth` (of `measure`, most rows over fewest), `metadata_vs_scan`,
`metadata_peak_mb`.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from PIL import Image

from infra.store import ArtifactStore
from schemas.base import digest
from schemas.data import MeasureConfig, SelectConfig
from schemas.manifest import ImageShards, Lineage, Manifest, Measurements
from stages import measure, select
from stages.parallel import map_processes
from stages.shards import Sample, ShardWriter, read_samples, shard_paths
from stages.workspace import Workspace

PROCESSES: Final = 2
SHARD_IMAGES: Final = 100
MEMORY_ROWS: Final = (1_000, 10_000, 100_000)
MEMORY_SHARD: Final = 1_000
_LOOP_PX: Final = MeasureConfig().analysis_px
_SOURCES: Final = 24


def pictures(count: int, photos: Path | None) -> Iterator[bytes]:
    """JPEG files, each another one."""
    random = np.random.default_rng(0)
    sources = _photographs(photos) if photos is not None else [_natural(seed, 2600, 2000) for seed in range(4)]
    for number in range(count):
        source = sources[number % len(sources)]
        short = int(random.integers(1100, 1700))
        width, height = (min(length, side) for length, side in zip((short * 4 // 3, short), source.size, strict=True))
        left, top = (int(random.integers(0, side - length + 1)) for length, side in zip((width, height), source.size, strict=True))
        buffer = io.BytesIO()
        source.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def _photographs(folder: Path) -> list[Image.Image]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.is_symlink())
    wanted = [path for path in found if min(Image.open(path).size) > 1100]
    if not wanted:
        sys.exit(f"{folder}: no picture above 1100 px")
    return [Image.open(path).convert("RGB") for path in wanted[:: max(1, len(wanted) // _SOURCES)]]


def _natural(seed: int, width: int, height: int) -> Image.Image:
    """Colour noise with the spectrum of photographs: amplitude 1/f."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.random.default_rng(seed).normal(size=(3, height, width))
    noise[1:] = 0.8 * noise[:1] + 0.2 * noise[1:]
    values = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width))
    values = 127 + 50 * values / values.std(axis=(1, 2), keepdims=True)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def workspace(folder: Path, name: str) -> Workspace:
    """The surroundings of a stage, its store below `folder`."""
    (folder / name).mkdir(exist_ok=True)
    store = ArtifactStore.open(f"file://{folder / 'store'}")
    lineage = Lineage(stage=name, node=name, revision=1, config={}, inputs={})
    return Workspace(store=store, identity=digest(name), lineage=lineage, scratch=folder / name)


def publish(folder: Path, name: str, files: Iterator[bytes], extension: str, shard_images: int) -> Manifest[ImageShards]:
    """Make an artifact of image shards."""
    place = workspace(folder, name)
    with place.folder("images") as shards:
        writer = ShardWriter(shards, shard_images)
        for number, data in enumerate(files):
            row = {"url": f"http://example.org/{number}", "width": 0, "height": 0, "aesthetic": 6.0, "sha256": digest(number)}
            writer.add(Sample(f"{number:010d}", extension, data, f"a picture of something, number {number}", row))
        writer.close()
        return place.publish(shards, ImageShards(rows_in_table=writer.images, images=writer.images, shards=writer.shards))


def measured(folder: Path, images: Manifest[ImageShards], name: str = "measure") -> Manifest[Measurements]:
    """Run `measure`."""
    return measure.run(MeasureConfig(processes=PROCESSES), measure.Inputs(images=images), workspace(folder, name))


def selected(folder: Path, measurements: Manifest[Measurements], name: str = "select") -> None:
    """Run `select` with bounds that let some pictures pass, whatever they show."""
    config = SelectConfig(min_side_px=0, min_sharpness=0, min_high_frequency=0)
    select.run(config, select.Inputs(measurements=measurements), workspace(folder, name))


def decode(shard: Path, library: str) -> int:
    """Decode every picture of a shard and do nothing with it."""
    cv2.setNumThreads(1)
    count = 0
    for sample in read_samples(shard):
        if library == "pillow":
            Image.open(io.BytesIO(sample.image)).load()
        else:
            cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_COLOR)
        count += 1
    return count


def loop(shards: list[Path]) -> list[float]:
    """The plain loop: Pillow decodes, OpenCV does the rest, with the threads it takes."""
    found = []
    for shard in shards:
        for sample in read_samples(shard):
            rgb = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))
            luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
            scale = _LOOP_PX / min(luma.shape)
            small = cv2.resize(luma, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            found.append(float(cv2.Laplacian(small, cv2.CV_64F).var() / small.var()))
    return found


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def floor_seconds(shards: list[Path], library: str) -> float:
    """Decoding alone, in processes that are up: each has decoded a shard before."""
    results = map_processes(partial(decode, library=library), [*shards[:PROCESSES], *shards], PROCESSES)
    for _ in range(PROCESSES):
        next(results)
    return seconds(lambda: sum(results))


def rates(count: int, photos: Path | None, folder: Path, repeats: int) -> dict[str, float]:
    """Pictures per second of all four, the best of `repeats` each, taken in turn."""
    images = publish(folder, "images", pictures(count, photos), "jpg", SHARD_IMAGES)
    shards = shard_paths(workspace(folder, "read").fetch(images))
    pixels = sum(
        width * height for width, height in (Image.open(io.BytesIO(one.image)).size for shard in shards for one in read_samples(shard))
    )
    best: dict[str, float] = {}
    for turn in range(repeats):
        results: list[Manifest[Measurements]] = []
        one = {
            "measure": seconds(lambda: results.append(measured(folder, images, f"measure-{turn}"))),  # noqa: B023 - called at once
            "select": seconds(lambda: selected(folder, results[0], f"select-{turn}")),  # noqa: B023
            "decode pillow": floor_seconds(shards, "pillow"),
            "decode opencv": floor_seconds(shards, "opencv"),
            "loop": seconds(lambda: loop(shards)),
        }
        best = {name: min(value, best.get(name, value)) for name, value in one.items()}
    both = best["measure"] + best["select"]
    figures = {f"{name}_per_second": count / value for name, value in best.items()}
    figures |= {"megapixels": pixels / count / 1e6, "select_vs_loop": best["loop"] / both}
    return figures | {"select_vs_decode": min(best["decode pillow"], best["decode opencv"]) / both}


def tiny(rows: int) -> Iterator[bytes]:
    """Small PNG pictures, each another one."""
    random = np.random.default_rng(0)
    for _ in range(rows):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        yield buffer.getvalue()


def peak_mb(folder: Path, stage: str, identity: str) -> float:
    """Peak memory of this process after running a stage, in 10^6 bytes. Not getrusage: that begins with the peak of the process that started this."""
    manifest: Any = workspace(folder, "find").store.find(identity)
    if stage == "measure":
        measured(folder, manifest, f"measure-{manifest.content.images}")
    else:
        selected(folder, manifest, f"select-{manifest.content.images}")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def memory(folder: Path, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Peak memory of `measure` and `select` by number of rows, each in a process of its own."""
    peaks: dict[str, list[float]] = {"measure": [], "select": []}
    for rows in sizes:
        images = publish(folder, f"tiny-{rows}", tiny(rows), "png", MEMORY_SHARD)
        for stage, identity in (("measure", images.identity), ("select", digest(f"measure-{rows}"))):
            command = [sys.executable, "-m", "benchmarks.select", "--peak-of", stage, identity, "--folder", str(folder)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
            peaks[stage].append(float(result.stdout.splitlines()[-1]))
    return peaks


def draw(sizes: tuple[int, ...], peaks: dict[str, list[float]], path: Path) -> None:
    """Plot the peaks."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and seldom asked for

    figure = Figure((6, 3), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="rows", ylabel="peak memory (MB)")
    for stage, values in peaks.items():
        axes.plot(sizes, values, "o-", label=stage)
    axes.set_ylim(0, 1.2 * max(max(values) for values in peaks.values()))
    axes.legend()
    figure.savefig(path)


def metadata(rows: int) -> dict[str, float]:
    """The filter of `ingest`."""
    try:
        from benchmarks.metadata import measure_metadata  # noqa: PLC0415
    except ModuleNotFoundError:
        sys.exit("benchmarks/metadata.py is not here: expected measure_metadata(rows); --metadata-rows 0 leaves that part out")
    return dict(measure_metadata(rows))


def main() -> None:
    """Measure, and write the table and the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.select", description=__doc__)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--photos", type=Path, help="folder of photographs to cut the pictures from")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--metadata-rows", type=int, default=20_000_000, help="0: leave the metadata filter out")
    parser.add_argument("--memory-rows", type=int, nargs="*", default=MEMORY_ROWS, help="none: leave the memory out")
    parser.add_argument("--plot", type=Path, help="SVG or PNG of the memory")
    parser.add_argument("--folder", type=Path, help="where the artifacts are made (default: a temporary folder)")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of is not None:
        sys.stdout.write(f"{peak_mb(arguments.folder, *arguments.peak_of)}\n")
        return
    with tempfile.TemporaryDirectory(prefix="select-", dir=arguments.folder) as name:
        figures = rates(arguments.images, arguments.photos, Path(name), arguments.repeats)
        keys = ["select_vs_loop", "select_vs_decode"]
        sizes = tuple(arguments.memory_rows)
        if sizes:
            peaks = memory(Path(name), sizes)
            for stage, values in peaks.items():
                figures |= {f"{stage}_peak_mb_{rows}": value for rows, value in zip(sizes, values, strict=True)}
            figures |= {"memory_growth": peaks["measure"][-1] / peaks["measure"][0]}
            keys.append("memory_growth")
            if arguments.plot is not None:
                draw(sizes, peaks, arguments.plot)
    if arguments.metadata_rows:
        figures |= metadata(arguments.metadata_rows)
        keys += ["metadata_vs_scan", "metadata_peak_mb"]
    lines = [f"{key:32} {value:14,.3f}" for key, value in figures.items()]
    sys.stdout.write("\n".join([*lines, json.dumps({key: round(figures[key], 3) for key in keys})]) + "\n")


if __name__ == "__main__":
    main()
