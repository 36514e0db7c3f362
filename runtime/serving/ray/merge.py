"""The numbers of several replicas as those of one server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hhdeploy.runtime.serving.metrics import Collector, latency_ms

# What an adapter's state is if replicas differ: the first of these that one of them says.
_STATES = ("ready", "on disk", "broken", "unloaded")


def summed(items: Sequence[Any]) -> Any:
    """Numbers added, through dictionaries and lists of one shape; of the rest the first."""
    first = items[0]
    if isinstance(first, dict):
        return {key: summed([item[key] for item in items]) for key in first}
    if isinstance(first, list):
        return [summed(several) for several in zip(*items, strict=True)]
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        return sum(items)
    return first


def merged_status(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`status_of` several services: counts added, latencies and adapters joined.

    ``uptime_seconds`` is the oldest's. An adapter's ``row`` is None: it has another one in each.
    """
    counts = ("queued_images", "batches", "images", "requests", "bank")
    recent = [value for one in found for value in one["latency_ms"]["recent"]]
    return {
        **found[0],
        "ready": any(one["ready"] for one in found),
        "uptime_seconds": max(one["uptime_seconds"] for one in found),
        **{key: summed([one[key] for one in found]) for key in counts},
        "latency_ms": latency_ms(recent),
        "adapters": _adapters(found),
        "replicas": len(found),
    }


def _adapters(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        for adapter in one["adapters"]:
            by_name.setdefault(adapter["name"], []).append(adapter)
    return [
        {
            **min(several, key=lambda adapter: _STATES.index(adapter["state"])),
            "images": sum(adapter["images"] for adapter in several),
            "row": None,
        }
        for _, several in sorted(by_name.items())
    ]


def merged_metrics(texts: Mapping[str, bytes]) -> bytes:
    """One exposition of many replicas': each sample has its replica's name as label ``replica``."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            kept = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            kept.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(Collector(lambda: iter(families.values())))
    return generate_latest(registry)
