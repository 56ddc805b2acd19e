"""The program `ingest` starts for each chunk: img2dataset, with the fetching of one file done by `infra.web`.

Usage: downloader.py OPTIONS.json, where `download` holds img2dataset's own arguments, `max_bytes` and `allow_private` ours. It is run by path, and
imports little, because every process of img2dataset imports it again. Standard input is its lifeline: when that closes, the whole process
group ends, so that no killed parent leaves downloads running.

img2dataset's own fetching has no limit of size or of total time, follows redirects into private networks, and says what went wrong in
words that differ from run to run.
"""

import functools
import io
import json
import os
import signal
import sys
import threading
import types
from email.message import Message
from pathlib import Path
from typing import Any, Final

from infra.web import FetchError, FetchLimits, fetch_with_retries

# img2dataset imports these at start, in every process, for resizing, reporting and torch's data loader: seconds for nothing where files are kept as
# they are. webdataset does without torch where its import fails.
sys.modules |= {"wandb": types.ModuleType("wandb"), "albumentations": types.ModuleType("albumentations"), "torch": None}  # type: ignore[dict-item]

import img2dataset.downloader  # noqa: E402
from img2dataset import download  # noqa: E402

_USER_AGENT: Final = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0 (compatible; {token})"


@functools.cache
def options() -> dict[str, Any]:
    """The options this program was started with; its spawned processes are given the same arguments."""
    loaded: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return loaded


def download_image(
    row: tuple[int, str], timeout: float, retries: int, user_agent_token: str | None, disallowed_header_directives: set[str] | None
) -> tuple[int, io.BytesIO | None, str | None]:
    """Stand in for img2dataset's function of the same arguments: (key, the file, None) or (key, None, what went wrong)."""
    key, url = row

    def refuses(headers: Message) -> bool:
        if not disallowed_header_directives:
            return False
        return bool(img2dataset.downloader.is_disallowed(headers, user_agent_token, disallowed_header_directives))

    limits = FetchLimits(
        timeout=timeout,
        max_bytes=options()["max_bytes"],
        allow_private=options()["allow_private"],
        user_agent=_USER_AGENT.format(token=user_agent_token),
        refuses=refuses,
    )
    try:
        return key, io.BytesIO(fetch_with_retries(url, limits, retries)), None
    except FetchError as error:
        return key, None, str(error)


img2dataset.downloader.download_image_with_retry = download_image  # at import, so that the processes of img2dataset get it too


def _end_with_parent() -> None:
    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock, held here, would break the interpreter's end
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


if __name__ == "__main__":
    _end_with_parent()
    download(**options()["download"])
