"""Counts and distributions for Prometheus. Needs the extra `metrics`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import fbclip
from fbclip.errors import UsageError, require_package
from fbclip.runtime.live.records import Notice, Record
from fbclip.runtime.live.status import Status
from fbclip.runtime.prediction import UNJUDGED
from fbclip.runtime.predictor import Predictor

if TYPE_CHECKING:
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import Metric

SCORES = tuple(n / 20 for n in range(1, 20))


SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Prometheus:
    """Counts and distributions for Prometheus, in a registry of their own.

    Args:
        counters: the running totals of the source, asked for at each scrape.
        place: see `listen`; None for nowhere.

    Raises:
        UsageError: prometheus-client is missing, or as `listen`.
    """

    name = "metrics"

    def __init__(self, counters: Callable[[], Mapping[str, int]], place: tuple[str, int] | None = None) -> None:
        require_package("prometheus_client", "metrics", "metrics")
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and descriptors: a leak shows
        registry.register(_SourceTotals(counters))
        Info("fbclip_build", "What runs", registry=registry).info({"version": fbclip.__version__})
        self._model = Info("fbclip_model", "What inspects", registry=registry)
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
        self._last_score = Gauge("fbclip_last_score", "Of the last good or defect frame", registry=registry)
        self._ages = Histogram("fbclip_age_seconds", "From capture to here", buckets=SECONDS, registry=registry)
        self._stages = Histogram(
            "fbclip_stage_seconds", "Time by stage", ["stage"], buckets=(0.001, *SECONDS), registry=registry
        )
        self._source = Gauge("fbclip_source_up", "1 while frames come", ["source"], registry=registry)
        self._sink = Gauge("fbclip_sink_up", "0 while a sink fails", ["sink"], registry=registry)
        self._drifting = Gauge("fbclip_drifting", "1 while scores differ from the calibration's", registry=registry)
        self.own = self.listen(place) if place else None

    def listen(self, place: tuple[str, int]) -> Listening:
        """Serve /metrics at a host and port, to whoever reaches it, until that is closed.

        Raises:
            UsageError: the port is taken, or there is no such address here.
        """
        from prometheus_client import start_http_server

        host, port = place
        try:
            return Listening(*start_http_server(port, host, self._registry))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"can't serve metrics at {host}:{port}: {error}; choose another port", option="metrics"
            ) from error

    def describe(self, predictor: Predictor, status: Callable[[], Status] | None = None) -> None:
        """Say what inspects, and what a run does, asked for at each scrape; once, before the first."""
        self._model.info(predictor.identity)
        self._threshold.set(predictor.threshold)
        if status:
            self._registry.register(_RunTotals(status))

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
            self._last_score.set(prediction.score)
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
        if self.own:
            self.own.close()


class Listening:
    """A server of /metrics, in a thread of its own."""

    def __init__(self, server: WSGIServer, thread: Thread) -> None:
        self.port: int = server.server_port
        self._server, self._thread = server, thread

    def close(self) -> None:
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


class _RunTotals:
    """What a run knows of itself: frames that it could not inspect or called good, and what sinks took and lost."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        status = self._status()
        yield CounterMetricFamily("fbclip_rejected", "Frames that could not be inspected", status.rejected)
        yield CounterMetricFamily("fbclip_overruled", "Good frames whose score is a defect's", status.overruled)
        delivered = CounterMetricFamily("fbclip_sink_delivered", "Results that a sink took", labels=["sink"])
        lost = CounterMetricFamily("fbclip_sink_lost", "Results and notices that it lost", labels=["sink"])
        for name, sink in status.sinks.items():
            delivered.add_metric([name], sink.delivered)
            lost.add_metric([name], sink.dropped)
        yield delivered
        yield lost
