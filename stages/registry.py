"""Every stage by name: its configuration, its revision, the kind it makes and where its function is. Adding a method is one line here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from schemas.base import Model
from schemas.data import EncodeConfig, IngestConfig, MeasureConfig, SelectConfig
from schemas.dmd import DmdConfig
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig, PublishConfig, ReferenceConfig
from schemas.finetune import FinetuneConfig
from schemas.lcm import LcmConfig
from schemas.lightning import LinkConfig
from schemas.manifest import Manifest
from schemas.pairs import PairsConfig
from schemas.recipe import Recipe
from schemas.teacher import TeacherConfig, TrainTeacherConfig


@dataclass(frozen=True)
class Stage:
    """One kind of work. The module is imported only when it runs, so that planning needs no torch."""

    name: str
    config: type[Model]
    makes: tuple[str, ...]
    """Artifact kinds it may publish."""
    module: str
    """Module with `run(config, inputs, workspace) -> Manifest` and the class `Inputs` (a model whose fields are manifests)."""
    revision: int = 1
    """Raised whenever the stage's results change for the same configuration and inputs."""

    part_of: str | None = None
    """Section of the recipe that it is made from; None for one of its own."""

    @property
    def section(self) -> str:
        """Name of its section in the recipe."""
        return self.part_of or self.name.replace("-", "_")

    def load(self) -> tuple[Callable[..., Manifest], type[Model]]:
        """Import the stage: its run function and its Inputs class."""
        module = self._module()
        return module.run, module.Inputs

    def load_share(self) -> Callable[..., None]:
        """Import the stage and return its function `run_share(config, inputs, workspace, share)`, which keeps a share's shards as parts.

        A stage whose configuration has `workers` has one.
        """
        share: Callable[..., None] = self._module().run_share
        return share

    def load_preflight(self) -> Callable[[Any, Mapping[str, str], Recipe], None] | None:
        """Import the stage and return its check of what must hold before anything runs, None where it has none.

        That is an optional function of the module, `preflight(config, outside, recipe)`: it looks at what lies outside the store (`outside`:
        addresses by name, as in the plan) and at what is installed, in seconds, and raises `BadInput`. The recipe tells what later stages will
        ask of what this one brings.
        """
        check: Callable[[Any, Mapping[str, str], Recipe], None] | None = getattr(self._module(), "preflight", None)
        return check

    def _module(self) -> Any:
        try:
            return import_module(self.module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("stages", "infra", "schemas"):
                raise
            raise BadInput(
                f"stage {self.name}: the package {error.name} is not installed here; expected the extras of this stage, such as "
                "pip install 'diffusion-distillery[data,evaluate]'"
            ) from error


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("ingest", IngestConfig, ("image_shards",), "stages.ingest", revision=2),
        Stage("measure", MeasureConfig, ("measurements",), "stages.measure"),
        Stage("select", SelectConfig, ("selection",), "stages.select", revision=2),
        Stage("teacher", TeacherConfig, ("teacher",), "stages.teacher"),
        Stage("train-teacher", TrainTeacherConfig, ("teacher",), "stages.train_teacher"),
        Stage("encode", EncodeConfig, ("latents",), "stages.encode", revision=2),
        Stage("pairs", PairsConfig, ("pairs",), "stages.pairs"),
        Stage("finetune", FinetuneConfig, ("finetuned_lora", "teacher"), "stages.finetune", revision=2),
        Stage("lightning", LinkConfig, ("student_unet", "student_lora"), "stages.lightning", revision=4),
        Stage("lcm", LcmConfig, ("student_unet", "student_lora"), "stages.lcm", revision=4),
        Stage("dmd", DmdConfig, ("student_unet", "student_lora"), "stages.dmd", revision=2),
        Stage("reference", ReferenceConfig, ("reference_set",), "stages.evaluate.reference", part_of="evaluate"),
        Stage("evaluate", EvaluateConfig, ("evaluation",), "stages.evaluate", revision=5),
        Stage("publish", PublishConfig, ("published_model",), "stages.publish", revision=4),
    )
}


def stage(name: str) -> Stage:
    """Return a stage by name. Raises `BadInput` with the names there are."""
    try:
        return STAGES[name]
    except KeyError:
        raise BadInput(f"stage {name!r}: expected one of {', '.join(STAGES)}") from None
