"""An endpoint of many replicas: what the ingress asks them, and makes of their answers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import defaultdict
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.errors import RequestError, refusal_kind
from hhdeploy.runtime.serving.fleet.uploads import Upload
from hhdeploy.runtime.serving.messages import ADAPTERS, BYTES, Deadline, InferRequest, InferResponse
from hhdeploy.runtime.serving.metrics import refusals_text
from hhdeploy.runtime.serving.ray.calls import answered, ask
from hhdeploy.runtime.serving.ray.merge import merged_metrics, merged_status, summed
from hhdeploy.runtime.serving.settings import ServeSettings

# For a replica that is busy to say that it is ready.
_READY_SECONDS = 5.0
# Between two words to the registry of what was refused here.
_TELL_SECONDS = 0.5


class RayEndpoint:
    """An `Endpoint` that calls replicas through Ray Serve's handles.

    A call on a replica that dies is made again on another one, within the request's time limit:
    inference changes nothing, and loading twice is loading. Whoever asks bounds that time.

    Attributes:
        stopping: not ready any more, for load balancers.
    """

    def __init__(
        self,
        settings: ServeSettings,
        replicas: Any,
        registry: Any,
        name: str = "ingress",
        actor: str | None = None,
    ) -> None:
        """An endpoint of these.

        Args:
            settings: what the operator chose.
            replicas, registry: handles of the deployments of that name.
            name: what it is called in the metrics, with a word that a restart changes.
            actor: whose it is; None: that of the command, which ends with all others.
        """
        self.settings = settings
        self._replicas = replicas
        self._registry = registry
        self.stopping = False
        self._name, self._actor = f"{name}-{secrets.token_hex(4)}", actor
        self._refusals: dict[str, int] = defaultdict(int)
        self._telling: asyncio.Task[None] | None = None
        self._tells_soon = False

    @property
    def most_json(self) -> int:
        """See `Endpoint.most_json`; an ingress does not know the size of images."""
        return self.settings.json_limit(None)

    async def infer(self, request: InferRequest) -> InferResponse:
        """See `Endpoint.infer`."""
        adapter = named_adapter(request, self.settings.model_name)
        method = self._replicas.options(method_name="infer", multiplexed_model_id=adapter)
        with Deadline(request.seconds()):
            response: InferResponse = await ask(method, request)
        return response

    async def ready(self) -> bool:
        """See `Endpoint.ready`."""
        try:
            with Deadline(_READY_SECONDS):
                return not self.stopping and bool(await ask(self._replicas.ready))
        except RequestError:
            return False

    async def model_ready(self, model: str, version: str = "") -> bool:
        """See `Endpoint.model_ready`."""
        return bool(await self._one("model_ready", model, version))

    async def model_metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """See `Endpoint.model_metadata`."""
        found: dict[str, Any] = await self._one("model_metadata", model, version)
        return found

    async def model_statistics(self, model: str, version: str = "") -> dict[str, Any]:
        """See `Endpoint.model_statistics`: of all replicas together."""
        by_name: dict[str, list[Any]] = {}
        for found in await self._all("model_statistics", model, version):
            for one in found["model_stats"]:
                by_name.setdefault(one["name"], []).append(one)
        return {"model_stats": [summed(several) for several in by_name.values()]}

    def refused(self, error: HhdeployError) -> None:
        """See `Endpoint.refused`: counted where it was told, and the registry hears of it soon."""
        self._refusals[refusal_kind(error)] += 1
        if not self._tells_soon:
            self._tells_soon = True
            asyncio.get_running_loop().call_later(_TELL_SECONDS, self._tell)

    async def repository_index(self, ready_only: bool) -> list[dict[str, str]]:
        """See `Endpoint.repository_index`."""
        found: list[dict[str, str]] = await self._one("repository_index", ready_only)
        return found

    async def load_adapter(self, name: str, upload: Upload | None) -> dict[str, Any]:
        """See `Endpoint.load_adapter`: every replica answers with it afterwards."""
        loaded: dict[str, Any] = await ask(self._registry.change, name, upload, False)
        return loaded

    async def unload_adapter(self, name: str) -> None:
        """See `Endpoint.unload_adapter`: no replica answers for it afterwards."""
        await ask(self._registry.change, name, None, True)

    async def metrics(self) -> tuple[bytes, str]:
        """See `Endpoint.metrics`: each replica's, with a label of its name.

        What was refused is of all that take requests, the other ingresses and gRPC's side as well.
        """
        texts = dict(await self._all("named_metrics"))
        refusals = {self._name: dict(self._refusals)}
        with contextlib.suppress(HhdeployError):  # else these alone: the registry is gone
            refusals = await self._told()
        texts |= {name: refusals_text(counts) for name, counts in refusals.items()}
        return merged_metrics(texts), CONTENT_TYPE_LATEST

    def _tell(self) -> None:
        async def tell() -> None:
            # The next word has these as well.
            with contextlib.suppress(HhdeployError, RayError, RayServeException):
                await self._told()

        self._tells_soon = False
        self._telling = asyncio.create_task(tell())

    async def _told(self) -> dict[str, dict[str, int]]:
        """What was refused here, told to the registry, and what it heard of all."""
        with Deadline(_READY_SECONDS):
            found: dict[str, dict[str, int]] = await ask(
                self._registry.refused, self._name, dict(self._refusals), self._actor
            )
        return found

    async def status(self) -> dict[str, Any]:
        """See `Endpoint.status`: see `merged_status`."""
        return merged_status(await self._all("status"))

    async def _one(self, method: str, *arguments: object) -> Any:
        return await ask(getattr(self._replicas, method), *arguments)

    async def _all(self, method: str, *arguments: object) -> list[Any]:
        """What each replica answers; one that dies meanwhile is left out."""
        try:
            call = self._replicas.broadcast(method, *arguments)
            answers = await call.results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []
        return answered(answers)


def named_adapter(request: InferRequest, bundle: str) -> str:
    """The one adapter that a request names, however it does; "" for none or several."""
    if request.model != bundle:
        return request.model
    tensor = request.inputs.get(ADAPTERS)
    if tensor is not None and tensor.datatype == BYTES:
        several = set(tensor.array.reshape(-1))
        return several.pop().decode("utf-8", "replace") if len(several) == 1 else ""
    name = request.parameters.get("adapter", "")
    return name if isinstance(name, str) else ""
