"""Spans of OpenTelemetry, where its packages are there and something collects them.

A span for each request, the child of the client's if it sends ``traceparent``, and in it one for
each part that the metrics tell apart. Without a collector nothing is measured and nothing made.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _THERE = False
else:
    _THERE = True

_LOG = logging.getLogger("hhdeploy.serve")
_NAME = "hhdeploy.serve"
_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
# What says where spans go, as OpenTelemetry has it.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def start_tracing() -> None:
    """Send spans where the environment says, over OTLP; a warning where packages are missing.

    Nothing if it says nothing, or the process was set up before, e.g. by
    ``opentelemetry-instrument``.
    """
    if not any(map(os.environ.get, _ENDPOINTS)) or _tracer() is not None:
        return
    try:
        exporter: Any = importlib.import_module(_EXPORTER)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _LOG.warning(
            "no spans: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
            extra={"problem": str(error)},
        )
        return
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "hhdeploy")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter.OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


class Tracing:
    """Spans of one wire; `request` costs nothing where nothing collects them."""

    def __init__(self) -> None:
        """Spans go to the provider that the process has now."""
        self._tracer = _tracer()

    def request(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
    ) -> contextlib.AbstractContextManager[dict[str, str | int]]:
        """A request's span, current in the block.

        Args:
            name: of the method or route; nothing that a client chose.
            headers: of the request, their names in lower case; ``traceparent`` names its parent.
            attributes: of the span.

        Returns:
            For a block, what it adds: further attributes, and ``error``, why the request failed.
        """
        if self._tracer is None:
            return contextlib.nullcontext({})
        return self._span(name, headers, attributes)

    @contextlib.contextmanager
    def _span(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
    ) -> Iterator[dict[str, str | int]]:
        parent = TraceContextTextMapPropagator().extract(headers)
        added: dict[str, str | int] = {}
        with self._tracer.start_as_current_span(
            name, parent, trace.SpanKind.SERVER, dict(attributes), record_exception=False
        ) as span:
            try:
                yield added
            finally:
                if (problem := added.pop("error", None)) is not None:
                    span.set_status(trace.StatusCode.ERROR, str(problem))
                span.set_attributes(added)


def trace_parts(**seconds: float) -> None:
    """Spans of a request's parts that just ended, one after the other, in the current span.

    Args:
        seconds: of each part, in their order.
    """
    if (tracer := _tracer()) is None:
        return
    begin = time.time_ns() - round(1e9 * sum(seconds.values()))
    for name, taken in seconds.items():
        end = begin + round(1e9 * taken)
        tracer.start_span(name, start_time=begin).end(end)
        begin = end


def _tracer() -> Any:
    """None where nothing collects spans."""
    if not _THERE:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    return provider.get_tracer(_NAME)
