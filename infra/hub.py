"""Uploading a folder to a model repository on the Hugging Face hub, and what calls of the hub raise. Reading from it is in `infra.outside`."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from schemas.errors import BadInput, RunFailed

TOKEN: Final = "HF_TOKEN"
"""Environment variable with the token, the only place that it is taken from."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CARD: Final = "README.md"


def check_repository(name: str) -> None:
    """Raise `BadInput` unless `name` is an `owner/name`."""
    if _REPOSITORY.fullmatch(name) is None:
        raise BadInput(f"hub:{name}: expected hub:owner/name, such as hub:someone/sdxl-4step")


def check_token() -> None:
    """Raise `BadInput` unless the environment has a token."""
    if not os.environ.get(TOKEN):
        raise BadInput(f"hub: {TOKEN} is not set in the environment; expected a token with write access")


def card_metadata(folder: Path) -> Mapping[str, Any]:
    """The metadata block of a folder's model card, as the hub's own library reads it. Raises `BadInput` for a card without one, or a wrong one."""
    from huggingface_hub import ModelCard  # noqa: PLC0415  # slow to import, and needed by few commands

    try:
        found: dict[str, Any] = ModelCard.load(folder / CARD, ignore_metadata_errors=False).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        told = str(error).splitlines()[0]
        raise BadInput(f"{CARD}: no model card that the hub reads ({told}); expected a folder made by the stage publish") from error
    for field in ("license", "library_name", "tags"):
        if not found.get(field):
            raise BadInput(f"{CARD}: its metadata has no {field}; expected a card made by the stage publish")
    return found


def upload_model(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Make the repository `owner/name` where there is none, and commit the folder's files to it; returns the commit's address.

    Files of an earlier commit that the folder does not have stay. Raises `BadInput` without a token in the environment and where the hub refuses it,
    `RunFailed` where the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415

    check_repository(name)
    check_token()
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ[TOKEN])
    with _answers(name):
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, repo_type="model", folder_path=folder, commit_message=message).commit_url)


def hub_errors() -> tuple[type[BaseException], ...]:
    """What calls of the hub's library raise where the hub refuses, fails, or is not reached."""
    from huggingface_hub import errors  # noqa: PLC0415

    # The base of the hub's own HTTP errors is that of its HTTP library, which changed with its major versions.
    return (OSError, ValueError, errors.HfHubHTTPError.__bases__[0])


def first_line(error: BaseException) -> str:
    """What an error says before its details."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _answers(name: str) -> Iterator[None]:
    """What the hub refuses, in a sentence without its request: no error of ours can name a header."""
    try:
        yield
    except hub_errors() as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            expected = f"expected a token in {TOKEN} that may write there"
            raise BadInput(f"hub:{name}: the hub refuses the upload (status {status}); {expected}") from None
        told = f"status {status}" if status is not None else first_line(error)
        raise RunFailed(f"hub:{name}: the upload failed ({told}); what the hub has already is not sent again") from error
