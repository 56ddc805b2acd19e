"""The command that draws with a published model: `sample`."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import output
from flows.cli.options import Device, Store
from schemas.errors import BadInput, RunFailed


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sample)


def sample(
    published: Annotated[str, typer.Argument(metavar="PUBLISHED", help="Published model: a folder, or an artifact on the store.")],
    *,
    prompt: Annotated[str, typer.Option("--prompt")],
    destination: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="PNG to write.")],
    steps: Annotated[int, typer.Option("--steps", min=1)] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    variant: Annotated[str | None, typer.Option("--variant", help="Which student, where several take this step count; or teacher.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", min=1, help="Imagen convention; 1 is none. Default: what the variant is published with."),
    ] = None,
    store: Store = None,
    device: Device = None,
) -> None:
    """Draw one picture with a published model, by plain diffusers calls."""
    if destination.suffix.lower() != ".png":
        raise BadInput(f"--output {destination}: expected a file name that ends in .png")
    if destination.is_dir():
        raise BadInput(f"--output {destination}: is a folder; expected a file to write")
    if not destination.parent.is_dir():
        raise BadInput(f"--output {destination}: the folder {destination.parent} does not exist")
    from flows.preparation import open_store
    from infra.settings import Settings
    from stages.preflight import check_device
    from stages.sample import open_published, sample

    device = device or Settings.load().device
    check_device(device)
    folder = open_published(published, None if Path(published).is_dir() else open_store(store))
    picture = sample(folder, prompt, steps=steps, seed=seed, variant=variant, guidance_scale=guidance_scale, device=device)
    try:
        picture.save(destination)
    except OSError as error:
        raise RunFailed(f"--output {destination}: cannot be written ({error.strerror or error})") from error
    output.print(str(destination))
