"""The program `ingest` starts for each chunk: img2dataset, working with `infra.guarded_download`.

Usage: downloader.py OPTIONS.json, where `download` holds img2dataset's own arguments and `guard` those of `GuardedDownloader`. It is run by path, and
imports little, because every process of img2dataset imports it again. Standard input is its lifeline: when that closes, the whole process
group ends, so that no killed parent leaves downloads running. Processes that Spark and Ray start on this machine end with the driver they belong to.
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
import types
from pathlib import Path

# img2dataset imports these at start, in every process, for resizing, reporting and torch's data loader: seconds for nothing where files are kept as
# they are. webdataset does without torch where its import fails.
sys.modules |= {"wandb": types.ModuleType("wandb"), "albumentations": types.ModuleType("albumentations"), "torch": None}  # type: ignore[dict-item]

from infra.guarded_download import GuardedDownloader  # noqa: E402


def _end_with_parent() -> None:
    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock, held here, would break the interpreter's end
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


def _spark() -> contextlib.AbstractContextManager[object]:
    """A session by Spark's own configuration, for img2dataset to find: the one it would make itself is on this machine whatever that says."""
    from pyspark.sql import SparkSession  # noqa: PLC0415 - only where asked for

    session: contextlib.AbstractContextManager[object] = SparkSession.builder.appName("diffusion-distillery").getOrCreate()
    return session


if __name__ == "__main__":
    _end_with_parent()
    options = json.loads(Path(sys.argv[1]).read_text())
    program = importlib.import_module("img2dataset.main")  # by its name: the package has a function of the name, too
    if not issubclass(GuardedDownloader, program.Downloader):
        raise RuntimeError("img2dataset.main does not work with img2dataset.downloader.Downloader: this version cannot be given our rules")
    setattr(program, "Downloader", functools.partial(GuardedDownloader, **options["guard"]))  # noqa: B010 - mypy knows no such attribute
    with _spark() if options["download"]["distributor"] == "pyspark" else contextlib.nullcontext():
        program.download(**options["download"])
