"""A web server on the loopback that misbehaves as the real web does: dead links, broken files, slow answers. For the demo and the tests."""

import http.server
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final, Literal

from schemas.errors import BadInput

Fault = Literal["dead", "truncated", "garbage", "slow"]
GARBAGE: Final = b"<html><body>This picture has moved.</body></html>"


@dataclass(frozen=True)
class PictureServer:
    """A running server: `address` is `http://127.0.0.1:<port>`; `requests` counts the answers given for each path."""

    address: str
    requests: dict[str, int] = field(default_factory=dict)

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


@contextmanager
def serve_pictures(folder: Path, faults: Mapping[str, Fault] | None = None, delay_seconds: float = 0.5) -> Iterator[PictureServer]:
    """Serve the files of `folder` on a free port of the loopback until the block is left.

    `faults` names what goes wrong with which file: `dead` answers 404 though the file exists, `truncated` sends its first half and no more,
    `garbage` sends a page of HTML under the picture's media type, `slow` waits `delay_seconds` before it answers.
    """
    if not folder.is_dir():
        raise BadInput(f"picture server: {folder} is not a folder")
    requests: dict[str, int] = {}
    handler = partial(_Handler, folder, dict(faults or {}), delay_seconds, requests)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="picture-server", daemon=True)
        thread.start()
        try:
            yield PictureServer(f"http://127.0.0.1:{server.server_address[1]}", requests)
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    _counting = threading.Lock()
    _media_types: Final = {".png": "image/png", ".jpg": "image/jpeg"}

    def __init__(
        self, folder: Path, faults: Mapping[str, Fault], delay_seconds: float, requests: dict[str, int], *connection: object
    ) -> None:
        self._folder, self._faults, self._delay_seconds, self._requests = folder, faults, delay_seconds, requests
        super().__init__(*connection)  # type: ignore[arg-type]  # what socketserver hands over: request, client address, server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/")
        with self._counting:
            self._requests[name] = self._requests.get(name, 0) + 1
        path = self._folder / name
        fault = self._faults.get(name)
        if fault == "dead" or Path(name).name != name or not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        if fault == "slow":
            time.sleep(self._delay_seconds)
        body = path.read_bytes()
        if fault == "truncated":
            body = body[: len(body) // 2]
        if fault == "garbage":
            body = GARBAGE
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", self._media_types.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the name is http.server's
        """Say nothing: the counts are enough, and a line a picture drowns the log of the run."""
