"""What a benchmark found, as it is shown, recorded and compared. `docs/guides/benchmarks.md` describes the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fbclip.untrusted import build

SCHEMA = "fbclip-bench/1"
RECORDED_AS = {"deviation": "drift", "deviation_from": "drift_from"}  # fields whose names in the JSON are older


@dataclass(frozen=True)
class Environment:
    """What the figures must be read with; None or missing where the machine does not tell.

    Attributes:
        cores: that the benchmark may use.
        threads: environment variables that limit libraries' threads.
        versions: of fbclip, Python and the packages that compute.
    """

    processor: str
    device: str | None
    gpu: str | None
    cores: int
    memory_gb: float | None
    system: str
    governor: str | None
    threads: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """The bundle: sides in pixels, hashes of the graphs by precision, the name of the memory of good parts that ran, or None."""

    name: str
    image_size: int
    frame_size: tuple[int, int] | None
    graphs: Mapping[str, str]
    memory: str | None = None


@dataclass(frozen=True)
class Frames:
    """What every subject was given; `size` is height and width."""

    size: tuple[int, int]
    count: int
    source: str


@dataclass(frozen=True)
class Clock:
    """In MHz, over all turns."""

    least: float
    median: float
    most: float


@dataclass(frozen=True)
class Conditions:
    """Under which the rounds ran; None where the machine does not tell.

    Attributes:
        seconds: that they took.
        other_processes_cores, stolen_cores: cores that other processes, and a hypervisor, took meanwhile.
        cpu_throttled: how often the cores were slowed down for heat.
        gpu_throttled: why the GPU was slowed down.
        clocks_mhz: by "cpu" and "gpu".
    """

    seconds: float
    other_processes_cores: float | None
    stolen_cores: float | None
    cpu_throttled: int | None
    gpu_throttled: tuple[str, ...]
    clocks_mhz: Mapping[str, Clock]


@dataclass(frozen=True)
class Operations:
    """Floating-point operations for one image, in all and by stage."""

    total: int
    stages: Mapping[str, int]


@dataclass(frozen=True)
class Key:
    """Which subject: the backend as the command names it, the precision, the images per run."""

    backend: str
    precision: str
    batch: int


@dataclass(frozen=True)
class Warmup:
    """Untimed runs, whether they took about the same time in the end, and seconds of the last."""

    runs: int
    stable: bool
    seconds: float


@dataclass(frozen=True)
class Deviation:
    """Largest differences of scores and maps from the reference's, and the maps' 99.9th percentile, over `frames`."""

    frames: int
    score_max: float
    map_max: float
    map_p999: float


@dataclass(frozen=True)
class StageTime:
    """A stage of the method: milliseconds per run, share of all, its products' rate."""

    stage: str
    ms: float
    share: float
    gflops: float


@dataclass(frozen=True)
class OperatorTime:
    """An operator in a stage: nodes of the graph, milliseconds per run, share of all."""

    stage: str
    operator: str
    nodes: int
    ms: float
    share: float


@dataclass(frozen=True)
class Profile:
    """Where ONNX Runtime spends its time, the costliest operators first.

    Attributes:
        nodes: that a run executes, by ONNX Runtime's provider: on a GPU each is a launch or more.
    """

    runs: int
    stages: tuple[StageTime, ...]
    operators: tuple[OperatorTime, ...]
    nodes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class BenchResult:
    """What was measured of one subject; times are milliseconds per run, of `batch` images, or of one in tiles.

    Attributes:
        backend, precision, batch: see `Key`.
        device: where it ran.
        rounds_ms: every timed run, a list per round.
        cold_start_s: from the start of its process to the first result.
        cores_used: on average, while it ran.
        peak_host_mb, device_mb: the most memory, of the host and of the GPU.
        device_ms: "upload", "compute" and "download" apart, on a GPU.
        joules_per_image: by source; a source that showed nothing is in `too_coarse` instead.
        gflops: of matrix products and convolutions, by the median.
        limit_ms, share_of_limit: the roofline's least time, and that by the median.
        deviation: from the report's `deviation_from`.
        launches: how runs are started on a GPU: see `fbclip.backend.Backend`.
    """

    backend: str
    precision: str
    batch: int
    device: str
    rounds_ms: tuple[tuple[float, ...], ...]
    median_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    cold_start_s: float
    warmup: Warmup
    cores_used: float
    peak_host_mb: float
    device_mb: float | None
    device_ms: Mapping[str, float] | None
    joules_per_image: Mapping[str, float]
    gflops: float
    limit_ms: float | None
    share_of_limit: float | None
    deviation: Deviation | None
    profile: Profile | None
    launches: str | None = None
    too_coarse: tuple[str, ...] | None = None

    @property
    def key(self) -> Key:
        return Key(self.backend, self.precision, self.batch)

    @property
    def images(self) -> int:
        """Of a run: the batch, or one that is inspected in tiles."""
        runs = [one for each in self.rounds_ms for one in each]
        return max(1, round(self.images_per_s * sum(runs) / len(runs) / 1e3))


@dataclass(frozen=True)
class LeftOut:
    """A backend, or one subject of it, that could not be measured, and why."""

    backend: str
    precision: str | None
    batch: int | None
    reason: str


@dataclass(frozen=True)
class BenchReport:
    """A benchmark.

    Attributes:
        schema: `SCHEMA`.
        date: of its end, ISO 8601 in UTC.
        runs: timed runs of each subject, at least.
        order: who ran when in each round.
        rates: operations per second by "device precision library", bytes per second of "cpu copy" and "cuda copy"; medians.
        deviation_from: the subject that the others' results are compared with.
    """

    schema: str
    date: str
    environment: Environment
    bundle: Model
    frames: Frames
    runs: int
    order: tuple[tuple[int, ...], ...]
    conditions: Conditions
    rates: Mapping[str, float]
    operations: Operations
    deviation_from: Key | None
    results: tuple[BenchResult, ...]
    left_out: tuple[LeftOut, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self, dict_factory=lambda items: {RECORDED_AS.get(k, k): v for k, v in items})

    @classmethod
    def from_dict(cls, values: Any) -> BenchReport:
        """Of `to_dict`, perhaps by a later version: fields that this one does not know are passed over.

        Raises:
            ValueError: a field is missing or not what it should be.
        """
        return build(cls, _known(cls, values), "the benchmark")


def _known(rule: Any, values: Any) -> Any:
    """The fields of dataclasses in JSON's values, by their names here; what else is there is left out, and what an
    earlier version did not know is its default."""
    parts = get_args(rule)
    if get_origin(rule) in (Union, UnionType):
        return None if values is None else _known(parts[0], values)
    if isinstance(values, list) and parts:
        return [_known(parts[0], value) for value in values]
    if isinstance(values, dict) and len(parts) == 2:
        return {key: _known(parts[1], value) for key, value in values.items()}
    if isinstance(values, dict) and is_dataclass(rule):
        hints = get_type_hints(rule)
        names = {field.name: RECORDED_AS.get(field.name, field.name) for field in fields(rule)}
        later = {field.name: field.default for field in fields(rule) if field.default is not MISSING}
        return later | {here: _known(hints[here], values[there]) for here, there in names.items() if there in values}
    return values
