"""`fbclip score`: an archive to tables of results, by many workers, and what was found."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from signal import Signals
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from fbclip.bundle import Bundle
from fbclip.errors import FBClipError, Interrupted, UsageError
from fbclip.files import sha256
from fbclip.runtime.cluster.archive import (
    Address,
    Archive,
    Item,
    Part,
    Reader,
    is_address,
    open_archive,
    placed,
    plural,
)
from fbclip.runtime.cluster.job import Job
from fbclip.runtime.cluster.local import Crew
from fbclip.runtime.cluster.pictures import draw_histogram, draw_worst
from fbclip.runtime.cluster.results import FORMAT, SUMMARY, Receipt, Results
from fbclip.runtime.cluster.scorer import Recipe, bundle_sha256
from fbclip.runtime.host import Machine, cores
from fbclip.runtime.predictor import Predictor
from fbclip.stopping import StopRequest
from fbclip.terminal import cell, printable, progress, say, warn

POLL_S = 0.2  # until Ctrl-C is heard
SHOWN = 10  # pictures with the highest scores that are named
BESIDE = 500 << 20  # bytes that a worker takes beside its graph ...
TIMES = 4  # ... and times the size of that, at most


class Workers(Protocol):
    """Where parts are done."""

    def work(self, parts: list[Part]) -> Iterator[tuple[Part, Receipt]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Hands:
    """Who does the work.

    Attributes:
        workers: how many; None for as many as there is room for.
        cores: of each; None: of this machine each has its share, and one in a cluster.
        address: of a Ray cluster; None for processes of this machine.
        gpus: of each worker in a cluster; 0.25 is a fourth of one.
    """

    workers: int | None = None
    cores: int | None = None
    address: str | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise UsageError(f"GPUs of a worker are 0 or more; got {self.gpus:g}", option="gpus")
        if self.gpus and self.address is None:
            raise UsageError("GPUs are shared out by a cluster; got none: name it, or local", option="address")

    def start(self, job: Job) -> Workers:
        """The workers, ready to be given parts.

        Raises:
            UsageError: there is no such cluster, or no room in it.
        """
        if self.address is not None:
            from fbclip.runtime.cluster.on_ray import Cluster

            return Cluster(job, self.address, self.workers, self.cores or 1, self.gpus)
        workers = self.workers or max(1, min(cores() // (self.cores or 1), _room(job)))
        return Crew(job, workers, self.cores or max(1, cores() // workers))


def _room(job: Job) -> int:
    """Workers that this machine has memory for."""
    memory, files = Machine().memory(), job.bundle.manifest.files
    paths = [job.bundle.inside(name) for name in files]
    graph = max((path.stat().st_size for path in paths if path.is_file()), default=0)
    return cores() if memory is None else memory.available // (BESIDE + TIMES * graph)


def score(
    sources: Sequence[str],
    bundle: Bundle,
    out: str,
    recipe: Recipe,
    hands: Hands,
    console: Console,
    maps: bool = False,
    column: str | None = None,
) -> Receipt:
    """Score an archive, what of it isn't done yet, and say what was found.

    Args:
        sources: as `open_archive` takes them.
        bundle: what judges.
        out: folder of results, here or in a store.
        recipe: how it judges.
        hands: who does the work.
        maps: whether maps are kept.
        column: of tables.

    Returns:
        What the whole archive came to.

    Raises:
        Interrupted: a signal ended it; finished parts stay.
        UsageError: no such archive, bundle or cluster, or the folder has results of another.
        FBClipError: a worker failed, nothing could be read, or some pictures have to be fetched again.
    """
    here = replace(recipe, device="auto") if hands.address else recipe  # this machine may have other devices
    with here.predictor(bundle.path) as predictor:  # what can't be used is said at once
        say(console, predictor.explain_threshold())
        judges = _identity(predictor)
    job = Job(bundle, bundle_sha256(bundle), recipe, out, maps)
    results = Results(out)
    archive = open_archive(list(sources), column, lambda line: say(console, line), results.place)
    parts = _planned(archive, results, job, sources, judges)
    with results.hold():
        total, done, seconds = _go_on(parts, results, job, hands, console)
        with here.predictor(bundle.path) as predictor:
            _report(total, results, predictor, Reader(archive.store), seconds, done, console)
    return _insist(total)


def _go_on(parts: list[Part], results: Results, job: Job, hands: Hands, console: Console) -> tuple[Receipt, int, float]:
    """Have the parts done that aren't; what all came to, the images of those that were done now, and the seconds."""
    before_it = results.tables()
    finished = results.finished(lambda line: warn(console, line))
    total = Receipt()
    for part in parts:
        if part.id in finished:
            total.add(finished[part.id])
    older = results.older({part.id for part in parts})
    todo = [_with_known(part, older) for part in parts if part.id not in finished]
    images = sum(map(len, parts))
    before = images - sum(item not in older for part in todo for item in part.items or range(len(part)))
    already = f", {before:,} of them done before" if before else ""
    say(console, f"{plural(images, 'image')} in {plural(len(parts), 'table')}{already}")
    began = time.monotonic()
    if todo:
        results.write(SUMMARY, b'{"finished": false}\n')
        with closing(hands.start(job)) as workers, StopRequest(None) as stop:
            _work(workers, todo, total, stop, console)
    if old := results.remove(before_it - {part.id for part in parts}):
        say(console, f"{plural(old, 'table')} removed: of images that changed, are gone, or are in another table now")
    return total, sum(map(len, todo)), time.monotonic() - began


