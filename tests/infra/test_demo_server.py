"""The misbehaving web server: each fault is what it says, everything else is the file."""

import io
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from infra.demo import emoji
from infra.demo.server import serve_pictures
from schemas.errors import BadInput


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        data: bytes = answer.read()
    return data


def test_faults_are_served_as_named(tmp_path: Path) -> None:
    emoji.write_collection(tmp_path, 5, sizes=[32], seed=0)
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    faults = {files[1]: "dead", files[2]: "truncated", files[3]: "garbage", files[4]: "slow"}
    with serve_pictures(tmp_path, faults, delay_seconds=0.05) as server:  # type: ignore[arg-type]
        whole = (tmp_path / files[0]).read_bytes()
        assert _get(server.url(files[0])) == whole
        with pytest.raises(urllib.error.HTTPError, match="404"):
            _get(server.url(files[1]))
        for broken in files[2:4]:
            with pytest.raises((OSError, SyntaxError)):
                Image.open(io.BytesIO(_get(server.url(broken)))).load()
        assert _get(server.url(files[4])) == (tmp_path / files[4]).read_bytes()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            _get(server.url("../" + tmp_path.name + "/" + files[0]))
        assert server.requests[files[0]] == 1
    with pytest.raises(urllib.error.URLError):
        _get(server.url(files[0]))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a folder"), serve_pictures(tmp_path / "nothing"):
        pass
