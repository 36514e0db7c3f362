"""A message in, a message out: what the HTTP, gRPC and Ray sides share.

Inputs of a request:

    images     FP32 or FP16 [n, 3, H, W]: normalised, as `Session.run` takes them; or
               UINT8 [n, 3, H, W]: RGB of the graph's size, normalised as each adapter wants it; or
               BYTES [n]: encoded JPEG, PNG or WebP, preprocessed as each adapter wants it
    adapters   BYTES [n], optional: the adapter of each image; one image with several adapters
               is answered by each of them. Else the parameter `adapter`, or the model's name.

Outputs: see `outputs`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.bundle.manifest import AdapterEntry, Manifest
from hhdeploy.errors import PlanError, abbreviate
from hhdeploy.runtime.bank import Hold
from hhdeploy.runtime.serving.batcher import Batcher, Computed
from hhdeploy.runtime.serving.errors import NotFoundError, RequestError, StoppingError
from hhdeploy.runtime.serving.fleet.fleet import Fleet
from hhdeploy.runtime.serving.messages import (
    ADAPTERS,
    BYTES,
    VERSION,
    Deadline,
    InferRequest,
    InferResponse,
    Tensor,
)
from hhdeploy.runtime.serving.metrics import Metrics, Now
from hhdeploy.runtime.serving.outputs import (
    LOGITS,
    all_outputs,
    answered_by,
    asked_outputs,
    check_finite,
    output_of,
    outputs_of,
    work_of,
)
from hhdeploy.runtime.serving.pictures.images import Pictures
from hhdeploy.runtime.serving.pictures.inputs import as_pixels, check_images
from hhdeploy.runtime.serving.processes.aside import Aside
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.runtime.serving.tracing import trace_parts
from hhdeploy.runtime.session import Session


@dataclass(frozen=True)
class Row:
    """One image of a batch: its pixels' number in the request, and the adapter it goes to."""

    image: int
    adapter: str | None


