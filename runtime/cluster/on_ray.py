"""Parts on a cluster: Ray Data gives them to actors, and again to another where one or its machine is lost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fbclip.errors import FBClipError, UsageError, require_package
from fbclip.files import new_folder, sha256, take_place
from fbclip.runtime.cluster.archive import Part, brief
from fbclip.runtime.cluster.job import Job, checked, receipt_of
from fbclip.runtime.cluster.results import Receipt, Results

if TYPE_CHECKING:
    import ray


class Cluster:
    """Workers of a Ray cluster.

    Args:
        job: what they do.
        address: of the cluster: ray://HOST:10001, auto for the one that this machine belongs to, or local to start one.
        workers: actors; None for as many as there is room for.
        cores, gpus: that each of them takes of its machine.

    Raises:
        UsageError: there is no such cluster, or no room in it for one worker.
    """

    def __init__(self, job: Job, address: str, workers: int | None, cores: int, gpus: float) -> None:
        require_package("ray", "cluster", "address")
        if not re.fullmatch(r"auto|local|(ray://)?[\w.-]+:\d+", address):
            raise UsageError(
                "a cluster is ray://HOST:10001, auto, local or HOST:PORT; got none of them", option="address"
            )
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what it says of itself, in lines of its own
        import ray

        self._job, self._is_client = job, address.startswith("ray://")
        try:
            # a client's server takes no more than the address
            quiet = {} if self._is_client else {"logging_level": logging.ERROR, "log_to_driver": False}
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise UsageError(
                f"a cluster is ray://HOST:10001, auto (of this machine, after ray start) or local; {address} can't be "
                f"reached: {brief(error)}",
                option="address",
            ) from error
        there = ray.cluster_resources()
        room = int(min(there.get("CPU", 0) / cores, there.get("GPU", 0) / gpus if gpus else float("inf")))
        if room < 1:
            self.close()
            needs = f"{cores} cores and {gpus:g} GPUs" if gpus else f"{cores} cores"
            raise UsageError(
                f"each worker takes {needs}; the cluster has {there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs",
                option="gpus" if gpus else "cores",
            )
        self.workers = min(workers or room, room)
        self._resources: dict[str, float] = {"num_cpus": cores, **({"num_gpus": gpus} if gpus else {})}
        self._cores = cores

    def work(self, parts: list[Part]) -> Iterator[tuple[Part, Receipt]]:
        """Parts as they are done, in no order.

        Raises:
            FBClipError: of a worker.
        """
        import ray

        job = self._job
        by_id = {part.id: part for part in parts}
        told = (pack(job), asdict(job.recipe), job.out, self._cores, job.maps)
        answers: Any = (told, [part.to_json() for part in parts], min(self.workers, len(parts)), self._resources)
        if self._is_client:  # Ray Data works within the cluster alone
            there = ray.remote(num_cpus=0)(Answers).remote(*answers)
            given = iter(lambda: ray.get(there.next.remote()), None)
        else:
            given = iter(Answers(*answers).next, None)
        known: set[str] = set()
        for part, text in given:
            answer = json.loads(text)
            receipt = receipt_of(answer)
            if answer["host"] not in known:
                self._check(answer, part)
                known.add(answer["host"])
            yield by_id[part], receipt

    def _check(self, answer: dict[str, Any], part: str) -> None:
        """Insist that a machine has this program and bundle, and writes where this one reads."""
        checked(self._job, answer["ready"], answer["host"])
        if not Results(self._job.out).receipt(part):
            raise UsageError(
                f"all machines write into one folder; what {answer['host']} wrote isn't in {self._job.out} here: use a "
                f"folder that they share, or a store",
                option="out",
            )

    def close(self) -> None:
        """Leave the cluster; its actors of this run end."""
        import ray

        with suppress(Exception):
            ray.shutdown()


def pack(job: Job) -> dict[str, ray.ObjectRef]:
    """The bundle's files and those of the recipe by their names, in the cluster's memory, once for all workers.

    Of the engines none travel: each is for its device.
    """
    import ray

    names = ["manifest.json", *job.bundle.manifest.files, "memory.npz", "calibration.json"]
    files = {f"bundle/{name}": job.bundle.inside(name) for name in names}
    files |= {f"recipe/{name}": Path(value) for name, value in job.recipe.files().items()}
    return {name: ray.put(np.fromfile(path, np.uint8)) for name, path in files.items() if path.is_file()}


def unpack(luggage: dict[str, ray.ObjectRef], recipe: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The bundle on this machine's disk, where the first worker puts it, and the recipe with its files' names here."""
    import ray

    contents = {name: ray.get(ref) for name, ref in luggage.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    known = hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir(), f"fbclip-{_user()}-{known}")
    if not all((place / name).is_file() and sha256(place / name) == value for name, value in hashes.items()):
        with new_folder(place) as folder:
            for name, content in contents.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                content.tofile(folder / name)
            take_place(folder, place)
    here = {name.removeprefix("recipe/"): str(place / name) for name in contents if name.startswith("recipe/")}
    return place / "bundle", {**recipe, **here}


def _user() -> str:
    import getpass

    return getpass.getuser()


class Answers:
    """What the actors say of each part, as it comes: Ray Data, from inside the cluster.

    Args:
        told: an `Actor`'s arguments.
        parts: as JSON.
        workers: actors.
        resources: of each.
    """

    def __init__(self, told: tuple[Any, ...], parts: list[str], workers: int, resources: dict[str, float]) -> None:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        done = rows.map_batches(
            Actor,
            fn_constructor_args=told,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
        self._rows = iter(done.iter_rows())

    def next(self) -> tuple[str, str] | None:
        """The id of a part and its answer as JSON; None after the last."""
        row = next(self._rows, None)
        return row and (row["id"], row["answer"])


class Actor:
    """A worker of the cluster; Ray makes it once, and again where its machine is lost."""

    def __init__(
        self, luggage: dict[str, ray.ObjectRef], recipe: dict[str, Any], out: str, cores: int, maps: bool
    ) -> None:
        self._told = luggage, recipe, out, cores, maps
        self._scorer: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score one part: a batch of one row."""
        part = str(batch["part"][0])
        try:
            scorer = self._ready()
            answer = {**scorer.score(part), "ready": scorer.ready(), "host": socket.gethostname()}
        except FBClipError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        return {"id": [Part.from_json(part).id], "answer": [json.dumps(answer, allow_nan=False)]}

    def _ready(self) -> Any:
        from fbclip.runtime.cluster.scorer import Scorer

        if self._scorer is None:
            luggage, recipe, out, cores, maps = self._told
            bundle, recipe = unpack(luggage, recipe)
            self._scorer = Scorer(str(bundle), recipe, out, cores, maps)
        return self._scorer
