"""The MQTT sink against a real mosquitto (Debian's package of that name)."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from delivered import notice, result
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from stream_faults import bound
from waiting import PATIENCE_S, eventually

from fbclip.runtime import sinks_network
from fbclip.runtime.sinks import SinkOptions, make_sinks
from fbclip.runtime.sinks_network import Mqtt


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker on a busy machine may take its time."""
    monkeypatch.setattr(sinks_network, "GRACE_S", PATIENCE_S)
    monkeypatch.setattr(sinks_network, "FLUSH_S", PATIENCE_S)


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

    def until(self, topic: str, payload: str) -> None:
        while self.next()[:2] != (topic, payload):
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
    (sink,) = make_sinks(SinkOptions(mqtt=broker.url))
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
    work = f"from fbclip.runtime.sinks_network import Mqtt; Mqtt({broker.url!r}); import signal; signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", work])
    assert listener.next() == ("status", "online", False)
    process.kill()
    process.wait()
    assert listener.next() == ("status", "offline", False)


def test_a_broker_that_restarts_gets_what_waited(broker: Broker, listener: Listener) -> None:
    sink = Mqtt(broker.url)
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


def test_an_absent_broker_is_an_error_until_it_comes(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks_network, "GRACE_S", 0)
    before = set(threading.enumerate())
    sink = Mqtt(broker.url)
    with pytest.raises(OSError, match=f"no connection to the MQTT broker 127.0.0.1:{broker.port} for"):
        sink.write(result(0))
    broker.start()
    listener = Listener(broker)
    listener.until("status", "online")
    sink.write(result(1))
    topic, payload, _ = listener.next()
    assert (topic, json.loads(payload)["index"]) == ("results", 1)
    listener.close()
    sink.close()
    assert set(threading.enumerate()) <= before


def test_a_broker_that_hangs_fills_the_queue_and_does_not_hold_up_the_end(
    broker: Broker, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks_network, "QUEUED", 30)
    monkeypatch.setattr(sinks_network, "FLUSH_S", 0.1)
    before = set(threading.enumerate())
    sink = Mqtt(broker.url)
    assert listener.next() == ("status", "online", False)
    assert broker.process
    broker.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, broker.process.pid, os.WSTOPPED | os.WNOWAIT)
    for index in range(30):
        sink.write(result(index))
    for _ in range(2):
        with pytest.raises(OSError, match="too slow: 30 messages wait"):
            sink.write(result(30))
    with pytest.raises(OSError, match="has not acknowledged"):
        sink.close()
    assert set(threading.enumerate()) <= before


def refused(sink: Mqtt, reason: str) -> None:
    """Write until the background connection knows why it fails."""

    def is_known() -> bool:
        with pytest.raises(OSError) as caught:
            sink.write(result())
        return reason in str(caught.value)

    eventually(is_known)


def test_password(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks_network, "GRACE_S", 0)
    passwords = broker.folder / "passwords"
    subprocess.run([program("mosquitto_passwd"), "-b", "-c", str(passwords), "cam", "s/ecret"], check=True)
    broker.settings = ["allow_anonymous false", f"password_file {passwords}"]
    broker.start()
    wrong = Mqtt(f"mqtt://cam:wrong@127.0.0.1:{broker.port}")
    refused(wrong, "Not authorized")
    wrong.close()
    right = Mqtt(f"mqtt://cam:s%2Fecret@127.0.0.1:{broker.port}")
    monkeypatch.setattr(sinks_network, "GRACE_S", PATIENCE_S)
    right.write(result())
    right.close()  # which is an error unless the broker has acknowledged it


def test_tls_only_with_a_certificate_that_is_trusted(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks_network, "GRACE_S", 0)
    key, certificate = broker.folder / "key.pem", broker.folder / "certificate.pem"
    options = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    options += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([program("openssl"), "req", "-x509", *options], check=True, capture_output=True)
    broker.settings = ["allow_anonymous true", f"keyfile {key}", f"certfile {certificate}"]
    broker.start()
    url = f"mqtts://127.0.0.1:{broker.port}"
    untrusted = Mqtt(url)
    refused(untrusted, "certificate verify failed")
    untrusted.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(sinks_network, "GRACE_S", PATIENCE_S)
    trusted = Mqtt(url)
    trusted.write(result())
    trusted.close()  # which is an error unless the broker has acknowledged it
