"""What `pairs` will take, told before it runs: passes of the network, hours, bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.store import ArtifactStore
from schemas.manifest import Latents, Manifest
from schemas.pairs import PairsConfig
from stages.encoded_size import EncodedSize, human
from stages.plan import Plan

_KEPT = "pairs-"
"""How the names of kept shards begin."""


@dataclass(frozen=True)
class PairsCost:
    """Of all pairs, those included that a killed run has kept."""

    config: PairsConfig
    bytes_each: int | None
    """Noise and output of one pair; None where neither the encoded set nor the teacher's configuration files are here yet."""
    seconds_each: float | None
    """Of one pair by one process; None where nothing tells."""
    source: str
    """What tells the seconds."""

    @property
    def passes(self) -> int:
        """Samples that go through the network."""
        return self.config.count * self.config.passes

    @property
    def bytes(self) -> int | None:
        """On the store."""
        return None if self.bytes_each is None else self.config.count * self.bytes_each

    @property
    def hours(self) -> float | None:
        """By one process."""
        return None if self.seconds_each is None else self.config.count * self.seconds_each / 3600

    def as_json(self) -> dict[str, Any]:
        """For `distill plan --json`; null for what is not known yet."""
        return {
            "pairs": self.config.count,
            "network_passes": self.passes,
            "bytes": self.bytes,
            "hours": self.hours,
            "hours_by": self.source,
        }

    def sentence(self) -> str:
        """For people."""
        config = self.config
        guided = f"guided by {config.guidance_scale:g}" if config.guidance_scale > 1 else "unguided"
        size = "bytes known once the teacher's configuration files are here" if self.bytes is None else human(self.bytes)
        hours = f"{self.hours:,.3g} hours for one process ({self.source})" if self.hours is not None else self.source
        drawn = f"pairs: {config.count:,} by {config.sampler} in {config.steps} steps, {guided}"
        return f"{drawn}: {self.passes:,} passes of the network, {size}, {hours}"


def pairs_cost(
    plan: Plan, find: Callable[[str], Manifest | None], store: ArtifactStore, size: EncodedSize | None, device: str | None
) -> PairsCost | None:
    """None where the recipe has no pairs, or they are finished.

    `size` is that of an encoded sample. With a `device` a call of the teacher's UNet is timed there; else the shards tell that a run has kept.
    """
    config = plan.recipe.pairs
    if config is None or find("pairs") is not None:
        return None
    shape = _latent_shape(find)
    bytes_each = 2 * 4 * shape[0] * shape[1] * shape[2] if shape is not None else None if size is None else 2 * size.latents
    seconds, source = _seconds(config, plan, find, store, device)
    return PairsCost(config, bytes_each, seconds, source)


def _latent_shape(find: Callable[[str], Manifest | None]) -> tuple[int, int, int] | None:
    encoded = find("encode")
    return encoded.content.latent_shape if encoded is not None and isinstance(encoded.content, Latents) else None


def _seconds(
    config: PairsConfig,
    plan: Plan,
    find: Callable[[str], Manifest | None],
    store: ArtifactStore,
    device: str | None,
) -> tuple[float | None, str]:
    """Of one pair, and what tells them; None and what would."""
    if device is not None:
        teacher = _teacher(plan, find, store)
        if teacher is None:
            return None, "hours known once the teacher is here: run distill stage teacher"
        from stages.pairs.timing import time_a_call  # noqa: PLC0415 - torch, which planning needs for nothing else

        call = time_a_call(config, teacher, plan.recipe.encode.resolution_px, device)
        return (
            call.seconds / call.batch_size * config.network_calls,
            f"a call for {call.batch_size} pairs takes {call.seconds:.3g} s on {device}",
        )
    notes = [part.note for part in store.parts(plan.identities["pairs"]) if part.name.startswith(_KEPT)]
    pairs, seconds = (sum(float(str(note[name])) for note in notes) for name in ("pairs", "seconds"))
    if not pairs:
        return None, "hours known with --device, which times a pass"
    return seconds / pairs, f"by {pairs:,.0f} pairs that are drawn"


def _teacher(plan: Plan, find: Callable[[str], Manifest | None], store: ArtifactStore) -> Path | None:
    """The teacher's folder: the artifact, else the pipeline on this machine that it will be made of."""
    made = find("teacher" if plan.recipe.teacher is not None else "train-teacher")
    if made is not None:
        return store.fetch(made)
    if plan.recipe.teacher is None or plan.recipe.teacher.variant is not None:
        return None
    folder = Path(plan.recipe.teacher.address.removeprefix("file://"))
    return folder if folder.is_dir() else None
