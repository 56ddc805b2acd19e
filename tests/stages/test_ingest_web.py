"""Fetching one file: where a URL may lead, how long it may take and how much may come, against real servers on this machine."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest

import infra.web_addresses
from infra.web import FetchError, FetchLimits, fetch, fetch_with_retries
from infra.web_addresses import is_private_host
from tests.web import Answer, Site, serve, status, with_headers

LIMITS = FetchLimits(timeout=2, max_bytes=1000, allow_private=True)
PUBLIC = FetchLimits(timeout=2, max_bytes=1000)
PRIVATE_HOSTS = (
    "localhost", "LOCALHOST.", "a.localhost", "printer.local", "metadata.google.internal", "router.home.arpa", "127.0.0.1", "127.0.0.1.", "127.1",
    "10.1.2.3", "192.168.0.1", "172.16.5.4", "100.64.0.1", "169.254.169.254", "0.0.0.0", "0", "255.255.255.255", "224.0.0.1", "240.0.0.1",
    "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "2852039166", "%31%32%37.0.0.1", "１２７.0.0.1", "①②⑦.⓪.⓪.①",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:a9fe:a9fe]", "[fe80::1]", "[fe80::1%25eth0]", "[fd00:ec2::254]", "[ff02::1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "user:pass@10.0.0.1", "127.0.0.1:8080", "",
)  # fmt: skip
PUBLIC_HOSTS = (
    "example.org", "local.example.org", "localhost.example.org", "8.8.8.8", "134744072", "0x08080808", "[2606:4700::1111]", "[::ffff:8.8.8.8]",
    "[64:ff9b::808:808]", "user@example.org:8080", "10.0.0.1.example.org", "mylocal", "xn--bcher-kva.example", "bücher.example", "1.2.3.4.5",
)  # fmt: skip


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site({"/page": b"a page"})) as served:
        yield served


@pytest.fixture
def only_this_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 counts as public, and every other address does not."""
    monkeypatch.setattr(infra.web_addresses, "is_public", lambda address: str(address) == "127.0.0.1")


