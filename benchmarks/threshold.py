"""Another threshold on many measured rows: `python -m benchmarks.threshold [--rows 100000] [--shards 100]`.

Synthetic measurements with thumbnails are put on a store of a temporary folder under the identity that the recipe's plan asks for. The images they
would have been made from are not there, and no stage before `select` has run: whatever read one image would fail. Timed are `select.run` in a
process that is up, three times with another threshold each, and `distill stage select` as a command. The last line is JSON:
`threshold_seconds` and `threshold_command_seconds` are the slowest of their three, `threshold_cpu_seconds` the processor time of the former (what
a machine busy with other things would not change), `images_read` the objects of images that the store could have
given away, `threshold_peak_mb` the peak of this process, which made the measurements too.
"""

import argparse
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from infra.outside import content_digest
from infra.store import ArtifactStore
from schemas.base import digest
from schemas.loading import load_recipe
from schemas.manifest import ImageShards, Lineage, Manifest, Measurements
from stages.plan import make_plan
from stages.runner import Surroundings, execute
from stages.workspace import Workspace

logger = logging.getLogger(__name__)
THRESHOLDS = (0.011, 0.013, 0.017)
WORDS = (
    "sunset",
    "over",
    "the",
    "old",
    "bay",
    "with",
    "a",
    "red",
    "boat",
    "and",
    "two",
    "children",
    "near",
    "mountains",
    "in",
    "café",
    "Zürich",
    "at night",
)
NOISE = (
    "IMG_1234.JPG", "| Flickr", "stock photo", "&amp; friends", "1920x1080", "- Getty Images", "12 March 2011", "http://www.example.com/a/b",
    "Canon EOS 5D, f/2.8, ISO 100", "(2012)", "...", "|", "№ 5", "&quot;Hello&quot;",
)  # fmt: skip


def measurements(rng: np.random.Generator, words: random.Random, first: int, count: int) -> pa.Table:
    """Rows such as the web gives, nine of ten good."""
    sides = rng.integers(700, 3000, (2, count))
    captions = [
        " ".join([*words.choices(WORDS, k=words.randint(2, 16)), *words.choices(NOISE, k=words.choice((0, 0, 1, 1, 2)))])
        for _ in range(count)
    ]
    numbers = range(first, first + count)
    return pa.table(
        {
            "key": [f"{number:010d}" for number in numbers],
            "url": [f"http://images.example.org/{number}.jpg" for number in numbers],
            "caption": captions,
            "width": sides[0],
            "height": sides[1],
            "aesthetic": rng.normal(6, 0.7, count),
            "similarity": rng.normal(0.3, 0.05, count),
            "watermark": rng.beta(1, 4, count),
            "unsafe": rng.beta(1, 20, count),
            "nsfw": pa.array(words.choices(("UNLIKELY", "UNSURE", "NSFW", None), (90, 5, 2, 3), k=count)),
            "sharpness": rng.lognormal(-2.5, 1.2, count),
            "high_frequency": rng.lognormal(-4, 1.5, count).clip(0, 1),
            "sha256": [digest(number % 99_991) for number in numbers],
            "phash": rng.integers(-(2**63), 2**63, count),
            "animated": rng.random(count) < 0.01,
            "unreadable": pa.array([None] * count, pa.string()),
        }
    )


def publish(store: ArtifactStore, identity: str, images: str, *, rows: int, shards: int, scratch: Path) -> Manifest[Measurements]:
    """Put the artifact on the store."""
    rng, words = np.random.default_rng(0), random.Random(0)
    workspace = Workspace(store, identity, Lineage(stage="measure", node="measure", revision=1, config={}, inputs={}), scratch)
    picture = b"\xff\xd8" + rng.bytes(3500)  # as large as a thumbnail of 96 px
    ends = np.linspace(0, rows, shards + 1).astype(int)
    with workspace.folder("measurements") as place:
        for shard, (start, end) in enumerate(pairwise(ends)):
            table = measurements(rng, words, int(start), int(end - start))
            pq.write_table(table, place / f"measurements-{shard:05d}.parquet")
            small = pa.table({"key": table["key"], "thumbnail": pa.array([picture + key.encode() for key in table["key"].to_pylist()])})
            pq.write_table(small, place / f"thumbnails-{shard:05d}.parquet", row_group_size=64)
        return workspace.publish(place, Measurements(source=images, images=rows, shards=shards))


def benchmark(rows: int, shards: int, folder: Path) -> dict[str, Any]:
    """Return the figures."""
    pq.write_table(pa.table({"url": ["http://images.example.org/0.jpg"], "caption": ["a"]}), folder / "urls.parquet")
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(
        yaml.safe_dump(
            {"name": "threshold", "ingest": {"table": str(folder / "urls.parquet")}, "teacher": {"source": "recipes/tiny_teacher"}}
        )
    )
    store = ArtifactStore.open(f"file://{folder / 'store'}")

    def plan(threshold: float) -> Any:
        return make_plan(load_recipe(recipe_file, [f"select.min_sharpness={threshold}"]), content_digest)

    identities = plan(THRESHOLDS[0]).identities
    measured = publish(store, identities["measure"], identities["ingest"], rows=rows, shards=shards, scratch=folder)
    logger.info("measurements of %d rows: %.1f MB", rows, measured.bytes / 1e6)

    inside, processor, outside, selected = [], [], [], []
    for threshold in THRESHOLDS:
        made = plan(threshold)
        started, used = time.perf_counter(), time.process_time()
        manifest = execute(made, made.node("select"), Surroundings(store=store, scratch=folder))
        inside.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
        selected.append(manifest.content.images)
        logger.info("sharpness %g: %.2f s in this process, %s selected", threshold, inside[-1], selected[-1])
    for threshold in THRESHOLDS:
        command = [
            sys.executable,
            "-c",
            "from flows.cli import main; main()",
            "stage",
            "select",
            str(recipe_file),
            "--store",
            store.address,
        ]
        started = time.perf_counter()
        subprocess.run([*command, "--set", f"select.min_sharpness={threshold + 0.001}"], check=True, stdout=subprocess.DEVNULL)
        outside.append(time.perf_counter() - started)
        logger.info("sharpness %g: %.2f s as a command", threshold + 0.001, outside[-1])
    images = [entry for identity in (identities["ingest"],) if (found := store.find(identity)) for entry in found.files]
    assert not images, f"the store holds {ImageShards.__name__}: what was shown is not that no image is needed"
    assert len(set(selected)) == len(THRESHOLDS), "another threshold selects others"
    return {
        "rows": rows,
        "threshold_seconds": round(max(inside), 3),
        "threshold_cpu_seconds": round(max(processor), 3),
        "threshold_command_seconds": round(max(outside), 3),
        "images_read": len(images),
        "threshold_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "selected": selected,
    }


def main() -> None:
    """Run, and write the figures as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=100)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="threshold-") as folder:
        sys.stdout.write(json.dumps(benchmark(given.rows, given.shards, Path(folder))) + "\n")


if __name__ == "__main__":
    main()
