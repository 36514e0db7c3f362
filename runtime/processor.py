"""What a CPU does with 8-bit products, as far as its flags say, and how many cores are for us."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Final

# Flags of x86 processors whose 8-bit products are added in 32 bits. Kernels are chosen by AVX-512
# first: without its own VNNI they overflow, whatever AVX-VNNI a virtual machine shows beside it.
_EXACT: Final = frozenset({"avx_vnni", "avx_vnni_int8"})
_EXACT_512: Final = frozenset({"avx512_vnni"})

_CPUINFO: Final = Path("/proc/cpuinfo")
_CPUS: Final = Path("/sys/devices/system/cpu")
# Which control groups this process is in, and where those of version 2 are.
_GROUPS: Final = Path("/proc/self/cgroup")
_GROUP_FILES: Final = Path("/sys/fs/cgroup")


def overflows_in_int8(cpuinfo: Path = _CPUINFO) -> bool | None:
    """Whether this processor adds pairs of 8-bit products in 16 bits, which overflows.

    x86 does before VNNI. None: nothing says so, as it is no x86 or no Linux.
    """
    units = int8_units(cpuinfo)
    return None if units is None else "VNNI" not in units


def int8_units(cpuinfo: Path = _CPUINFO) -> tuple[str, ...] | None:
    """What this processor multiplies 8-bit numbers with exactly, of AMX and VNNI; None: nothing
    says so, as it is no x86 or no Linux."""
    flags = _flags(cpuinfo)
    if not flags:
        return None
    vnni = not flags.isdisjoint(_EXACT_512 if "avx512f" in flags else _EXACT)
    return (*(["AMX"] if "amx_int8" in flags else []), *(["VNNI"] if vnni else []))


def _flags(cpuinfo: Path) -> set[str]:
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return {word for line in lines for word in line.split()}


def cores() -> str:
    """How many this machine shows, and how many of them this process may use."""
    few = allowed_cores()
    return f"{os.cpu_count()} cores" + ("" if few is None else f", {few} for this process")


def allowed_cores() -> int | None:
    """How many this process may use, where these are not all of the machine's; None: all.

    An affinity (taskset, a container's cpuset) keeps it from others, or the quota of a control
    group (``docker run --cpus``, a limit of Kubernetes), which runtimes do not look for: threads
    beyond it wait for each other. Two threads of one core are one.
    """
    there = os.cpu_count()
    if there is None:
        return None
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(there))
    quota = _quota()
    if len(ours) >= there and quota >= there:
        return None
    return math.ceil(min(len({_core(cpu) for cpu in ours}), quota))


def _quota() -> float:
    """Processors' worth of time that control groups leave; infinity: all there is."""
    least = math.inf
    with contextlib.suppress(OSError):  # no Linux
        for line in _GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            own = _GROUP_FILES / line.split(":", 2)[2].lstrip("/")
            for group in (own, *own.parents):
                with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
                    quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
                    least = min(least, int(quota) / int(period))
    return least


def _core(cpu: int) -> str:
    """What all threads of one core have in common."""
    try:
        siblings = _CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        return siblings.read_text(encoding="ascii")
    except OSError:
        return str(cpu)
