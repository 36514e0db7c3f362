"""Which replica a request goes to: rather one that has its adapter in a row."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# Of what a replica takes (`max_ongoing_requests`). With so much under way in every replica that
# has an adapter in a row the adapter is hot: others had better load it than idle.
_HOT_SHARE = 8


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Of two replicas by chance, the one with fewer requests; adapters decide between which two.

    The adapter that a request names is its multiplexed model id. Replicas that have it in a row
    come first. Once the adapter is hot in all of them any two are asked: one that has not loaded it
    does so, and comes first as well from then on. What is in a row is as old as Ray's last look
    (``request_routing_stats_period_s``), and what is under way is what this router has sent and
    heard: a preference, on which no answer depends. A request that names no adapter, or several,
    goes to any replica.
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
        if all(map(self._busy, having)):
            having = []
        return [_two(group) for group in (having, candidate_replicas) if group]

    def _busy(self, replica: RunningReplica) -> bool:
        under_way = self.replica_queue_len_cache.get(replica.replica_id)
        return bool(
            under_way is not None
            and under_way >= max(2, replica.max_ongoing_requests // _HOT_SHARE)
        )


def _two(replicas: list[Any]) -> list[Any]:
    return random.sample(replicas, min(2, len(replicas)))
