"""The rows of the table: every model with every step count it is sampled with, and how it is sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from schemas.evaluation import EvaluateConfig
from schemas.lightning import trailing_timesteps
from schemas.manifest import FinetunedLoRA, Manifest, StudentLoRA, StudentManifest, StudentUNet, Teacher

Finetuned = Manifest[FinetunedLoRA | Teacher]
"""What a run of `finetune` made."""

TEACHER = "teacher"


@dataclass(frozen=True)
class Row:
    """One model at one step count."""

    model: str
    """Name of the node in the plan, `teacher` for the teacher."""
    family: str
    """What the table and the plots group by: rows of one family differ in their step count only."""
    steps: int
    timesteps: tuple[int, ...]
    """The grid, descending."""
    sampler: str
    prediction_type: str
    guidance_scale: float
    """Imagen convention, uncond + s (cond - uncond); 1 means none."""
    guidance_input: bool = False
    """Whether the network is told the scale, in the place of guidance."""
    on: str | None = None
    """Entry of `evaluate.transfer`: another teacher than the student's own."""

    @classmethod
    def of_student(cls, model: str, family: str, steps: int, content: StudentUNet | StudentLoRA) -> Self:
        """A student with one of its step counts."""
        return cls(
            model=model,
            family=family,
            steps=steps,
            timesteps=content.timesteps[steps],
            sampler=content.sampler,
            prediction_type=content.prediction_type,
            guidance_scale=content.guidance_scale,
            guidance_input=content.guidance_range is not None,
        )

    @property
    def name(self) -> str:
        """`<model>@<steps>`, the key of the scores; on another teacher `<model>@<steps>+<entry>`."""
        return f"{self.model}@{self.steps}" + (f"+{self.on}" if self.on else "")

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return f"{self.model}-at-{self.steps}" + (f"-on-{self.on}" if self.on else "")


def rows_of(config: EvaluateConfig, teacher: Teacher, students: Mapping[str, StudentManifest], also: Sequence[Row] = ()) -> tuple[Row, ...]:
    """Rows in order: the teacher by the recipe's step counts (the first is the reference), then students by family, most steps first, then what is
    evaluated beside them."""
    rows = [
        Row(TEACHER, TEACHER, steps, trailing_timesteps(steps), "trailing", teacher.prediction_type, config.teacher_guidance_scale)
        for steps in dict.fromkeys(config.teacher_steps)
    ]
    families = families_of(students, also)
    sampled = [
        Row.of_student(node, families[node], steps, manifest.content)
        for node, manifest in students.items()
        for steps in manifest.content.steps
    ]
    return (*rows, *sorted(sampled, key=lambda row: (row.family, -row.steps, row.model)), *also)


def families_of(students: Mapping[str, StudentManifest], also: Sequence[Row] = ()) -> dict[str, str]:
    """By node name the family: method, with `LoRA` where it is one; the node's own name where two, or one of the rows `also`, would share a step
    count."""
    families = {node: _family(manifest) for node, manifest in students.items()}
    taken = {(row.family, row.steps): [row.model] for row in also}
    for node, manifest in students.items():
        for steps in manifest.content.steps:
            taken.setdefault((families[node], steps), []).append(node)
    doubled = {node for nodes in taken.values() if len(nodes) > 1 for node in nodes}
    return {node: node if node in doubled else family for node, family in families.items()}


def _family(manifest: StudentManifest) -> str:
    method = manifest.content.method
    return f"{method}-lora" if isinstance(manifest.content, StudentLoRA) and "lora" not in method.lower() else method
