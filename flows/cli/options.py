"""Arguments and options that several commands have."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.environment import LEAST_SILENT_SECONDS
from schemas.errors import BadInput

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one field; may be repeated.")]
Also = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="NAME=PATH", help="Evaluate this LoRA, UNet or pipeline too (evaluate.also); may be repeated."),
]
Store = Annotated[
    str | None,
    typer.Option("--store", metavar="ADDRESS", help="file:///folder or s3://bucket/prefix. Default: DISTILL_STORE_ADDRESS, or ./store."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Where networks run: cpu, cuda, cuda:0, mps. Default: DISTILL_DEVICE, or cpu.")
]
PassGate = Annotated[
    list[str] | None, typer.Option("--pass-gate", metavar="NAME", help="Go on although this gate is not met; may be repeated.")
]
LostAfter = Annotated[
    int,
    typer.Option(
        metavar="SECONDS",
        help="Silence of a run after which its worker is taken for lost and the run started again.",
        min=LEAST_SILENT_SECONDS,
    ),
]
ArtifactReference = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="Identity, its first 6 or more digits, or an address on the store.")
]


def with_also(overrides: list[str] | None, also: list[str] | None) -> list[str]:
    """Overrides of a recipe, entries of `evaluate.also` among them. Raises `BadInput` for an entry that is no `NAME=PATH`."""
    added = []
    for item in also or ():
        name, separator, path = item.partition("=")
        if not (separator and name and path):
            raise BadInput(f"--also {item}: expected NAME=PATH, such as lightning-public=sdxl_lightning_4step_lora.safetensors")
        added.append("evaluate.also+=" + json.dumps({"name": name, "path": path}))
    return [*(overrides or ()), *added]
