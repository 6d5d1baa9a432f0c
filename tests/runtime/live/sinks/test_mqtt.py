"""The MQTT sink against a real mosquitto (Debian's package of that name), and against a broker that remembers all it gets."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fbclip.runtime.live.delivery import Delivery, Lost, Queued
from fbclip.runtime.live.records import Notice
from fbclip.runtime.live.sinks import SinkOptions, make_sinks
from fbclip.runtime.live.sinks.mqtt import Mqtt, Patience
from helpers.delivered import notice, result
from helpers.live import Frames
from helpers.stream_faults import bound
from helpers.waiting import PATIENCE_S, eventually

# a broker on a busy machine may take its time
CALM = Patience(grace_s=PATIENCE_S, flush_s=PATIENCE_S, connect_s=PATIENCE_S, retry_s=(0.05, 0.1))
STRICT = replace(CALM, grace_s=0)  # without a broker it counts as failing at once


class Ledger:
    """A broker that writes down the results it gets, in their order; it may be away, and may leave without an answer."""

    def __init__(self) -> None:
        self.reserved = bound()  # keeps the port from others while there is no broker
        self.port: int = self.reserved.getsockname()[1]
        self.indices: list[int] = []
        self.answers = True
        self.listener: socket.socket | None = None
        self.clients: list[socket.socket] = []

    def start(self) -> None:
        self.listener = bound(self.port)
        self.listener.listen()
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def stop(self) -> None:
        ends, self.clients = [*self.clients, *filter(None, [self.listener])], []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                self.clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client.makefile("rb") as stream:
            while kind := stream.read(1):
                length = shift = 0
                while (byte := stream.read(1)[0]) & 0x80:
                    length, shift = length | (byte & 0x7F) << shift, shift + 7
                body = stream.read(length | byte << shift)
                if kind[0] >> 4 == 1:  # CONNECT
                    client.sendall(b"\x20\x02\0\0")
                elif kind[0] >> 4 == 3 and kind[0] & 6:  # PUBLISH with QoS 1
                    end = 2 + int.from_bytes(body[:2], "big")
                    record = json.loads(body[end + 2 :])
                    if self.answers:
                        if record["kind"] == "result":
                            self.indices.append(record["index"])
                        client.sendall(b"\x40\x02" + body[end : end + 2])
                elif kind[0] >> 4 == 12:  # PINGREQ
                    client.sendall(b"\xd0\0")

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}/line"


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger()
    ledger.start()
    yield ledger
    ledger.stop()
    ledger.reserved.close()


def in_order(indices: list[int]) -> list[int]:
    """Without those that came a second time."""
    return list(dict.fromkeys(indices))


@pytest.mark.parametrize("lossless", [False, True])
def test_a_broker_that_is_away_gets_all_that_waited(ledger: Ledger, lossless: bool) -> None:
    """However long it is away: here it counts as failing at once."""
    told: list[Notice] = []
    sink = Mqtt(ledger.url, STRICT)
    queue = Delivery(sink, 8, lossless, lambda _, notice: told.append(notice))

    def put(first: int, last: int) -> None:
        for index in range(first, last):
            queue.put(result(index))
            if not lossless:  # a camera is not faster than that
                eventually(lambda: queue.status().waiting == 0)

    eventually(lambda: sink._away_since is None)
    put(0, 10)
    eventually(lambda: len(ledger.indices) == 10)
    ledger.stop()
    eventually(lambda: sink._away_since is not None)
    put(10, 300)
    eventually(lambda: queue.status().delivered == 300)
    state = queue.status()
    assert (state.state, state.dropped) == ("failing", 0)
    assert f"no connection to the MQTT broker 127.0.0.1:{ledger.port} for" in state.error
    assert [notice.state for notice in told] == ["failing"]
    ledger.start()
    eventually(lambda: sink._away_since is None)
    put(300, 310)
    eventually(lambda: 309 in ledger.indices)
    assert in_order(ledger.indices) == list(range(310))
    assert [notice.state for notice in told] == ["failing", "working"]
    queue.close()
    queue.join(PATIENCE_S)
    assert queue.status().dropped == 0


def test_a_broker_that_comes_back_in_the_end_gets_it_all(ledger: Ledger) -> None:
    ledger.stop()
    queue = Delivery(Mqtt(ledger.url, STRICT), 8, True, lambda *_: None)
    for index in range(20):
        queue.put(result(index))
    eventually(lambda: queue.status().delivered == 20)
    assert queue.status().state == "failing"
    queue.close()
    ledger.start()
    queue.join(PATIENCE_S)
    assert in_order(ledger.indices) == list(range(20))
    state = queue.status()
    assert (state.state, state.error, state.dropped) == ("working", None, 0)


def test_what_is_left_in_the_end_is_told(ledger: Ledger) -> None:
    ledger.stop()
    queue = Delivery(Mqtt(ledger.url, replace(CALM, flush_s=0)), 8, True, lambda *_: None)
    for index in range(20):
        queue.put(result(index))
    queue.put(notice())
    queue.drain(time.monotonic() + PATIENCE_S)
    queue.wait_drained()
    queue.close()
    queue.join(PATIENCE_S)
    state = queue.status()
    assert (state.state, state.dropped) == ("failing", 21)
    assert state.dropped_because == state.error
    assert f"no connection to the MQTT broker 127.0.0.1:{ledger.port}" in state.error


def test_only_what_comes_when_a_thousand_wait_is_lost_and_counted(ledger: Ledger) -> None:
    assert Patience().queued == 1000
    ledger.stop()
    sink = Mqtt(ledger.url, replace(STRICT, queued=30))
    queue = Delivery(sink, 8, True, lambda *_: None)
    for index in range(40):
        queue.put(result(index))
        eventually(lambda index=index: queue.status().delivered + queue.status().dropped == index + 1)
    state = queue.status()
    assert (state.delivered, state.dropped) == (30, 10)
    assert "no connection to the MQTT broker" in state.dropped_because
    assert state.dropped_because.endswith("; 30 messages wait for it, which is all that may")
    ledger.start()
    eventually(lambda: len(in_order(ledger.indices)) == 30)
    eventually(lambda: sink._client.is_connected())
    queue.put(result(40))
    queue.drain(time.monotonic() + PATIENCE_S)
    queue.wait_drained()
    queue.close()
    queue.join(PATIENCE_S)
    assert in_order(ledger.indices) == [*range(30), 40]
    state = queue.status()
    assert (state.state, state.dropped) == ("working", 10)
    assert "no connection" in state.dropped_because  # and not that it was too slow, though it works again


def test_a_broker_that_is_there_and_slow_is_waited_for(ledger: Ledger) -> None:
    sink = Mqtt(ledger.url, replace(CALM, queued=3, room_s=PATIENCE_S))
    eventually(lambda: sink._away_since is None)
    for index in range(100):
        sink.write(result(index))
    sink.close()
    assert in_order(ledger.indices) == list(range(100))


def program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
    if found is None:
        pytest.skip(f"no {name} here: apt-get install mosquitto openssl")
    return found


class Broker:
    """A mosquitto on a free port, which may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: list[str] = ["allow_anonymous true"]
        self.reserved = bound()  # keeps the port from others while there is no broker
        self.port: int = self.reserved.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        config = self.folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", *self.settings, "log_dest stderr"]
        lines += ["persistence true", f"persistence_location {self.folder}/"]
        if os.geteuid() == 0:
            lines.append("user root")  # the folder is for nobody else
        config.write_text("\n".join(lines) + "\n")
        self.process = subprocess.Popen(
            [program("mosquitto"), "-c", str(config)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert self.process.stderr
        said = []
        for line in self.process.stderr:
            said.append(line)
            if line.rstrip().endswith("running"):
                return
        raise AssertionError("".join(said))

    def stop(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()  # it saves its sessions
            self.process.communicate(timeout=PATIENCE_S)
            self.process = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}/line%204/cam"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    program("mosquitto")
    yield broker
    broker.stop()
    broker.reserved.close()


class Listener:
    """What a subscriber sees, also of the time while it was away (a session that the broker keeps)."""

    def __init__(self, broker: Broker, name: str = "listener") -> None:
        self.messages: queue.Queue[tuple[str, str, bool]] = queue.Queue()
        self.is_subscribed = threading.Event()
        self.client = Client(CallbackAPIVersion.VERSION2, name, clean_session=False)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = lambda *_: self.is_subscribed.set()
        self.client.on_message = self._on_message
        self.client.connect_async("127.0.0.1", broker.port)
        self.client.loop_start()
        assert self.is_subscribed.wait(PATIENCE_S)

    def _on_connect(self, client: Client, _d: object, _f: ConnectFlags, _r: ReasonCode, _p: Properties | None) -> None:
        client.subscribe("line 4/#", qos=1)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        self.messages.put((message.topic.removeprefix("line 4/cam/"), message.payload.decode(), message.retain))

    def next(self) -> tuple[str, str, bool]:
        return self.messages.get(timeout=PATIENCE_S)

    def until_result(self, index: int) -> None:
        while (message := self.next())[0] != "results" or json.loads(message[1])["index"] != index:
            pass

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def listener(broker: Broker) -> Iterator[Listener]:
    broker.start()
    listener = Listener(broker)
    yield listener
    listener.close()


def test_results_notices_and_status(broker: Broker, listener: Listener) -> None:
    before = set(threading.enumerate())
    (sink,) = make_sinks(SinkOptions(mqtt=broker.url), Frames([], live=True))
    assert listener.next() == ("status", "online", False)
    sink.write(result(5, 0.75, alarm=True))
    sink.notify(notice())
    topic, payload, retained = listener.next()
    assert (topic, json.loads(payload)["index"], retained) == ("results", 5, False)
    topic, payload, retained = listener.next()
    assert (topic, json.loads(payload)["state"], retained) == ("notices", "lost", False)
    late = Listener(broker, "late")
    assert late.next() == ("status", "online", True)  # only the status waits for those who come late
    sink.close()
    assert listener.next() == late.next() == ("status", "offline", False)
    late.close()
    assert set(threading.enumerate()) <= before
    latest = Listener(broker, "latest")
    assert latest.next() == ("status", "offline", True)
    latest.close()


def test_last_will_of_a_killed_process(broker: Broker, listener: Listener) -> None:
    work = f"from fbclip.runtime.live.sinks.mqtt import Mqtt; Mqtt({broker.url!r}); import signal; signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", work])
    assert listener.next() == ("status", "online", False)
    process.kill()
    process.wait()
    assert listener.next() == ("status", "offline", False)


