"""What the network loaded and unloaded, and that every replica has it.

One `Registry` numbers the changes. Every replica joins it before it looks at any adapter, and from
then on asks it for the next change (`Follower`); asking is also the word that all before are done.
`Registry.change` returns once every replica that joined has done the change. A replica that dies
meanwhile is not waited for: it is gone once Ray's list of actors has it no more.

A registry that is started again knows nothing. It waits until every replica of Ray's list has
joined anew, and takes the changes that they know; until then nothing can be loaded or unloaded,
and requests are answered as before.

It also hears what was refused where requests come in, so that whoever is asked for the metrics can
tell of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.util import list_named_actors

from hhdeploy.errors import BundleError, HhdeployError
from hhdeploy.runtime.serving.errors import FailedError
from hhdeploy.runtime.serving.fleet.uploads import Upload
from hhdeploy.runtime.serving.ray.calls import LOST, ask

_LOG = logging.getLogger("hhdeploy.serve.ray")
REPLICA, REGISTRY, INGRESS = "Replica", "Registry", "Ingress"
# A replica's question for the next change is answered after this time, with nothing.
_ASK_SECONDS = 5.0
# How often it is looked whether a replica that is waited for is still there.
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Latest:
    """The latest that happened to an adapter over the network.

    Attributes:
        revision: 1, 2, ...; of all adapters together.
        name: of the adapter.
        unloaded: taken out; else loaded: read from its folder again.
    """

    revision: int
    name: str
    unloaded: bool


@dataclass(frozen=True)
class Served:
    """What a replica opened.

    Attributes:
        bundle: its path.
        digest: of what answers depend on in it.
        settings: all that the operator chose; of other ones, as while Ray Serve goes from one
            deployment to the next, replicas may differ.
    """

    bundle: str
    digest: str
    settings: str


class Registry:
    """The changes so far, and how far each replica is. One a fleet of replicas.

    A deployment of Ray Serve; its methods belong to one event loop.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Latest] = {}
        self._done: dict[str, int] = {}
        self._served: dict[str, Served] = {}
        self._problems: list[str] = []
        self._refusals: dict[str, tuple[str | None, dict[str, int]]] = {}
        self._moved = asyncio.Condition()
        self._changing = asyncio.Lock()
        self._joining = set(_actors())

    async def join(self, member: str, known: Collection[Latest], served: Served) -> list[Latest]:
        """Count a replica in, and tell it what happened so far.

        Args:
            member: name of its actor.
            known: changes that it has done already, if it joined an earlier registry.
            served: what it opened.

        Raises:
            BundleError: a replica that is there, of the same settings, opened another one.
        """
        if self._unlike(served):
            alive = await asyncio.to_thread(_actors)
            self._served = {m: theirs for m, theirs in self._served.items() if m in alive}
        if others := self._unlike(served) - {member}:
            raise BundleError(
                f"{served.bundle} has other adapters or another graph now than {len(others)} "
                "replicas opened there, which still answer: this one would answer otherwise. Put "
                "it back as it was, or deploy the new one from a directory of its own."
            )
        self._served[member] = served
        for change in known:
            mine = self._latest.get(change.name)
            if mine is None or mine.revision < change.revision:
                self._latest[change.name] = change
        # What it is told now it does before it asks for more.
        await self._note(member, max((c.revision for c in known), default=0))
        return self._after(0)

    async def following(
        self, member: str, done: int, problems: dict[int, str]
    ) -> list[Latest] | None:
        """The changes after ``done``, as soon as there are any; [] after a while.

        Args:
            member: as it joined.
            done: the revision up to which it has done them.
            problems: why it could not do one, by revision.

        Returns:
            None: it has not joined this registry, which may know less than it does. Join first.
        """
        if member not in self._done:
            return None
        if self._revision in problems:
            self._problems.append(f"{member}: {problems[self._revision]}")
        await self._note(member, done)
        try:
            await asyncio.wait_for(self._news(done), _ASK_SECONDS)
        except asyncio.TimeoutError:
            return []
        return self._after(done)

    async def change(
        self, name: str, upload: Upload | None, unloaded: bool
    ) -> dict[str, Any] | None:
        """Load or unload an adapter on every replica.

        Args:
            name: of the adapter.
            upload: its files, to be written into the fleet directory first.
            unloaded: take it out instead.

        Returns:
            What the first replica said of one that was loaded.

        Raises:
            HhdeployError: one replica tried it first, and this is why it cannot be done; then
                nothing has changed.
            FailedError: some replicas could do it, others could not.
        """
        async with self._changing:
            await self._wait(lambda: self._joining)
            said: dict[str, Any] | None
            if unloaded:
                said = await ask(self._replicas.unload_adapter, name)
            else:
                said = await ask(self._replicas.load_adapter, name, upload)
            revision = self._revision + 1
            self._problems = []
            self._latest[name] = Latest(revision, name, unloaded)
            async with self._moved:
                self._moved.notify_all()
            await self._wait(lambda: {m for m, done in self._done.items() if done < revision})
            if self._problems:
                raise FailedError(
                    f"adapter {name!r}: {len(self._problems)} of {len(self._done)} replicas could "
                    "not do what another one could. Is the fleet directory the same on all "
                    f"machines? {self._problems[0]}"
                )
            return said

    async def refused(
        self, teller: str, counts: dict[str, int], actor: str | None
    ) -> dict[str, dict[str, int]]:
        """Keep what was refused where requests come in, by kind; and what all others told so far.

        Those that are gone are left out, as replicas are: their numbers would stay for ever, and
        with every restart there would be more of them.

        Args:
            teller: who counted.
            counts: since its start.
            actor: name of its actor; None: it has none, and is there as long as this registry is.
        """
        self._refusals[teller] = actor, counts
        alive = {None, actor, *await asyncio.to_thread(_actors, INGRESS)}
        self._refusals = {t: told for t, told in self._refusals.items() if told[0] in alive}
        return {t: told for t, (_, told) in self._refusals.items()}

    @functools.cached_property
    def _replicas(self) -> Any:
        """Their handle; there is none yet when the registry is made."""
        return serve.get_deployment_handle(REPLICA)

    def _unlike(self, served: Served) -> set[str]:
        """Replicas of the same settings that opened something else."""
        told = served.settings
        return {m for m, s in self._served.items() if s.settings == told and s != served}

    @property
    def _revision(self) -> int:
        return max((c.revision for c in self._latest.values()), default=0)

    def _after(self, revision: int) -> list[Latest]:
        found = [c for c in self._latest.values() if c.revision > revision]
        return sorted(found, key=lambda change: change.revision)

    async def _note(self, member: str, done: int) -> None:
        async with self._moved:
            self._done[member] = done
            self._joining.discard(member)
            self._moved.notify_all()

    async def _news(self, done: int) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: self._revision > done)

    async def _wait(self, missing: Callable[[], Collection[str]]) -> None:
        """Until no replica is missing, those that are gone left out."""
        while missing():
            alive = await asyncio.to_thread(_actors)
            self._joining &= alive
            self._done = {m: done for m, done in self._done.items() if m in alive}
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._one_moved(), _LOOK_SECONDS)

    async def _one_moved(self) -> None:
        async with self._moved:
            await self._moved.wait()


