"""Results to an MQTT broker. Needs the extra `mqtt`."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fbclip import addresses
from fbclip.errors import UsageError, require_package
from fbclip.runtime.live.delivery import Lost, Queued
from fbclip.runtime.live.records import Notice, Record
from fbclip.runtime.live.sinks.lines import to_json

if TYPE_CHECKING:
    from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessageInfo
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

KEEPALIVE_S = 20  # the broker publishes the last will after 1.5 times as long a silence


@dataclass(frozen=True)
class Patience:
    """What a broker is given before something counts as lost.

    Attributes:
        queued: messages that wait for the broker; what comes beyond them is lost.
        grace_s: seconds without a broker before the sink counts as failing: a restart of the broker is no fault.
        room_s: seconds that one message waits for an answer of the broker, where as many wait as may.
        retry_s: seconds between two tries to connect, at first and later: a broker that is back gets what waits before
            more does.
        connect_s: seconds for TCP; the next try waits for that.
        flush_s: seconds for the broker to acknowledge what is left at the end.
    """

    queued: int = 1000
    grace_s: float = 5.0
    room_s: float = 5.0
    retry_s: tuple[float, float] = (1, 2)
    connect_s: float = 2.0
    flush_s: float = 3.0


class Mqtt:
    """Results and notices as JSON to PREFIX/results and PREFIX/notices with QoS 1: each arrives, in order, rarely twice.

    PREFIX/status, retained, is "online", or "offline": at the end, or as last will once this process is gone. The
    connection is made in the background and again whenever it is cut; up to 1000 messages wait meanwhile, and what comes
    then is lost.

    Args:
        url: mqtt://user:password@host:port/prefix, mqtts:// for TLS with the system's certificates (SSL_CERT_FILE names
            others). The port is 1883 or 8883, the prefix "fbclip", if left out.
        patience: how long a broker is waited for.

    Raises:
        UsageError: paho-mqtt is missing, or the address is malformed.
    """

    name = "mqtt"

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        require_package("paho", "mqtt", "mqtt")
        self._patience = patience or Patience()
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        address = addresses.parse(url, "a broker is mqtt://HOST:PORT/PREFIX", {"mqtt": 1883, "mqtts": 8883}, "mqtt")
        prefix = unquote(address.path.strip("/")) or "fbclip"
        if "#" in url or set("#+") & set(prefix) or not prefix.isprintable():
            raise UsageError(
                "a broker is mqtt://HOST:PORT/PREFIX, where the prefix has no # or +, which are wildcards",
                option="mqtt",
            )
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
        self._client.max_queued_messages_set(self._patience.queued)
        self._client.reconnect_delay_set(*self._patience.retry_s)  # type: ignore[arg-type]  # fractions are well
        self._client.connect_timeout = self._patience.connect_s
        self._client.will_set(f"{prefix}/status", "offline", qos=1, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.connect_async(address.host, address.port, KEEPALIVE_S)
        self._client.loop_start()

    def write(self, record: Record) -> None:
        self._publish("results", record)

    def notify(self, notice: Notice) -> None:
        self._publish("notices", notice)

    def close(self) -> None:
        """Wait 3 s at most for what is under way; Lost if the broker didn't acknowledge it all."""
        deadline = time.monotonic() + self._patience.flush_s
        while self._count() and (left := deadline - time.monotonic()) > 0:
            self._waiting[0].wait_for_publish(left)
        why = self._trouble(0) or f"the MQTT broker {self._broker} did not acknowledge them"
        self._status("offline")
        self._client.disconnect()
        self._client.loop_stop()
        if left_over := self._count():
            raise Lost(left_over, why)

    def _publish(self, topic: str, record: Record | Notice) -> None:
        """Queued where it waits for a broker that is away, Lost where too many do."""
        from paho.mqtt.enums import MQTTErrorCode

        if self._count() >= self._patience.queued and self._away_since is None:
            self._waiting[0].wait_for_publish(
                self._patience.room_s
            )  # it is there: a file waits for it, a camera drops frames
        trouble = self._trouble(self._patience.grace_s)
        message = self._client.publish(f"{self._prefix}/{topic}", to_json(record), qos=1)
        if message.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            trouble = trouble or f"the MQTT broker {self._broker} does not answer"
            raise Lost(1, f"{trouble}; {self._patience.queued} messages wait for it, which is all that may")
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