def _with_known(part: Part, older: dict[Item, str]) -> Part:
    """A part with the older tables that have rows of its pictures."""
    return replace(part, known=tuple(sorted({older[item] for item in part.items if item in older})))


def _identity(predictor: Predictor) -> dict[str, Any]:
    """What scores depend on, for those who go on with them."""
    bundle = predictor.bundle
    calibration = bundle.calibration
    return {
        "bundle": bundle.sha256,
        "calibration": sha256(calibration) if calibration.is_file() else None,
        "model": {precision: bundle.model_sha256(precision) for precision in bundle.manifest.precisions},
        "memory": predictor.memory.sha256 if predictor.memory else None,
        "place": [*predictor.view.place],
    }


def _planned(
    archive: Archive, results: Results, job: Job, sources: Sequence[str], judges: dict[str, Any]
) -> list[Part]:
    """The parts of an archive, of the size that the first run chose."""
    about = results.about() or {}
    size = about.get("images_a_part", archive.size_of_parts())
    values = asdict(job.recipe)
    values |= {name: sha256(Path(value)) for name, value in job.recipe.files().items()}
    results.prepare(
        {
            "format": FORMAT,
            "source": [placed(source) for source in sources],
            "store": _options(sources),
            **judges,
            "judged": {name: value for name, value in values.items() if name not in ("device", "batch")},
            "maps": job.maps,
            "images_a_part": size,
        }
    )
    return archive.parts(size)


def _options(sources: Sequence[str]) -> str:
    """What leads to the store besides its name, without a login: the same bucket at another endpoint is another."""
    return "&".join(sorted({Address.parse(source).options for source in sources if is_address(source)}))


def _work(workers: Workers, parts: list[Part], total: Receipt, stop: StopRequest, console: Console) -> None:
    """Have all parts done, under a bar with the rate.

    Raises:
        Interrupted, FBClipError.
    """
    done: SimpleQueue[tuple[Part, Receipt] | Exception | None] = SimpleQueue()

    def serve() -> None:  # a thread of its own, so that Ctrl-C is heard while all are at work
        try:
            for each in workers.work(parts):
                done.put(each)
            done.put(None)
        except Exception as error:
            done.put(error)

    threading.Thread(target=serve, name="workers", daemon=True).start()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    images, began, left = 0, time.monotonic(), len(parts)
    with progress(console, *columns, TimeRemainingColumn()) as bars:
        task = bars.add_task("images", total=sum(map(len, parts)), note="")
        while True:
            if stop.signal:
                name = Signals(stop.signal).name
                raise Interrupted(
                    f"stopped by {name}; {len(parts) - left:,} of {plural(len(parts), 'table')} were made, and the same command goes on",
                    stop.signal,
                )
            try:
                each = done.get(timeout=POLL_S)
            except Empty:
                continue
            if each is None:
                return
            if isinstance(each, Exception):
                raise each
            part, receipt = each
            total.add(receipt)
            left, images = left - 1, images + len(part)
            bars.update(task, advance=len(part), note=f"{images / (time.monotonic() - began):.1f}/s")


def _report(
    total: Receipt,
    results: Results,
    predictor: Predictor,
    reader: Reader,
    seconds: float,
    done: int,
    console: Console,
) -> None:
    """Tell and write what the archive came to."""
    counts = ", ".join(f"{count:,} {verdict}" for verdict, count in sorted(total.verdicts.items()))
    some = "" if done == total.images else f"{done:,} of them "
    rate = f", {some}in {seconds:.1f} s ({done / seconds:.1f}/s)" if done else ""
    say(console, f"{plural(total.images, 'image')}{rate}: {counts or 'none judged'}")
    if total.errors:
        warn(console, f"{total.errors:,} could not be read; their rows say why, like: {total.reasons[0]}")
    if total.worst:
        say(console, "the highest scores:")
    for high, name in total.worst[:SHOWN]:
        console.print(f"{high:.4f}", cell(name), soft_wrap=True)
    summary = {
        "finished": not total.unfetched,
        "images": total.images,
        "verdicts": dict(total.verdicts),
        "errors": total.errors,
        "unfetched": total.unfetched,
        "histogram": total.histogram,
        "worst": [{"source": printable(name), "score": score} for score, name in total.worst],
        "bundle": predictor.bundle.sha256,
    }
    results.write(SUMMARY, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
    results.write("histogram.png", draw_histogram(total, predictor.threshold))
    worst = draw_worst(total, predictor, reader)
    if worst:
        results.write("worst.jpg", worst)
    elif total.worst:
        say(console, "no worst.jpg: those with the highest scores lie in tables, or are gone")
    pictures = "histogram.png and worst.jpg" if worst else "histogram.png"
    say(console, f"results are in {printable(results.name)}: rows/ (Parquet), {SUMMARY}, {pictures}")


def _insist(total: Receipt) -> Receipt:
    """The receipt, unless nothing could be read, or another try may read more."""
    if total.errors == total.images:
        raise FBClipError(f"none of {total.images:,} images could be read: {total.reasons[0]}")
    if total.unfetched:
        raise FBClipError(f"{total.unfetched:,} images could not be fetched: the same command tries them again")
    return total
