"""How the store is reached. Credentials are never here: they come from the environment or botocore's own chain."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 2**30


class StoreSettings(BaseSettings):
    """Every field can be given as `DISTILL_STORE_<FIELD>` in the environment. None of them changes a result."""

    model_config = SettingsConfigDict(env_prefix="DISTILL_STORE_", frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint_url: str | None = None
    """Address of an S3-compatible server, such as `http://127.0.0.1:8333`. Without it botocore decides (`AWS_ENDPOINT_URL`, then AWS)."""
    region: str | None = None
    """Region to sign for. Without it botocore decides, and `us-east-1` is used when it knows none."""
    cache_dir: Path | None = None
    """Folder of the local read cache. Default: `$XDG_CACHE_HOME/diffusion-distillery`, or `~/.cache/diffusion-distillery`."""
    cache_bytes: Annotated[int, Field(ge=0)] = 50 * GIB
    """Size the read cache is kept under. Files a living process has fetched are never evicted, whatever the limit."""
    transfer_workers: Annotated[int, Field(ge=1, le=256)] = 8
    """Files, and ranges of files, moved at the same time."""
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    """How often an operation that failed for a passing reason is tried again."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Silence on a connection after which an operation counts as failed. Connecting gets a sixth of it."""

    def cache_folder(self) -> Path:
        """Return the folder of the read cache, absolute."""
        if self.cache_dir is not None:
            return self.cache_dir.expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser().absolute() / "diffusion-distillery"
