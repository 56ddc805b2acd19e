"""Which hosts are on the public network, and connections that go to those alone.

Standard library only: each process of the downloader imports this.
"""

import ipaddress
import socket
import time
import unicodedata
import urllib.parse
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAMES: Final = ("localhost", "local", "internal", "localdomain", "home.arpa")
"""RFC 6761, 6762, 8375, and `internal`, which ICANN keeps for private use: cloud machines ask for their credentials at a name below it."""


class PrivateAddressError(Exception):
    """Every address of the host is outside the public network."""


def is_public(address: Address) -> bool:
    """Whether an address is a single machine's on the public network, also where an IPv6 address carries one of IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64:
            carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if carried is not None:
            return is_public(carried)
    return address.is_global and not address.is_multicast and not address.is_reserved


def is_private_host(url: str) -> bool:
    """Whether the host of `url` is written as an address that is not public, in any form that is understood, or as a name for this network.

    Forms are those that the system's resolver takes: `127.1`, `2130706433`, `0x7f.1`, `0177.0.0.1`, `[::ffff:127.0.0.1]`, and any of them with
    characters that are escaped or of other widths. A URL that cannot be parsed counts as private.
    """
    try:
        host = urllib.parse.unquote(urllib.parse.urlsplit(url).hostname or "")
    except ValueError:
        return True
    host = unicodedata.normalize("NFKC", host).lower().rstrip(".")
    if not host or any(host == name or host.endswith(f".{name}") for name in _LOCAL_NAMES):
        return True
    literal = _literal(host)
    return literal is not None and not is_public(literal)


def connect(host: str, port: int, deadline: float, *, public_only: bool) -> socket.socket:
    """Connect to `host` until `deadline` (`time.monotonic()`), with `public_only` to addresses that are public.

    The name is resolved here, once, and the connection goes to the very address that was looked at: a name that resolves differently the next time
    gains nothing, and no packet goes to an address that is refused. Raises `PrivateAddressError`, and `OSError` (`TimeoutError`) as sockets do.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = [one for one in found if not public_only or is_public(ipaddress.ip_address(str(one[4][0]).partition("%")[0]))]
    if not allowed:
        raise PrivateAddressError(host)
    for number, (family, kind, protocol, _, address) in enumerate(allowed, 1):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(remaining(deadline))
            sock.connect(address)
            sock.settimeout(remaining(deadline))
        except OSError:
            sock.close()
            if number == len(allowed):
                raise
        else:
            return sock
    raise AssertionError("the last address has raised")


def remaining(deadline: float) -> float:
    """Seconds until `deadline` (`time.monotonic()`). Raises `TimeoutError` when it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None
