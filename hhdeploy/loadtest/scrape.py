"""What a server counts itself, read from what Prometheus scrapes."""

from __future__ import annotations

from dataclasses import dataclass

from hhdeploy.errors import SessionError, require

_DURATIONS = ("request", "queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Counts:
    """Counters of one scrape, or the difference of two.

    Attributes:
        requests: that were answered.
        images: that were classified.
        batches: that were run.
        loads: of adapters.
        load_seconds: of all loads together.
        evictions: adapters that lost their row to another one.
        seconds: of all answered requests together, by what they went to; Triton's terms.
        cpu_seconds: of the process; None where its system does not tell.
        rss_bytes: resident memory, at the time; None likewise.
    """

    requests: float
    images: float
    batches: float
    loads: float
    load_seconds: float
    evictions: float
    seconds: dict[str, float]
    cpu_seconds: float | None
    rss_bytes: float | None

    def since(self, before: Counts) -> Counts:
        """What was counted between two scrapes; memory is the later one's."""
        cpu = None
        if self.cpu_seconds is not None and before.cpu_seconds is not None:
            cpu = self.cpu_seconds - before.cpu_seconds
        return Counts(
            self.requests - before.requests,
            self.images - before.images,
            self.batches - before.batches,
            self.loads - before.loads,
            self.load_seconds - before.load_seconds,
            self.evictions - before.evictions,
            {name: value - before.seconds[name] for name, value in self.seconds.items()},
            cpu,
            self.rss_bytes,
        )


def read_counts(text: str) -> Counts:
    """Counters of the text of a scrape, labels summed up.

    Raises:
        SessionError: one is missing: the server is no `hhdeploy serve`.
    """
    parser = require("prometheus_client.parser", "serve", "the load test")
    values: dict[str, float] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    try:
        return Counts(
            values["nv_inference_request_success"],
            values["nv_inference_count"],
            values["nv_inference_exec_count"],
            values["hhdeploy_adapter_load_seconds_count"],
            values["hhdeploy_adapter_load_seconds_sum"],
            values["hhdeploy_adapter_evictions_total"],
            {name: values[f"nv_inference_{name}_duration_us"] / 1e6 for name in _DURATIONS},
            values.get("process_cpu_seconds_total"),
            values.get("process_resident_memory_bytes"),
        )
    except KeyError as error:
        raise SessionError(f"the server's metrics: expected {error}, found none.") from None
