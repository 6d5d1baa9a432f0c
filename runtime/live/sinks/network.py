"""Where live results go over the network: an MQTT broker, a webhook, Prometheus."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from fbclip import addresses
from fbclip.errors import UsageError
from fbclip.runtime.live.delivery import Lost, Queued
from fbclip.runtime.live.records import Notice, Result
from fbclip.runtime.live.sinks import to_json

if TYPE_CHECKING:
    from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessageInfo
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode
    from prometheus_client import Metric

QUEUED = 1000  # messages that wait for the broker
GRACE_S = 5.0  # without a broker before the sink counts as failing: a restart of the broker is no fault
ROOM_S = 5.0  # that one message waits for an answer of the broker, where as many wait as may
RETRY_S = (
    1,
    2,
)  # between two tries to connect, at first and later: a broker that is back gets what waits before more does
CONNECT_S = 2.0  # for TCP: the next try waits for that
FLUSH_S = 3.0  # for the broker to acknowledge what is left at the end
KEEPALIVE_S = 20  # the broker publishes the last will after 1.5 times as long a silence
TIMEOUT_S = 5.0  # of a webhook
SCORES = tuple(n / 20 for n in range(1, 20))
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Mqtt:
    """Results and notices as JSON to PREFIX/results and PREFIX/notices with QoS 1: each arrives, in order, rarely twice.

    PREFIX/status, retained, is "online", or "offline": at the end, or as last will once this process is gone. The
    connection is made in the background and again whenever it is cut; up to 1000 messages wait meanwhile, and what comes
    then is lost.

    Args:
        url: mqtt://user:password@host:port/prefix, mqtts:// for TLS with the system's certificates (SSL_CERT_FILE names
            others). The port is 1883 or 8883, the prefix "fbclip", if left out.

    Raises:
        UsageError: paho-mqtt is missing, or the address is malformed.
    """

    name = "mqtt"

    def __init__(self, url: str) -> None:
        _require("paho", "--mqtt", "mqtt")
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        address = addresses.parse(url, "--mqtt is mqtt://HOST:PORT/PREFIX", {"mqtt": 1883, "mqtts": 8883})
        prefix = unquote(address.path.strip("/")) or "fbclip"
        if "#" in url or set("#+") & set(prefix) or not prefix.isprintable():
            raise UsageError("--mqtt is mqtt://HOST:PORT/PREFIX, where the prefix has no # or +, which are wildcards")
        self._prefix = prefix
        self._broker = f"{address.host}:{address.port}"
        self._away_since: float | None = time.monotonic()
        self._reason = "no answer yet"
        self._waiting: deque[MQTTMessageInfo] = deque()  # what the broker has not acknowledged, the oldest first
        self._client: Client = Client(CallbackAPIVersion.VERSION2)
        if address.user:
            self._client.username_pw_set(address.user, address.password)
        if address.scheme == "mqtts":
            self._client.tls_set()
        self._client.max_queued_messages_set(QUEUED)
        self._client.reconnect_delay_set(*RETRY_S)
        self._client.connect_timeout = CONNECT_S
        self._client.will_set(f"{prefix}/status", "offline", qos=1, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.connect_async(address.host, address.port, KEEPALIVE_S)
        self._client.loop_start()

    def write(self, result: Result) -> None:
        self._publish("results", result)

    def notify(self, notice: Notice) -> None:
        self._publish("notices", notice)

    def close(self) -> None:
        """Wait 3 s at most for what is under way; Lost if the broker didn't acknowledge it all."""
        deadline = time.monotonic() + FLUSH_S
        while self._count() and (left := deadline - time.monotonic()) > 0:
            self._waiting[0].wait_for_publish(left)
        why = self._trouble(0) or f"the MQTT broker {self._broker} did not acknowledge them"
        self._status("offline")
        self._client.disconnect()
        self._client.loop_stop()
        if left_over := self._count():
            raise Lost(left_over, why)

    def _publish(self, topic: str, record: Result | Notice) -> None:
        """Queued where it waits for a broker that is away, Lost where too many do."""
        from paho.mqtt.enums import MQTTErrorCode

        if self._count() >= QUEUED and self._away_since is None:
            self._waiting[0].wait_for_publish(ROOM_S)  # it is there: a file waits for it, a camera drops frames
        trouble = self._trouble(GRACE_S)
        message = self._client.publish(f"{self._prefix}/{topic}", to_json(record), qos=1)
        if message.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            trouble = trouble or f"the MQTT broker {self._broker} does not answer"
            raise Lost(1, f"{trouble}; {QUEUED} messages wait for it, which is all that may")
        message.rc = MQTTErrorCode.MQTT_ERR_SUCCESS  # without a connection, too, it is on its way
        self._waiting.append(message)
        if trouble:
            raise Queued(trouble)

    def _count(self) -> int:
        """Messages that the broker has not acknowledged; it does so in their order."""
        while self._waiting and self._waiting[0].is_published():
            self._waiting.popleft()
        return len(self._waiting)

    def _trouble(self, grace: float) -> str | None:
        """Why the broker has been away for more than `grace` seconds, if it has."""
        away_since = self._away_since
        if away_since is None or (seconds := time.monotonic() - away_since) <= grace:
            return None
        return f"no connection to the MQTT broker {self._broker} for {seconds:.0f} s: {self._reason}"

    def _status(self, status: str) -> None:
        # not QoS 1, which had to wait its turn behind a full queue; if it gets lost, so does the connection
        self._client.publish(f"{self._prefix}/status", status, qos=0, retain=True)

    def _on_connect(
        self, client: Client, _data: object, _flags: ConnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._reason = str(reason)
        else:
            self._away_since = None
            self._status("online")

    def _on_connect_fail(self, _client: Client, _data: object) -> None:
        self._reason = str(sys.exc_info()[1])  # paho calls this while it handles the error, and doesn't pass it

    def _on_disconnect(
        self,
        _client: Client,
        _data: object,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if self._away_since is None:  # it was there; a refused log-in has its own reason
            self._away_since = time.monotonic()
            self._reason = str(reason)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Don't: urllib would ask the other address without the body."""


class Webhook:
    """A POST of JSON for each notice; of an alarm ("on" or "off") with the `result` that it is about.

    Results alone are not posted: where the server is away, the many of them would push alarms out of the queue.

    Args:
        url: http:// or https://; a token belongs into its path or query.

    Raises:
        UsageError: the address is malformed.
    """

    name = "webhook"

    def __init__(self, url: str) -> None:
        address = addresses.parse(url, "--webhook is https://HOST/PATH", {"http": 80, "https": 443})
        if address.user:
            raise UsageError("--webhook takes no user and password: put a token into the path or query")
        self._url = address.bare
        self._host = address.host
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._latest: dict[str, Any] = {}

    def write(self, result: Result) -> None:
        self._latest = result.to_dict()

    def notify(self, notice: Notice) -> None:
        values = notice.to_dict()
        if notice.kind == "alarm" and self._latest.get("time") == notice.time:
            values["result"] = self._latest
        self._post(json.dumps(values, allow_nan=False))

    def close(self) -> None:
        """Nothing is open between posts."""

    def _post(self, body: str) -> None:
        request = urllib.request.Request(self._url, body.encode(), {"Content-Type": "application/json"})
        try:
            self._open(request, timeout=TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(f"the webhook at {self._host} answered {addresses.status(error.code)}") from error
        except (HTTPException, ValueError) as error:  # whose text may hold the address, or a proxy's
            raise OSError(f"no answer of the webhook at {self._host} as HTTP has it: {type(error).__name__}") from error
        except OSError as error:
            raise OSError(f"no answer of the webhook at {self._host}: {getattr(error, 'reason', error)}") from error


class Metrics:
    """Counts and distributions for Prometheus, in a registry of their own.

    Args:
        counters: the running totals of the source, asked for at each scrape.
        port, host: where /metrics is served; nowhere without a port, then `render` is for a server that is there.

    Raises:
        UsageError: prometheus-client is missing, or the port is taken.
    """

    name = "metrics"

    def __init__(self, counters: Callable[[], Mapping[str, int]], port: int | None = None, host: str = "127.0.0.1"):
        _require("prometheus_client", "--metrics-port", "metrics")
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and descriptors: a leak shows
        registry.register(_SourceTotals(counters))
        self._results = Counter("fbclip_results", "Frames scored", registry=registry)
        self._anomalies = Counter("fbclip_anomalies", "Frames with a defect", registry=registry)
        self._unusable = Counter("fbclip_unusable", "Frames that show nothing", registry=registry)
        self._alarms = Counter("fbclip_alarms", "Alarms raised", registry=registry)
        self._alarm = Gauge("fbclip_alarm", "1 while an alarm is on", registry=registry)
        self._threshold = Gauge("fbclip_threshold", "Scores from here on are anomalous", registry=registry)
        self._scores = Histogram("fbclip_score", "Anomaly scores", buckets=SCORES, registry=registry)
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
                    f"can't serve metrics at {host}:{port}: {error}; pass another --metrics-port"
                ) from error

    def write(self, result: Result) -> None:
        prediction = result.prediction
        self._results.inc()
        self._anomalies.inc(prediction.verdict == "defect")
        self._unusable.inc(prediction.verdict == "unusable")
        self._alarms.inc(result.alarm_began)
        self._alarm.set(result.alarm)
        self._threshold.set(prediction.threshold)
        self._scores.observe(prediction.score)
        self._ages.observe(time.monotonic() - result.frame.captured)
        for stage, milliseconds in result.stages_ms.items():
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


def _require(module: str, option: str, extra: str) -> None:
    if find_spec(module) is None:
        raise UsageError(f"{option} needs a package that is not installed: pip install 'fbclip[{extra}]'")
