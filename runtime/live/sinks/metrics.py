"""Counts and distributions for Prometheus. Needs the extra `metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from fbclip.errors import UsageError, require_package
from fbclip.runtime.live.records import Notice, Record
from fbclip.runtime.prediction import UNJUDGED

if TYPE_CHECKING:
    from prometheus_client import Metric

SCORES = tuple(n / 20 for n in range(1, 20))


SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Prometheus:
    """Counts and distributions for Prometheus, in a registry of their own.

    Args:
        counters: the running totals of the source, asked for at each scrape.
        port, host: where /metrics is served; nowhere without a port, then `render` is for a server that is there.

    Raises:
        UsageError: prometheus-client is missing, or the port is taken.
    """

    name = "metrics"

    def __init__(self, counters: Callable[[], Mapping[str, int]], port: int | None = None, host: str = "127.0.0.1"):
        require_package("prometheus_client", "metrics", "metrics_port")
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and descriptors: a leak shows
        registry.register(_SourceTotals(counters))
        self._results = Counter("fbclip_results", "Frames scored", registry=registry)
        self._anomalies = Counter("fbclip_anomalies", "Frames with a defect", registry=registry)
        self._unusable = Counter("fbclip_unusable", "Frames that show nothing", registry=registry)
        self._absent = Counter("fbclip_absent", "Frames without the part", registry=registry)
        self._alarms = Counter("fbclip_alarms", "Alarms raised", registry=registry)
        self._alarm = Gauge("fbclip_alarm", "1 while an alarm is on", registry=registry)
        self._threshold = Gauge("fbclip_threshold", "Scores from here on are anomalous", registry=registry)
        self._scores = Histogram(
            "fbclip_score", "Anomaly scores of good and defect frames", buckets=SCORES, registry=registry
        )
        self._ages = Histogram("fbclip_age_seconds", "From capture to here", buckets=SECONDS, registry=registry)
        self._stages = Histogram(
            "fbclip_stage_seconds", "Time by stage", ["stage"], buckets=(0.001, *SECONDS), registry=registry
        )
        self._source = Gauge("fbclip_source_up", "1 while frames come", ["source"], registry=registry)
        self._sink = Gauge("fbclip_sink_up", "0 while a sink fails", ["sink"], registry=registry)
        self._drifting = Gauge("fbclip_drifting", "1 while scores differ from the calibration's", registry=registry)
        self._server = None
        self.port = port
        if port is not None:
            try:
                self._server, self._thread = start_http_server(port, host, registry)
                self.port = self._server.server_port
            except (OSError, OverflowError) as error:
                raise UsageError(
                    f"can't serve metrics at {host}:{port}: {error}; choose another port", option="metrics_port"
                ) from error

    def write(self, record: Record) -> None:
        prediction = record.prediction
        self._results.inc()
        self._anomalies.inc(prediction.verdict == "defect")
        self._unusable.inc(prediction.verdict == "unusable")
        self._absent.inc(prediction.verdict == "absent")
        self._alarms.inc(record.alarm_began)
        self._alarm.set(record.alarm)
        self._threshold.set(prediction.threshold)
        if prediction.verdict not in UNJUDGED:
            self._scores.observe(prediction.score)
        self._ages.observe(time.monotonic() - record.frame.captured)
        for stage, milliseconds in record.timings_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1e3)

    def notify(self, notice: Notice) -> None:
        if notice.kind == "source":
            self._source.labels(notice.subject).set(notice.state == "live")
        elif notice.kind == "sink":
            self._sink.labels(notice.subject).set(notice.state == "working")
        elif notice.kind == "drift":
            self._drifting.set(notice.state == "drifting")

    def render(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def close(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _SourceTotals:
    """fbclip_source_frames_total, fbclip_source_dropped_total and so on, as the source has counted them."""

    def __init__(self, counters: Callable[[], Mapping[str, int]]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        for name, total in self._counters().items():
            yield CounterMetricFamily(f"fbclip_source_{name}", f"{name} since the start".capitalize(), total)
