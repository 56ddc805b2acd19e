"""Whether a service answers: exit code 0 when the address given answers with success, 1 with the reason otherwise. Standard library only."""

import sys
import urllib.error
import urllib.request


def problem(url: str) -> str | None:
    """Return why the service at an address is not healthy, None when it is."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return None
    except (urllib.error.URLError, OSError) as error:
        return f"{url}: {error}"


if __name__ == "__main__":
    sys.exit(problem(*sys.argv[1:]))
