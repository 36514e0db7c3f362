"""``python leash.py PID COMMAND ...`` becomes COMMAND, which ends when process PID ends.

However that ends, also by SIGKILL: the kernel sees to it. Linux; elsewhere the command runs as it
is. Standard library alone, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def leashed(command: Sequence[str]) -> list[str]:
    """A command that ends with this process. To be started by a thread that lives as long."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main(parent: int, command: Sequence[str]) -> None:
    """Take the leash, which outlives ``exec``, and become the command."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl")
        if os.getppid() != parent:  # it ended meanwhile
            sys.exit(f"{command[0]}: the process that started it is gone")
    os.execvp(command[0], list(command))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
