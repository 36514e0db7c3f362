"""What a CPU does with 8-bit products, as far as its flags say."""

from __future__ import annotations

from pathlib import Path
from typing import Final

# Flags of x86 processors whose 8-bit products are added in 32 bits. Kernels are chosen by AVX-512
# first: without its own VNNI they overflow, whatever AVX-VNNI a virtual machine shows beside it.
_EXACT: Final = frozenset({"avx_vnni", "avx_vnni_int8"})
_EXACT_512: Final = frozenset({"avx512_vnni"})


_CPUINFO: Final = Path("/proc/cpuinfo")


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
