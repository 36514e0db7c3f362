"""What the wires ask for: inference, and what the protocol tells about models and adapters.

The bundle is a model, and so is every adapter, under its own name. HTTP, gRPC and the page talk to
an `Endpoint`: `LocalEndpoint` is one service in this process, `ray_app` has one of many replicas.
Loading is off unless the operator allowed it, and needs the operator's token then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

from hhdeploy.adapters.config import VALUES
from hhdeploy.bundle.manifest import AdapterEntry
from hhdeploy.errors import HhdeployError
from hhdeploy.packages import own_version
from hhdeploy.runtime.serving.errors import (
    NotFoundError,
    RequestError,
)
from hhdeploy.runtime.serving.fleet.fleet import Fleet
from hhdeploy.runtime.serving.fleet.uploads import Upload
from hhdeploy.runtime.serving.messages import (
    ADAPTERS,
    BYTES,
    IMAGES,
    VERSION,
    InferRequest,
    InferResponse,
)
from hhdeploy.runtime.serving.metrics import Tally
from hhdeploy.runtime.serving.outputs import ANSWERS, LABELS, LOGITS, PROBABILITIES
from hhdeploy.runtime.serving.pacing import Paced
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from hhdeploy.runtime.serving.status import status_of

PLATFORM: Final = "hhdeploy"
EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)
_TYPES: Final = {"FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}


class Endpoint(Protocol):
    """What answers. Methods that take a model raise `NotFoundError` if there is none such."""

    @property
    def settings(self) -> ServeSettings:
        """What the operator chose."""

    @property
    def most_json(self) -> int:
        """Bytes of JSON that an inference may have, decompressed."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request; cancelling the call gives up its place. See `Service.infer`."""

    async def ready(self) -> bool:
        """Whether requests are answered."""

    async def model_ready(self, model: str, version: str = "") -> bool:
        """Whether a model's are."""

    async def model_metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """Inputs and outputs of a model, and the adapters there are. -1: any number.

        Raises:
            NotFoundError: also of an adapter that was unloaded.
            RequestError: of one that cannot be loaded.
        """

    async def model_statistics(self, model: str, version: str = "") -> dict[str, Any]:
        """Counts and durations since the start, in Triton's terms.

        The bundle's are of all requests; an adapter's of those that it answered, however they
        named it, each counted as a run of its own. "": the bundle's and all adapters'.
        """

    async def repository_index(self, ready_only: bool) -> list[dict[str, str]]:
        """The bundle and every adapter, with its state; `reason` says why one is not ready."""

    async def load_adapter(self, name: str, upload: Upload | None) -> dict[str, Any]:
        """Load an adapter of the fleet directory or the bundle, or one that is uploaded.

        Returns:
            What it is called, whether it was ever ``verified``, and ``notes``: what is assumed of
            it, as `hhdeploy.bundle.add_adapter` says it.

        Raises:
            RequestError: or one of its kinds. HhdeployError: what is wrong with the adapter.
        """

    async def unload_adapter(self, name: str) -> None:
        """Answer no request for an adapter any more, until it is loaded again."""

    def refused(self, error: HhdeployError) -> None:
        """A request was refused, on whichever wire: it is counted by its kind."""

    async def metrics(self) -> tuple[bytes, str]:
        """What Prometheus scrapes, and its content type."""

    async def status(self) -> dict[str, Any]:
        """What the page at `/` shows: health, adapters, counts and latencies. See `status_of`."""


