"""The manifest as an object that processes hand to each other."""

import pickle
from typing import Any

from schemas.manifest import Lineage, Manifest, Measurements


def test_a_manifest_of_a_class_made_in_a_function_can_be_pickled() -> None:
    class OfMeasurements(Measurements):
        """Known to no module."""

    fields: dict[str, Any] = {"identity": "a" * 64, "files": (), "lineage": Lineage(stage="s", node="n", revision=1, config={}, inputs={})}
    manifest = Manifest[OfMeasurements](content=OfMeasurements(images=2, shards=1, source="b" * 64), **fields)
    again = pickle.loads(pickle.dumps(manifest))
    assert isinstance(again, Manifest)
    assert again.model_dump_json() == manifest.model_dump_json()
