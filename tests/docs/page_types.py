"""mypy reads docs/python.md as a user's own program: ``python -m tests.docs.page_types``.

`make lint` does; mypy's first look at all that hhdeploy imports is too slow for a test.
"""

from __future__ import annotations

import subprocess
import sys

from hhdeploy.files.scratch import scratch_directory
from tests.docs.pages import blocks
from tests.workshop import ROOT

if __name__ == "__main__":
    program = "\n".join(block.text for block in blocks("docs/python.md") if block.kind == "python")
    with scratch_directory(None, "types") as scratch:
        (scratch / "python_page.py").write_text(program, encoding="utf-8")
        words = [sys.executable, "-m", "mypy", "--strict", str(scratch / "python_page.py")]
        sys.exit(subprocess.run(words, cwd=ROOT, check=False, timeout=900).returncode)
