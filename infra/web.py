"""Fetching one file from the open web: bounded in size and time, public addresses only, every failure one of a fixed set of reasons.

Standard library only: each process of the downloader imports this.
"""

import functools
import http.client
import io
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from typing import Any, Final

from infra.web_addresses import PrivateAddressError, connect, is_private_host, remaining

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
    """Seconds for one try, from the connection to the last byte, redirects included. Only the system's resolver keeps its own time."""
    max_bytes: int
    allow_private: bool = False
    """Whether peers outside the public network (loopback, private, link-local) may be asked. Behind a proxy a name's address is the proxy's to judge,
    and only addresses that are written out are refused."""
    user_agent: str = ""
    refuses: Callable[[Message], bool] = lambda _headers: False
    """Says from the response's headers that the file must not be used."""


def fetch(url: str, limits: FetchLimits) -> bytes:
    """Return the body at `url`, redirects followed. Raises `FetchError`."""
    deadline = time.monotonic() + limits.timeout
    try:
        request = urllib.request.Request(url, headers={"User-Agent": limits.user_agent})
        with _opener(deadline, public_only=not limits.allow_private).open(request, timeout=limits.timeout) as response:
            return _read(response, limits)
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"http {error.code}", may_pass=error.code in _MAY_PASS) from error
    except urllib.error.URLError as error:
        raise _explained(error.reason) from error
    except (OSError, http.client.HTTPException, ValueError, PrivateAddressError) as error:
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


def _read(response: http.client.HTTPResponse, limits: FetchLimits) -> bytes:
    if limits.refuses(response.headers):
        raise FetchError("refused by robots tag")
    length = response.headers.get("Content-Length") or "0"
    if not (length.isascii() and length.isdecimal()):
        raise FetchError("bad response")
    stated = int(length)
    if stated > limits.max_bytes:
        raise FetchError("file too large")
    body = io.BytesIO()
    while block := response.read1(_BLOCK):
        body.write(block)
        if body.tell() > limits.max_bytes:
            raise FetchError("file too large")
    if body.tell() < stated:
        raise FetchError("connection", "broken", may_pass=True)
    if body.tell() == 0:
        raise FetchError("empty file")
    return body.getvalue()


def _explained(error: object) -> FetchError:  # noqa: PLR0911 - a table of causes
    match error:
        case PrivateAddressError():
            return FetchError("private address")
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


class _TimedReader(io.RawIOBase):
    """A socket's bytes until a deadline. A socket's own timeout is for each call: a peer that sends a byte now and then would never meet it."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(remaining(self._deadline))
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, deadline: float, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline))


class _Connection(http.client.HTTPConnection):
    def __init__(self, *arguments: Any, deadline: float, public_only: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.response_class = functools.partial(_Response, deadline=deadline)  # type: ignore[assignment]
        # The seam by which http.client, also below TLS and through a tunnel, makes its socket.
        self._create_connection = lambda peer, *_: connect(peer[0], peer[1], deadline, public_only=public_only)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Web(urllib.request.AbstractHTTPHandler):
    """http and https, every request, redirected ones too, under the same rules and to the same deadline."""

    def __init__(self, deadline: float, public_only: bool) -> None:
        super().__init__()
        self._deadline, self._public_only = deadline, public_only

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if self._public_only and is_private_host(request.full_url):
            raise FetchError("private address")
        prepared: urllib.request.Request = self.do_request_(request)
        return prepared

    https_request = http_request

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req, **self._rules(req))  # type: ignore[arg-type]

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req, context=_tls(), **self._rules(req))  # type: ignore[arg-type]

    def _rules(self, request: urllib.request.Request) -> dict[str, Any]:
        proxied = request.has_proxy() or getattr(request, "_tunnel_host", None) is not None  # the proxy may well be on the private network
        return {"deadline": self._deadline, "public_only": self._public_only and not proxied}


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _opener(deadline: float, *, public_only: bool) -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # not build_opener: it would open file: and ftp: addresses too
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Web(deadline, public_only),
    ):
        opener.add_handler(handler)
    return opener
