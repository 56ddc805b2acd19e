"""Fetching one chunk of rows with img2dataset in processes of its own, and what it says became of each row."""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

import infra
from schemas.base import Model
from schemas.data import IngestConfig
from schemas.errors import BadInput, RunFailed
from stages.shards import index_tar

logger = logging.getLogger(__name__)

_PROGRAM: Final = Path(__file__).with_name("downloader.py")
_LAST_LINES: Final = 20
_ROWS_PER_THREAD: Final = 16
USER_AGENT_TOKEN: Final = "diffusion-distillery"


@dataclass(frozen=True)
class Fetched:
    """What became of one row: bytes at a place in a tar file, or a failure as `reason: detail`."""

    row: int
    tar: Path | None = None
    offset: int = 0
    size: int = 0
    failure: str | None = None

    def read(self) -> bytes:
        """The downloaded file."""
        assert self.tar is not None, "only of rows that were fetched"
        with self.tar.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


class Downloads(Model):
    """img2dataset's own statistics, added up: what it says of itself, less its times, so that the same outcomes are the same figures."""

    count: int = 0
    successes: int = 0
    failed_to_download: int = 0
    failed_to_resize: int = 0
    """Always 0: nothing is resized."""
    status_dict: dict[str, int] = {}
    """`success`, or what went wrong, with its count."""

    def __add__(self, other: "Downloads") -> "Downloads":
        statuses = dict(sorted((Counter(self.status_dict) + Counter(other.status_dict)).items()))
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return Downloads(**counts, status_dict=statuses)


_COUNTS: Final = ("count", "successes", "failed_to_download", "failed_to_resize")


def check_installed(config: IngestConfig) -> None:
    """Raise `BadInput` when img2dataset or its distributor's package is not installed. They are not imported here: that takes seconds."""
    if importlib.util.find_spec("img2dataset") is None:
        raise BadInput("ingest: img2dataset is not installed; expected the extra: pip install 'diffusion-distillery[data]'")
    name = config.distributor
    if name != "multiprocessing" and importlib.util.find_spec(name) is None:
        raise BadInput(
            f"ingest.distributor = {name}: the package {name} is not installed here; expected pip install {name}, here and with "
            "diffusion-distillery[data] on every machine of the cluster, or distributor: multiprocessing"
        )
    if name == "pyspark" and "JAVA_HOME" not in os.environ and shutil.which("java") is None:
        raise BadInput("ingest.distributor = pyspark: no java on the path and no JAVA_HOME; expected a Java runtime, which Spark needs")


def fetch_rows(rows: pa.Table, config: IngestConfig, folder: Path, shared: str | None = None) -> tuple[list[list[Fetched]], Downloads]:
    """Download the `url` of every row.

    Returns what became of each, one list for each tar that img2dataset wrote, and its statistics. All files end below `folder`; on their way they are
    at `shared`, where that is given: an address that all machines of the distributor reach, removed before and afterwards. Raises `BadInput` when
    something is not installed, and `RunFailed` when img2dataset ends badly, leaves rows without a word or contradicts itself.
    """
    check_installed(config)
    pq.write_table(rows.select(["row", "url"]), folder / "urls.parquet")
    output = folder / "downloaded"
    with _workplace(folder, shared) as place:
        last_lines = _run(_options(rows.num_rows, config, place, folder))
    fetched = [_outcomes(statuses) for statuses in sorted(output.glob("*.parquet"))]
    missing = rows.num_rows - sum(map(len, fetched))
    if missing:
        raise RunFailed(f"img2dataset ended without a word on {missing} of {rows.num_rows} rows; its last lines:\n{last_lines}")
    told = [
        Downloads.model_validate({name: json.loads(path.read_text())[name] for name in Downloads.model_fields})
        for path in output.glob("*_stats.json")
    ]
    downloads = sum(told, Downloads())
    got = sum(one.failure is None for group in fetched for one in group)
    if (downloads.count, downloads.successes) != (rows.num_rows, got):
        raise RunFailed(
            f"img2dataset's statistics say {downloads.successes} of {downloads.count} rows were fetched, its files {got} of {rows.num_rows}"
        )
    return fetched, downloads


