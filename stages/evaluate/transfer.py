"""Students where they were not trained: LoRAs on other bases and under a style, all at other sizes and from pictures; each such teacher is measured
against itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from infra.outside import local_copy
from schemas.errors import BadInput
from schemas.evaluation import EvaluateConfig, TransferConfig
from schemas.lightning import trailing_timesteps
from schemas.manifest import StudentLoRA, StudentManifest
from stages.diffusion.facts import TeacherFacts, inspect, read_config
from stages.diffusion.lora import LORA_FILE, merge_lora
from stages.diffusion.lora_files import check_fits, find_lora
from stages.diffusion.pipeline import TeacherPipeline, load_controlnet
from stages.diffusion.sampling import steps_left
from stages.evaluate.encoded_pictures import EncodedPictures, choose_pictures
from stages.evaluate.inputs import Inputs
from stages.evaluate.rows import Finetuned, Row
from stages.evaluate.samples import Sampler, scheduler_of
from stages.evaluate.scoring import Score
from stages.latents import LatentSet
from stages.workspace import Workspace


@dataclass(frozen=True)
class Transfer:
    """One changed teacher, its files at hand and found to fit."""

    config: TransferConfig
    base: Path
    """Pipeline folder: another base, or the teacher's own."""
    style: Path | None
    """LoRA file."""
    controlnet: Path | None
    """Folder of a ControlNet."""
    rows: tuple[Row, ...]
    """The changed teacher at its most steps first, then in as many steps as each student that takes part, then those."""

    def load(self, device: str) -> TeacherPipeline:
        """The changed teacher: the base, the style added to its UNet's weights."""
        pipeline = TeacherPipeline.load(self.base, device)
        if self.style is not None:
            plain = pipeline.diffusers()
            plain.load_lora_weights(str(self.style.parent), weight_name=self.style.name, adapter_name="style")
            plain.set_adapters(["style"], adapter_weights=[self.config.style_weight])
            merge_lora(pipeline.unet)
        return pipeline

    def made_of(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any] | None:
        """By digests what draws its rows, and on what pictures; None where the content of something outside is not known."""
        config = self.config
        outside = {field: workspace.lineage.inputs.get(config.outside_name(field)) for field in config.outside_fields()}
        if None in outside.values():
            return None
        made: dict[str, Any] = {"teacher": inputs.teacher.identity, **config.identity_fields(), **outside}
        made |= {field: inputs.finetuned[run].identity for field, run in config.finetuned().items()}
        made |= {"latents": inputs.latents.identity} if config.reads_pictures else {}
        of_rows = ("name", "guidance_scale", "teacher_guidance_scale")  # a row's key has its own scale
        return {field: value for field, value in made.items() if field not in of_rows}

    def pictures(self, pipeline: TeacherPipeline, sampler: Sampler, inputs: Inputs, workspace: Workspace) -> EncodedPictures | None:
        """Those that its rows start from or whose edges they follow, for the sampler's prompts; None where they need none.

        Raises `BadInput` where the encoded set's are not of the pipeline's own size.
        """
        if not self.config.reads_pictures:
            return None
        shape = inputs.latents.content.latent_shape
        if shape != pipeline.latent_shape:
            raise BadInput(f"evaluate.transfer.{self.config.name}: the latents are {shape}; expected the teacher's {pipeline.latent_shape}")
        latents = LatentSet(workspace.fetch(inputs.latents), inputs.latents, pipeline.encode_prompts)
        controlnet = None if self.controlnet is None else load_controlnet(self.controlnet, pipeline.dtype).to(pipeline.device)
        chosen = choose_pictures(sampler.prompts.images, latents.captions.to_pylist(), sampler.seed)
        return EncodedPictures(pipeline, latents, chosen, self.config.strength, controlnet, self.config.controlnet_scale)


def open_transfers(config: EvaluateConfig, inputs: Inputs, rows: Sequence[Row], workspace: Workspace) -> tuple[Transfer, ...]:
    """Find what every entry of `evaluate.transfer` names, and hold it against the teacher and its LoRAs by headers alone.

    `rows` are those of the table: what is put on another base or under a style are its LoRAs, otherwise all its students. Raises `BadInput` for a
    base of another architecture, size or prediction type, a style or student that does not fit it, and where no student takes part.
    """
    if not config.transfer:
        return ()
    changing = [entry.name for entry in config.transfer if not entry.of_teacher]
    own = workspace.fetch(inputs.teacher)
    loras = {node: manifest for node, manifest in inputs.students.items() if isinstance(manifest.content, StudentLoRA)}
    if changing and not loras:
        raise BadInput(f"evaluate.transfer.{changing[0]}: no student is a LoRA; expected lcm, or a link of lightning that ends in one")
    files = {node: workspace.fetch(manifest, [LORA_FILE]) / LORA_FILE for node, manifest in loras.items()}
    found = []
    for entry in config.transfer:
        field = f"evaluate.transfer.{entry.name}"
        base = _place(entry, "base", inputs.finetuned, workspace) or own
        if entry.base is not None:
            check_base(base, own, f"{field}.base")
        check_size(entry.size_px, inspect(base), f"{field}.size_px")
        place = _place(entry, "style", inputs.finetuned, workspace)
        style = None if place is None else find_lora(str(place), f"{field}.style")
        if style is not None:
            check_fits(style, base, f"{field}.style")
        for node, file in files.items() if not entry.of_teacher else ():
            check_fits(file, base, f"{field}: the student {node}:")
        controlnet = _place(entry, "controlnet", inputs.finetuned, workspace)
        if controlnet is not None:
            check_controlnet(controlnet, base, f"{field}.controlnet")
        taking_part = inputs.students if entry.of_teacher else loras
        transferred = _rows(entry, rows, taking_part)
        if not any(row.model in taking_part for row in transferred):
            raise BadInput(f"{field}: no student is there, or none with a step left of its own; expected one")
        for row in transferred:
            scheduler_of(row, inspect(base).scheduler_config)
        found.append(Transfer(entry, base, style, controlnet, transferred))
    return tuple(found)


