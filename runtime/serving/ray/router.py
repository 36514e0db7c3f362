"""Which replica a request goes to: rather one that has its adapter in a row."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Of two replicas by chance, the one with fewer requests; adapters decide between which two.

    The adapter that a request names is its multiplexed model id. Replicas that have it in a row
    come first; if those are full (``max_ongoing_requests``) the others are asked, load it, and
    come first as well from then on. What is in a row is as old as Ray's last look
    (``request_routing_stats_period_s``): a preference, on which no answer depends. A request that
    names no adapter, or several, goes to any replica.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Candidates, in the order they are tried in."""
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            # Where all are full Ray asks again after a pause, not at once.
            pending_request.routing_context.should_backoff = True
        having = [r for r in candidate_replicas if adapter in r.routing_stats.get("adapters", ())]
        return [_two(group) for group in (having, candidate_replicas) if group]


def _two(replicas: list[Any]) -> list[Any]:
    return random.sample(replicas, min(2, len(replicas)))
