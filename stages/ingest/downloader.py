"""The program `ingest` starts for each chunk: img2dataset, with the fetching of one file done by our rules.

Usage: downloader.py OPTIONS.json, where `download` holds img2dataset's own arguments, `max_bytes` and `allow_private` ours. It is run by path and uses
nothing of ours, because every process of img2dataset imports it again. Standard input is its lifeline: when that closes, the whole process
group ends, so that no killed parent leaves downloads running.

img2dataset's own fetching has no limit of size or of total time, follows redirects into private networks, and reports what went wrong in
words that differ from run to run. A failure here is `reason: detail`, both from fixed sets.
"""

import functools
import http.client
import io
import ipaddress
import json
import os
import signal
import socket
import ssl
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Final

# Downloading original bytes uses none of these, but img2dataset imports them at start, in every process: 8 s on two cores.
for _unused in ("wandb", "albumentations"):
    sys.modules.setdefault(_unused, types.ModuleType(_unused))
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None makes the import fail; webdataset then does without

import img2dataset.downloader  # noqa: E402
from img2dataset import download  # noqa: E402

_BLOCK: Final = 64 * 1024
_USER_AGENT: Final = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0 (compatible; {token})"
_PASSING_STATUS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class FetchError(Exception):
    """One file could not be fetched, for a reason fit for counting."""

    def __init__(self, reason: str, detail: str = "", *, may_pass: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.may_pass = may_pass


@functools.cache
def options() -> dict[str, Any]:
    """The options this program was started with; its spawned processes are given the same arguments."""
    loaded: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return loaded


def fetch_with_retries(
    row: tuple[int, str], timeout: float, retries: int, user_agent_token: str | None, disallowed_header_directives: set[str] | None
) -> tuple[int, io.BytesIO | None, str | None]:
    """Stand in for img2dataset's function of the same arguments: (key, the file, None) or (key, None, what went wrong)."""
    key, url = row
    for attempt in range(retries + 1):
        try:
            return key, io.BytesIO(fetch(url, timeout, user_agent_token or "", disallowed_header_directives or set())), None
        except FetchError as error:
            if attempt == retries or not error.may_pass:
                return key, None, str(error)
    raise AssertionError("unreachable: the last attempt returns")


def fetch(url: str, timeout: float, token: str, disallowed: set[str]) -> bytes:
    """Return the body at `url`, got within `timeout` seconds in all and not above the size limit. Raises `FetchError`."""
    limit = int(options()["max_bytes"])
    deadline = time.monotonic() + timeout
    try:
        request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT.format(token=token)})
        with _opener().open(request, timeout=timeout) as response:
            if disallowed and img2dataset.downloader.is_disallowed(response.headers, token.lower(), disallowed):
                raise FetchError("refused by robots tag")
            if int(response.headers.get("Content-Length") or 0) > limit:
                raise FetchError("file too large")
            body = io.BytesIO()
            while block := response.read1(_BLOCK):
                body.write(block)
                if body.tell() > limit:
                    raise FetchError("file too large")
                if time.monotonic() > deadline:
                    raise FetchError("timeout", may_pass=True)
            if body.tell() == 0:
                raise FetchError("empty file")
            expected = response.headers.get("Content-Length")
            if expected is not None and body.tell() < int(expected):
                raise FetchError("connection", "cut short", may_pass=True)
            return body.getvalue()
    except urllib.error.HTTPError as error:
        raise FetchError(f"http {error.code}", may_pass=error.code in _PASSING_STATUS) from error
    except urllib.error.URLError as error:
        raise _explained(error.reason) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _explained(error) from error


def _explained(error: object) -> FetchError:
    match error:
        case FetchError():
            return error
        case TimeoutError():
            return FetchError("timeout", may_pass=True)
        case socket.gaierror():
            return FetchError("dns", may_pass=error.errno == socket.EAI_AGAIN)
        case ssl.SSLError():
            return FetchError("tls", error.reason or "")
        case ConnectionRefusedError():
            return FetchError("connection", "refused", may_pass=True)
        case ConnectionError() | http.client.IncompleteRead():
            return FetchError("connection", "broken", may_pass=True)
        case OSError():
            return FetchError("connection", os.strerror(error.errno) if error.errno else "", may_pass=True)
        case http.client.InvalidURL() | ValueError():
            return FetchError("bad url")
        case _:
            return FetchError("bad response", type(error).__name__)


def _check_peer(sock: socket.socket, host: str) -> None:
    """Refuse, before anything is asked of it, a peer that is not on the public network: names and redirects can lead anywhere."""
    if options()["allow_private"] or host in _proxy_hosts():
        return
    if not ipaddress.ip_address(str(sock.getpeername()[0]).partition("%")[0]).is_global:
        raise FetchError("private address")


@functools.cache
def _proxy_hosts() -> frozenset[str]:
    return frozenset(urllib.parse.urlsplit(proxy).hostname or "" for proxy in urllib.request.getproxies().values())


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self.sock, self.host)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self.sock, self.host)


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req, context=ssl.create_default_context())


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # not build_opener: it would also open file: and ftp: addresses
    for handler in (
        urllib.request.ProxyHandler(), _Handler(), _SecureHandler(), urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(), urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


img2dataset.downloader.download_image_with_retry = fetch_with_retries  # at import: the spawned processes of img2dataset get it too


def _end_with_parent() -> None:
    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


if __name__ == "__main__":
    _end_with_parent()
    download(**options()["download"])
