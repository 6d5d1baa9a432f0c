"""Where live results go: a window, a video file, JSON lines, a CSV table; `make_sinks` also those of the network."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.errors import FBClipError, UsageError
from fbclip.files import require_file
from fbclip.runtime.live.records import Notice, Result, Sink
from fbclip.runtime.live.sinks.lines import LineFile, Lines, StandardOutput
from fbclip.runtime.live.stills import CSV_COLUMNS, csv_line, csv_row

LIVE_COLUMNS = ("time", "index", *CSV_COLUMNS, "alarm")
PART_BYTES = 1_000_000_000  # of a video file; AVI counts in 32 bits
RESERVE_BYTES = 200_000_000  # of the disk that a video leaves to everything else
WINDOW = "fbclip"


@dataclass(frozen=True)
class SinkOptions:
    """Where results go; None means nowhere.

    Attributes:
        show: a window with the overlay of each result.
        video: Motion JPEG file (.avi) of the overlays, one frame per result.
        video_fps: frames per second that the video claims.
        json: JSON lines, results and notices; "-" is standard output.
        csv: table of the results.
        log_mb: size in MB at which a JSON lines or CSV file is put aside as NAME.1, NAME.2, …
        log_keep: how many of these stay.
        mqtt: mqtt://user:password@host:port/prefix, or mqtts:// for TLS.
        webhook: http:// or https:// address that alarms and notices are posted to.
        metrics_port, metrics_host: where Prometheus fetches its metrics.
    """

    show: bool = False
    video: Path | None = None
    video_fps: float = 10.0
    json: str | None = None
    csv: Path | None = None
    log_mb: float = 100.0
    log_keep: int = 5
    mqtt: str | None = None
    webhook: str | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"


def make_sinks(options: SinkOptions, counters: Callable[[], Mapping[str, int]] = dict) -> list[Sink]:
    """The sinks that are asked for, open and ready.

    Args:
        counters: the running totals of the source (frames, dropped, reconnects, …), for the metrics.

    Raises:
        UsageError: a file that can't be written, a malformed address, a package or display that is missing.
    """
    makers: list[Callable[[], Sink]] = []
    if options.show:
        makers.append(Window)
    if path := options.video:
        makers.append(lambda: Video(path, options.video_fps))
    if target := options.json:
        makers.append(lambda: JsonLines(StandardOutput() if target == "-" else _log(Path(target), options)))
    if table := options.csv:
        makers.append(lambda: Csv(_log(table, options, ",".join(LIVE_COLUMNS))))
    if options.mqtt or options.webhook or options.metrics_port is not None:
        from fbclip.runtime.live.sinks import network

        if broker := options.mqtt:
            makers.append(lambda: network.Mqtt(broker))
        if url := options.webhook:
            makers.append(lambda: network.Webhook(url))
        if (port := options.metrics_port) is not None:
            makers.append(lambda: network.Metrics(counters, port, options.metrics_host))
    sinks: list[Sink] = []
    with ExitStack() as opened:  # one that can't be made closes those before it
        for make in makers:
            sinks.append(make())
            opened.callback(sinks[-1].close)
        opened.pop_all()
    return sinks


def _log(path: Path, options: SinkOptions, header: str = "") -> LineFile:
    return LineFile(path, header, round(options.log_mb * 1e6), options.log_keep)


def to_json(record: Result | Notice) -> str:
    """One line of JSON; `kind` is "result", or what the notice is about."""
    values = record.to_dict()
    return json.dumps(values if isinstance(record, Notice) else {"kind": "result", **values}, allow_nan=False)


class JsonLines:
    """Results and notices, one JSON object a line."""

    name = "json"

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def write(self, result: Result) -> None:
        self._lines.append(to_json(result))

    def notify(self, notice: Notice) -> None:
        self._lines.append(to_json(notice))

    def close(self) -> None:
        self._lines.close()


class Csv:
    """A row for each result; a table has no place for notices."""

    name = "csv"

    def __init__(self, lines: LineFile) -> None:
        self._lines = lines

    def write(self, result: Result) -> None:
        record = result.to_dict()
        values = [record["time"], record["index"], *csv_row(record, record["stages_ms"]["model"]), record["alarm"]]
        self._lines.append(csv_line(values))

    def notify(self, notice: Notice) -> None:
        pass

    def close(self) -> None:
        self._lines.close()


class Video:
    """Overlays as Motion JPEG, one frame per result.

    Of the containers that OpenCV writes, only this one can be played up to the last 32 KB after the process was killed
    (an .mp4 not at all), and it needs no FFmpeg. A file that is there stays: NAME-2.avi, NAME-3.avi, … follow, as they
    do after 1 GB, after another frame size and after a fault.

    Args:
        path: ends in .avi.
        fps: that the file claims; results come at a rate of their own.
    """

    name = "video"

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix.lower() != ".avi":
            raise UsageError(
                f"a video is Motion JPEG in .avi, which stays playable when the process is killed; got {path}: pass {path.stem}.avi"
            )
        try:
            str(path).encode()
        except UnicodeEncodeError as error:  # it would crash
            raise UsageError(f"OpenCV writes no video to a name that is no UTF-8; got {path}") from error
        if not 0 < fps < 1000:
            raise UsageError(f"a video has more than 0 and less than 1000 frames per second; got {fps}")
        require_file(path, room=False)
        self.path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None
        self._part, self._size = path, (0, 0)

    def write(self, result: Result) -> None:
        picture = _bgr(result)
        size = (picture.shape[1], picture.shape[0])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            # OpenCV doesn't say when a disk is full
            if shutil.disk_usage(self.path.parent).free < RESERVE_BYTES:
                raise OSError(errno.ENOSPC, f"less than {RESERVE_BYTES // 10**6} MB left, no video", str(self.path))
            if self._writer and not (size == self._size and self._goes_on()):
                self.close()
            writer = self._writer or self._begin(size)
        except OSError:
            self.close()
            raise
        writer.write(picture)

    def notify(self, notice: Notice) -> None:
        pass

    def close(self) -> None:
        if self._writer:
            self._writer.release()
            self._writer = None

    def _goes_on(self) -> bool:
        """Whether the file is still there, and not full."""
        return self._part.is_file() and self._part.stat().st_size <= PART_BYTES

    def _begin(self, size: tuple[int, int]) -> cv2.VideoWriter:
        names = (self.path if n == 1 else self.path.with_stem(f"{self.path.stem}-{n}") for n in count(1))
        part = next(name for name in names if not name.exists())
        writer = cv2.VideoWriter(
            str(part), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter.fourcc(*"MJPG"), self._fps, size, True
        )
        if not writer.isOpened():
            raise OSError(errno.EIO, "OpenCV can't write a video", str(part))
        writer.set(cv2.VIDEOWRITER_PROP_QUALITY, 80)
        self._writer, self._part, self._size = writer, part, size
        return writer


class Window:
    """The overlay of the latest result on the screen. q, Esc or closing it ends the run, as Ctrl-C does.

    Raises:
        UsageError: no window can be opened here.
    """

    name = "window"

    def __init__(self) -> None:
        _require_window()
        self._is_open = False
        self._was_closed = False

    def write(self, result: Result) -> None:
        if self._was_closed:
            return
        try:
            picture = _bgr(result)
            if not self._is_open:
                cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
                cv2.resizeWindow(WINDOW, picture.shape[1], picture.shape[0])
                self._is_open = True
            cv2.imshow(WINDOW, picture)
            key = cv2.waitKey(1) & 0xFF
            self._was_closed = key in (ord("q"), 27) or not _is_shown()
        except cv2.error as error:
            raise FBClipError(f"the window can't be drawn: {error.err}") from error
        if self._was_closed:
            os.kill(os.getpid(), signal.SIGINT)

    def notify(self, notice: Notice) -> None:
        if self._is_open and not self._was_closed:
            cv2.setWindowTitle(WINDOW, f"fbclip: {notice.message}")

    def close(self) -> None:
        if self._is_open:
            with suppress(cv2.error):  # the user closed it
                cv2.destroyWindow(WINDOW)
            self._is_open = False


def _bgr(result: Result) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(result.overlay(), cv2.COLOR_RGB2BGR), np.uint8)


def _is_shown() -> bool:
    try:
        return cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) >= 1
    except cv2.error:  # Qt knows nothing of windows once the last one is closed
        return False


def _require_window() -> None:
    """Open a window in a process of its own: without a display some builds of OpenCV abort theirs."""
    instead = "or watch in a browser with fbclip serve, or record with --video"
    if not cv2.currentUIFramework():
        raise UsageError(
            f"--show needs an OpenCV with windows, and opencv-python-headless has none: pip uninstall -y "
            f"opencv-python-headless && pip install opencv-python, {instead}"
        )
    program = "import cv2; cv2.namedWindow('fbclip'); cv2.waitKey(1)"
    probe = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UsageError(f"--show needs a display, and no window opens here ({reason}): run on a desktop, {instead}")
