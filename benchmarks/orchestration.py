"""What Prefect adds to the stages: `python -m benchmarks.orchestration`.

A server (SQLite), a store in a folder and a worker, started as `distill services up` does, and a chain of thirteen runs of stages that do next to
nothing, as many as recipes/tiny.yaml has. The last line is JSON, in seconds:
`cached_chain_s`         time of a flow run whose stages are all finished, as the server knows it (asked: under 10)
`inline_task_overhead_s` median, over the eight last stages, of a stage's time as a task of a chain over that of the bare call (asked: under .5)
`pool_task_overhead_s`   median time of a stage as a run on a worker of another pool, over that of the bare call
`worker_start_s`         median time of a process of the worker's environment that imports what such a run does, and ends
and beside them where the time of the runs on the pool goes: `waiting_s` until a worker has taken it, `starting_s` until it runs, `running_s`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import end_tidily
from infra.seaweedfs import free_ports

ROOT = Path(__file__).resolve().parent.parent
FINETUNES = [f"run-{number}" for number in range(8)]
INSTALL = "import benchmarks.orchestration_stage as stage; stage.install(); "
IMPORTS = f"{INSTALL}import flows, prefect.engine, flows.single"
RUN = f"{INSTALL}from flows.flow_run import main; main()"
DISTILL = "from flows.cli import main; main()"


@contextmanager
def services(folder: Path) -> Iterator[None]:
    """Start server and worker, with this process' environment set to reach them; stop both at the end."""
    for name in [name for name in os.environ if name.startswith(("PREFECT", "DISTILL"))]:
        del os.environ[name]
    os.environ |= {"PYTHONPATH": str(ROOT), "TOY_FOLDER": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    place = ["--folder", str(folder / "services")]
    asked = ["--detach", "--port", str(free_ports(1)[0]), "--store", f"file://{folder / 'store'}", "--pool", "gpu=process"]
    subprocess.run([sys.executable, "-c", DISTILL, "services", "up", *place, *asked], check=True)
    try:
        os.environ |= json.loads((folder / "services" / "state.json").read_text())["environment"]
        yield
    finally:
        subprocess.run([sys.executable, "-c", DISTILL, "services", "down", *place], check=True)


def recipe(folder: Path, **sections: Any) -> Any:
    """Return the recipe of the chain, with changed sections."""
    from schemas.loading import parse_recipe  # noqa: PLC0415 - with all that follows only when the environment is set

    finetune = {name: {"lora_rank": rank + 1} for rank, name in enumerate(FINETUNES)}
    data = {"name": "orchestration", "ingest": {"table": str(folder / "table.csv")}, "teacher": {"source": str(folder / "teacher")}}
    return parse_recipe(data | {"finetune": finetune} | sections)


def seconds_of(call: Callable[[], Any]) -> float:
    """Time one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def start_process(folder: Path) -> None:
    """Start a process that imports what a run does, in a session of its own as the worker is: on a busy machine each session has its share."""
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=folder, start_new_session=True)


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Make all measurements with the services that are up."""
    from prefect import Flow  # noqa: PLC0415
    from prefect.client.orchestration import get_client  # noqa: PLC0415
    from prefect.client.schemas.actions import WorkPoolUpdate  # noqa: PLC0415
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags  # noqa: PLC0415

    import benchmarks.orchestration_stage as stage  # noqa: PLC0415
    import flows  # noqa: F401, PLC0415
    from flows.chain import distill_chain  # noqa: PLC0415
    from flows.preparation import Prepared, prepare  # noqa: PLC0415
    from flows.results import result_storage  # noqa: PLC0415
    from flows.tasks import Json, run_stage, stage_progress  # noqa: PLC0415
    from stages.runner import execute  # noqa: PLC0415

    stage.install()
    client = get_client(sync_client=True)
    template = client.read_work_pool("gpu").base_job_template
    template["variables"]["properties"]["command"]["default"] = f'python -c "{RUN}"'
    client.update_work_pool("gpu", WorkPoolUpdate(base_job_template=template))

    def bare(prepared: Prepared, names: list[str]) -> list[float]:
        surroundings = prepared.surroundings
        return [seconds_of(lambda: execute(prepared.plan, node, surroundings)) for node in prepared.plan.nodes if node.name in names]  # noqa: B023

    def as_tasks(prepared: Prepared, names: list[str], *, elsewhere: bool = False) -> list[float]:
        found: list[float] = []

        def body() -> None:
            storage, results = result_storage(prepared.surroundings.store), dict[str, Json]()
            for node in prepared.plan.nodes:
                if node.name in names:
                    run = lambda: run_stage(prepared.plan, node, prepared.surroundings, results, storage, elsewhere=elsewhere)  # noqa: B023, E731
                    found.append(seconds_of(run))

        Flow(body, name="orchestration")()
        return found

    data = ["ingest", "measure", "select", "teacher", "encode"]
    trained = [f"finetune-{name}" for name in FINETUNES]
    distill_chain(recipe(folder))
    cached = [distill_chain(recipe(folder), return_state=True) for _ in range(repeats)]
    runs = [client.read_flow_run(state.state_details.flow_run_id) for state in cached]

    alone, tasks = prepare(recipe(folder, seed=1)), prepare(recipe(folder, seed=2), progress=stage_progress)
    bare(alone, data)
    bare(tasks, data)
    inline = [task - call for task, call in zip(as_tasks(tasks, trained), bare(alone, trained), strict=True)]

    pooled, places = [], []
    for repeat in range(repeats):
        changed = {"encode": {"batch_size": 100 + repeat}, "pools": {"encode": "gpu"}}
        apart = prepare(recipe(folder, seed=3, **changed))
        bare(apart, data[:-1])
        (taken,) = as_tasks(apart, ["encode"], elsewhere=True)
        again = prepare(recipe(folder, seed=4, **changed))
        bare(again, data[:-1])
        (call,) = bare(again, ["encode"])
        pooled.append(taken - call)
        tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"artifact-{apart.plan.identities['encode'][:16]}"]))
        (newest,) = client.read_flow_runs(flow_run_filter=tagged)
        places.append({state.name: state.timestamp for state in client.read_flow_run_states(newest.id)})
    start = [seconds_of(lambda: start_process(folder)) for _ in range(repeats)]

    def between(first: str, last: str) -> float:
        return statistics.median((times[last] - times[first]).total_seconds() for times in places)

    return {
        "cached_chain_s": statistics.median(run.total_run_time.total_seconds() for run in runs),
        "inline_task_overhead_s": statistics.median(inline),
        "pool_task_overhead_s": statistics.median(pooled),
        "worker_start_s": statistics.median(start),
        "waiting_s": between("Scheduled", "Pending"),
        "starting_s": between("Pending", "Running"),
        "running_s": between("Running", "Completed"),
    }


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    end_tidily()
    with tempfile.TemporaryDirectory(prefix="orchestration-") as name:
        folder = Path(name)
        (folder / "table.csv").write_text("url,caption\nhttp://a/1.png,one")
        (folder / "teacher").mkdir()
        (folder / "teacher" / "weights.bin").write_bytes(bytes(range(32)))
        with services(folder):
            figures = measure(folder, repeats)
    sys.stdout.write(json.dumps({key: round(value, 3) for key, value in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
