"""Feature networks that FIDs are computed with, as `evaluate` and `watch` name them."""

from collections.abc import Iterator
from typing import Final, Literal, Protocol

from schemas.base import Mistake

Extractor = Literal["inception", "efficientnet-lite0", "transformers"]

EXTRACTOR_WEIGHTS: Final = "extractor_weights"
"""Field of a feature network's weights."""


def weights_name(section: str) -> str:
    """Name of these weights among what lies outside: the field below the recipe's own section, `lightning.watch` being `watch.extractor_weights`."""
    return f"{section}.{EXTRACTOR_WEIGHTS}".partition(".")[2]


class HasExtractor(Protocol):
    """A section that names a feature network."""

    @property
    def extractor(self) -> Extractor:
        """Which one."""

    @property
    def extractor_weights(self) -> str | None:
        """Where its weights are."""


def weights_fit_extractor(config: HasExtractor) -> Iterator[Mistake]:
    """A check of such a section: which network needs weights from outside, and which takes none."""
    place = config.extractor_weights
    if config.extractor == "transformers" and place is None:
        yield (EXTRACTOR_WEIGHTS,), None, "extractor is transformers: expected a folder, address or hub id of an image model in its layout"
    if config.extractor == "efficientnet-lite0" and place is not None:
        yield (EXTRACTOR_WEIGHTS,), place, "extractor efficientnet-lite0 has the weights that its package carries: expected null"
