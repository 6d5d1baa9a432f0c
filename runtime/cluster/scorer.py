"""What a worker does: opens the bundle once, and makes a table of each part that it is given."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fbclip
from fbclip.bundle import Bundle
from fbclip.errors import FBClipError, ImageError, reason
from fbclip.runtime.align import Align
from fbclip.runtime.cluster.archive import Part, Reader, read_content
from fbclip.runtime.cluster.results import Results, error_row, row_of
from fbclip.runtime.host import use_cores
from fbclip.runtime.live.pipeline import Pipeline
from fbclip.runtime.live.records import Frame
from fbclip.runtime.live.sources import BaseSource, CaptureOptions
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.roi import Roi
from fbclip.runtime.tiles import OVERLAP, Tiles


@dataclass(frozen=True)
class Recipe:
    """How pictures are judged: what a `Predictor` takes, as plain values that travel to other machines.

    Attributes:
        memory, roi, align, mask: may be paths; the others are no files.
    """

    device: str = "auto"
    precision: str = "auto"
    threshold: float | None = None
    memory: str = "auto"
    roi: str | None = None
    tiles: str | None = None
    overlap: float = OVERLAP
    detail: float | None = None
    align: str | None = None
    mask: str | None = None
    min_area: float = 0
    mm_per_pixel: float | None = None
    merge: int = 0
    max_regions: int | None = None
    batch: int = 1

    def predictor(self, bundle: str | Path) -> Predictor:
        """A predictor of a bundle, that judges by it.

        Raises:
            BundleError, DeviceError, UsageError: as `Predictor`.
        """
        return Predictor(
            bundle,
            device=self.device,
            precision=self.precision,
            threshold=self.threshold,
            memory=self.memory,
            roi=None if self.roi is None else Roi.parse(self.roi),
            tiles=None if self.tiles is None else Tiles.parse(self.tiles, self.overlap, self.detail),
            align=None if self.align is None else Align.parse(self.align, self.mask and Path(self.mask)),
            min_area=self.min_area,
            mm_per_pixel=self.mm_per_pixel,
            merge=self.merge,
            max_regions=self.max_regions,
            batch=self.batch,
        )

    def files(self) -> dict[str, str]:
        """The names of its values that are files."""
        values = {name: getattr(self, name) for name in ("memory", "roi", "align", "mask")}
        return {name: value for name, value in values.items() if value and Path(value).is_file()}


def bundle_sha256(bundle: Bundle) -> str:
    """The hash of all that a bundle judges by: its manifest, which has the hashes of its graphs, its memory and its
    calibration."""
    digest = hashlib.sha256()
    for name in ("manifest.json", "memory.npz", "calibration.json"):
        path = bundle.inside(name)
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode() if path.is_file() else b"")
    return digest.hexdigest()


class PartSource(BaseSource):
    """The pictures of a part, one after the other.

    Attributes:
        faults: by the number of a picture in the part, why it can't be inspected, and whether another try may get it.
    """

    still = True

    def __init__(self, part: Part) -> None:
        super().__init__(f"part {part.id}", CaptureOptions())
        self.total = len(part)
        self.names: list[str] = []
        self.faults: dict[int, tuple[str, bool]] = {}
        self._contents = Reader(part.store).contents(part)
        self._frames = self._read()

    def __next__(self) -> Frame:
        return next(self._frames)

    def reject(self, frame: Frame, error: ImageError) -> None:
        """A picture that was read can't be inspected."""
        self.faults[frame.index] = str(error), False

    def _read(self) -> Iterator[Frame]:
        start = time.perf_counter()
        for index, (name, content) in enumerate(self._contents):
            self.names.append(name)
            if self._closed.is_set():
                return
            try:
                image = read_content(content)
            except (ImageError, OSError) as error:
                self.faults[index] = reason(error), not isinstance(error, ImageError)
            else:
                read_ms = (time.perf_counter() - start) * 1e3
                yield Frame(image, name, index, time.monotonic(), time.time(), read_ms)
            start = time.perf_counter()


class Scorer:
    """A worker: a predictor that makes tables of parts.

    Args:
        bundle: path of the bundle.
        recipe: how pictures are judged.
        out: path or address of the folder of results.
        cores: that this process may use; None for all that it is given.
        maps: whether the tables have the maps.

    Raises:
        FBClipError: the bundle can't be used here.
    """

    def __init__(self, bundle: str, recipe: dict[str, Any], out: str, cores: int | None, maps: bool) -> None:
        if cores:
            use_cores(cores)
        self._predictor = Recipe(**recipe).predictor(bundle)
        self._results, self._maps = Results(out), maps
        self._sha256 = bundle_sha256(self._predictor.bundle)

    def ready(self) -> dict[str, Any]:
        """What it judges with, to be the same on every machine."""
        return {
            "fbclip": fbclip.__version__,
            "bundle": self._sha256,
            "device": self._predictor.backend.device,
            "precision": self._predictor.precision,
        }

    def score(self, part: str) -> dict[str, Any]:
        """Score a part and write its table: {"receipt": …}, or {"error": why that can't be, "exit_code": …}."""
        try:
            receipt = self._results.write_part((given := Part.from_json(part)).id, self._rows(given))
        except FBClipError as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except OSError as error:  # a table of pictures that went away meanwhile
            return {"error": reason(error), "exit_code": 1}
        return {"receipt": receipt.to_json()}

    def _rows(self, part: Part) -> Iterator[dict[str, Any]]:
        """A row for each picture, in the order of the part: those that older tables have, and new ones of the others."""
        if part.rows:
            return self._judged(part)
        known = self._results.known_rows(part.known)
        judged = self._judged(replace(part, items=tuple(item for item in part.items if item not in known)))
        return (
            known[item] if item in known else {**next(judged), "size": item.size, "changed": item.changed}
            for item in part.items
        )

    def _judged(self, part: Part) -> Iterator[dict[str, Any]]:
        """The rows of pictures that are inspected now."""
        source = PartSource(part)
        at_once = self._predictor.frames_at_once
        pipeline = Pipeline(source, self._predictor, [], batch=at_once, rejected=source.reject)
        fault = partial(self._fault, source)
        done = 0
        for record in pipeline.records():
            yield from map(fault, range(done, record.frame.index))
            yield row_of(record, self._predictor, self._maps)
            done = record.frame.index + 1
        yield from map(fault, range(done, len(source.names)))
        if len(source.names) != len(part):
            raise FBClipError(f"{source.name} has {len(part)} pictures, and {len(source.names)} were found")

    def _fault(self, source: PartSource, index: int) -> dict[str, Any]:
        why, unfetched = source.faults[index]
        return error_row(source.names[index], why, self._predictor.bundle, unfetched)
