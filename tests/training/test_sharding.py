"""Moments and networks divided over processes: the same losses and weights as in one, checkpoints that any number of processes goes on from."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from schemas.base import digest
from schemas.dmd import DmdConfig
from schemas.finetune import FinetuneConfig
from schemas.lcm import LcmConfig
from schemas.lightning import LinkConfig
from schemas.manifest import Latents, Manifest, Teacher
from schemas.training import TrainingConfig
from stages import lightning
from stages.elastic import Task, run_together
from stages.ranks import Parallel
from stages.training.metrics import read_metrics
from tests.training import artifacts

pytestmark = pytest.mark.slow

Place = tuple[Path, Manifest[Teacher], Manifest[Latents]]
Job = tuple[str, str, Any, bool]
"""Name, stage, configuration, whether it is stopped when it has trained."""

# With a large eps, Adam does not turn the rounding of a gradient near zero into a whole step of the other sign.
ADAM = {"learning_rate": 1e-3, "betas": (0.5, 0.99), "eps": 1e-3}
LINK = {
    "teacher_steps": 8, "steps": 4, "training_steps": 4, "batch_size": 4, "checkpoint_every": 2, "warmup_steps": 2, "ema_decay": 0.6,
    "max_grad_norm": 0.02, "optimizer": ADAM, "adversarial": {"optimizer": ADAM}, "lora_rank": 4,
}  # fmt: skip


def link(**more: object) -> LinkConfig:
    return LinkConfig.model_validate(LINK | more)


LCM = {"training_steps": 2, "batch_size": 4, "warmup_steps": 0, "optimizer": ADAM}
DMD2 = {"steps": 4, "regression": None, "gan": {}, "fake_updates": 2}
FINETUNE = {"training_steps": 2, "batch_size": 4, "accumulation_steps": 2, "optimizer": ADAM}
LOOKS = {"every": 1, "images": 4, "teacher_steps": 2, "extractor": "efficientnet-lite0", "grid_images": 2, "batch_size": 4}
ANCHORS = {"action": "roll_back", "anchor_every": 1}

CASES: Mapping[str, tuple[str, Any, tuple[str, ...]]] = {
    "unet": ("lightning", link(accumulation_steps=2), ("optimizer", "full")),
    "lora": ("lightning", link(network="lora", gradient_checkpointing=True, training_steps=2), ("full",)),
    "bfloat16": ("lightning", link(precision="bfloat16", teacher_precision="bfloat16", training_steps=2), ("full",)),
    "switch": ("lightning", link(prediction="sample", conversion_steps=1, adversarial=None, training_steps=2), ("full",)),
    "watched": ("lightning", link(watch=LOOKS, alarms=ANCHORS, adversarial=None, training_steps=2), ("full",)),
    "lcm": ("lcm", LcmConfig.model_validate(LCM | {"lora_rank": 4}), ("full",)),
    "lcm-unet": ("lcm", LcmConfig.model_validate(LCM | {"network": "unet", "guidance_w_range": (2, 14), "target_decay": 0.6}), ("optimizer", "full")),
    "dmd": ("dmd", DmdConfig.model_validate(LCM | DMD2), ("full",)),
    "style": ("finetune", FinetuneConfig.model_validate(FINETUNE | {"lora_rank": 4}), ("full",)),
    "base": ("finetune", FinetuneConfig.model_validate(FINETUNE | {"network": "unet", "ema_decay": 0.6}), ("optimizer", "full")),
}  # fmt: skip
"""Stage, configuration, and how it is divided."""
SHARDINGS = ("optimizer", "full")


def run(place: Place, job: Job, parallel: Parallel | None = None) -> Manifest[Any] | None:
    """Run a stage under a name that stands for its identity; None for one that is stopped."""
    folder, teacher, latents = place
    name, stage, config, stopped = job
    module = import_module(f"stages.{stage}")
    scratch = folder / f"{name}-{os.getpid()}"
    scratch.mkdir(exist_ok=True)
    workspace = replace(artifacts.workspace(folder, config=config), identity=digest(name), scratch=scratch, parallel=parallel or Parallel())
    inputs = module.Inputs(teacher=teacher, latents=latents)
    if not stopped:
        manifest: Manifest[Any] = module.run(config, inputs, workspace)
        return manifest
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.lightning.stage.publish_student", _stop)
        module.run(config, inputs, workspace)
    return None


def _stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _process(rank: int, world_size: int, place: Place, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{place[0] / 'rendezvous'}"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    for job in jobs:
        run(place, job, Parallel(rank, world_size))
    counts = {steps: _reductions(place, steps, Parallel(rank, world_size)) for steps in (1, 2)}
    (place[0] / f"reductions-{rank}.json").write_text(json.dumps(counts))
    distributed.destroy_process_group()


def sharded(config: TrainingConfig, sharding: str) -> Any:
    return config.model_copy(update={"sharding": sharding})


def _reductions(place: Place, accumulation_steps: int, parallel: Parallel) -> int:
    """How often gradients are reduced in two steps of a link, by the process that asks."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    found: list[int] = []
    reduce = collectives.DefaultReduceScatter.__call__

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        found.append(1)
        return reduce(self, *arguments, **named)

    config = sharded(link(training_steps=2, accumulation_steps=accumulation_steps, warmup_steps=0), "full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.DefaultReduceScatter, "__call__", counted)
        run(place, (f"counted-{accumulation_steps}", "lightning", config, False), parallel)
    return len(found)


SHORT, LONG = link(training_steps=2, accumulation_steps=2), link(accumulation_steps=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """All runs, each in one process and in two, so that processes are started once."""
    folder = tmp_path_factory.mktemp("sharding")
    teacher = artifacts.make_teacher(folder, "sdxl")
    made = (folder, teacher, artifacts.make_latents(folder, teacher))
    together: list[Job] = []
    for name, (stage, config, shardings) in CASES.items():
        run(made, (f"{name}-alone", stage, config, False))
        together += [(f"{name}-{sharding}", stage, sharded(config, sharding), False) for sharding in shardings]
    for sharding in SHARDINGS:
        run(made, (f"joined-{sharding}", "lightning", sharded(SHORT, sharding), True))
        together.append((f"joined-{sharding}", "lightning", sharded(LONG, sharding), False))
    together.append(("left-optimizer", "lightning", sharded(SHORT, "optimizer"), True))
    multiprocessing.spawn(_process, (2, made, together), nprocs=2)
    run(made, ("left-optimizer", "lightning", LONG, False))
    return made


def compare(place: Place, one: str, other: str, rel: float = 2e-3, weights: float = 1e-4) -> None:
    """Figures of every step, and the files' weights. Gradients' norms are compared a little less closely: they add up every rounding."""
    store = artifacts.open_store(place[0])
    manifests = [store.find(digest(name)) for name in (one, other)]
    folders = [store.fetch(manifest) for manifest in manifests if manifest is not None]
    figures = [list(read_metrics(folder / "metrics.parquet")) for folder in folders]
    assert [row.keys() for row in figures[0]] == [row.keys() for row in figures[1]]
    for first, second in zip(*figures, strict=True):
        for name, value in first.items():
            tolerance = 3 * rel if name.endswith("grad_norm") else rel
            assert second[name] == pytest.approx(value, rel=tolerance, abs=1e-4), (first["step"], name)
    (left, right) = ({path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")} for folder in folders)
    assert left.keys() == right.keys() and left
    for path, tensors in left.items():
        assert tensors.keys() == right[path].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(right[path][name], tensor, rtol=0, atol=weights, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("case", "sharding"), [(case, sharding) for case, (*_, shardings) in CASES.items() for sharding in shardings])
def test_two_processes_with_a_part_each_train_as_one(place: Place, case: str, sharding: str) -> None:
    low = case == "bfloat16"
    compare(place, f"{case}-alone", f"{case}-{sharding}", rel=2e-2 if low else 2e-3, weights=2e-3 if low else 1e-4)


def test_gradients_of_a_batch_in_parts_are_reduced_once(place: Place) -> None:
    for rank in (0, 1):
        counts = json.loads((place[0] / f"reductions-{rank}.json").read_text())
        assert counts["1"] == counts["2"] > 0


@pytest.mark.parametrize("case", ["joined-optimizer", "joined-full", "left-optimizer"])
def test_a_run_of_one_process_is_gone_on_with_by_two_and_the_other_way_round(place: Place, case: str) -> None:
    compare(place, "unet-alone", case)


def test_one_process_goes_on_where_elastic_ones_were_killed(place: Place) -> None:
    """The agent and its two processes die at once, as with their machine."""
    folder, teacher, latents = place
    arguments = json.dumps([str(folder), teacher.model_dump_json(), latents.model_dump_json()])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    agent = subprocess.Popen([sys.executable, "-m", "tests.training.test_sharding", arguments], env=environment, start_new_session=True)
    parts = folder / "store" / "parts" / digest("killed")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and agent.poll() is None and not (parts / "checkpoint-00000002" / "part.json").exists():
        time.sleep(0.01)
    assert agent.poll() is None, "it ended before it was killed"
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    assert (parts / "checkpoint-00000002" / "part.json").exists()
    assert artifacts.open_store(folder).find(digest("killed")) is None
    run(place, ("killed", "lightning", LONG, False))
    compare(place, "unet-alone", "killed")


def _elastic(folder: Path, teacher: Manifest[Teacher], latents: Manifest[Latents]) -> None:
    config = sharded(LONG, "full")
    scratch = folder / "elastic"
    scratch.mkdir()
    workspace = replace(artifacts.workspace(folder, config=config), identity=digest("killed"), scratch=scratch)
    run_together(Task("lightning", config, lightning.Inputs(teacher=teacher, latents=latents), workspace), 2)


if __name__ == "__main__":  # python -m tests.training.test_sharding ARGUMENTS: an agent that a test may kill
    where, made_teacher, made_latents = json.loads(sys.argv[1])
    _elastic(Path(where), Manifest[Teacher].model_validate_json(made_teacher), Manifest[Latents].model_validate_json(made_latents))