class Service:
    """One open session behind a fleet and a queue. Belongs to one event loop.

    Attributes:
        settings: what the operator chose.
        manifest: of the bundle that is served.
        fleet: None for a folded bundle.
        ready: False before `start` is done and once `stop` was called.
    """

    def __init__(self, session: Session, settings: ServeSettings) -> None:
        self.settings = settings
        self.ready = self._started = False
        self.metrics = Metrics(settings.model_name)
        self._session = session
        self.manifest: Manifest = session.bundle.manifest
        self._size = self.manifest.input_size
        self._backbone_classes = self.manifest.backbone_classes
        self._outputs = outputs_of(self.manifest)
        # What requests call the backbone; a folded bundle has none.
        self._bare = {None, ""} if self.manifest.layout is None else {None, "", BACKBONE}
        self.fleet: Fleet | None = None
        if self.manifest.layout is None:
            _check_folded(settings)
        else:
            self.fleet = Fleet(
                session.bundle, session.adapters, settings.adapters_dir, settings.pinned
            )
            self.fleet.reserve(settings.model_name)
            self.fleet.counters.loaded = self.metrics.loaded
        self._batcher = Batcher(
            session.unchecked(),
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1e3,
            max_queued=settings.max_queue,
            contexts=settings.contexts,
        )
        self._pictures = Pictures(settings)
        self._aside = Aside("hhdeploy-outputs")
        self._watch: asyncio.Task[None] | None = None
        self._since = time.monotonic()

    @property
    def device(self) -> str:
        """What computes."""
        return self._session.device

    @property
    def precision(self) -> str:
        """Of the session."""
        return self._session.precision

    @property
    def uptime(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._since

    @property
    def crowded(self) -> bool:
        """Whether more than half of the images wait that may."""
        return 2 * self._batcher.queued > self.settings.max_queue

    async def start(self) -> None:
        """Find the fleet's adapters, run one image through, and be ready.

        Raises:
            PlanError: see `Fleet.start`.
        """
        if self.fleet is not None:
            await self.fleet.start()
            if self.settings.watch_seconds is not None:
                self._watch = asyncio.create_task(self.fleet.watch(self.settings.watch_seconds))
        # The first run of a session allocates: not at the first request's cost.
        rows = None if self.fleet is None else np.zeros(1, np.int64)
        image = np.zeros((1, *self._size), np.float32)
        with self._batcher.place(1) as place:
            await self._batcher.run(place, image, rows)
        self._batcher.runs = 0  # nobody asked for that one
        self.ready = self._started = True

    async def stop(self) -> None:
        """Take nothing new, answer what was taken, free the session."""
        self.ready = False
        await self._batcher.drain()
        self._pictures.close()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self.fleet is not None:
            await self.fleet.close()
        self._aside.close()
        self._session.close()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request. Cancelling the call gives up its place in the queue.

        Raises:
            RequestError: or one of its kinds; it is counted as a failure.
        """
        try:
            with Deadline(request.seconds()):
                return await self._infer(request)
        except asyncio.CancelledError:
            self._failed(request, "CANCELED")
            raise
        except Exception as error:
            self._failed(request, error.reason if isinstance(error, RequestError) else "OTHER")
            raise

    def _failed(self, request: InferRequest, reason: str) -> None:
        known = request.model in self._adapter_names()  # any other name would be kept
        self.metrics.failed(reason, request.model if known else None)

    def alias(self, model: str, version: str = "") -> str | None:
        """The adapter that a model's name stands for; None for the bundle's own name.

        Raises:
            NotFoundError: no such model or version.
        """
        _check_version(version)
        if model == self.settings.model_name:
            return None
        if self.fleet is not None:
            return self.fleet.status(model).name
        only = self.manifest.adapters[0].name
        if model != only:
            raise NotFoundError(
                f"unknown model {model[:200]!r}. Expected {self.settings.model_name!r} or {only!r}."
            )
        return only

    def _adapter_names(self) -> Collection[str]:
        if self.fleet is not None:
            return self.fleet.names
        return {adapter.name for adapter in self.manifest.adapters}

    def now(self) -> Now:
        """The numbers of this moment."""
        fleet, names = self.fleet, self._adapter_names()
        return Now(
            rows_used=fleet.rows.used if fleet is not None else 0,
            rows=fleet.rows.total if fleet is not None else 0,
            queued=self._batcher.queued,
            pending=self._batcher.pending,
            runs=self._batcher.runs,
            evictions=fleet.rows.evictions if fleet is not None else 0,
            load_failures=fleet.counters.failures if fleet is not None else 0,
            adapters=frozenset(names) | {BACKBONE},
        )

    def entries(self) -> list[AdapterEntry]:
        """Adapters that can answer without being loaded first, sorted."""
        if self.fleet is None:
            return list(self.manifest.adapters)
        return [s.entry for s in self.fleet.statuses() if s.entry is not None]

    # --- one request ----------------------------------------------------------------------------

    async def _infer(self, request: InferRequest) -> InferResponse:
        begin = time.perf_counter()
        if not self._started:
            raise StoppingError("the server is starting. Try again later.")
        named = self._named_by_model(request)
        asked = asked_outputs(request.outputs, self._outputs)
        priority, visitor = request.priority(), request.visitor()
        images = check_images(request, self._size)
        count = max(len(images.array), _size(request.inputs.get(ADAPTERS)))
        with self._batcher.place(count) as place:  # before names are looked at one by one
            rows = self._rows(request, named, len(images.array))
            held = await self._hold(rows, visitor)
            release = partial(self._release, held)
            try:
                entries, ids = self._assigned(held, rows)
                pixels = await self._pixels(images, rows, entries)
            except BaseException:
                release()
                raise
            prepared = time.perf_counter()
            answer = await self._batcher.run(place, pixels, ids, priority=priority, done=release)
        ran = time.perf_counter()
        classes = [e.classes if e is not None else self._backbone_classes for e in entries]
        wanted = asked or all_outputs(entries, self._outputs, request.binary)
        found = self.manifest.split(answer.logits)
        if any(w.top or w.name not in found for w in wanted):
            try:
                check_finite(pixels, found[LOGITS], classes, entries)
            except RequestError:
                if asked:
                    raise
                wanted = [w for w in wanted if w.name in found]  # which show what there is
        outputs = await self._aside.run(
            work_of(wanted, classes),
            lambda: tuple(output_of(w, found, entries, classes, request.json) for w in wanted),
        )
        self._count(entries, begin, prepared, ran, answer)
        digests = [self.manifest.tensors_digest(e) if e is not None else "" for e in entries]
        return InferResponse(request.model, request.id, outputs, answered_by(entries, digests))

    async def _hold(self, rows: Sequence[Row], visitor: bool) -> dict[str | None, Hold]:
        """The bank's rows of a request by adapter; none of a folded bundle."""
        names = dict.fromkeys(row.adapter for row in rows)
        if self.fleet is not None:
            return await self.fleet.rows.hold(names, visitor=visitor)
        only = self.manifest.adapters[0].name
        for name in names:
            if name not in (None, only):
                raise NotFoundError(f"unknown adapter {name[:200]!r}. There is: {only}.")
        return {}

    def _assigned(
        self, held: dict[str | None, Hold], rows: Sequence[Row]
    ) -> tuple[Sequence[AdapterEntry | None], NDArray[np.int64] | None]:
        """Of each image the adapter's entry, and its row in the bank."""
        if self.fleet is None:
            return [self.manifest.adapters[0]] * len(rows), None
        holds = [held[row.adapter] for row in rows]
        return [hold.entry for hold in holds], np.asarray([hold.row for hold in holds], np.int64)

    def _release(self, held: dict[str | None, Hold]) -> None:
        for hold in held.values():
            assert self.fleet is not None
            self.fleet.rows.release(hold)

    def _count(
        self,
        entries: Sequence[AdapterEntry | None],
        begin: float,
        prepared: float,
        ran: float,
        answer: Computed,
    ) -> None:
        images = Counter(entry.name if entry is not None else BACKBONE for entry in entries)
        end = time.perf_counter()
        parts = {
            "prepare": prepared - begin,
            "queue": answer.queue_seconds,
            "run": answer.run_seconds,
            "finish": end - ran,
        }
        self.metrics.answered(images, request=end - begin, **parts)
        trace_parts(**parts)

    def _named_by_model(self, request: InferRequest) -> str | None:
        """The adapter that the model's name stands for; None: the bundle's own."""
        if self.fleet is None or request.model not in self.fleet.rows:
            return self.alias(request.model, request.version)
        _check_version(request.version)
        return request.model

    def _rows(self, request: InferRequest, named: str | None, count: int) -> list[Row]:
        """Which of ``count`` images goes to which adapter; whether it exists, its row tells."""
        names = self._names(request, named, count)
        if count not in (1, len(names)):
            raise RequestError(
                f"input adapters: expected one name per image, found {len(names)} for {count} "
                "images."
            )
        if self.fleet is not None and None in names and not self.manifest.answers_backbone:
            there = abbreviate([s.name for s in self.fleet.statuses() if s.answers], 20)
            raise RequestError(
                "no adapter named, and this bundle has no classifier of the bare backbone. "
                f"Set the parameter adapter; there are: {there or 'none'}."
            )
        return [Row(i if count > 1 else 0, name) for i, name in enumerate(names)]

    def _names(self, request: InferRequest, named: str | None, count: int) -> list[str | None]:
        """The adapters as they are given, or the one of all ``count`` images."""
        parameter = request.parameters.get("adapter")
        if parameter is not None and not isinstance(parameter, str):
            raise RequestError("parameter adapter: expected a name.")
        given = [("the model's name", named), ("parameter adapter", parameter or None)]
        tensor = request.inputs.get(ADAPTERS)
        if tensor is not None:
            if tensor.datatype != BYTES or tensor.array.ndim > 2 or not tensor.array.size:
                raise RequestError(
                    f"input adapters: expected BYTES [n], found {tensor.datatype} "
                    f"{list(tensor.array.shape)}."
                )
            given.append(("input adapters", "given"))
        said = [where for where, name in given if name is not None]
        if len(said) > 1 and not (tensor is None and named == parameter):
            raise RequestError(f"the adapter is named twice: by {' and by '.join(said)}.")
        if tensor is not None:
            several = tensor.array.reshape(-1)
            return [self._adapter(item.decode("utf-8", "replace")) for item in several]
        # A folder that is called as the bare model is, is an adapter that does not load.
        return [self._adapter(parameter) if named is None else named] * count

    def _adapter(self, name: str | None) -> str | None:
        return None if name in self._bare else name

    async def _pixels(
        self, images: Tensor, rows: Sequence[Row], entries: Sequence[AdapterEntry | None]
    ) -> NDArray[np.float32]:
        """float32 [rows, 3, H, W], each image as its adapter wants it."""
        ways = [self.manifest.preprocess_of(e) for e in entries]
        numbers = [row.image for row in rows]
        if images.datatype != BYTES:
            return as_pixels(images, numbers, ways)
        encoded: list[bytes] = images.array.reshape(-1).tolist()
        return await self._pictures.pixels(encoded, numbers, ways)


def _check_folded(settings: ServeSettings) -> None:
    """Raises `PlanError` for what only a bank of adapters can do."""
    for name, given in (
        ("`adapters_dir`", settings.adapters_dir is not None),
        ("`pinned`", bool(settings.pinned)),
        ("`allow_adapter_loading`", settings.allow_adapter_loading),
    ):
        if given:
            raise PlanError(
                f"{name}: a folded bundle holds one adapter, in its weights. Leave it out, or "
                "export without `fold=True`."
            )


def _check_version(version: str) -> None:
    if version not in ("", VERSION):
        raise NotFoundError(f"unknown version {version[:80]!r}: expected {VERSION!r}.")


def _size(tensor: Tensor | None) -> int:
    return tensor.array.size if tensor is not None else 0