@contextlib.contextmanager
def _workplace(folder: Path, shared: str | None) -> Iterator[str]:
    """Where the downloader reads `urls.parquet` and writes `downloaded`, which is in `folder` in the end."""
    if shared is None:
        yield str(folder)
        return
    system, path = fsspec.core.url_to_fs(shared)
    _remove(system, path)
    system.makedirs(path, exist_ok=True)
    system.put_file(str(folder / "urls.parquet"), f"{path}/urls.parquet")
    try:
        yield shared
        (folder / "downloaded").mkdir()
        for name in system.glob(f"{path}/downloaded/*.*"):
            system.get_file(name, str(folder / "downloaded" / name.rpartition("/")[2]))
    finally:
        _remove(system, path)


def _remove(system: fsspec.AbstractFileSystem, path: str) -> None:
    system.invalidate_cache()
    if system.exists(path):
        system.rm(path, recursive=True)


def _options(rows: int, config: IngestConfig, place: str, folder: Path) -> Path:
    # Several tars for each process, so that none of them waits for the last one; what is in which does not matter, we sort.
    per_tar = max(1, min(1000, -(-rows // (4 * config.processes))))
    arguments = {
        "url_list": f"{place}/urls.parquet",
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": ["row"],
        "output_folder": f"{place}/downloaded",
        "output_format": "webdataset",
        "number_sample_per_shard": per_tar,
        # A process takes seconds to start and its threads fetch side by side, so a few rows are no work for many.
        "processes_count": min(config.processes, -(-rows // (_ROWS_PER_THREAD * config.threads))),
        "thread_count": config.threads,
        "disable_all_reencoding": True,  # the original bytes
        "resize_mode": "no",
        "extract_exif": False,
        "compute_hash": None,
        "timeout": config.timeout_seconds,
        "retries": config.retries,
        "user_agent_token": USER_AGENT_TOKEN,
        "distributor": config.distributor,
        "enable_wandb": False,
    }
    guard = {"max_bytes": config.max_file_bytes, "allow_private": config.allow_private_addresses}
    path = folder / "options.json"
    path.write_text(json.dumps({"download": arguments, "guard": guard}))
    return path


def _run(options: Path) -> str:
    """Run the program to its end, its lines into our log; it never outlives us. Returns its last lines."""
    search = os.pathsep.join(filter(None, (str(Path(infra.__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = (
        {"PYSPARK_PYTHON": sys.executable} | os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    process = subprocess.Popen(
        [sys.executable, "-P", str(_PROGRAM), str(options)],
        stdin=subprocess.PIPE,  # its lifeline: closed by the system when this process ends, however it ends
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdin is not None
    forward = threading.Thread(target=_forward, args=(process.stdout, last), daemon=True, name="img2dataset-log")
    forward.start()
    try:
        status = process.wait()
    finally:
        with contextlib.suppress(
            ProcessLookupError
        ):  # whoever is left of the group: after a crash its processes would hold the pipe open for ever
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        forward.join()
        process.stdin.close()
        process.stdout.close()
    lines = "\n".join(last)
    if status != 0:
        raise RunFailed(f"img2dataset ended with status {status}; its last lines:\n{lines}")
    return lines


def _forward(stream: IO[str], last: deque[str]) -> None:
    for line in stream:
        if text := line.rstrip():
            last.append(text)
            logger.info("img2dataset: %s", text)


def _outcomes(statuses: Path) -> list[Fetched]:
    table = pq.read_table(statuses, columns=["key", "row", "status", "error_message"])
    tar = statuses.with_suffix(".tar")
    places = {name: place for name, *place in index_tar(tar)}
    outcomes = []
    for key, row, status, message in zip(*(column.to_pylist() for column in table.columns), strict=True):
        if status == "success":
            offset, size = places[f"{key}.jpg"]
            outcomes.append(Fetched(row, tar, offset, size))
        else:
            outcomes.append(Fetched(row, failure=message or str(status)))
    return outcomes


def reason_and_detail(failure: str) -> tuple[str, str]:
    """Split `reason: detail`."""
    reason, _, detail = failure.partition(": ")
    return reason, detail
