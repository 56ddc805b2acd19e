"""Processes of this machine (Linux), as /proc tells of them."""

import signal
import sys
from pathlib import Path


def end_tidily() -> None:
    """On SIGTERM, leave by way of every `finally`: services that a benchmark started would otherwise outlive it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def descendants(pid: int) -> dict[int, str]:
    """Return the living processes that a process started, and those that they did: command lines by process id."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # after the command's name, which may hold anything but ends at the last parenthesis: state, parent
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended
            continue
    found: dict[int, str] = {}
    for child, parent in parents.items():
        ancestor = parent
        while ancestor not in (0, pid):
            ancestor = parents.get(ancestor, 0)
        if ancestor == pid:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return found
