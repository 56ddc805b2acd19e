"""What processes that run a stage together log, told again by the process that started them: only there does it reach the run's page."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_GLOB: Final = "log-of-rank-*.jsonl"
_CARRIED: Final = ("alarm",)
"""Attributes of a record, beside what every record has, that are told too."""


class WorkerLog(logging.Handler):
    """Writes the records of one process to a file of its own: a queue's lock would stay locked when its writer is killed."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self._file = (folder / _GLOB.replace("*", str(rank))).open("a", encoding="utf-8")  # after a restart, behind what the dead one told

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a line, whole."""
        said = self.format(record)  # with the traceback, if any
        told = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname, "created": record.created}
        told |= {name: getattr(record, name) for name in _CARRIED if hasattr(record, name)}
        self._file.write(json.dumps(told | {"msg": f"rank {self._rank}: {said}"}) + "\n")
        self._file.flush()


class WorkerLogs:
    """Reads what the processes have written, as it comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def tell(self) -> None:
        """Hand every new record to the loggers of this process, under its own name and level, where they want to hear of that level."""
        for record in self._new():
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)

    def _new(self) -> Iterator[logging.LogRecord]:
        for path in sorted(self._folder.glob(_GLOB)):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                *lines, unfinished = file.read().split(b"\n")
                self._read[path] = file.tell() - len(unfinished)
            for line in lines:
                try:
                    yield logging.makeLogRecord(json.loads(line))
                except ValueError:  # of a process that was killed while it wrote
                    continue