class Follower:
    """Keeps one replica where the registry is."""

    def __init__(
        self, registry: Any, do: Callable[[Latest], Awaitable[None]], served: Served
    ) -> None:
        """``do``: makes the replica do a change. ``served``: see `Registry.join`."""
        self._registry = registry
        self._served = served
        self._do = do
        self._member = ray.get_runtime_context().get_actor_name()
        self._known: dict[str, Latest] = {}
        self._done = 0

    async def join(self) -> list[Latest]:
        """What happened before: to be done by the caller before it answers requests."""
        changes: list[Latest] = await ask(self._registry.join, self._member, [], self._served)
        self._note(changes)
        return changes

    async def follow(self) -> None:
        """Do every change from now on, for ever."""
        problems: dict[int, str] = {}
        while True:
            question = self._registry.following.remote(self._member, self._done, problems)
            changes: list[Latest] | None = None
            with contextlib.suppress(*LOST):
                changes = await question
            if changes is None:
                _LOG.warning("registry lost: joining the next one")
                known = list(self._known.values())
                await ask(self._registry.join, self._member, known, self._served)
                continue
            problems = {}
            for change in changes:
                try:
                    await self._do(change)
                except HhdeployError as error:
                    problems[change.revision] = str(error)
            self._note(changes)

    def _note(self, changes: Collection[Latest]) -> None:
        self._known.update({c.name: c for c in changes})
        self._done = max((c.revision for c in self._known.values()), default=0)


def _actors(deployment: str = REPLICA) -> set[str]:
    """Names of a deployment's actors, as Ray has them now: started, or being started."""
    own = ray.get_runtime_context().get_actor_name()
    assert own is not None  # Ray Serve names all its actors
    ours = own.rpartition("#")[0].removesuffix(REGISTRY) + deployment + "#"
    return {a["name"] for a in list_named_actors(all_namespaces=True) if a["name"].startswith(ours)}
