"""Real services for tests: an object store with enforced secrets, and a TCP proxy that drops connections."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from infra.seaweedfs import PORTS, ObjectStore, free_ports, new_object_store, seaweedfs_command

__all__ = ["FlakyProxy", "ObjectStore", "seaweedfs_server"]


@contextlib.contextmanager
def seaweedfs_server(folder: Path) -> Iterator[ObjectStore]:
    """Start SeaweedFS on the loopback interface with data below `folder`, and kill it at the end."""
    ports = free_ports(PORTS)
    store = new_object_store(ports[0])
    command = seaweedfs_command(folder, store, ports, reader_key=f"reader{store.access_key}")
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
        if store.answers():
            return
        time.sleep(0.1)
    raise AssertionError(f"the object store did not answer within 60 s:\n{log.read_text()[-4000:]}")


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
