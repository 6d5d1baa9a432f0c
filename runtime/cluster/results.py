"""What is written of an archive: a folder of Parquet tables, a row for each picture, and what the whole came to."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fbclip.bundle import Bundle
from fbclip.errors import FBClipError, UsageError, require_package
from fbclip.files import lock, replacing, require_writable, sweep, write_error
from fbclip.runtime.calibrate import Sample
from fbclip.runtime.cluster.archive import STORES, Address, Item, Reader, brief, is_address, plural
from fbclip.runtime.live.records import Record
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.sight import Look, look
from fbclip.terminal import printable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs

ABOUT, ROWS, SUMMARY = "score.json", "rows", "summary.json"
FORMAT = 1
SAMPLED = ["source", "error", "verdict", "unusable", "precision", "score", "peak", "ground", "pixels_sha256", "look"]
KINDS = {  # what `score.json` says, as a message calls it
    "format": "release of fbclip",
    "source": "archive",
    "store": "store",
    "bundle": "bundle",
    "calibration": "calibration",
    "model": "model",
    "memory": "memory",
    "place": "region, tiling or alignment",
    "judged": "threshold or rule for regions",
    "maps": "choice to keep maps",
    "images_a_part": "size of tables",
}
BLIND = ("black", "uniform")  # shows nothing, whatever good parts look like
TABLE = re.compile(r"([0-9a-f]{32})\.parquet")  # other files are not ours
OWN = b"fbclip"  # key of a table's receipt in its metadata
AT_ONCE = 128  # rows that are written together
BINS = 50  # of the histogram of scores, from 0 to 1
WORST = 24  # pictures with the highest scores that are remembered
TOLD = 5  # reasons that are told of pictures that could not be read
SPOOLED = 64 << 20  # bytes of a table that are kept in memory


@dataclass
class Receipt:
    """What a part, or several, came to.

    Attributes:
        images: rows.
        verdicts: of these, by verdict.
        errors: pictures without a verdict, for they could not be read.
        unfetched: of these, which another try may get.
        histogram: of scores, `BINS` numbers.
        worst: the highest scores, each with its picture's name, the highest first.
        reasons: of some pictures that could not be read.
    """

    images: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    unfetched: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    worst: list[tuple[float, str]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, other: Receipt) -> None:
        self.images += other.images
        self.verdicts += other.verdicts
        self.errors += other.errors
        self.unfetched += other.unfetched
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.worst = nlargest(WORST, [*self.worst, *other.worst])
        self.reasons = [*self.reasons, *other.reasons][:TOLD]

    def count(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.images += 1
        if row["error"] is not None:
            self.errors += 1
            self.unfetched += row["unfetched"]
            self.reasons = [*self.reasons, row["error"]][:TOLD]
            return
        self.verdicts[row["verdict"]] += 1
        if row["verdict"] not in ("good", "defect"):
            return
        self.histogram[min(int(row["score"] * BINS), BINS - 1)] += 1
        if len(self.worst) < WORST or row["score"] > self.worst[-1][0]:
            self.worst = nlargest(WORST, [*self.worst, (row["score"], row["source"])])

    def to_json(self) -> str:
        return json.dumps(vars(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        values = json.loads(text)
        values["verdicts"] = Counter(values["verdicts"])
        values["worst"] = [(float(score), str(name)) for score, name in values["worst"]]
        return cls(**values)


def schema() -> pa.Schema:
    """The columns of a row, in the words of the records of `fbclip infer`, and what a calibration takes of a picture."""
    import pyarrow as pa

    text, real, whole = pa.string(), pa.float32(), pa.int64()
    region = pa.struct(
        [
            ("box", pa.list_(pa.int32())),
            ("peak", real),
            ("area", whole),
            ("weak", pa.bool_()),
            ("length", pa.float64()),
            ("mean", pa.float64()),
            ("area_mm2", pa.float64()),
            ("length_mm", pa.float64()),
            ("place", pa.list_(pa.float64())),
        ]
    )
    seen = pa.struct([(name, pa.float64()) for name in ("light", "blown", "green", "sharpness")])
    stages = pa.struct([(name, real) for name in ("read", "wait", "preprocess", "model", "postprocess")])
    return pa.schema(
        [
            pa.field("source", text, nullable=False),
            ("error", text),
            ("size", whole),
            ("changed", whole),
            ("time", pa.timestamp("us", "UTC")),
            ("score", real),
            ("threshold", pa.float64()),
            ("is_anomalous", pa.bool_()),
            ("verdict", text),
            ("overruled", text),
            ("unusable", text),
            ("memory", text),
            ("regions", pa.list_(region)),
            ("part", pa.list_(pa.list_(pa.float64()))),
            ("timings_ms", stages),
            pa.field("bundle", text, nullable=False),
            ("precision", text),
            ("device", text),
            ("peak", real),
            ("ground", pa.float64()),
            ("pixels_sha256", text),
            ("look", seen),
            ("map", pa.binary()),
        ]
    )


def row_of(record: Record, predictor: Predictor, with_map: bool) -> dict[str, Any]:
    """The row of a picture that was inspected.

    Args:
        predictor: that inspected it.
        with_map: whether the model's map is kept: a NumPy file (.npy) of float32 (H', W').
    """
    sample = Sample.of(record.prediction, look(predictor.view.take(record.frame.image).shown))
    return {
        **record.to_dict(),
        "source": _text(record.frame.name),
        "time": round(record.frame.wall * 1e6),
        "bundle": predictor.bundle.sha256,
        "precision": predictor.precision,
        "device": predictor.backend.device,
        "peak": sample.peak,
        "ground": sample.ground,
        "pixels_sha256": sample.sha256,
        "look": asdict(sample.look),
        "map": _npy(record.prediction.model_map) if with_map else None,
        "error": None,
    }


def error_row(name: str, error: object, bundle: Bundle, unfetched: bool = False) -> dict[str, Any]:
    """The row of a picture of which nothing is known; `unfetched` where another try may get it."""
    return {"source": _text(name), "error": printable(error)[:500], "bundle": bundle.sha256, "unfetched": unfetched}


def _text(name: str) -> str:
    """A name as a table can hold it: bytes that are no UTF-8 are spelled."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def sample_of(row: dict[str, Any]) -> Sample:
    """What a calibration takes of a row."""
    return Sample(row["source"], row["score"], row["peak"], row["ground"], row["pixels_sha256"], Look(**row["look"]))


