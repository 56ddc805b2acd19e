"""Several processes that run one training stage together, started and watched by torch's elastic agent (the library torchrun uses).

Every process calls the stage's own function; `Workspace.parallel` tells it which one it is. A process that dies takes the others with it, and the
agent starts all of them again, which go on from the newest checkpoint.
"""

import contextvars
import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from infra.progress import NullProgress, Progress
from schemas.base import Model
from schemas.errors import BadInput, DistillError, RunFailed
from schemas.manifest import Manifest
from schemas.training import TrainingConfig
from stages.parallel import belong_to_parent
from stages.ranks import Parallel
from stages.registry import stage
from stages.worker_logs import WorkerLog, WorkerLogs
from stages.workspace import Workspace

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_PATIENCE = timedelta(hours=2)
"""How long processes wait for one that draws samples or writes a checkpoint; one that dies is noticed at once, by the agent."""
RESTARTS = 3
"""How often the processes are started again after one of them died."""


def processes_for(config: TrainingConfig, device: str) -> int:
    """Processes that a stage with this configuration is run by. Raises `BadInput` for more than there are devices, or than divide the batch."""
    devices = torch.cuda.device_count() if device == "cuda" else 1
    wanted = config.world_size or devices
    if device.startswith("cuda") and wanted > devices:
        raise BadInput(f"world_size = {wanted}: expected at most {devices}, the number of devices that {device} stands for")
    if config.batch_size % (wanted * config.accumulation_steps):
        raise BadInput(
            f"batch_size = {config.batch_size}: expected a multiple of world_size {wanted} times accumulation_steps {config.accumulation_steps}"
        )
    return wanted


@dataclass(frozen=True)
class Task:
    """What every process is told."""

    stage: str
    config: Model
    inputs: Model
    workspace: Workspace


def run_together(task: Task, processes: int) -> Manifest[Any]:
    """Run a stage in `processes` processes and return its manifest. Raises what the stage raises, and `RunFailed` when processes keep dying."""
    progress, quiet = task.workspace.progress, replace(task.workspace, progress=NullProgress())
    told = quiet.scratch / "progress.json"
    ended = threading.Event()
    # in this thread's context, which says whose run is told of
    listen = partial(contextvars.copy_context().run, _forward, told, progress, WorkerLogs(quiet.scratch), ended)
    listener = threading.Thread(target=listen, daemon=True, name="what-processes-tell")
    listener.start()
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=quiet.identity[:16], rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        max_restarts=RESTARTS, monitor_interval=0.2, start_method="spawn",
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        results = elastic_launch(launch, _work)(replace(task, workspace=quiet), told)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RunFailed(f"process {rank} of {processes} died {RESTARTS + 1} times, at last with exit code {failure.exitcode}") from error
    finally:
        for number, handler in handlers.items():  # the agent leaves its own behind
            signal.signal(number, handler)
        ended.set()
        listener.join()
    result = results[0]
    if isinstance(result, DistillError):
        raise result
    return Manifest.model_validate_json(result)


def _forward(told: Path, progress: Progress, logs: WorkerLogs, ended: threading.Event) -> None:
    """Report the progress that the first process has last written, and what all have logged."""
    last = ""
    while True:
        over = ended.wait(_POLL_SECONDS)
        text = told.read_text() if told.exists() else ""
        if text != last:
            progress.update(*json.loads(text))
            last = text
        logs.tell()
        if over:
            return


@dataclass
class _Told(NullProgress):
    """Progress for the process that started this one."""

    path: Path

    def update(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps([done, total, unit, figures]))
        new.replace(self.path)


def _meeting_place(parallel: Parallel) -> PrefixStore:
    """Where the processes find each other: the agent's store, one shelf for each start.

    The agent keeps one store over all restarts (pytorch issue 135712); without the shelf, processes started again read the addresses of the dead
    and wait for them for ever.
    """
    address, port, attempt = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
    store = TCPStore(address, int(port), parallel.world_size, is_master=False, timeout=_PATIENCE)
    return PrefixStore(f"attempt-{attempt}", store)


def _work(task: Task, told: Path) -> str | DistillError:
    """The life of one process. An error that would come again is a result, so that the agent does not start everything anew for it."""
    belong_to_parent()
    parallel = Parallel(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    told_again = WorkerLog(task.workspace.scratch, parallel.rank)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[told_again], force=True)
    if not parallel.leads:
        logging.disable(logging.INFO)
    device = task.workspace.device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        store=_meeting_place(parallel), rank=parallel.rank, world_size=parallel.world_size, timeout=_PATIENCE,
    )  # fmt: skip
    scratch = Path(tempfile.mkdtemp(prefix=f"rank-{parallel.rank}-", dir=task.workspace.scratch))
    progress: Progress = _Told(told) if parallel.leads else NullProgress()
    workspace = replace(task.workspace, scratch=scratch, device=device, parallel=parallel, progress=progress)
    try:
        run, _ = stage(task.stage).load()
        manifest = run(task.config, task.inputs, workspace)
    except (BadInput, RunFailed) as error:
        return error
    else:
        return manifest.model_dump_json()
    finally:
        distributed.destroy_process_group()
