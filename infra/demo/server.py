"""A web server on the loopback address, for pictures that the demo and the tests let img2dataset fetch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from schemas.errors import RunFailed


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it so
        """Two hundred request lines would bury the run's own log."""


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[int]:
    """Serve the files of `folder` on 127.0.0.1 for the length of the block; yields the port (a free one where `port` is 0)."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(folder)))
    except OSError as error:
        raise RunFailed(f"127.0.0.1:{port}: the demo's picture server cannot listen there ({error.strerror})") from error
    server.daemon_threads = True
    with in_background(server):
        yield server.server_address[1]


@contextmanager
def in_background(server: HTTPServer) -> Iterator[None]:
    """Have a thread answer what the server is asked for the length of the block, and close it then."""
    thread = threading.Thread(target=server.serve_forever, name=type(server).__name__, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