def resolve(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Let names under `.example` resolve to each of the answers in turn; return the names asked for."""
    asked: list[str] = []
    real, waiting = socket.getaddrinfo, list(answers)

    def answer(host: str, *arguments: object, **named: object) -> object:
        if not host.endswith(".example"):
            return real(host, *arguments, **named)  # type: ignore[arg-type]
        asked.append(host)
        return real(waiting.pop(0), *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


class TestAddresses:
    @pytest.mark.parametrize("host", PRIVATE_HOSTS)
    def test_private_in_every_form(self, host: str) -> None:
        assert is_private_host(f"http://{host}/a.jpg")

    @pytest.mark.parametrize("host", PUBLIC_HOSTS)
    def test_public_names_and_addresses(self, host: str) -> None:
        assert not is_private_host(f"http://{host}/a.jpg")

    def test_a_host_that_cannot_be_parsed_is_no_public_one(self) -> None:
        assert is_private_host("http://[::1/a")

    @pytest.mark.parametrize("scheme", ["http", "https"])
    @pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "inside.example", "[::ffff:127.0.0.1]"])
    def test_not_one_packet_goes_to_a_private_address(self, scheme: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
        resolve(monkeypatch, "127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            with pytest.raises(FetchError, match=r"^private address$"):
                fetch(f"{scheme}://{host}:{server.getsockname()[1]}/", PUBLIC)
            with pytest.raises(TimeoutError):
                server.accept()

    @pytest.mark.usefixtures("only_this_is_public")
    def test_the_address_that_was_checked_is_the_one_connected_to(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = resolve(monkeypatch, "127.0.0.1", "127.0.0.2")  # DNS rebinding: the second answer leads inside
        assert fetch(f"http://rebinding.example:{site.port}/page", PUBLIC) == b"a page"
        assert asked == ["rebinding.example"]

    @pytest.mark.parametrize(
        "target", ["http://127.0.0.2:{port}/page", "http://inside.example:{port}/page", "http://localhost:{port}/page"]
    )
    @pytest.mark.usefixtures("only_this_is_public")
    def test_redirects_into_private_networks_are_refused(self, target: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        resolve(monkeypatch, "127.0.0.2")
        site.pages["/away"] = status(302, Location=target.format(port=site.port))
        with pytest.raises(FetchError, match=r"^private address$"):
            fetch(site.url("/away"), PUBLIC)
        assert site.asked == ["/away"]

    def test_behind_a_proxy_on_the_private_network_addresses_that_are_written_out_are_refused(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, site.url(""))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        site.pages |= {
            "http://public.example/a": b"from the proxy",
            "http://public.example/b": status(302, Location="http://169.254.169.254/latest"),
        }
        assert fetch("http://public.example/a", PUBLIC) == b"from the proxy"
        for url in ("http://public.example/b", "http://10.0.0.1/"):
            with pytest.raises(FetchError, match=r"^private address$"):
                fetch(url, PUBLIC)
        assert site.asked == ["http://public.example/a", "http://public.example/b"]

    def test_redirects_are_followed_to_the_web_only(self, site: Site) -> None:
        site.pages |= {
            "/away": status(302, Location="/page"),
            "/out": status(302, Location="file:///etc/passwd"),
            "/ftp": status(302, Location="ftp://example.org/a"),
            "/round": status(302, Location="/round"),
        }
        assert fetch(site.url("/away"), LIMITS) == b"a page"
        for path, reason in {"/out": "http 302", "/ftp": "bad response", "/round": "http 302"}.items():
            with pytest.raises(FetchError, match=f"^{reason}$"):
                fetch(site.url(path), LIMITS)

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:text/plain,a", "page"])
    def test_other_schemes_are_not_opened(self, url: str) -> None:
        with pytest.raises(FetchError):
            fetch(url, LIMITS)


def dripping(head: bytes, drop: bytes, seconds: float = 0.05) -> Answer:
    """Answer with `head` and then `drop`, again and again, each long before a socket's own timeout."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(head)
        while True:
            request.wfile.write(drop)
            request.wfile.flush()
            time.sleep(seconds)

    return answer


class TestLimits:
    limits = FetchLimits(timeout=0.5, max_bytes=1000, allow_private=True)

    @pytest.mark.parametrize(
        "page",
        [
            dripping(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
            dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            dripping(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
            dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        ],
        ids=["headers", "interim answers", "body", "chunks"],
    )
    def test_a_file_has_a_total_time_however_it_drips(self, page: Answer, site: Site) -> None:
        site.pages["/drips"] = page
        assert self.seconds(lambda: self.refused(site.url("/drips"), "timeout")) < 1.5

    def test_redirects_share_the_time(self, site: Site) -> None:
        def late(request: BaseHTTPRequestHandler) -> None:
            time.sleep(0.2)
            status(302, Location=request.path + "x")(request)

        site.pages |= {f"/{'x' * count}": late for count in range(1, 9)}
        assert self.seconds(lambda: self.refused(site.url("/x"), "timeout")) < 1.5

    def test_a_server_that_takes_the_connection_and_is_silent(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            for scheme in ("http", "https"):  # TLS: its greeting has no answer
                self.refused(f"{scheme}://127.0.0.1:{server.getsockname()[1]}/", "timeout")

    @pytest.mark.parametrize(
        ("page", "reason"),
        [
            (with_headers(b"x" * 5000), "file too large"),
            (with_headers(b"x", Content_Length="5000"), "file too large"),
            (with_headers(b"x", Content_Length="-5"), "bad response"),
            (with_headers(b"x", Content_Length="many"), "bad response"),
            (with_headers(b""), "empty file"),
        ],
    )
    def test_sizes(self, page: Answer, reason: str, site: Site) -> None:
        site.pages["/sized"] = page
        self.refused(site.url("/sized"), reason)

    def test_what_is_no_http_at_all(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def greet() -> None:
                with server.accept()[0] as connection:
                    connection.recv(1000)
                    connection.sendall(b"220 mail.example ESMTP\r\n")

            threading.Thread(target=greet, daemon=True).start()
            self.refused(f"http://127.0.0.1:{server.getsockname()[1]}/", "bad response")

    def test_what_may_pass_is_tried_again_and_what_cannot_is_not(self, site: Site) -> None:
        answers = iter([status(503), status(503), with_headers(b"at last")])

        def busy(request: BaseHTTPRequestHandler) -> None:
            next(answers)(request)

        site.pages["/busy"] = busy
        assert fetch_with_retries(site.url("/busy"), LIMITS, retries=2) == b"at last"
        site.asked.clear()
        with pytest.raises(FetchError, match="http 404"):
            fetch_with_retries(site.url("/gone"), LIMITS, retries=3)
        assert site.asked == ["/gone"]

    @pytest.mark.parametrize(
        ("url", "reason"), [("http://name.invalid/", "dns"), ("http://127.0.0.1:9/", "connection: refused"), ("http://a b/", "bad url")]
    )
    def test_reasons(self, url: str, reason: str) -> None:
        self.refused(url, reason)

    def refused(self, url: str, reason: str) -> None:
        with pytest.raises(FetchError, match=f"^{reason}$"):
            fetch(url, self.limits)

    def seconds(self, work: Callable[[], None]) -> float:
        started = time.monotonic()
        work()
        return time.monotonic() - started