class LocalEndpoint:
    """An `Endpoint` of one started service in this process."""

    def __init__(self, service: Service) -> None:
        self._service, self.settings = service, service.settings
        # See `Endpoint`. The service's own: the way of a request has no step in between.
        self.infer = service.infer
        self.refused = service.metrics.refused
        # Their cost grows with the fleet, and a request for them is a line.
        self._metrics = Paced(lambda: service.metrics.exposition(service.now()))
        self._status = Paced(lambda: status_of(service))
        self._all_statistics = Paced(self._statistics_of_all)
        self._index = Paced(self._repository_index)

    @property
    def most_json(self) -> int:
        """See `Endpoint.most_json`."""
        service = self._service
        return service.settings.json_limit(math.prod(service.manifest.input_size))

    async def ready(self) -> bool:
        """See `Endpoint.ready`."""
        return self._service.ready

    async def model_ready(self, model: str, version: str = "") -> bool:
        """See `Endpoint.model_ready`."""
        alias = self._service.alias(model, version)
        return self._service.ready and (alias is None or alias in self._adapter_names())

    async def model_metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """See `Endpoint.model_metadata`."""
        service = self._service
        alias = service.alias(model, version)
        answering = self._answering(alias)
        # Adapters come and go: the bundle itself has no number of classes.
        only = answering[0] if alias is not None or service.fleet is None else None
        classes = -1 if only is None else only.classes
        values = all(entry is not None and entry.problem_type == VALUES for entry in answering)
        shares = [
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, classes]},
            {"name": LABELS, "datatype": "BYTES", "shape": [-1]},
        ]
        images = [-1, *service.manifest.input_size]
        # A model that is one adapter has no choice of others.
        chooses = alias is None and service.fleet is not None
        choice = [{"name": ADAPTERS, "datatype": BYTES, "shape": [-1]}] if chooses else []
        answers = [
            {"name": LOGITS, "datatype": "FP32", "shape": [-1, classes]},
            *(() if answering and values else shares),
            {"name": ANSWERS, "datatype": "BYTES", "shape": [-1]},
        ]
        features = [
            {"name": name, "datatype": "FP32", "shape": [-1, *shape]}
            for name, shape in service.manifest.features.items()
        ]
        return {
            "name": model,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [{"name": IMAGES, "datatype": "FP32", "shape": images}],
            "outputs": [*(answers if service.manifest.classes else ()), *features],
            "parameters": {
                "adapters": self._adapter_names() if alias is None else [alias],
                "max_batch_size": service.settings.max_batch,
                "device": service.device,
                "optional_inputs": [
                    {"name": IMAGES, "datatype": "UINT8", "shape": images},
                    {"name": IMAGES, "datatype": "FP16", "shape": images},
                    {"name": IMAGES, "datatype": BYTES, "shape": [-1]},
                    *choice,
                ],
            },
        }

    async def model_statistics(self, model: str, version: str = "") -> dict[str, Any]:
        """See `Endpoint.model_statistics`."""
        if not model:
            self._service.alias(self.settings.model_name, version)
            return {"model_stats": await self._all_statistics()}
        return {"model_stats": [self._statistics(model, version)]}

    def _statistics_of_all(self) -> list[dict[str, Any]]:
        names = [self.settings.model_name, *self._adapter_names()]
        return [self._statistics(name) for name in names]

    def _statistics(self, model: str, version: str = "") -> dict[str, Any]:
        service = self._service
        alias, metrics = service.alias(model, version), service.metrics
        if alias is None:
            failures = sum(metrics.failures.values())
            tally = Tally(metrics.success, failures, metrics.images, metrics.microseconds)
            runs = service.now().runs
        else:
            tally = metrics.tallies.get(alias, Tally())
            runs = tally.success
        names = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        times = {
            name: {"count": tally.success, "ns": 1000 * microseconds}
            for name, microseconds in zip(names, tally.microseconds, strict=True)
        }
        return {
            "name": model,
            "version": VERSION,
            "inference_count": tally.images,
            "execution_count": runs,
            "inference_stats": {**times, "fail": {"count": tally.failure, "ns": 0}},
        }

    async def repository_index(self, ready_only: bool) -> list[dict[str, str]]:
        """See `Endpoint.repository_index`."""
        found = await self._index()
        return [m for m in found if m["state"] == "READY" or not ready_only]

    def _repository_index(self) -> list[dict[str, str]]:
        service = self._service
        found = [
            {
                "name": service.settings.model_name,
                "version": VERSION,
                "state": "READY" if service.ready else "UNAVAILABLE",
                "reason": "",
            }
        ]
        if service.fleet is None:
            found += [found[0] | {"name": a.name} for a in service.manifest.adapters]
        else:
            for status in service.fleet.statuses():
                found.append(
                    {
                        "name": status.name,
                        "version": VERSION,
                        "state": "READY" if status.answers else "UNAVAILABLE",
                        "reason": status.problem or ("" if status.answers else "unloaded"),
                    }
                )
        return found

    async def load_adapter(self, name: str, upload: Upload | None) -> dict[str, Any]:
        """See `Endpoint.load_adapter`."""
        fleet = self._fleet(name)
        if upload is None:
            entry = await fleet.load(name)
        else:
            entry = await fleet.upload(name, upload.config, upload.tensors)
        notes = list(fleet.rows.notes(name))
        return {"name": name, "verified": entry.verified, "notes": notes}

    async def unload_adapter(self, name: str) -> None:
        """See `Endpoint.unload_adapter`."""
        await self._fleet(name).unload(name)

    # Functions, and no attributes that can be called: Ray asks a replica for no other.
    async def metrics(self) -> tuple[bytes, str]:
        """See `Endpoint.metrics`."""
        return await self._metrics()

    async def status(self) -> dict[str, Any]:
        """See `Endpoint.status`."""
        return await self._status()

    def _answering(self, alias: str | None) -> list[AdapterEntry | None]:
        """Who answers a model's requests; None: the backbone, or an adapter never read so far."""
        service = self._service
        if service.fleet is None:
            return list(service.manifest.adapters)
        if alias is not None:
            status = service.fleet.status(alias)
            status.check()
            return [status.known]
        found = [status.known for status in service.fleet.statuses() if status.answers]
        return [*found, None] if service.manifest.answers_backbone else found

    def _adapter_names(self) -> list[str]:
        """Adapters that requests may name."""
        if self._service.fleet is None:
            return [a.name for a in self._service.manifest.adapters]
        return [s.name for s in self._service.fleet.statuses() if s.answers]

    def _fleet(self, name: str) -> Fleet:
        if name == self.settings.model_name:
            raise RequestError(
                f"{name!r} is the bundle: it is loaded as long as the server runs. Name an adapter."
            )
        if self._service.fleet is None:
            raise NotFoundError("this folded bundle holds one adapter, in its weights.")
        return self._service.fleet


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of the server."""
    return {"name": "hhdeploy", "version": own_version(), "extensions": list(EXTENSIONS)}


def model_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`Endpoint.model_metadata` as a configuration in Triton's terms, for tools that ask for it.

    ``parameters`` are texts, as Triton's are, lists with commas: the ``adapters`` there are, the
    ``image_datatypes`` that are taken, and ``optional_inputs``. No input is marked ``optional``:
    perf_analyzer fills those as well, with names of adapters that there are not, and so does any
    client that sends every input it finds.
    """
    told = metadata["parameters"]
    taken = (*metadata["inputs"], *told["optional_inputs"])
    texts = {
        "adapters": told["adapters"],
        "image_datatypes": [t["datatype"] for t in taken if t["name"] == IMAGES],
        "optional_inputs": [t["name"] for t in taken if t["name"] != IMAGES],
    }
    return {
        "name": metadata["name"],
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": told["max_batch_size"],
        "input": [*map(_tensor, metadata["inputs"])],
        "output": [*map(_tensor, metadata["outputs"])],
        "parameters": {
            name: {"string_value": ",".join(each)} for name, each in texts.items() if each
        },
    }


def _tensor(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of the metadata in a configuration's terms: with max_batch_size, without the batch."""
    dims = told["shape"][1:] or [1]
    return {"name": told["name"], "data_type": _TYPES[told["datatype"]], "dims": dims}
