"""How a soak ends: one line of JSON, and an exit code."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn


def finish(result: dict[str, Any]) -> NoReturn:
    """Print what was found; exit code 1 if anything is in ``wrong``."""
    for line in result["wrong"][:20]:
        print(line, file=sys.stderr)
    print(json.dumps({**result, "wrong": len(result["wrong"])}))
    sys.exit(1 if result["wrong"] else 0)
