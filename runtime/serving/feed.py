"""What the page shows of a running pipeline: the newest picture, scores over time, what happened, alarms."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from fbclip.images import encode_image
from fbclip.runtime.live.records import Notice, Record
from fbclip.runtime.live.sinks.events import event_folders
from fbclip.runtime.prediction import UNJUDGED

SCORES = 4096  # results that the graph goes back
NOTICES = 200
EVENTS = 60  # alarms whose picture is kept in memory, about 100 kB each
SHOWN_SIDE = 1280  # pixels of the longer side of a picture on the page
RECORD = (
    "source",
    "index",
    "time",
    "score",
    "threshold",
    "is_anomalous",
    "regions",
    "alarm",
    "timings_ms",
)  # of a Record
LATER = ("verdict", "overruled", "unusable", "memory")  # of a Record too, which older events don't have
MEASURED = ("length", "mean", "area_mm2", "length_mm")  # of a region, which older events don't have
Point = tuple[float, float | None, bool]
T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """An alarm with its picture.

    Attributes:
        id: its number on the server, from 1.
        result: of the frame that raised it, plain values.
        picture: the overlay, JPEG.
    """

    id: int
    result: dict[str, Any]
    picture: bytes = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, **self.result}


@dataclass(frozen=True)
class Update:
    """What came since a viewer asked last.

    Attributes:
        position: to ask from the next time.
        scores: (seconds since 1970, score 0..1, whether the alarm was on), oldest first; no score of what is neither good
            nor a defect.
        notices, alarms: oldest first.
    """

    position: int
    scores: list[Point]
    notices: list[Notice]
    alarms: list[Event]


class Feed:
    """A sink that remembers for viewers; any thread may ask it. Pictures are drawn when somebody looks.

    Args:
        events: folder of an `EventRecorder`; the alarms of earlier runs in it are remembered too.
    """

    name = "page"

    def __init__(self, events: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._drawing = threading.Lock()
        self._listeners: set[Callable[[], object]] = set()
        self._position = 1  # of what is there from the start
        self._scores: deque[tuple[int, Point]] = deque(maxlen=SCORES)
        self._notices: deque[tuple[int, Notice]] = deque(maxlen=NOTICES)
        self._alarms: deque[tuple[int, Event]] = deque(maxlen=EVENTS)
        self._raised = 0
        for result, jpeg in _recorded(events) if events else ():
            if _is_whole(result):
                self._remember(result, jpeg)
        self._latest: Record | None = None
        self._drawn: tuple[Record, bytes] | None = None

    def write(self, result: Record) -> None:
        jpeg = self.picture(result) if result.alarm_began else None
        with self._lock:
            self._position += 1
            self._latest = result
            score = None if result.prediction.verdict in UNJUDGED else round(result.prediction.score, 4)
            self._scores.append((self._position, (round(result.frame.wall, 3), score, result.alarm)))
            if jpeg:
                self._remember(result.to_dict(), jpeg)
        self._call()

    def notify(self, notice: Notice) -> None:
        with self._lock:
            self._position += 1
            self._notices.append((self._position, notice))
        self._call()

    def close(self) -> None:
        """Nothing to release: what came stays to be seen after the source has ended."""

    @property
    def latest(self) -> Record | None:
        return self._latest

    @property
    def alarms(self) -> list[Event]:
        """The last alarms, newest first."""
        with self._lock:
            return [alarm for _, alarm in reversed(self._alarms)]

    def since(self, position: int) -> Update:
        """Everything remembered that came after a position; 0 is the beginning."""
        with self._lock:
            return Update(
                self._position,
                _after(self._scores, position),
                _after(self._notices, position),
                _after(self._alarms, position),
            )

    def picture(self, result: Record) -> bytes:
        """The overlay of a result as JPEG; drawn once for all who look at the same one."""
        with self._drawing:
            if self._drawn is None or self._drawn[0] is not result:
                self._drawn = result, encode_image(result.draw(SHOWN_SIDE), ".jpg")
            return self._drawn[1]

    @contextmanager
    def listening(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call back, from the thread that writes, after each result and notice."""
        with self._lock:
            self._listeners.add(callback)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.discard(callback)

    def _remember(self, result: dict[str, Any], jpeg: bytes) -> None:
        self._raised += 1
        self._alarms.append((self._position, Event(self._raised, result, jpeg)))

    def _call(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for callback in listeners:
            callback()


def _recorded(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Record and overlay of the frames that raised the last alarms in a folder of events, oldest first."""
    for event in event_folders(folder)[-EVENTS:] if folder.is_dir() else ():
        try:
            description = json.loads((event / "event.json").read_text("utf-8"))
            raised = next(frame for frame in description["frames"] if frame["index"] == description["alarms"][0])
            raised.setdefault("timings_ms", raised.get("stages_ms"))  # as older events call it
            record = {name: raised[name] for name in RECORD}
            yield (
                record | {name: raised[name] for name in LATER if name in raised},
                (event / "overlay.jpg").read_bytes(),
            )
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            continue  # the recorder makes room, a person cleans up: what is gone or torn is not shown


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether what a file says of a frame can be shown: somebody may have written in it."""
    try:
        numbers = [*(record[name] for name in ("index", "time", "score", "threshold")), *record["timings_ms"].values()]
        numbers += [value for region in record["regions"] for value in (*region["box"], region["peak"], region["area"])]
        numbers += [region[name] for region in record["regions"] for name in MEASURED if name in region]
        places = [region["place"] for region in record["regions"] if "place" in region]
        numbers += [value for place in places for value in place]
        flags = (record["is_anomalous"], record["alarm"])
        return (
            all(type(number) in (int, float) and isfinite(number) for number in numbers)
            and type(record["index"]) is int
            and all(len(region["box"]) == 4 for region in record["regions"])
            and all(len(place) == 2 for place in places)
            and isinstance(record["source"], str)
            and all(isinstance(flag, bool) for flag in flags)
        )
    except (AttributeError, LookupError, TypeError):
        return False


def _after(kept: deque[tuple[int, T]], position: int) -> list[T]:
    return [item for number, item in kept if number > position]
