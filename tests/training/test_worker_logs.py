"""Log records of worker processes, told again by the process that started them."""

import contextvars
import logging
import threading
from pathlib import Path

import pytest

from infra.progress import NullProgress
from stages.elastic import _forward
from stages.worker_logs import WorkerLog, WorkerLogs


def tell(folder: Path, rank: int, message: str, level: int = logging.INFO, **extra: object) -> None:
    handler = WorkerLog(folder, rank)
    record = logging.makeLogRecord(
        {"name": "stages.training.loop", "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
    )
    record.__dict__.update(extra)
    handler.emit(record)
    handler._file.close()


def test_records_keep_name_level_and_alarm_and_get_the_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logs = WorkerLogs(tmp_path)
    logs.tell()
    tell(tmp_path, 1, "memory is short", logging.WARNING, alarm="latent_std")
    tell(tmp_path, 0, "step 1\nof two lines")
    logs.tell()
    tell(tmp_path, 0, "step 2")
    logs.tell()
    logs.tell()
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("stages.training.loop", "INFO", "rank 0: step 1\nof two lines"),
        ("stages.training.loop", "WARNING", "rank 1: memory is short"),
        ("stages.training.loop", "INFO", "rank 0: step 2"),
    ]
    assert [getattr(record, "alarm", None) for record in caplog.records] == [None, "latent_std", None]
    caplog.set_level(logging.WARNING, "stages.training.loop")
    caplog.handler.setLevel(logging.INFO)
    tell(tmp_path, 0, "step 3")
    logs.tell()
    assert len(caplog.records) == 3, "what this process would not say itself is not told"


def test_a_line_is_told_when_it_is_whole_and_never_when_it_is_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tell(tmp_path, 0, "first")
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    logs = WorkerLogs(tmp_path)
    logs.tell()
    assert caplog.messages == ["rank 0: first"]
    path.write_bytes(whole + whole)  # the rest came
    logs.tell()
    path.write_bytes(whole + whole + whole[:20] + b"\n" + whole)  # its writer was killed, and started again
    logs.tell()
    assert caplog.messages == ["rank 0: first"] * 3


def test_it_is_told_in_the_context_of_who_started_the_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By which a log handler knows the run."""
    caplog.set_level(logging.INFO)
    run = contextvars.ContextVar("run", default="none")
    seen = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((run.get(), record.getMessage()))

    handler, ended = Handler(), threading.Event()
    logger = logging.getLogger("stages.training.loop")
    logger.addHandler(handler)
    try:
        run.set("mine")
        tell(tmp_path, 0, "step 1")
        ended.set()
        arguments = (_forward, tmp_path / "progress.json", NullProgress(), WorkerLogs(tmp_path), ended)
        thread = threading.Thread(target=contextvars.copy_context().run, args=arguments)
        thread.start()
        thread.join()
    finally:
        logger.removeHandler(handler)
    assert seen == [("mine", "rank 0: step 1")]
