"""How a calibration judges what it made."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hhdeploy.bundle.manifest import LOCK_TIMEOUT
from hhdeploy.choices import DEVICES, Device, as_float, listed, one_of, seconds, whole
from hhdeploy.errors import DataError
from hhdeploy.files.writing import as_path

if TYPE_CHECKING:
    from hhdeploy.calibration.data import ImageSource


@dataclass(frozen=True)
class CalibrationOptions:
    """How ``calibrate_bundle`` judges; what it quantises is in `CalibrationSettings`.

    Attributes:
        eval_data: images to judge on; None: those of the data that calibration leaves over.
        max_drop: points of mean top-1 that may be lost; None: no guard.
        report: HTML file to write; None: none.
        device: of the sessions that judge; see ``open_session``.
        threads: of one run on the CPU; None leaves it to the runtime.
        cache: directory of earlier calibrations; "default": see ``default_cache``; None: none.
        lock_timeout: see `hhdeploy.bundle.store.edit`.
    """

    eval_data: ImageSource | None = None
    max_drop: float | None = None
    report: str | Path | None = None
    device: Device = "cpu"
    threads: int | None = None
    cache: str | Path | None = "default"
    lock_timeout: float = LOCK_TIMEOUT

    def __post_init__(self) -> None:
        one_of(DEVICES, self.device, "device")
        # Not after the calibration.
        seconds(self.lock_timeout, "lock_timeout")
        if self.threads is not None:
            object.__setattr__(self, "threads", whole(self.threads, "threads", 1))
        if not math.isnan(drop := as_float(self.max_drop)):  # NumPy's cannot be written as JSON
            object.__setattr__(self, "max_drop", drop)
        if self.report is not None:
            object.__setattr__(self, "report", as_path(self.report, "report"))
        if self.eval_data is not None:
            object.__setattr__(self, "eval_data", image_source(self.eval_data, "eval_data"))


def image_source(given: ImageSource, parameter: str) -> ImageSource:
    """Images as a user gives them; arrays in a list, which can be read twice: to calibrate, and for
    what is left over."""
    if isinstance(given, str | os.PathLike):
        return as_path(given, parameter, DataError)
    return listed(given, parameter, "mappings of arrays", DataError)
