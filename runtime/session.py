"""An open bundle: images and adapter names in, logits (or features) out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.backbones.facts import LOGITS
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.answers import Answer, answers_of, are_numbers
from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.bundle.reading import read_bundle
from hhdeploy.choices import DEVICES, PRECISIONS, Device, Precision, listed, one_of, yes_or_no
from hhdeploy.errors import SessionError
from hhdeploy.files.writing import cache_of
from hhdeploy.runtime.backends import (
    Backend,
    BackendOptions,
    Run,
    check_options,
    closed,
    find_target,
    open_backend,
)
from hhdeploy.runtime.bank import DEFAULT_SLOTS, AdapterBank, Hold
from hhdeploy.runtime.processor import allowed_cores

if TYPE_CHECKING:
    from PIL import Image


class Session:
    """One bundle, open on one device; use `open_session`. `run` is thread-safe.

    Attributes:
        bundle: the bundle that was opened.
        precision: of its graph or engine.
        adapters: its adapters by name, an `AdapterBank`; of a folded bundle, None.
    """

    def __init__(
        self, bundle: Bundle, precision: Precision, backend: Backend, adapters: AdapterBank | None
    ) -> None:
        self.bundle = bundle
        self.precision = precision
        self._backend: Backend | None = backend
        self._adapters = adapters

    @property
    def adapters(self) -> AdapterBank:
        """Adapters by name: iterate, ``add``, ``remove``. Raises for a folded bundle."""
        if self._adapters is None:
            raise SessionError(
                "a folded bundle holds exactly one adapter, in its weights. Export without "
                "`fold=True` to add and remove adapters."
            )
        return self._adapters

    @property
    def device(self) -> str:
        """What computes, e.g. ``onnxruntime CPUExecutionProvider``."""
        return self._open_backend().name

    def entry(self, adapter: str | None) -> AdapterEntry | None:
        """Classes, labels and preprocessing of an adapter; None for the backbone."""
        if not isinstance(adapter, str | None):
            raise SessionError(f"`adapter`: expected one name or None, found {adapter!r}.")
        if self._adapters is None:
            only = self.bundle.manifest.adapters[0]
            if adapter not in (None, only.name):
                raise SessionError(
                    f"unknown adapter {adapter!r}: this folded bundle holds {only.name!r}."
                )
            return only
        return None if adapter in (None, BACKBONE) else self._adapters[adapter]

    def preprocess(
        self, images: Sequence[Image.Image], adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Images to float32 [batch, 3, H, W] as an adapter (None: the backbone) wants them."""
        transform = self.bundle.manifest.preprocess_of(self.entry(adapter))
        return np.stack([transform(image) for image in _pictures(images)])

    def run(
        self,
        images: NDArray[np.float32],
        adapters: str | Sequence[str | None] | None = None,
        output: str | None = None,
    ) -> NDArray[np.float32]:
        """Logits, features or tokens of a batch in which every image may use another adapter.

        Args:
            images: float32 [batch, 3, H, W], normalised (see `preprocess`).
            adapters: one name per image, None or ``"backbone"`` for the bare backbone; a single
                name or None for all images. A folded bundle takes its adapter's name or None.
            output: ``logits``, ``features`` or ``tokens``, as far as the bundle has them (see
                `Manifest.outputs`); None: the first it has.

        Returns:
            float32: logits [batch, classes], columns past an image's own classes are -inf;
            features [batch, dim]; tokens [batch, n, dim].

        Raises:
            SessionError: wrong shape or type, wrong number of names, an unknown adapter or output,
                or the session is closed.
        """
        has = self.bundle.manifest.outputs
        wanted = next(iter(has)) if output is None else output
        if not isinstance(wanted, str) or wanted not in has:
            raise SessionError(f"`output={wanted!r}`: this bundle has {', '.join(has)}.")
        return self.bundle.manifest.split(self.answer(images, adapters))[wanted]

    def answer(
        self,
        images: NDArray[np.float32],
        adapters: str | Sequence[str | None] | None = None,
    ) -> NDArray[np.float32]:
        """All outputs of a batch, an image's side by side: see `Manifest.split`; else as `run`."""
        backend = self._open_backend()
        images = self._checked(images)
        names = _names(adapters, len(images))
        if self._adapters is None:
            for name in set(names):
                self.entry(name)
            return backend.run(images, None)
        with self._adapters.lease(names) as rows:
            return backend.run(images, rows)

    def classify(
        self,
        images: Sequence[Image.Image],
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[list[Answer]]:
        """What an adapter says of each image: preprocessed as that adapter wants it, one batch.

        Args:
            images: decoded pictures.
            adapters: as for `run`.

        Returns:
            For every image all classes (or labels) of its own adapter, the most probable first,
            or all values of a regression; see `Answer`. Images of other adapters in the batch
            change nothing.

        Raises:
            SessionError: see `run`; no image; or logits that are no numbers.
        """
        if not self.bundle.manifest.classes:
            raise SessionError(
                f"this bundle gives {', '.join(self.bundle.manifest.outputs)} and no logits: it "
                "has no classes to tell. Session.run gives what it has."
            )
        images = _pictures(images)
        names = _names(adapters, len(images))
        with ExitStack() as stack:
            entries, rows = self._held(names, stack)
            manifest = self.bundle.manifest
            ways = [manifest.preprocess_of(e) for e in entries]
            pixels = np.stack([way(image) for way, image in zip(ways, images, strict=True)])
            found = self._open_backend().run(self._checked(pixels), rows)
        logits = manifest.split(found)[LOGITS]
        answers = []
        for index, (entry, row) in enumerate(zip(entries, logits, strict=True)):
            classes = entry.classes if entry is not None else manifest.backbone_classes
            if not are_numbers(row[:classes], entry):
                raise SessionError(
                    f"image {index}, adapter {names[index] or BACKBONE!r}: the logits are no "
                    f"numbers (NaN or infinity) in {self.precision}. Open the bundle in another "
                    "precision; if float32 gives none either, compare it with its reference: "
                    "`verify()`."
                )
            answers.append(answers_of(row, entry, classes))
        return answers

    def _held(
        self, names: Sequence[str | None], stack: ExitStack
    ) -> tuple[list[AdapterEntry | None], NDArray[np.int64] | None]:
        """Entry and row of each image's adapter; the stack gives the rows back."""
        if self._adapters is None:
            return [self.entry(name) for name in names], None
        holds: dict[str | None, Hold] = {}
        for name in dict.fromkeys(names):
            holds[name] = self._adapters.hold(name)
            stack.callback(self._adapters.release, holds[name])
        taken = [holds[name] for name in names]
        return [hold.entry for hold in taken], np.asarray([hold.row for hold in taken], np.int64)

    def unchecked(self) -> Run:
        """The graph itself, for a server that checks a request where it comes in.

        Called with images, float32 [batch, 3, H, W] in C order, and rows, int64 [batch], each held
        with `AdapterBank.hold`; None of a folded bundle. It gives what `answer` does, and raises
        `SessionError` once this is closed.
        """
        return self._open_backend().run

    def close(self) -> None:
        """Free the graph. Closing twice is fine."""
        if self._adapters is not None:
            self._adapters.close()
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def __reduce__(self) -> NoReturn:
        raise SessionError("a session cannot be copied or sent: open one in each process.")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise closed()
        return self._backend

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        size = self.bundle.manifest.input_size
        if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[1:] != size:
            found = list(images.shape) if isinstance(images, np.ndarray) else type(images).__name__
            torch = " Pass images.detach().cpu().numpy()." if hasattr(images, "detach") else ""
            raise SessionError(
                f"`images`: expected float32 [batch, {', '.join(map(str, size))}], found {found}."
                f"{torch}"
            )
        if not len(images):
            raise SessionError("`images`: expected a batch of at least one image, found none.")
        if not np.issubdtype(images.dtype, np.floating):
            raise SessionError(
                f"`images`: expected normalised float32, found {images.dtype}. Use "
                "session.preprocess on decoded images."
            )
        return np.ascontiguousarray(images, np.float32)


def _pictures(images: object) -> Sequence[Image.Image]:
    """Decoded pictures, at least one: what else users hold is told how it becomes one."""
    from PIL import Image

    if isinstance(images, Image.Image):
        raise SessionError("`images`: expected a sequence of pictures, found one: pass [image].")
    if isinstance(images, str | Path):
        images = [images]  # which is told below how it becomes a picture
    pictures: list[Image.Image] = listed(images, "images", "pictures", SessionError)
    if not pictures:
        raise SessionError("`images`: expected a sequence of at least one picture, found none.")
    for index, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise SessionError(
                f"`images`[{index}]: expected a PIL.Image.Image, found {type(picture).__name__}. "
                "hhdeploy.preprocess.open_image(path) reads a file, upright; "
                "PIL.Image.fromarray(array) takes uint8 [H, W, 3] in the order red, green, blue "
                "(OpenCV's is the other way round)."
            )
        try:
            picture.load()  # what was opened may be read only now
        except (OSError, SyntaxError, ValueError) as error:
            raise SessionError(f"`images`[{index}]: it cannot be read: {error}.") from error
        if not all(picture.size):
            width, height = picture.size
            raise SessionError(f"`images`[{index}]: expected pixels, found {width} x {height}.")
    return pictures


def _names(adapters: str | Sequence[str | None] | None, images: int) -> list[str | None]:
    """One name per image."""
    if adapters is None or isinstance(adapters, str):
        return [adapters] * images
    names = listed(adapters, "adapters", "names, one an image,", SessionError)
    if len(names) != images:
        raise SessionError(
            f"`adapters`: expected one per image, found {len(names)} for {images} images."
        )
    for index, name in enumerate(names):
        if not isinstance(name, str | None):
            raise SessionError(f"`adapters`[{index}]: expected a name or None, found {name!r}.")
    return names


def open_session(
    path: str | Path,
    *,
    device: Device = "auto",
    precision: Precision = "float32",
    slots: int | None = None,
    threads: int | None = None,
    contexts: int = 1,
    cuda_graphs: bool = False,
    hint: str = "latency",
    cache: str | Path | None = "default",
    partial: bool = False,
) -> Session:
    """Open a bundle for inference. Needs NumPy, safetensors, Pillow and the device's runtime.

    Args:
        path: the bundle.
        device: ``cpu``, ``cuda``, ``ort-tensorrt``, ``ort-tensorrt-rtx`` (ONNX Runtime's
            execution providers), ``openvino``, ``tensorrt``, ``tensorrt-rtx`` (an engine of the
            bundle, see ``hhdeploy build``); ``auto`` picks the fastest that is available for
            this precision, never another precision.
        precision: of the graph or engine, as listed in the manifest.
        slots: rows of the bank, row 0 (the backbone) included; None: 64, as far as an engine
            takes that many, or what is needed.
        threads: of one run on the CPU, with ``hint="throughput"`` of all together; None leaves it
            to the runtime, or is as many cores as an affinity or the quota of a control group
            leaves where these are not all. 1 to 1024, as ``contexts``.
        contexts: runs at the same time on ``tensorrt`` and ``tensorrt-rtx``, each with buffers
            of its own; further calls wait. Other runtimes take calls as they come.
        cuda_graphs: ``cuda``, ``tensorrt`` and ``tensorrt-rtx``: record a run of each batch size
            and replay it, for small batches. On ``cuda`` every size keeps memory of its own, runs
            go one after the other, and no other session of the process may work while a size
            runs for the first time.
        hint: ``openvino``: ``latency`` gives each run all threads, further calls wait;
            ``throughput`` divides the threads among calls at the same time.
        cache: directory where what is compiled at the start is kept for the next one, see
            `hhdeploy.files.caches`; "default": ``$HHDEPLOY_CACHE``, else ``~/.cache/hhdeploy``;
            None: no cache. ``openvino``: models, as large as their weights; the first start takes
            longer, and that much more memory for a moment. ``tensorrt-rtx``: kernels.
        partial: where the bundle has more adapters than ``slots``, open with the first of them
            instead of raising.

    Raises:
        BundleError: no bundle, a file that does not match its hash, no such precision, no
            engine that fits this machine.
        OptionError: no such device or precision anywhere.
        SessionError: the device is not available; it never falls back to another.
        DeviceError: no GPU, or it refused.
        MissingDependencyError: the device's runtime is not installed.
    """
    where = one_of(DEVICES, device, "device")
    which = one_of(PRECISIONS, precision, "precision")
    return read_bundle(
        path,
        lambda bundle: open_bundle(
            bundle,
            device=where,
            precision=which,
            slots=slots,
            threads=threads,
            contexts=contexts,
            cuda_graphs=cuda_graphs,
            hint=hint,
            cache=cache_of(cache),
            partial=partial,
        ),
        Session.close,
    )


def open_bundle(
    bundle: Bundle,
    *,
    device: Device,
    precision: Precision,
    slots: int | None = None,
    threads: int | None = None,
    contexts: int = 1,
    cuda_graphs: bool = False,
    hint: str = "latency",
    cache: str | Path | None = None,
    partial: bool = False,
) -> Session:
    """`open_session` for a bundle whose manifest is read already; by default without a cache."""
    check_options(threads=threads, contexts=contexts, cuda_graphs=cuda_graphs, hint=hint)
    partial = yes_or_no(partial, "partial", SessionError)
    target = find_target(bundle.manifest, device, precision)
    engine, room = target.engine, DEFAULT_SLOTS
    if engine is not None and engine.bank_sha256 is not None:
        # The adapters of this session are the engine's: adding and removing is refused.
        bundle = replace(bundle, manifest=replace(bundle.manifest, bank_as_constant=True))
    if engine is not None and engine.slots is not None:
        room = min(max(room, engine.slots[0]), engine.slots[2])
    manifest = bundle.manifest
    some = partial and not manifest.bank_as_constant
    adapters = (
        AdapterBank(bundle, slots, room, partial=some, precision=precision)
        if manifest.layout is not None
        else None
    )
    rows = adapters.rows if adapters is not None and not manifest.bank_as_constant else None
    where = Path(cache).absolute() if cache is not None else None
    threads = threads or allowed_cores()
    options = BackendOptions(precision, threads, contexts, cuda_graphs, hint, where)
    backend = open_backend(bundle, rows, target, options)
    if adapters is not None:
        adapters.row_changed = backend.row_changed
    return Session(bundle, precision, backend, adapters)
