"""Run all benchmarks, one process each: ``python -m benchmarks``."""

from __future__ import annotations

import subprocess
import sys

_ALL = (
    "bench_fold",
    "bench_branches",
    "bench_parts",
    "bench_slots",
    "bench_export",
    "bench_memory",
    "bench_int8",
    "bench_machine",
    "bench_cold_start",
    "bench_serve",
    "bench_bank",
)


def main() -> int:
    """Exit code 1 if any benchmark failed."""
    failed = []
    for name in _ALL:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
