"""What a run does, and what it did, as typed values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Percents = dict[str, float]  # milliseconds by name: p50, p95, p99


@dataclass(frozen=True)
class SourceStatus:
    """A source now.

    Attributes:
        name: without passwords.
        state: "connecting", "live", "lost", "blind" (frames come, and show nothing) or "ended".
        message: the last that it said, one line.
        live: whether it drops frames that nobody takes in time.
        still: whether its pictures don't follow each other in time.
        counters: running totals: frames, dropped, reconnects, one for each kind of fault, and warm_up, frames left out
            after a connect, where that was asked for.
    """

    name: str
    state: str
    message: str
    live: bool
    still: bool
    counters: dict[str, int]


@dataclass(frozen=True)
class SinkStatus:
    """A sink now.

    Attributes:
        state: "working" or "failing".
        error: why it fails; None where it works.
        delivered, dropped: records, and records and notices that it took and lost.
        dropped_because: why the last was lost; None where none was.
        waiting: records and notices.
        age_ms: of records when the sink had taken them, over the last thousand; None before the first.
    """

    state: str
    error: str | None
    delivered: int
    dropped: int
    dropped_because: str | None
    waiting: int
    age_ms: Percents | None


@dataclass(frozen=True)
class Status:
    """A run now. Milliseconds are over the last thousand results; None before the first.

    Attributes:
        seconds: since it began.
        source: where frames come from.
        total: how many pictures there are to inspect; None where nobody knows.
        frames: results handed to the sinks; of these
        anomalous, overruled, unusable, absent: defects; good ones whose score reaches the threshold (see
            `Prediction.overruled`); such that show nothing; such without the part (see `Prediction.absent`).
        alarms: raised.
        rejected: frames that could not be inspected, like one of another size than the graph takes.
        fps: results per second, over the last five.
        age_ms: from capture until handed to the sinks.
        stages_ms: by stage.
        verdict, score: of the last result; None before the first.
        threshold: scores from here on are anomalous.
        memory: the name of the memory of good parts that scores; None of the zero-shot model.
        alarm: whether it is on.
        drift: "steady" or "drifting"; None without a calibration.
        sinks: by name.
    """

    seconds: float
    source: SourceStatus
    total: int | None
    frames: int
    anomalous: int
    alarms: int
    overruled: int
    unusable: int
    absent: int
    rejected: int
    fps: float
    age_ms: Percents | None
    stages_ms: dict[str, Percents | None]
    verdict: str | None
    score: float | None
    threshold: float
    memory: str | None
    alarm: bool
    drift: str | None
    sinks: dict[str, SinkStatus]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        status: at its end.
        rejection: why the last frame that could not be inspected couldn't; "" where all could.
        absence: why the source gave nothing to inspect when the run ended; "" where it did.
        failure: of the sink that ended a run of stills; "" where none did.
        seconds: from start to end.
    """

    status: Status
    rejection: str
    absence: str
    failure: str
    seconds: float