def test_a_broker_that_restarts_gets_what_waited(broker: Broker, listener: Listener) -> None:
    sink = Mqtt(broker.url, CALM)
    assert listener.next() == ("status", "online", False)
    sink.write(result(0))
    assert json.loads(listener.next()[1])["index"] == 0
    broker.stop()
    for index in range(1, 51):
        sink.write(result(index))
    broker.start()
    indices: list[int] = []
    while 50 not in indices:
        topic, payload, _ = listener.next()
        if topic == "results":
            indices.append(json.loads(payload)["index"])
    sink.close()
    assert set(range(1, 51)) <= set(indices)  # once more may come what was not acknowledged


def test_an_absent_broker_is_an_error_until_it_comes(broker: Broker) -> None:
    before = set(threading.enumerate())
    sink = Mqtt(broker.url, STRICT)
    with pytest.raises(Queued, match=f"no connection to the MQTT broker 127.0.0.1:{broker.port} for"):
        sink.write(result(0))
    broker.start()
    listener = Listener(broker)
    eventually(lambda: sink._away_since is None)
    sink.write(result(1))
    listener.until_result(1)
    listener.close()
    sink.close()
    assert set(threading.enumerate()) <= before


def test_a_broker_that_hangs_fills_the_queue_and_does_not_hold_up_the_end(broker: Broker, listener: Listener) -> None:
    before = set(threading.enumerate())
    sink = Mqtt(broker.url, replace(CALM, queued=30, flush_s=0.1, room_s=0.1))
    assert listener.next() == ("status", "online", False)
    assert broker.process
    broker.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, broker.process.pid, os.WSTOPPED | os.WNOWAIT)
    for index in range(30):
        sink.write(result(index))
    for _ in range(2):
        with pytest.raises(Lost, match="does not answer; 30 messages wait for it"):
            sink.write(result(30))
    with pytest.raises(Lost, match="did not acknowledge them") as caught:
        sink.close()
    assert caught.value.count == 30
    assert set(threading.enumerate()) <= before


