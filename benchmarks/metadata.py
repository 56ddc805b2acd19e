"""The metadata filter of `ingest` beside pyarrow's own scan of the same columns, on a synthetic table as large as a part of LAION.

`python -m benchmarks.metadata [--rows N] [--folder PATH]`. The table (about 120 bytes a row) is made in a temporary folder and deleted afterwards.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.data import ColumnMap, IngestConfig
from stages.ingest.rules import MetadataFilter
from stages.ingest.table import BATCH_ROWS, UrlTable

ROWS: Final = 20_000_000
GROUP_ROWS: Final = 500_000
"""Rows of one row group, and of one step of the making."""
REPEATS: Final = 3
COLUMNS: Final = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")
_TEXT: Final = (
    "a red old photo of the city mountain portrait vintage kitchen design wedding dress for sale how to make best summer winter sea beach dog cat "
    "garden house interior modern wall art print canvas poster black white flower tree forest river lake sunset free vector background"
)
_WORDS: Final = pa.array(_TEXT.split())


def write_table(path: Path, rows: int) -> None:
    """Write a table with the columns and types of LAION-Aesthetics. About 5 % of its rows pass the default bounds; 1 % of its URLs are repeated."""
    with pq.ParquetWriter(path, _group(0, 1).schema, compression="snappy") as writer:
        for first in range(0, rows, GROUP_ROWS):
            writer.write_table(_group(first, min(GROUP_ROWS, rows - first)))


def _group(first: int, rows: int) -> pa.Table:
    generator = np.random.default_rng(first)
    numbers = np.arange(first, first + rows)
    repeated = generator.random(rows) < 0.01
    numbers[repeated] = generator.integers(0, first + rows, int(repeated.sum()))
    scattered = (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(str)  # a URL's digits do not compress
    url = pc.binary_join_element_wise(
        "https://cdn", pa.array((numbers % 4999).astype(str)), ".example.org/wp-content/uploads/", pa.array(scattered), ".jpg", ""
    )
    words = [_WORDS.take(pa.array(generator.integers(0, len(_WORDS), rows))) for _ in range(7)]
    sides = 2 ** generator.normal(9.65, 0.9, (2, rows))
    return pa.table(
        {
            "URL": url,
            "TEXT": pc.binary_join_element_wise(*words, " "),
            "WIDTH": pa.array(sides[0].astype(np.int32)),
            "HEIGHT": pa.array(sides[1].astype(np.int32)),
            "similarity": pa.array(generator.normal(0.32, 0.03, rows)),
            "punsafe": pa.array(generator.beta(0.2, 8, rows).astype(np.float32)),
            "pwatermark": pa.array(generator.beta(0.5, 1.5, rows).astype(np.float32)),
            "AESTHETIC_SCORE": pa.array(generator.normal(5.5, 0.7, rows).astype(np.float32)),
        }
    )


def scan(path: Path) -> int:
    """Read what the filter reads, in batches of the same size, and do nothing with it: pyarrow's scan with the settings that are fastest here."""
    with pa.OSFile(str(path)) as stream:
        batches = pq.ParquetFile(stream, pre_buffer=False).iter_batches(BATCH_ROWS, columns=list(COLUMNS))
        return sum(batch.num_rows for batch in batches)


def filtered(path: Path) -> MetadataFilter:
    """Run the stage's own filter with the default bounds over the table."""
    metadata = MetadataFilter(IngestConfig(table=str(path)))
    for _ in metadata.passing(UrlTable(str(path), ColumnMap()).batches()):
        pass
    return metadata


def measure_metadata(rows: int = ROWS, folder: Path | None = None) -> dict[str, float]:
    """Make the table below `folder` (default: the system's temporary one), measure and delete it.

    Returns `metadata_vs_scan` (the filter's rows per second over the scan's; best of `REPEATS` each, taken in turn), `metadata_peak_mb` (growth
    of the peak resident memory of a process that does nothing but filter, in 10^6 bytes), and beside them the rates and the share that passes.
    """
    with tempfile.TemporaryDirectory(prefix="metadata-", dir=folder) as place:
        path = Path(place) / "table.parquet"
        write_table(path, rows)
        scans, filters = zip(*((_seconds(scan, path), _seconds(filtered, path)) for _ in range(REPEATS)), strict=True)
        metadata = filtered(path)
        peak = _peak_of_child(path)
    passed = metadata.seen - sum(metadata.dropped.values())
    return {
        "metadata_vs_scan": min(scans) / min(filters),
        "metadata_peak_mb": peak,
        "metadata_rows_per_second": rows / min(filters),
        "scan_rows_per_second": rows / min(scans),
        "metadata_passed": passed / rows,
    }


def _seconds(work: Callable[[Path], object], path: Path) -> float:
    started = time.perf_counter()
    work(path)
    return time.perf_counter() - started


def _peak_of_child(path: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.metadata", "--peak-of", str(path)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]).stdout)


def _peak_growth_mb(path: Path) -> float:
    before = _memory_kib("VmRSS")
    filtered(path)
    return (_memory_kib("VmHWM") - before) * 1024 / 1e6


def _memory_kib(name: str) -> int:
    """A figure of this process' memory. Not getrusage: its peak is that of the process that started this one, where that was larger."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def main() -> None:
    """Measure, and write the table and the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metadata", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--folder", type=Path, help="where the table is made (3 GB for 20 million rows)")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of is not None:
        sys.stdout.write(str(_peak_growth_mb(arguments.peak_of)))
        return
    figures = measure_metadata(arguments.rows, arguments.folder)
    lines = [f"{name:28} {value:16,.3f}" for name, value in figures.items()]
    keys = ("metadata_vs_scan", "metadata_peak_mb")
    sys.stdout.write("\n".join([*lines, json.dumps({name: round(figures[name], 3) for name in keys})]) + "\n")


if __name__ == "__main__":
    main()
