"""A double of the Hugging Face hub's API on the loopback interface: it keeps what an upload by the hub's own library sends, large files apart."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from infra.demo.server import in_background

LARGE = ".safetensors"
"""What the hub keeps as large files, sent apart from the commit."""


class Hub:
    """Repositories by name, each with its files by path."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.endpoint = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.commits: list[str] = []


@contextlib.contextmanager
def hub_server(token: str) -> Iterator[Hub]:
    """Serve a hub that only this token may write to."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the library's name
            """Say nothing."""

        def do_POST(self) -> None:
            body = self._body()
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._answer(401, {"error": "Invalid credentials"})
            elif self.path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif self.path == "/api/repos/create":
                self._create(json.loads(body))
            elif self.path.endswith("/preupload/main"):
                self._preupload(json.loads(body))
            elif self.path.endswith(".git/info/lfs/objects/batch"):
                self._batch(json.loads(body))
            elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                self._commit(found[1], body)
            else:
                self._answer(404, {"error": self.path})

        def do_PUT(self) -> None:
            body = self._body()
            name = self.path.removeprefix("/objects/")
            if hashlib.sha256(body).hexdigest() != name:
                self._answer(400, {"error": "checksum"})
                return
            hub.objects[name] = body
            self._answer(200, {})

        def _create(self, asked: Any) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, {})
            hub.visibility.setdefault(name, asked.get("visibility", "public"))
            self._answer(409 if known else 200, {"url": f"{hub.endpoint}/{name}"})

        def _preupload(self, asked: Any) -> None:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for file in asked["files"]
            ]
            self._answer(200, {"files": files})

        def _batch(self, asked: Any) -> None:
            objects = [
                one | ({} if one["oid"] in hub.objects else {"actions": {"upload": {"href": f"{hub.endpoint}/objects/{one['oid']}"}}})
                for one in asked["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

        def _commit(self, name: str, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                else:
                    assert line["key"] == "lfsFile"
                    hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
            self._answer(200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def _answer(self, status: int, content: Any, kind: str = "application/json") -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    with in_background(server):
        yield hub
