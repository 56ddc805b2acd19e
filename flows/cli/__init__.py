"""The command line `distill`. Commands import torch and Prefect only when they run."""

from flows.cli.main import main

__all__ = ["main"]
