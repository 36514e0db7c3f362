"""What the page at `/` shows of one service, as JSON."""

from __future__ import annotations

from typing import Any

from hhdeploy.packages import own_version
from hhdeploy.runtime.serving.fleet.states import Status
from hhdeploy.runtime.serving.metrics import latency_ms
from hhdeploy.runtime.serving.service import Service


def status_of(service: Service) -> dict[str, Any]:
    """The numbers of this moment.

    Keys:
        version: of hhdeploy.
        model, device, precision: what is served, what computes, and in which precision.
        ready, uptime_seconds: health.
        answers: requests may ask for answers: the graph gives logits.
        max_batch, body_bytes: what one request may hold.
        queued_images, batches, images: waiting; run; classified.
        requests: how many were ``answered``, and ``failed`` by Triton's reason.
        latency_ms: see `latency_ms`.
        bank: rows used and rows there are for adapters, those for visitors, evictions, load
            failures; None if folded.
        adapters: sorted by name; ``classes`` and ``problem_type`` are None where it was never read,
            ``classes`` without logits, ``row`` without a row; ``exif``: it sees pictures upright,
            as their orientation says.
    """
    metrics, now = service.metrics, service.now()
    bank = None
    if service.fleet is not None:
        bank = {
            "rows_used": now.rows_used,
            "rows": now.rows,
            "visitor_rows": service.fleet.rows.visitor_rows,
            "evictions": now.evictions,
            "load_failures": now.load_failures,
        }
    return {
        "version": own_version(),
        "model": service.settings.model_name,
        "device": service.device,
        "precision": service.precision,
        "ready": service.ready,
        "uptime_seconds": round(service.uptime, 1),
        "answers": bool(service.manifest.classes),
        "max_batch": service.settings.max_batch,
        "body_bytes": service.settings.body_bytes,
        "queued_images": now.queued,
        "batches": now.runs,
        "images": metrics.images,
        "requests": {"answered": metrics.success, "failed": dict(metrics.failures)},
        "latency_ms": latency_ms([1e3 * seconds for seconds in metrics.recent]),
        "bank": bank,
        "adapters": _adapters(service),
    }


def _adapters(service: Service) -> list[dict[str, Any]]:
    if service.fleet is None:
        found = [Status(a.name, "ready", "", False, a) for a in service.manifest.adapters]
    else:
        found = service.fleet.statuses()
    return [
        {
            "name": adapter.name,
            "state": adapter.state,
            "problem": adapter.problem,
            "pinned": adapter.pinned,
            "classes": (adapter.known.classes or None) if adapter.known is not None else None,
            "problem_type": adapter.known.problem_type if adapter.known is not None else None,
            "row": adapter.entry.row if adapter.entry is not None else None,
            "exif": service.manifest.preprocess_of(adapter.known).exif,
            "images": service.metrics.adapters.get(adapter.name, 0),
        }
        for adapter in found
    ]
