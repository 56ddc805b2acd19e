"""Fetching one file from the open web: bounded in size and time, public addresses only, every failure one of a fixed set of reasons.

Standard library only: each process of the downloader imports this.
"""

import functools
import http.client
import io
import ipaddress
import os
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from typing import Final

_BLOCK: Final = 64 * 1024
_MAY_PASS: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class FetchError(Exception):
    """One file could not be fetched. The text is `reason` or `reason: detail`, the same for the same cause, fit for counting."""

    def __init__(self, reason: str, detail: str = "", *, may_pass: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.may_pass = may_pass
        """Whether another try is worth it."""


@dataclass(frozen=True)
class FetchLimits:
    """What a fetch may cost and where it may go."""

    timeout: float
    """Seconds for one try, from the connection to the last byte."""
    max_bytes: int
    allow_private: bool = False
    """Whether peers outside the public network (loopback, private, link-local) may be asked."""
    user_agent: str = ""
    refuses: Callable[[Message], bool] = lambda _headers: False
    """Says from the response's headers that the file must not be used."""


def fetch(url: str, limits: FetchLimits) -> bytes:
    """Return the body at `url`, redirects followed. Raises `FetchError`."""
    deadline = time.monotonic() + limits.timeout
    try:
        request = urllib.request.Request(url, headers={"User-Agent": limits.user_agent})
        with _opener(limits.allow_private).open(request, timeout=limits.timeout) as response:
            return _read(response, limits, deadline)
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"http {error.code}", may_pass=error.code in _MAY_PASS) from error
    except urllib.error.URLError as error:
        raise _explained(error.reason) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _explained(error) from error


def fetch_with_retries(url: str, limits: FetchLimits, retries: int) -> bytes:
    """Fetch with up to `retries` further tries of what may pass. Raises the last `FetchError`."""
    for _ in range(retries):
        try:
            return fetch(url, limits)
        except FetchError as error:
            if not error.may_pass:
                raise
    return fetch(url, limits)


def is_private_host(url: str) -> bool:
    """Whether the host of `url` is written as a loopback, private or otherwise not global address. A URL that cannot be parsed counts as such."""
    try:
        host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return True
    if host in ("", "localhost") or host.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def _read(response: http.client.HTTPResponse, limits: FetchLimits, deadline: float) -> bytes:
    if limits.refuses(response.headers):
        raise FetchError("refused by robots tag")
    stated = int(response.headers.get("Content-Length") or 0)
    if stated > limits.max_bytes:
        raise FetchError("file too large")
    body = io.BytesIO()
    while block := response.read1(_BLOCK):
        body.write(block)
        if body.tell() > limits.max_bytes:
            raise FetchError("file too large")
        if time.monotonic() > deadline:
            raise FetchError("timeout", may_pass=True)
    if body.tell() < stated:
        raise FetchError("connection", "broken", may_pass=True)
    if body.tell() == 0:
        raise FetchError("empty file")
    return body.getvalue()


def _explained(error: object) -> FetchError:  # noqa: PLR0911 - a table of causes
    match error:
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
            return FetchError("bad response")


def _check_peer(sock: socket.socket, host: str) -> None:
    # After the connection and before a byte is sent: a name may resolve, and a redirect lead, anywhere, and differently each time it is asked.
    if host in _proxy_hosts():
        return
    if not ipaddress.ip_address(str(sock.getpeername()[0]).partition("%")[0]).is_global:
        raise FetchError("private address")


@functools.cache
def _proxy_hosts() -> frozenset[str]:
    return frozenset(urllib.parse.urlsplit(proxy).hostname or "" for proxy in urllib.request.getproxies().values())


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self.sock, self.host)


class _PublicSecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self.sock, self.host)


class _PublicHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicConnection, req)


class _PublicSecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicSecureConnection, req)


@functools.cache
def _opener(allow_private: bool) -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # not build_opener: it would open file: and ftp: addresses too
    web = (urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()) if allow_private else (_PublicHandler(), _PublicSecureHandler())
    others = (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    )
    for handler in (*others, *web):
        opener.add_handler(handler)
    return opener
