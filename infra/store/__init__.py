"""The content-addressed artifact store, on a folder or on S3."""

from infra.store.gc import GcItem, GcReport
from infra.store.lease import Lease
from infra.store.metered import Traffic
from infra.store.parts import Part
from infra.store.safetensors_header import RawTensor
from infra.store.settings import StoreSettings
from infra.store.store import ArtifactStore

__all__ = ["ArtifactStore", "GcItem", "GcReport", "Lease", "Part", "RawTensor", "StoreSettings", "Traffic"]
