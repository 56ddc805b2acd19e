"""The command that adds LoRAs up on a base: `compose`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.console import output
from flows.cli.options import Device, Store


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compose)


def compose(
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="Pipeline folder in diffusers layout, or a teacher artifact.")],
    acceleration: Annotated[
        str, typer.Option("--acceleration", metavar="LORA", help="LoRA file or folder in diffusers layout, or a student_lora artifact.")
    ],
    destination: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    *,
    style: Annotated[list[str] | None, typer.Option("--style", metavar="LORA", help="Likewise; may be repeated.")] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="A,S", help="Of the acceleration, then of each style. Default: 1.0 and 0.8 (LCM-LoRA, 3.3)."),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--form", help="lora: one fused LoRA, the default; unet: a fused UNet; adapters: the LoRAs kept apart. May be repeated."
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Draw grid.png: weights of the acceleration against those of the style.")] = False,
    prompt: Annotated[str, typer.Option("--prompt", help="Of the grid, the comparison and the card.")] = "a red apple",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    sampler: Annotated[
        Literal["lcm", "trailing"] | None, typer.Option("--sampler", help="Of an acceleration that comes without its description.")
    ] = None,
    steps: Annotated[list[int] | None, typer.Option("--steps", min=1, help="Step count of such an acceleration; may be repeated.")] = None,
    store: Store = None,
    device: Device = None,
) -> None:
    """Add an acceleration LoRA and styles to any base of their architecture, without training: base + w x acceleration + w x style."""
    from flows.preparation import open_store
    from infra.settings import Settings
    from stages.compose import Ask, compose
    from stages.compose.sources import parse_forms, parse_weights
    from stages.preflight import check_device

    device = device or Settings.load().device
    check_device(device)
    ask = Ask(
        base=base,
        acceleration=acceleration,
        styles=tuple(style or ()),
        weights=None if weights is None else parse_weights(weights),
        forms=parse_forms(form or ["lora"]),
        sampler=sampler,
        steps=tuple(steps or ()),
    )
    here = all(Path(place.removeprefix("file://")).expanduser().exists() for place in (base, acceleration, *ask.styles))
    found = None if here else open_store(store)
    output.print(str(compose(ask, destination, store=found, device=device, prompt=prompt, seed=seed, grid=grid)))
