"""`fbclip score`: archives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from fbclip.commands.groups import BATCH_NAMES, AreaGroup, BundleGroup, DefectGroup
from fbclip.commands.mount import mounted, option
from fbclip.parsing import parse_threshold


@dataclass(frozen=True)
class HandsGroup:
    """Who does the work."""

    PANEL: ClassVar[str] = "Workers"
    workers: Annotated[
        int | None,
        option(
            "Processes of this machine, or of the cluster. Default: as many as there are cores and memory for.",
            metavar="N",
            min=1,
        ),
    ] = None
    address: Annotated[
        str | None,
        option(
            "Work on a Ray cluster: ray://HOST:10001, auto (the one that this machine belongs to), or local (one that is "
            "started here).",
            metavar="ADDRESS",
        ),
    ] = None
    cores: Annotated[
        int | None,
        option(
            "Cores of each worker. Default: on this machine each has its share, in a cluster one.", metavar="N", min=1
        ),
    ] = None
    gpus: Annotated[
        float, option("GPUs of each worker in a cluster; 0.25 shares one among four.", metavar="N", min=0)
    ] = 0.0


@mounted(first=("bundle", "out", "workers", "address", "save_maps"))
def score(
    hands: HandsGroup,
    model: BundleGroup,
    area: AreaGroup,
    verdict: DefectGroup,
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Images, folders, globs, lists (.txt, a path in each line) and Parquet tables (a column of paths or of "
            "images), here or at s3://… or gs://….",
        ),
    ],
    out: Annotated[
        str,
        option("Folder of the results, here or at s3://… or gs://…: the same again goes on.", metavar="DIR"),
    ],
    save_maps: Annotated[bool, option("Keep the anomaly maps in the tables, too.", "--save-maps")] = False,
    column: Annotated[
        str | None, option("Column of Parquet tables. Default: the only one that fits.", metavar="NAME", panel="Tables")
    ] = None,
    batch: Annotated[
        int, option("Images given to the model at once.", *BATCH_NAMES, metavar="N", min=1, panel=BundleGroup.PANEL)
    ] = 1,
) -> None:
    """Score an archive, by many processes or on a cluster, into Parquet tables."""
    from fbclip.bundle import Bundle
    from fbclip.runtime.cluster.score import Hands, score
    from fbclip.runtime.cluster.scorer import Recipe
    from fbclip.terminal import make_console

    area.settings()  # what doesn't go together is said before anything is listed
    recipe = Recipe(
        device=model.device,
        precision=model.precision,
        memory=model.memory,
        threshold=parse_threshold(verdict.threshold),
        roi=area.roi,
        tiles=area.tiles,
        overlap=area.overlap,
        detail=area.detail,
        align=None if area.align is None else str(area.align),
        mask=None if area.mask is None else str(area.mask),
        min_area=verdict.min_area,
        mm_per_pixel=verdict.mm_per_pixel,
        merge=verdict.merge,
        max_regions=verdict.max_regions,
        batch=batch,
    )
    workers = Hands(hands.workers, hands.cores, hands.address, hands.gpus)
    score(source, Bundle.load(model.bundle), out, recipe, workers, make_console(), save_maps, column)