def _npy(values: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, values, allow_pickle=False)
    return data.getvalue()


class Results:
    """The folder of results, here or in a store.

    Args:
        place: its path or address.
    """

    def __init__(self, place: str) -> None:
        require_package("pyarrow", "cluster")
        if not place:
            raise UsageError("results go into a folder; got an empty name (for this one say .)", option="out")
        address = Address.parse(place, "out") if is_address(place) else None
        self.place, self.name = os.path.abspath(place), place  # noqa: PTH100 - of this machine
        if address:
            self.place = self.name = address.name
        self.system, self.path = Reader(address.store if address else "").place(self.place)

    def __repr__(self) -> str:
        return f"Results({self.name!r})"

    @classmethod
    def at(cls, place: str) -> Results | None:
        """The results that a folder holds; None where it holds none.

        Raises:
            UsageError: they can't be read.
        """
        if not ((is_address(place) and place.partition("://")[0].lower() in STORES) or Path(place, ABOUT).is_file()):
            return None
        found = cls(place)
        return found if found.about() else None

    @property
    def is_here(self) -> bool:
        return not is_address(self.place)

    def prepare(self, about: dict[str, Any]) -> None:
        """Make the folder, or find that it holds results of the same archive by the same bundle.

        Raises:
            UsageError: it holds others', or something else.
            FBClipError: it can't be written.
        """
        with self._telling():
            if self.is_here:
                require_writable(Path(self.place))
                require_writable(Path(self.place, ROWS))
                sweep(Path(self.place, ROWS))
            if (old := self.about()) is None:
                if self.tables():
                    raise UsageError(
                        f"{self.name} has rows and no {ABOUT} that says of what: choose another folder", option="out"
                    )
                self.write(ABOUT, (json.dumps(about, indent=1, allow_nan=False) + "\n").encode())
                return
        for name, value in about.items():
            if old.get(name) != value:
                told = f" ({_short(old.get(name))})" if name == "source" else ""
                raise UsageError(
                    f"a folder of results is of one archive, judged in one way; {self.name} is of another "
                    f"{KINDS[name]}{told}: choose another folder",
                    option="out",
                )

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, keep other commands out of the folder; in a store that can't be done.

        Raises:
            UsageError: another command writes into it.
        """
        if not self.is_here:
            yield
            return
        handle = os.open(Path(self.place, ABOUT), os.O_RDONLY)
        try:
            if not lock(handle):
                raise UsageError(f"another command writes into {self.name}: wait until it has ended", option="out")
            yield
        finally:
            os.close(handle)

    def about(self) -> dict[str, Any] | None:
        """What `prepare` wrote; None where nothing is there yet.

        Raises:
            UsageError: it is none of ours.
        """
        try:
            values: Any = json.loads(self._read(ABOUT, 1 << 20))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            raise UsageError(f"{self.name}/{ABOUT} can't be read: {brief(error)}", option="out") from error
        size = values.get("images_a_part") if isinstance(values, dict) else None
        if not isinstance(size, int) or size < 1 or values.get("format") != FORMAT:
            raise UsageError(f"{self.name} is no folder of results of this fbclip: choose another", option="out")
        return dict(values)

    def require_finished(self) -> None:
        """Insist that the archive was scored to its end.

        Raises:
            UsageError: it was not.
        """
        try:
            finished = json.loads(self._read(SUMMARY, 1 << 24))["finished"] is True
        except (OSError, ValueError, KeyError, TypeError):
            finished = False
        if not finished:
            raise UsageError(f"{self.name} is not finished: run its fbclip score again to its end")

    def finished(self, tell: Callable[[str], None] = lambda line: None) -> dict[str, Receipt]:
        """The parts that are there and whole, but for those with pictures that another try may get.

        Args:
            tell: told of tables that can't be read, which are done again.
        """
        from concurrent.futures import ThreadPoolExecutor

        names = sorted(self.tables())
        with ThreadPoolExecutor(16) as pool:  # in a store each takes some ten ms
            receipts = list(pool.map(self.receipt, names))
        if broken := [name for name, receipt in zip(names, receipts, strict=True) if receipt is None]:
            tell(f"{plural(len(broken), 'table')} of {self.name} can't be read, like {broken[0]}.parquet: made again")
        return {n: receipt for n, receipt in zip(names, receipts, strict=True) if receipt and not receipt.unfetched}

    def receipt(self, part: str) -> Receipt | None:
        """What a part came to; None where it can't be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_metadata(f"{self.path}/{ROWS}/{part}.parquet", filesystem=self.system)
            receipt = Receipt.from_json((metadata.metadata or {})[OWN])
            return receipt if receipt.images == metadata.num_rows else None
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            return None

    def remove(self, old: set[str]) -> int:
        """Remove tables; how many there were."""
        for name in old:
            self.system.delete_file(f"{self.path}/{ROWS}/{name}.parquet")
        return len(old)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The rows of all tables, in the order of the tables' names, with these columns.

        Raises:
            UsageError: a table can't be read.
        """
        import pyarrow as pa
        import pyarrow.dataset

        try:
            paths = [f"{self.path}/{ROWS}/{name}.parquet" for name in sorted(self.tables())]
            tables = pa.dataset.dataset(paths, schema(), filesystem=self.system, format="parquet")
            for batch in tables.to_batches(columns=columns):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"the tables of {self.name} can't be read: {brief(error)}") from error

    def older(self, parts: Collection[str]) -> dict[Item, str]:
        """What tables besides those of some parts know: pictures, and the id of the table that has the row of each."""
        found: dict[Item, str] = {}
        for name in self.tables() - set(parts):
            for row in self._table(name, ["source", "error", "size", "changed"]):
                if row["error"] is None and row["size"] is not None:
                    found[Item(row["source"], row["size"], row["changed"])] = name
        return found

    def known_rows(self, parts: Iterable[str]) -> dict[Item, dict[str, Any]]:
        """The rows of some tables, of pictures that could be read."""
        rows = (row for part in parts for row in self._table(part, None) if row["error"] is None)
        return {Item(row["source"], row["size"], row["changed"]): row for row in rows}

    def _table(self, part: str, columns: list[str] | None) -> list[dict[str, Any]]:
        """The rows of one table; none where it can't be read, or is of an older form."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            path = f"{self.path}/{ROWS}/{part}.parquet"
            rows: list[dict[str, Any]] = pq.read_table(path, columns=columns, filesystem=self.system).to_pylist()
        except (OSError, pa.ArrowException):
            return []
        return rows

    def tables(self) -> set[str]:
        """The ids of all tables."""
        from pyarrow.fs import FileSelector

        infos = self.system.get_file_info(FileSelector(f"{self.path}/{ROWS}", allow_not_found=True))
        return {found[1] for info in infos if (found := TABLE.fullmatch(info.base_name))}

    def good_images(self) -> list[str]:
        """The names of pictures that were found good, sorted."""
        self.require_finished()
        return sorted(row["source"] for row in self.rows(["source", "verdict"]) if row["verdict"] == "good")

    def samples(self, predictor: Predictor) -> Iterator[Sample]:
        """What a calibration of a predictor takes of the pictures that showed something.

        Raises:
            UsageError: another model, memory, view or precision has scored them.
        """
        self.require_finished()
        about = self.about() or {}
        same = about.get("model", {}).get(predictor.precision) == predictor.bundle.model_sha256(predictor.precision)
        memory = predictor.memory.sha256 if predictor.memory else None
        if not same or (about.get("memory"), about.get("place")) != (memory, [*predictor.view.place]):
            raise UsageError(
                f"a threshold is of the model, memory, region and tiles that inspect; {self.name} was scored with others: "
                f"score it again, or calibrate with the images themselves"
            )
        for row in self.rows(SAMPLED):
            if row["error"] is not None or row["verdict"] == "absent" or row["unusable"] in BLIND:
                continue
            if row["precision"] != predictor.precision:
                raise UsageError(
                    f"{self.name} was scored in {row['precision']}: calibrate for that", option="precision"
                )
            yield sample_of(row)

    def write_part(self, part: str, rows: Iterator[dict[str, Any]]) -> Receipt:
        """Write the rows of a part; it has its name when all of them are in it.

        Raises:
            FBClipError, UsageError: it can't be written; see `fbclip.files.write_error`. Whatever `rows` raises.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns, receipt = schema(), Receipt()
        waiting: list[dict[str, Any]] = []
        with (
            self._writing(f"{ROWS}/{part}.parquet") as file,
            pq.ParquetWriter(file, columns, compression="zstd") as writer,
        ):
            for row in rows:
                receipt.count(row)
                waiting.append(row)
                if len(waiting) == AT_ONCE:
                    writer.write_table(pa.Table.from_pylist(waiting, columns))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, columns))
            writer.add_key_value_metadata({OWN: receipt.to_json().encode()})
        return receipt

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the folder, whole.

        Raises:
            FBClipError, UsageError: see `fbclip.files.write_error`.
        """
        with self._writing(name) as file:
            file.write(content)

    @contextmanager
    def _writing(self, name: str) -> Iterator[IO[bytes]]:
        if self.is_here:
            with replacing(Path(self.place, name)) as file:
                yield file
            return
        with tempfile.SpooledTemporaryFile(
            SPOOLED
        ) as whole:  # an object takes its name when it is closed, whole or not
            yield whole
            whole.seek(0)
            with self._telling(), self.system.open_output_stream(f"{self.path}/{name}") as stream:
                shutil.copyfileobj(whole, stream)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.is_here:
                raise write_error(error, self.place) from error
            raise FBClipError(f"can't write {self.name}: {brief(error)}") from error

    def _read(self, name: str, most: int) -> bytes:
        with self.system.open_input_stream(f"{self.path}/{name}") as stream:
            content: bytes = stream.read(most)
        return content


def _short(value: Any) -> str:
    return ", ".join(map(str, value))[:100] if isinstance(value, list) else printable(value)[:60]
