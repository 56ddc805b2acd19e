"""What another process does in the tests of the store: `python -m tests.infra.store_process WHAT ADDRESS ...`."""

import sys
import threading
import time
from pathlib import Path

from infra.store import ArtifactStore, StoreSettings
from tests.infra.conftest import CONTENT, LINEAGE


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def publish(address: str, identity: str, folder: str) -> None:
    """Publish slowly: one transfer at a time."""
    store = ArtifactStore.open(address, StoreSettings(transfer_workers=1))
    say("ready")
    store.publish(Path(folder), identity=identity, content=CONTENT, lineage=LINEAGE)
    say("published")


def race(address: str, identity: str, start: str, *folders: str) -> None:
    """Publish several folders under one identity from threads, all at a common moment; print the digest each ended with."""
    store = ArtifactStore.open(address)
    say("ready")

    def one(folder: str) -> None:
        while not Path(start).exists():
            time.sleep(0.005)
        say(store.publish(Path(folder), identity=identity, content=CONTENT, lineage=LINEAGE).files_digest)

    threads = [threading.Thread(target=one, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def hold(address: str, identity: str) -> None:
    """Hold a lease until killed."""
    with ArtifactStore.open(address).lease(identity, seconds=60):
        say("held")
        time.sleep(120)


def fetch(address: str, identity: str) -> None:
    """Fetch an artifact and live on."""
    store = ArtifactStore.open(address)
    say(str(store.fetch(store.resolve(identity))))
    time.sleep(120)


if __name__ == "__main__":
    {"publish": publish, "race": race, "hold": hold, "fetch": fetch}[sys.argv[1]](*sys.argv[2:])
