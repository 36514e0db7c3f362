"""Check a GPU: ``python -m tests.gpu [--part PART] [--dry]``, or ``make gpu-check``.

Each part is a process of its own with a report of its own, ``STEM.PART.json``; what there is of
them makes ``STEM.json`` and the table that is printed, ``STEM.txt``. Installs nothing: what is
not there is named. Needs pytest and this checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.gpu.summary import PARTS, Files, merge, table
from tests.leash import leashed

_ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 570
# To write down what it had, once it was asked to stop.
_GRACE_SECONDS = 20


def main() -> int:
    """Exit code 1 if anything failed or did not end, or if nothing at all ran."""
    chosen = _arguments()
    if importlib.util.find_spec("pytest") is None:
        sys.exit(f"{sys.executable} has no pytest, which runs the check.")
    files = Files(Path(chosen.report or _ROOT / ("gpu-dry" if chosen.dry else "gpu-report")))
    files.stem.parent.mkdir(parents=True, exist_ok=True)
    # Interrupted by hand, it still shows what there is.
    with (
        tempfile.TemporaryDirectory(prefix="hhdeploy-gpu-") as scratch,
        contextlib.suppress(KeyboardInterrupt),
    ):
        workbench = Path(chosen.workbench or scratch).resolve()
        workbench.mkdir(parents=True, exist_ok=True)
        for part in chosen.part or PARTS:
            run_part(part, files, workbench, dry=chosen.dry, seconds=chosen.seconds)
    content = merge(files, dry=chosen.dry)
    text = table(content)
    files.write(content, text)
    print(f"\n{text}\n\nwritten to {files.text} and {files.json}")
    return 0 if _passed(content, chosen.part or PARTS) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="this one alone; repeatable")
    parser.add_argument(
        "--dry", action="store_true", help="the same code on the CPU, with a tiny model"
    )
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of one part, at most")
    parser.add_argument(
        "--report",
        default=os.environ.get("HHDEPLOY_GPU_REPORT"),
        help="where, without .json  [default: gpu-report in the checkout, dry: gpu-dry]",
    )
    parser.add_argument(
        "--workbench",
        default=os.environ.get("GPU_WORKBENCH"),
        help="directory that keeps the exported bundles for later runs of this checkout",
    )
    return parser.parse_args()


def run_part(part: str, files: Files, workbench: Path, *, dry: bool, seconds: float) -> None:
    """Run one part and leave its report, whatever becomes of it."""
    report = files.part(part)
    report.unlink(missing_ok=True)
    print(f"== {part}", flush=True)
    environment = {
        **os.environ,
        # The checkout first, then what the caller put there, e.g. an unpacked wheel.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        "GPU_DRY": "1" if dry else "",
        "GPU_PART_REPORT": str(report.resolve()),
        "GPU_WORKBENCH": str(workbench),
    }
    if not dry:
        # The suite's one thread is for a machine that it shares.
        environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default",
        "--rootdir", str(_ROOT), f"tests/gpu/{part}",
    ]  # fmt: skip
    with subprocess.Popen(leashed(command), cwd=_ROOT, env=environment) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            files.amend(part, f"stopped after {seconds:g} s", stop(process))
        except KeyboardInterrupt:
            files.amend(part, "interrupted by hand", stop(process))
            raise
        else:
            if code not in (0, 1):
                files.amend(part, f"ended with exit code {code}", code)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Let a part write down what it had, then end it."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _passed(content: dict[str, object], parts: list[str]) -> bool:
    found = content["parts"]
    assert isinstance(found, dict)
    counts = [found[part]["counts"] for part in parts]
    return (
        all(found[part]["state"] == "finished" for part in parts)
        and not any(count["failed"] for count in counts)
        and any(count["passed"] for count in counts)
    )


if __name__ == "__main__":
    raise SystemExit(main())
