"""``python -m app.alive``: whether the API of this machine answers /healthz. For a container's health check."""

from __future__ import annotations

import os
import sys
import urllib.request


def main() -> int:
    """0 where it does, 1 where it does not."""
    url = f"http://127.0.0.1:{os.environ.get('MERGEYARD_PORT', '8000')}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