def refused(sink: Mqtt, reason: str) -> None:
    """Write until the background connection knows why it fails; close, which tells it, too."""

    def is_known() -> bool:
        with pytest.raises(OSError) as caught:
            sink.write(result())
        return reason in str(caught.value)

    eventually(is_known)
    with pytest.raises(Lost, match=reason):
        sink.close()


def test_password(broker: Broker) -> None:
    passwords = broker.folder / "passwords"
    subprocess.run([program("mosquitto_passwd"), "-b", "-c", str(passwords), "cam", "s/ecret"], check=True)
    broker.settings = ["allow_anonymous false", f"password_file {passwords}"]
    broker.start()
    wrong = Mqtt(f"mqtt://cam:wrong@127.0.0.1:{broker.port}", replace(STRICT, flush_s=0))
    refused(wrong, "Not authorized")
    right = Mqtt(f"mqtt://cam:s%2Fecret@127.0.0.1:{broker.port}", CALM)
    right.write(result())
    right.close()  # which is an error unless the broker has acknowledged it


def test_tls_only_with_a_certificate_that_is_trusted(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = broker.folder / "key.pem", broker.folder / "certificate.pem"
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    options += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([program("openssl"), "req", "-x509", *options], check=True, capture_output=True)
    broker.settings = ["allow_anonymous true", f"keyfile {key}", f"certfile {certificate}"]
    broker.start()
    url = f"mqtts://127.0.0.1:{broker.port}"
    untrusted = Mqtt(url, replace(STRICT, flush_s=0))
    refused(untrusted, "certificate verify failed")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    trusted = Mqtt(url, CALM)
    trusted.write(result())
    trusted.close()  # which is an error unless the broker has acknowledged it
