"""Where Prefect keeps task results: on the store, beside the artifacts, so that every run, host and deployment shares finished stages."""

from pathlib import Path

from prefect.filesystems import RemoteFileSystem, WritableFileSystem

from infra.store import ArtifactStore, StoreSettings
from schemas.base import digest

FOLDER = "prefect-results"


def result_storage(store: ArtifactStore) -> Path | WritableFileSystem:
    """Return what a task's `result_storage` takes. A block on the server is needed, and saved, for object storage only; it holds no secrets."""
    if store.address.startswith("file://"):
        return Path(store.address.removeprefix("file://")) / FOLDER
    reach = StoreSettings()
    settings = {
        "endpoint_url": reach.endpoint_url,
        "client_kwargs": {"region_name": reach.region} if reach.region else {},
        "config_kwargs": {"s3": {"addressing_style": "path"}} if reach.endpoint_url else {},
        "use_listings_cache": False,  # a listing cached before another host's write would hide it
    }
    block = RemoteFileSystem(basepath=f"{store.address}/{FOLDER}", settings=settings)
    block.save(f"distill-results-{digest([store.address, settings])[:12]}", overwrite=True)
    return block
