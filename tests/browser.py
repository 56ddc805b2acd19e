"""A headless Chromium for tests of pages, told what to do over its DevTools protocol. websockets comes with Prefect."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
SECONDS = 300
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip

_ROLES = {
    "button": "button, [role=button]",
    "link": "a",
    "tab": "[role=tab]",
    "menuitem": "[role=menuitem]",
}
"""Selectors of what has a role."""


@dataclass
class Tab:
    """One page and all that the browser said of it."""

    connection: ClientConnection
    session: str
    events: list[dict[str, Any]] = field(default_factory=list)
    _calls: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come meanwhile are kept."""
        self._calls += 1
        self.connection.send(json.dumps({"id": self._calls, "method": method, "params": parameters, "sessionId": self.session}))
        while True:
            message = json.loads(self.connection.recv(timeout=SECONDS))
            if message.get("id") == self._calls and message.get("sessionId") == self.session:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, page: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        """Open a file at a width and height in CSS pixels, in the scheme `light` or `dark`, and wait until it is there."""
        self._prepare(width, height, scheme)
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.readyState + ' ' + location.protocol === 'complete file:'", str(page))

    def visit(self, url: str, width: int = 1300, height: int = 1000) -> None:
        """Go to an address at a width and height in CSS pixels. What a page of scripts then shows is to be waited for."""
        self._prepare(width, height, "light")
        self.call("Page.navigate", url=url)

    def _prepare(self, width: int, height: int, scheme: str) -> None:
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def wait(self, expression: str, what: str, seconds: float = SECONDS) -> Any:
        """Wait until an expression in the page is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (found := self.js(expression)):
            assert time.monotonic() < deadline, f"{what} is not there after {seconds} s; the page: {self.text()[-2000:]}"
            time.sleep(0.05)
        return found

    def text(self) -> str:
        """What a reader of the page sees, as text."""
        return str(self.js("document.body ? document.body.innerText : ''"))

    def wait_for_text(self, text: str, seconds: float = SECONDS) -> None:
        """Wait until the page has a text."""
        self.wait(f"document.body && document.body.innerText.includes({json.dumps(text)})", repr(text), seconds)

    def click(self, name: str, role: str, within: str = "document") -> None:
        """Wait for a button, link, tab or menu item of that name, the first of them, and click it with the mouse. `within`: an expression."""
        find = f"({within})?.querySelectorAll({json.dumps(_ROLES[role])}) ?? []"
        label = f"(e.getAttribute('aria-label') || e.innerText).trim() === {json.dumps(name)}"
        place = self.wait(
            f"""(async () => {{
                const e = [...({find})].find(e => {label} && !e.disabled && e.getClientRects().length);
                if (!e) return null;
                e.scrollIntoView({{block: 'center', behavior: 'instant'}});
                const place = () => {{ const box = e.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] }};
                const before = place();
                await new Promise(resolve => setTimeout(resolve, 200));
                const [x, y] = place(), moved = x !== before[0] || y !== before[1];  // a page that is laid out anew would be clicked beside it
                return !moved && e.contains(document.elementFromPoint(x, y)) && [x, y];  // nor while a message lies over it
            }})()""",
            f"the {role} {name!r}",
        )
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, element: str, text: str) -> None:
        """Wait for a field, given as an expression, and type a text in the place of what is in it."""
        self.wait(f"(() => {{ const e = {element}; if (!e) return false; e.focus(); e.select(); return true }})()", element)
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Save what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def js(self, expression: str) -> Any:
        """The value of an expression in the page. One that throws fails the test."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and let go of a key: its name, its Windows code, and what it types."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what the page's policy refused."""
        named = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in named]

    def requests(self) -> list[str]:
        """Addresses that were asked for, the file itself and data in it left out."""
        sent = [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")][1:]


WINDOWS: Final = ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark"))
"""Widths (CSS pixels) and colour schemes that a report is looked at in."""

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is on the PATH to open the page in"
)


def assert_fits_and_is_quiet(tab: Tab, page: Path, width: int, scheme: str) -> None:
    """Nothing but what scrolls by itself is wider than the window, every picture is there, and nothing is asked for or complained of."""
    tab.open(page, width, scheme=scheme)
    assert tab.js("document.documentElement.scrollWidth") == width
    assert tab.js("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    lightness = tab.js(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765"
    )
    assert lightness > 0.9 if scheme == "light" else lightness < 0.2
    assert tab.complaints() == []
    assert tab.requests() == []


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A tab of a Chromium that runs for the block and leaves nothing outside `profile`."""
    assert CHROMIUM is not None, "the caller has looked"
    profile.mkdir(parents=True, exist_ok=True)
    with (profile / "log").open("wb") as log:
        process = subprocess.Popen([CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log)
    try:
        port, path = _address(profile, process)
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, open_timeout=SECONDS, proxy=None) as connection:
            root = Tab(connection, "")
            yield _tab(root)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(profile: Path, process: subprocess.Popen[bytes]) -> tuple[str, str]:
    said, deadline = profile / "DevToolsActivePort", time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, (profile / "log").read_text(errors="replace")[-2000:]
        lines = said.read_text().splitlines() if said.exists() else []
        if len(lines) == 2:
            return lines[0], lines[1]
        time.sleep(0.1)
    raise AssertionError(f"no address of the browser after {SECONDS} s")


def _tab(root: Tab) -> Tab:
    """The blank page that the browser began with."""
    connection = root.connection

    def browser_call(number: int, method: str, **parameters: Any) -> dict[str, Any]:
        connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(connection.recv(timeout=SECONDS))).get("id") != number:
            pass
        result: dict[str, Any] = message["result"]
        return result

    targets = browser_call(100_001, "Target.getTargets")["targetInfos"]
    page = next(target["targetId"] for target in targets if target["type"] == "page")
    return Tab(connection, browser_call(100_002, "Target.attachToTarget", targetId=page, flatten=True)["sessionId"])
