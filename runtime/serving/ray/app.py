"""The server on several replicas: an application of Ray Serve.

    client ── HTTP ── Ray's proxy ── Ingress ──┬── Replica    a session, a fleet, a queue each
                                               ├── Replica
                                     Registry ─┘              what was loaded and unloaded

An ingress is the HTTP side (`http_app`, with all its limits) of an endpoint that calls replicas.
There may be several; they keep nothing. `application` is what ``serve deploy`` and
``hhdeploy serve --ray`` run.

Routing. `AdapterRouter` prefers replicas that have a request's adapter in a row. Every replica
can answer for every adapter.

Dying replicas. Requests of a replica that dies are asked again on another one until the request's
time is up: inference changes nothing. Ray Serve starts a replica in its place.

Adapters. The fleet directory is one directory for all replicas: on several machines, a file system
that they share, in which a finished write is seen at once. An upload is written there by one
replica, which checks it first; then `Registry.change` has every replica read it. Load and unload go
the same way. "Loaded" means that every replica that answers has the new adapter; one that starts
later finds it on disk, and is told what was unloaded before it is ready.

    an adapter is wrong       the first replica refuses it; nothing has changed
    a replica dies            the others are waited for; the one in its place starts as above
    some replicas cannot do   500 that says so: the others answer with the new adapter. Mostly the
    what the first could      directory is not shared. Load again once it is
    time is up, or the        the change may have reached some replicas, and goes on to the
    ingress dies              others. Load again. (Other requests of that ingress: 500, ask again)
    the registry dies         requests are answered as before. Loading waits for the next registry,
                              which asks the replicas what it must know
    everything is stopped     what was unloaded is forgotten, as with one server
    a file is changed on      each replica sees it when it looks (--watch-seconds), at its own time
    disk

Numbers. ``/metrics`` has each replica's samples, labelled with its name, so that a restart is a
new series and not a counter that falls; `status` adds them up. What was refused is counted by each
ingress and by gRPC's side, as ``ingress-...`` and ``grpc-...``; the registry hears of all, and
leaves out those that are gone. The ingress' other numbers are Ray Serve's.

gRPC is answered by the command's own process (`grpc`), for Ray's gRPC proxy listens on all
addresses whatever it is told, and takes messages of any size. What ``serve deploy`` runs has HTTP
only.

    settings  what the operator chose        endpoint  what an ingress asks the replicas
    replica   one session of many            calls     one call, made again where need be
    registry  the state they share           merge     the numbers of all of them
    router    which replica is asked         draining  requests under way
    run       the command                    grpc      gRPC's side, in the command's process
"""

# No postponed annotations here: Ray reads that of `application` to check and convert its argument.

import logging
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hhdeploy.bundle.reading import Bundle
from hhdeploy.errors import PlanError
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.http.app import http_app
from hhdeploy.runtime.serving.logs import REQUEST_ID, log_as_json
from hhdeploy.runtime.serving.ray.draining import Draining
from hhdeploy.runtime.serving.ray.endpoint import RayEndpoint
from hhdeploy.runtime.serving.ray.registry import INGRESS, REGISTRY, REPLICA, Registry
from hhdeploy.runtime.serving.ray.replica import Replica
from hhdeploy.runtime.serving.ray.router import AdapterRouter
from hhdeploy.runtime.serving.ray.settings import MOST_WAITING, RaySettings, read_settings
from hhdeploy.runtime.serving.tracing import start_tracing

_LOG = logging.getLogger("hhdeploy.serve.ray")
# A replica that died is found within this time.
_LOOK_SECONDS = 2.0
# What is in its rows is told that often.
_ROWS_SECONDS = 2.0
# A bundle that cannot be opened will not open the tenth time.
_TRIES = 3


class Ingress:
    """The HTTP side over an endpoint of replicas. A deployment of Ray Serve."""

    def __init__(self, settings: RaySettings, replicas: Any, registry: Any) -> None:
        """``replicas``, ``registry``: handles of those deployments."""
        log_as_json(settings.log_level, "hhdeploy")
        start_tracing()
        actor = ray.get_runtime_context().get_actor_name()
        self._endpoint = RayEndpoint(settings, replicas, registry, actor=actor)
        self._settings, self._access = settings, Access.of(settings)
        self._app = Draining(named_by_proxy(http_app(self._endpoint, self._access)))

    def __serve_build_asgi_app__(self) -> Draining:
        """The application that Ray Serve hands requests to."""
        return self._app

    async def read_tokens(self) -> None:
        """Read the tokens' files again. Raises `PlanError`: see `Access.read`."""
        self._access.read(self._settings)

    async def drain(self) -> None:
        """Take nothing new, and wait until everything that was taken is answered."""
        self._endpoint.stopping = True
        await self._app.drain()


def named_by_proxy(app: ASGIApp) -> ASGIApp:
    """An application whose answers leave the id of their request out.

    Ray's proxy names a request that has none, and adds the name to every answer, also one that this
    server does not take: clients would find two.
    """
    name = REQUEST_ID.encode()

    async def once(scope: Scope, receive: Receive, send: Send) -> None:
        given = any(each[0] == name for each in scope.get("headers", ()))

        async def without(message: Message) -> None:
            if given and message["type"] == "http.response.start":
                kept = [each for each in message["headers"] if each[0] != name]
                message = {**message, "headers": kept}
            await send(message)

        await app(scope, receive, without)

    return once


def application(args: dict[str, Any]) -> Application:
    """The application, as ``import_path: hhdeploy.runtime.serving.ray.app:application`` names it.

    Args:
        args: see `read_settings`.

    Raises:
        ValidationError, PlanError: see `read_settings`; or no token in the file; or a certificate,
            which Ray's proxies do not hear of here: they would take requests without TLS.
        BundleError: no bundle there. Ray Serve would find out with replicas whose predecessors it
            has stopped; so what ran before goes on.
    """
    settings = read_settings(args)
    if settings.tls_cert is not None:
        raise PlanError(
            "`tls_cert`, `tls_key`: expected none among the application's args, for Ray's proxies "
            "have TLS, and would do without. Give them the files: ssl_certfile and ssl_keyfile of "
            "http_options."
        )
    Bundle.open(settings.bundle)
    return application_of(settings)


def application_of(settings: RaySettings) -> Application:
    """The application. Raises `PlanError` if there is no token in a file."""
    Access.of(settings)  # said here, not by processes that are started again and again
    drain_seconds = settings.request_seconds
    registry = _bound(
        Registry,
        REGISTRY,
        max_ongoing_requests=MOST_WAITING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=0.0,  # it keeps nothing that is lost
    )
    replicas = _bound(
        Replica,
        REPLICA,
        settings,
        registry,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpus},
        # One batch that runs and one that waits for each context; the rest waits in the ingress,
        # from where it can still go to any replica.
        max_ongoing_requests=(settings.contexts + 1) * settings.max_batch,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=drain_seconds,
        request_router_config={
            "request_router_class": AdapterRouter,
            "request_routing_stats_period_s": _ROWS_SECONDS,
        },
    )
    app: Application = _bound(
        serve.ingress()(Ingress),
        INGRESS,
        settings,
        replicas,
        registry,
        num_replicas=settings.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MOST_WAITING,
        graceful_shutdown_timeout_s=drain_seconds,
    )
    return app


def _bound(what: type, name: str, *arguments: object, **options: Any) -> Any:
    """A class as a deployment, with what its constructor gets."""
    deployment: Any = serve.deployment(
        name=name, health_check_period_s=_LOOK_SECONDS, max_constructor_retry_count=_TRIES
    )
    return deployment(what).options(**options).bind(*arguments)
