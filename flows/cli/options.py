"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one field; may be repeated.")]
Store = Annotated[
    str | None,
    typer.Option("--store", metavar="ADDRESS", help="file:///folder or s3://bucket/prefix. Default: DISTILL_STORE_ADDRESS, or ./store."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Where networks run: cpu, cuda, cuda:0, mps. Default: DISTILL_DEVICE, or cpu.")
]
LostAfter = Annotated[
    int,
    typer.Option(metavar="SECONDS", help="Silence of a run after which its worker is taken for lost and the run started again.", min=40),
]
ArtifactReference = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="Identity, its first 6 or more digits, or an address on the store.")
]
