"""The model card: metadata that the hub reads, figures, lineage, and the calls that load each variant."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import yaml

from schemas.evaluation import PublishConfig
from schemas.manifest import Manifest, StudentContent
from stages.evaluate.summary import figure
from stages.publish.variants import TEACHER, Description, Variant
from stages.reports.page import card_environment, plural


def render_card(config: PublishConfig, description: Description, summary: Mapping[str, Any], students: Mapping[str, Manifest[Any]]) -> str:
    """Return `README.md`. `summary` is the evaluation's `report.json`; `students` are by node name."""
    prompt = summary["samples"]["examples"][0]
    return (
        card_environment("stages.publish")
        .get_template("card.md.j2")
        .render(
            metadata=yaml.safe_dump(_metadata(config, description), sort_keys=False, allow_unicode=True).strip(),
            description=description,
            summary=summary,
            tables=[
                _figures(title, {(row["family"], row["steps"]): row["scores"].get(metric) for row in summary["rows"]})
                for metric, title in summary["metrics"].items()
            ],
            transfers=[_elsewhere(entry) for entry in summary.get("transfers", ())],
            snippets={name: snippet(description, name, variant, prompt) for name, variant in description.variants.items()},
            style_snippets={name: style_snippet(description, name, prompt) for name in description.styles},
            teacher_snippet=teacher_snippet(description, prompt) if description.complete else "",
            training={node: _training(manifest.content) for node, manifest in students.items()},
            plural=plural,
        )
    )


def _training(content: StudentContent) -> str:
    if content.kept == "last":
        return str(content.training_steps)
    return f"{content.weights_step}, the best of {content.training_steps}"


def _metadata(config: PublishConfig, description: Description) -> dict[str, Any]:
    metadata: dict[str, Any] = {"license": config.licence, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if config.base_model is not None:
        metadata["base_model"] = config.base_model
    tags = ["text-to-image", "diffusion-distillation", "few-step"]
    if description.kohya:
        tags.append("lora")
    return metadata | {"tags": tags + sorted({variant.method for variant in description.variants.values()})}


def _figures(title: str, values: Mapping[tuple[str, int], float | None]) -> str:
    """One metric as a Markdown table: a line a family, a column a step count; `values` by these."""
    families = list(dict.fromkeys(family for family, _ in values))
    steps = sorted({count for _, count in values}, reverse=True)

    def cell(key: tuple[str, int]) -> str:
        value = values.get(key)
        return "" if value is None else figure(value)

    lines = [f"| {title} | " + " | ".join(plural(count, "step") for count in steps) + " |", "|---" + "|---:" * len(steps) + "|"]
    lines += [f"| {family} | " + " | ".join(cell((family, count)) for count in steps) + " |" for family in families]
    return "\n".join(lines)


def _elsewhere(entry: Mapping[str, Any]) -> str:
    """An entry of `evaluate.transfer` as such a table."""
    title = f"{entry['name']}: {entry['changed']}; FID against its own samples"
    return _figures(title, {(row["family"], row["steps"]): row["fid_teacher"] for row in entry["rows"]})


def snippet(description: Description, name: str, variant: Variant, prompt: str, weights: Mapping[str, float] | None = None) -> str:
    """Python that loads one variant with plain diffusers calls and draws a picture with it. `weights` are of adapters kept apart, by name."""
    builders: Mapping[str, Callable[[Description, str], list[str]]] = {
        "unet": _load_unet,
        "lora": _load_lora,
        "adapters": partial(_load_adapters, weights or {}),
    }
    network = "UNet2DConditionModel" if variant.kind == "unet" else ""
    imports = ", ".join(sorted(filter(None, [variant.scheduler, description.pipeline, network])))
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {imports}",
            "",
            f'model = "{description.name}"  # this folder, or its id on the hub',
            *builders[variant.kind](description, name),
            f'pipeline.scheduler = {variant.scheduler}.from_pretrained(model, subfolder="{name}/scheduler")',
            *_draw(prompt, variant.steps[0], variant.guidance_scale),
        ]
    )


def teacher_snippet(description: Description, prompt: str) -> str:
    """Python that draws with the teacher, sampled as it was measured."""
    teacher = description.teacher
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(sorted([teacher.scheduler, description.pipeline]))}",
            "",
            f'model = "{description.name}"  # this folder, or its id on the hub',
            f"pipeline = {description.pipeline}.from_pretrained(model, torch_dtype=torch.float32)",
            f'pipeline.scheduler = {teacher.scheduler}.from_pretrained(model, subfolder="{TEACHER}/scheduler")',
            *_draw(prompt, teacher.steps, teacher.guidance_scale),
        ]
    )


def style_snippet(description: Description, name: str, prompt: str) -> str:
    """Python that puts one style on the teacher and draws as the teacher was measured; from the hub's base model with its own scheduler."""
    teacher, complete = description.teacher, description.complete
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(sorted([teacher.scheduler, description.pipeline] if complete else [description.pipeline]))}",
            "",
            f'model = "{description.name}"  # this folder, or its id on the hub',
            *_load_lora(description, name),
            *([f'pipeline.scheduler = {teacher.scheduler}.from_pretrained(model, subfolder="{TEACHER}/scheduler")'] if complete else []),
            *_draw(prompt, teacher.steps, teacher.guidance_scale),
        ]
    )


def _load_unet(description: Description, name: str) -> list[str]:
    return [
        f'unet = UNet2DConditionModel.from_pretrained(model, subfolder="{name}/unet", torch_dtype=torch.float32)',
        f"pipeline = {description.pipeline}.from_pretrained({_base(description)}, unet=unet, torch_dtype=torch.float32)",
    ]


def _load_lora(description: Description, name: str) -> list[str]:
    return [
        f"pipeline = {description.pipeline}.from_pretrained({_base(description)}, torch_dtype=torch.float32)",
        f'pipeline.load_lora_weights(model, subfolder="{name}", weight_name="pytorch_lora_weights.safetensors")',
    ]


def _load_adapters(weights: Mapping[str, float], description: Description, name: str) -> list[str]:
    return [
        f"pipeline = {description.pipeline}.from_pretrained({_base(description)}, torch_dtype=torch.float32)",
        *(
            f'pipeline.load_lora_weights(model, subfolder="{name}", weight_name="{adapter}.safetensors", adapter_name="{adapter}")'
            for adapter in weights
        ),
        f"pipeline.set_adapters({json.dumps(list(weights))}, adapter_weights={list(weights.values())})",
    ]


def _base(description: Description) -> str:
    return "model" if description.complete else f'"{description.base_model}"'


def _draw(prompt: str, steps: int, guidance_scale: float) -> list[str]:
    return [
        f"prompt = {json.dumps(prompt, ensure_ascii=False)}",
        "generator = torch.Generator().manual_seed(0)",
        f"image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={guidance_scale:g}, generator=generator).images[0]",
    ]
