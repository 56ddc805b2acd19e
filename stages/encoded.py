"""What a student is trained on: encoded pictures, or what the teacher itself drew. A method sees no difference."""

from schemas.manifest import EncodedManifest, Manifest, Pairs, Teacher
from stages.latents import LatentSet
from stages.pairs.pair_set import PairSet
from stages.workspace import Workspace

Encoded = LatentSet | PairSet
"""Either, open: an `EncodedSet` with captions, and the conditioning of no text."""


def open_encoded(manifest: EncodedManifest, workspace: Workspace, teacher: Manifest[Teacher]) -> Encoded:
    """Fetch the artifact, verified, and open it. Raises as `LatentSet.open` and `PairSet.open` do."""
    if isinstance(manifest.content, Pairs):
        return PairSet.open(manifest, workspace)
    return LatentSet.open(manifest, workspace, teacher)
