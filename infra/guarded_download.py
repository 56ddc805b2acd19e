"""img2dataset's unit of work with the fetching of one file done by `infra.web`.

img2dataset's own fetching has no limit of size or of total time, follows redirects into private networks, and says what went wrong in words that
differ from run to run. Its distributors send a `Downloader` by pickle to the processes that work: spawned ones, Spark's and Ray's workers, on this
machine or others. A pickled object names its class, so each process that unpickles a `GuardedDownloader` imports this module, and has no way to
download without its rules. Machines of a cluster need this package installed for that; where it is missing they fail.

Imports little, because every process of the downloader imports this.
"""

import io
from email.message import Message
from typing import Any, Final

import img2dataset.downloader
from img2dataset.downloader import Downloader

from infra.web import FetchError, FetchLimits, fetch_with_retries

_USER_AGENT: Final = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0 (compatible; {token})"
_SEAM: Final = "download_image_with_retry"
"""The function of its module by which img2dataset fetches one file."""


class GuardedDownloader(Downloader):  # type: ignore[misc]  # img2dataset has no types
    """Downloads one of img2dataset's shards by our rules."""

    def __init__(self, *, max_bytes: int, allow_private: bool, **named: Any) -> None:
        """`max_bytes` and `allow_private` are of `FetchLimits`, the others img2dataset's own. Raises `RuntimeError` where img2dataset has changed."""
        super().__init__(**named)
        if not hasattr(img2dataset.downloader, _SEAM):
            raise RuntimeError(f"img2dataset.downloader has no {_SEAM}: this version cannot be given address rules and limits")
        self.max_bytes, self.allow_private = max_bytes, allow_private

    def __call__(self, row: Any) -> Any:
        setattr(img2dataset.downloader, _SEAM, self.fetch)
        return super().__call__(row)

    def fetch(
        self,
        row: tuple[int, str],
        timeout: float,
        retries: int,
        user_agent_token: str | None,
        disallowed_header_directives: set[str] | None,
    ) -> tuple[int, io.BytesIO | None, str | None]:
        """Stand in for img2dataset's function of the same arguments: (key, the file, None) or (key, None, what went wrong)."""
        key, url = row

        def refuses(headers: Message) -> bool:
            if not disallowed_header_directives:
                return False
            return bool(img2dataset.downloader.is_disallowed(headers, user_agent_token, disallowed_header_directives))

        limits = FetchLimits(
            timeout=timeout,
            max_bytes=self.max_bytes,
            allow_private=self.allow_private,
            user_agent=_USER_AGENT.format(token=user_agent_token),
            refuses=refuses,
        )
        try:
            return key, io.BytesIO(fetch_with_retries(url, limits, retries)), None
        except FetchError as error:
            return key, None, str(error)