def check_base(base: Path, teacher: Path, field: str) -> None:
    """Raise `BadInput` unless the pipeline in `base` is of the teacher's architecture, resolution and prediction type."""
    other, own = inspect(base), inspect(teacher)
    for name in ("architecture", "resolution", "prediction_type"):
        if getattr(other, name) != getattr(own, name):
            raise BadInput(f"{field}: its {name} is {getattr(other, name)}; expected the teacher's, {getattr(own, name)}")


_OF_CONTROLNET: Final = (
    "in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
)  # fmt: skip
"""Fields of a ControlNet's configuration in which it is its UNet's."""


def check_controlnet(folder: Path, base: Path, field: str) -> None:
    """Raise `BadInput` unless the folder holds a ControlNet of the base's UNet for pictures of its size, by configuration alone."""
    config, unet, facts = _controlnet_config(folder, field), read_config(base, "unet"), inspect(base)
    wanted = {name: unet.get(name) for name in _OF_CONTROLNET} | {"conditioning_channels": 3}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise BadInput(f"{field} {folder.name}: its {name} is {config.get(name)!r}; expected {value!r}")
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    if factor != facts.resolution // facts.latent_shape[1]:
        expected = facts.resolution // facts.latent_shape[1]
        raise BadInput(f"{field} {folder.name}: takes pictures {factor} times as large as latents; expected {expected}, the VAE's factor")


def _controlnet_config(folder: Path, field: str) -> dict[str, Any]:
    config = read_config(folder.parent, folder.name) if (folder / "config.json").is_file() else {}
    if config.get("_class_name") != "ControlNetModel":
        found = config.get("_class_name", "no configuration of a network")
        raise BadInput(f"{field} {folder.name}: {found}; expected a ControlNetModel in diffusers layout")
    return config


def preflight_transfers(config: EvaluateConfig, outside: Mapping[str, str]) -> None:
    """Look at the bases and styles that lie on this machine. Raises `BadInput` for a base that is not supported and a style that is no LoRA."""
    for entry in config.transfer:
        base, style, controlnet = (
            Path(outside[name].removeprefix("file://")) if (name := entry.outside_name(field)) in outside else None
            for field in ("base", "style", "controlnet")
        )
        if base is not None and base.exists():
            inspect(base)
        if style is not None and style.exists():
            find_lora(str(style), f"evaluate.transfer.{entry.name}.style")
        if controlnet is not None and controlnet.exists():
            _controlnet_config(controlnet, f"evaluate.transfer.{entry.name}.controlnet")


def _place(entry: TransferConfig, field: str, finetuned: Mapping[str, Finetuned], workspace: Workspace) -> Path | None:
    """A local copy of what the entry's field names; None where it names nothing. Raises `BadInput` for an artifact of the other network."""
    if getattr(entry, field) is None:
        return None
    run = entry.finetuned().get(field)
    if run is None:
        return local_copy(workspace.outside[entry.outside_name(field)], workspace.scratch)
    manifest = finetuned[run]
    expected = "teacher" if field == "base" else "finetuned_lora"
    if manifest.kind != expected:  # one given in the place of the plan's own
        raise BadInput(f"evaluate.transfer.{entry.name}.{field}: {run} is {manifest.kind} {manifest.identity[:12]}; expected a {expected}")
    return workspace.fetch(manifest)


def check_size(size: tuple[int, int] | None, facts: TeacherFacts, field: str) -> None:
    """Raise `BadInput` for a height or width (pixels) that is no multiple of the VAE's factor."""
    downscale = facts.resolution // facts.latent_shape[1]
    if size is not None and any(side % downscale for side in size):
        raise BadInput(f"{field}: {size[0]} x {size[1]}; expected multiples of {downscale}, the VAE's factor")


def _rows(entry: TransferConfig, rows: Sequence[Row], students: Mapping[str, StudentManifest]) -> tuple[Row, ...]:
    """The reference's row, then for each step count of a student the changed teacher alone, then those students."""
    reference = replace(rows[0], guidance_scale=entry.teacher_guidance_scale or rows[0].guidance_scale)
    strength = entry.strength or 1
    if not steps_left(reference.steps, strength):
        raise BadInput(f"evaluate.transfer.{entry.name}.strength: {strength:g} of the teacher's {reference.steps} steps leaves none")
    accelerated = [row for row in rows if row.model in students and steps_left(row.steps, strength)]
    counts = sorted({row.steps for row in accelerated} - {reference.steps}, reverse=True)
    alone = [replace(reference, steps=steps, timesteps=trailing_timesteps(steps)) for steps in counts]
    guided = [row if row.guidance_input else replace(row, guidance_scale=entry.guidance_scale or row.guidance_scale) for row in accelerated]
    return tuple(replace(row, on=entry.name) for row in (reference, *alone, *guided))


def summarise_transfers(transfers: Sequence[Transfer], scores: Mapping[str, Score]) -> list[dict[str, object]]:
    """What the report says of them: names, never places."""

    def summarised(row: Row) -> dict[str, object]:
        score = scores[row.name]
        named = {"name": row.name, "model": row.model, "family": row.family, "steps": row.steps, "guidance_scale": row.guidance_scale}
        return named | {"fid_teacher": score.value, "interval": [score.low, score.high]}

    return [
        {
            "name": transfer.config.name,
            "changed": transfer.config.describe(),
            "rows": [summarised(row) for row in transfer.rows],
        }
        for transfer in transfers
    ]
