"""Prefect's settings that this project needs, made before Prefect is imported, and never against what the user set.

Prefect reads its settings once, at import, and configures logging then: so importing the package `flows` calls `prepare()` before anything else.
A variable is left alone where the environment has it, under any of its names, or the active profile, `prefect.toml` or `.env` does.
"""

import logging
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

ROOMS = ("stages", "infra", "flows")

DEFAULTS: Mapping[str, tuple[str, ...]] = {
    # First use creates the database: far more than the default 20 s on two cores.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": ("180",),
    # Without a server of the user's the embedded one serves, whatever profile is active.
    "PREFECT_SERVER_EPHEMERAL_ENABLED": ("true", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": ("false",),
    "DO_NOT_TRACK": ("1",),
    # A worker asks for runs every ten seconds, longer than a short stage takes.
    "PREFECT_WORKER_QUERY_SECONDS": ("1",),
    # A server that is started again is waited for, two minutes instead of one. Prefect doubles its waits.
    "PREFECT_CLIENT_MAX_RETRIES": ("6",),
    # What stages log belongs on the run's page, and a record from outside any run is no mistake.
    "PREFECT_LOGGING_EXTRA_LOGGERS": (",".join(ROOMS),),
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": ("ignore",),
}
"""Value, then further names of the same setting."""

API_URL = "PREFECT_API_URL"
API_AUTHENTICATION = "PREFECT_API_AUTH_STRING"
"""`user:password` of the server, as its clients know it."""
HEARTBEAT_SECONDS: Final = 30
"""Between two signs of life of a run on a pool; Prefect's smallest."""
SILENT_SECONDS: Final = 120
"""How long such a run may be silent before it is taken for lost."""
LEAST_SILENT_SECONDS: Final = 40
"""A heartbeat may be late."""
_SERVER_AUTHENTICATION = "PREFECT_SERVER_API_AUTH_STRING"


def prepare() -> None:
    """Set what is not set. Cheap, and harmless when called again."""
    known = {name.upper() for name in _configured()}
    for name, (value, *aliases) in DEFAULTS.items():
        if not known & {name, *aliases}:
            os.environ[name] = value
    # One setting is enough, of whichever of the two a person thinks: what is started here serves those who have it, and asks with it.
    authentication = os.environ.get(API_AUTHENTICATION) or os.environ.get(_SERVER_AUTHENTICATION)
    if authentication:
        for name in (API_AUTHENTICATION, _SERVER_AUTHENTICATION):
            os.environ[name] = os.environ.get(name) or authentication
    for room in ROOMS:  # Prefect hands on what passes the logger's level, and the root's is a warning
        logger = logging.getLogger(room)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def server_is_configured() -> bool:
    """True when the user named a Prefect server."""
    return bool(os.environ.get(API_URL)) or API_URL in set(_configured())


def _configured() -> Iterator[str]:
    """Yield the names of all settings the user made, wherever Prefect would read them from."""
    yield from os.environ
    yield from _flat(_toml(Path("prefect.toml")), "PREFECT")
    yield from _flat(_toml(Path("pyproject.toml")).get("tool", {}).get("prefect", {}), "PREFECT")
    if Path(".env").is_file():
        lines = Path(".env").read_text(encoding="utf-8", errors="replace").splitlines()
        yield from (line.partition("=")[0].removeprefix("export ").strip() for line in lines if "=" in line)
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    profiles = _toml(Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser())
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    yield from _flat(profiles.get("profiles", {}).get(active, {}), "")


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Prefect itself says what is wrong with it
        return {}


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}_{key}".strip("_").upper()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name
