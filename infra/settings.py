"""Settings of this installation, read from the environment. What a run computes is in its recipe, never here."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.store.settings import StoreSettings
from schemas.errors import BadInput


class Settings(BaseSettings):
    """`DISTILL_STORE_ADDRESS` says where artifacts lie, the other `DISTILL_STORE_*` how to get there, `DISTILL_TENSORBOARD` where figures go.

    `DISTILL_DEVICE` is the device of this machine, for runs that name none,
    and `DISTILL_SHARE_DEVICES` lets training stages run beside each other on it.
    """

    model_config = SettingsConfigDict(env_prefix="DISTILL_", frozen=True, extra="forbid", use_attribute_docstrings=True)

    store_address: str = "file://./store"
    """`file:///folder`, a plain path, or `s3://bucket/prefix`."""
    device: str = "cpu"
    """Where networks run: `cpu`, `cuda`, `cuda:0` or `mps`."""
    share_devices: bool = False
    """Whether training stages may run beside others of this machine on one device. Without it they wait for it."""
    tensorboard: Path | None = None
    """Folder for TensorBoard to watch: training stages tell their figures there as they go on."""
    store: StoreSettings = Field(default_factory=StoreSettings)

    @classmethod
    def load(cls) -> Self:
        """Read the environment. Raises `BadInput` naming every variable that is wrong."""
        try:
            return cls()
        except ValidationError as error:
            prefix = "DISTILL_STORE_" if error.title == StoreSettings.__name__ else "DISTILL_"
            wrong = "; ".join(
                f"{prefix}{'_'.join(str(part) for part in item['loc']).upper()}={item['input']!r}: {item['msg']}" for item in error.errors()
            )
            raise BadInput(f"wrong setting in the environment: {wrong}") from error
