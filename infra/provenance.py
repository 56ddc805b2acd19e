"""Who made an artifact: source revision, library versions, host. For the lineage only, never for an identity."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = (
    "diffusion-distillery",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "prefect",
    "pyarrow",
    "pydantic",
)


@cache
def source_revision() -> str:
    """Git revision of the code, with `+changes` where the tree is not clean; outside a checkout what `DISTILL_SOURCE_REVISION` says (images are
    built with it), or `unknown`."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("DISTILL_SOURCE_REVISION") or "unknown"
    try:
        revision = _git(root, "rev-parse", "HEAD")
        return revision + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache
def describe_host() -> str:
    """Host name, system and machine type."""
    return f"{platform.node()} ({platform.system()} {platform.machine()})"
