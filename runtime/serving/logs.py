"""Log lines as JSON, one object a line, on standard error."""

from __future__ import annotations

import logging
import sys

from hhdeploy.errors import require


def log_as_json(level: str, logger: str | None = None) -> None:
    """Write what is logged from ``level`` on.

    Args:
        level: debug, info, warning or error.
        logger: the one whose lines they are; None: all of the process.
    """
    formatters = require("pythonjsonlogger.json", "serve", "serving")
    handler = logging.StreamHandler(sys.stderr)
    names = {"asctime": "time", "levelname": "level", "name": "logger"}
    form = "{asctime}{levelname}{name}{message}"
    # uvicorn's messages once more, with terminal colours.
    left_out = [*require("pythonjsonlogger.core", "serve", "a log").RESERVED_ATTRS, "color_message"]
    handler.setFormatter(
        formatters.JsonFormatter(form, style="{", rename_fields=names, reserved_attrs=left_out)
    )
    chosen = logging.getLogger(logger)
    chosen.handlers[:] = [handler]
    chosen.setLevel(level.upper())
