"""An unfinished training on disk: what ``--resume`` continues from.

``OUT.training/state.json`` names the epoch that is done, the settings, the history and the
tensor file ``epoch-N.safetensors`` (trained values and AdamW's two moments) with its sha256.
Replacing state.json is the commit: an interrupt at any moment leaves the last whole epoch.
Nothing is pickled. Tensor files say in their metadata whose they are: those that a killed training
left without a state.json are written over. Other files in that directory are somebody's own, and
stay.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.bases import other_answer
from hhdeploy.backbones.facts import BaseAnswer
from hhdeploy.errors import WriteError
from hhdeploy.files.scratch import held_file
from hhdeploy.files.tensors import metadata_of, read_tensors, write_tensors
from hhdeploy.files.writing import os_errors, sha256_of, write_json
from hhdeploy.training.settings import EpochReport, TrainingError

STATE_VERSION = 2
STATE_FILE = "state.json"
# No other name is written or removed: an own loop may keep its epoch-best.safetensors here.
_EPOCH_FILE = re.compile(r"epoch-[0-9]+\.safetensors")
# In the metadata of a state's tensor files.
_OWN = {"made_by": "hhdeploy.training"}
# Settings that states of this version from before there were they do not have.
_ADDED = (
    "`problem_type`",
    "the list of class names",
    "the digest of the backbone's buffers",
)
# Which other processors and versions give with other rounding; None of a model that tells none.
ANSWER = "what the backbone computes of one fixed image"


@dataclass(frozen=True, eq=False)
class SavedTraining:
    """What was on disk: the last whole epoch (0: none yet), its tensors, the reports so far."""

    epoch: int
    tensors: Mapping[str, NDArray[Any]]
    history: tuple[EpochReport, ...]


@dataclass(frozen=True)
class StateDirectory:
    """The directory ``OUT.training`` beside an output directory."""

    path: Path

    @classmethod
    def beside(cls, out: Path) -> StateDirectory:
        """The state directory of ``out``."""
        whole = Path(os.path.abspath(out))
        return cls(whole.with_name(f"{whole.name}.training"))

    @property
    def exists(self) -> bool:
        """True when an unfinished training lies there."""
        return (self.path / STATE_FILE).is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other trainings of the same output out, from the first check to the last file.

        Raises:
            TrainingError: another one runs.
            WriteError: nothing can be written here.
        """
        # Beside it: the directory comes with the first epoch, and goes with the last.
        lock = self.path.with_name(f".{self.path.name}.lock")
        with ExitStack() as stack:
            with os_errors(self.path):
                lock.parent.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(held_file(lock))
                except BlockingIOError as error:
                    raise self._held_by(lock) from error
            yield

    def check(self, *, resume: bool) -> None:
        """Raise `TrainingError` unless there is a state exactly when ``resume`` asks for one.

        Without one, files of others that have a state's names are not written over.
        """
        if self.exists and not resume:
            raise TrainingError(
                f"{self.path} holds an unfinished training. Continue it with `resume=True`, or "
                "delete that directory to start over."
            )
        if resume and not self.exists:
            raise TrainingError(
                f"`resume`: {self.path / STATE_FILE} does not exist, so there is nothing to "
                "continue. Leave out `resume=True` to start from the beginning."
            )
        others = [p for p in self._epoch_files() if not _OWN.items() <= metadata_of(p).items()]
        if not self.exists and others:
            raise TrainingError(
                f"{self.path}: expected no {others[0].name} without {STATE_FILE}: a training keeps "
                "its own there, under that name, and would write over it. Move or delete it, or "
                "write to another directory than `out`."
            )

    def write(self, saved: SavedTraining, settings: Mapping[str, Any]) -> None:
        """Store one whole epoch, atomically. Raises `WriteError`: all is as it was before."""
        try:
            self._write(saved, settings)
        except BaseException:
            if not self.exists:  # of a first epoch nothing counts by itself
                with suppress(WriteError):
                    self.discard()
            raise

    def _write(self, saved: SavedTraining, settings: Mapping[str, Any]) -> None:
        with os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        tensor_file = self.path / f"epoch-{saved.epoch}.safetensors"
        write_tensors(tensor_file, saved.tensors, _OWN)
        content = {
            "schema_version": STATE_VERSION,
            "epoch": saved.epoch,
            "tensors": tensor_file.name,
            "sha256": sha256_of(tensor_file),
            "settings": dict(settings),
            "history": [asdict(report) for report in saved.history],
        }
        write_json(self.path / STATE_FILE, content)
        for old in self._epoch_files():
            if old != tensor_file:
                old.unlink(missing_ok=True)

    def read(self, settings: Mapping[str, Any]) -> SavedTraining:
        """The stored epoch, if it belongs to a training with the same ``settings``.

        Raises:
            TrainingError: naming the setting that differs, or the file that is damaged.
        """
        content = self._read_json()
        self._check_settings(content.get("settings", {}), settings)
        try:
            tensor_file = self.path / Path(content["tensors"]).name
            if sha256_of(tensor_file) != content["sha256"]:
                raise self._damaged(f"{tensor_file.name} has another sha256 than {STATE_FILE} says")
            tensors, _ = read_tensors(tensor_file, TrainingError)
            history = tuple(EpochReport(**report) for report in content["history"])
            epoch = int(content["epoch"])
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise self._damaged(str(error)) from error
        if len(history) != epoch:
            raise self._damaged(f"epoch {epoch} with {len(history)} reports")
        return SavedTraining(epoch, tensors, history)

    def discard(self) -> None:
        """Remove the state, and the directory unless it holds other files. Raises `WriteError`."""
        with os_errors(self.path):
            # state.json first: without it nothing of the rest counts.
            (self.path / STATE_FILE).unlink(missing_ok=True)
            for tensor_file in self._epoch_files():
                tensor_file.unlink()
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def _epoch_files(self) -> list[Path]:
        """Those of a state, sorted; none where there is no directory."""
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if _EPOCH_FILE.fullmatch(p.name))

    def _held_by(self, lock: Path) -> TrainingError:
        try:
            number = lock.read_text(encoding="utf-8").strip()
        except OSError:
            number = ""
        return TrainingError(
            f"another training into {self.path.with_suffix('')} is running (process "
            f"{number or 'unknown'}). Give this one another `out`, or wait until that has ended."
        )

    def _read_json(self) -> dict[str, Any]:
        path = self.path / STATE_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(f"{STATE_FILE}: {error}") from error
        if not isinstance(content, dict) or content.get("schema_version") != STATE_VERSION:
            raise self._damaged(f"{STATE_FILE} is not of schema version {STATE_VERSION}")
        return content

    def _check_settings(self, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        # What JSON makes of tuples and the like is what was stored.
        wanted = json.loads(json.dumps(dict(wanted)))
        for name, value in wanted.items():
            if name in _ADDED and name not in stored:
                continue
            if name == ANSWER:
                self._check_answer(stored.get(name), value)
            elif stored.get(name) != value:
                raise TrainingError(
                    f"`resume`: {name} is {value!r}, but the unfinished training in {self.path} "
                    f"has {stored.get(name)!r}. Use that value again, or delete the directory to "
                    "start over."
                )

    def _check_answer(self, stored: object, wanted: object) -> None:
        try:
            one, other = (BaseAnswer.from_json(each) for each in (stored, wanted))
        except (ValueError, TypeError) as error:
            raise self._damaged(f"{STATE_FILE}: {ANSWER}: expected {error}") from error
        if one and other and other_answer(one, other):
            raise TrainingError(
                f"`resume`: {ANSWER} is not what it was in the unfinished training in {self.path}, "
                f"with the same weights: it was found with {one.made_with}, now with "
                f"{other.made_with}. Use the model's code and versions of then again, or delete "
                "the directory to start over."
            )

    def _damaged(self, detail: str) -> TrainingError:
        return TrainingError(
            f"{self.path} cannot be continued from: {detail}. Delete that directory to start over."
        )


def as_floats(array: NDArray[Any]) -> NDArray[np.float32]:
    """A writable float32 copy, as torch wants it."""
    return np.array(array, dtype=np.float32)
