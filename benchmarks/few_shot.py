"""What a handful of good parts teach a bundle: python benchmarks/few_shot.py [BUNDLE] [--json F] [--seeds 0,1] [--only SET].

Nothing is tuned here: recipe, weights and lines are `fbclip adapt`'s defaults, which were chosen on rendered parts of
other seeds. Per seed, references are drawn at random from good images; every figure is mean and standard deviation
over the seeds. References, and good images with the same pixels, are in no test. SETs:

- tiles: $FBCLIP_DATA/magnetic_tile. References of train/good; all of test/good and all defective tiles are judged. Pixel
  AUROC is within each defect's own images, maps at 96 x 96. Image AUROC is of each defect against test/good; "mean" is
  over blowhole, break, crack and fray, "pooled" has all five kinds in one (as nano_real.py, which draws 300 good ones).
  Misses: defective tiles of all five kinds below the threshold that 5 % of test/good reach, and below the one that is
  calibrated on all of train/good but the references. Held-out rates: good tiles but eight references are dealt into
  halves at random, one calibrates, the other is counted.
- jackknife: the same good tiles; the threshold is of the memory's own references, as `fbclip calibrate` takes it where it is
  given no other images.
- elpv: the package `elpv-dataset`, solar cells, by their kind. References are drawn from all cells of defect probability
  0; 200 of these, and 200 cells of 0.5 or more, are judged: the same in every run, without the references.
- textile: the package `conformal-clip-data`. References of all of nominal; the 250 of each kind that nano_real.py draws
  are judged.
- boards: rendered lines, textures (parts lie anywhere) and boards (parts lie in place, within 3 of 192 px); 14 defective
  and 22 good parts each. Pixel AUROC is over all of a line's pixels; the mean goes over lines, so does the deviation.

Each image is described once, and memories judge in numpy; that this is what a Predictor gives is checked on 20 tiles.
--json replaces the SETs that were measured and keeps the others. Needs no torch; SciPy comes with the `dev` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from nano_real import DEFECTS, image_auroc, package_folder
from nano_real import drawn as chosen_alike
from numpy.random import PCG64, Generator
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import betabinom

from fbclip.backend import Backend, Described
from fbclip.data.procedural import add_defect
from fbclip.data.surfaces import noise, surface, texture
from fbclip.files import write_text
from fbclip.images import pixels_sha256, read_image
from fbclip.learning import judge
from fbclip.memory import MEMORY_LINE, Memory
from fbclip.metrics import image_metrics
from fbclip.resample import upsampling_matrix
from fbclip.runtime.adapt import Choice, teach
from fbclip.runtime.calibration import TAILS, conformal_threshold, rank, rate_interval
from fbclip.runtime.evaluation.few_shot import drawn
from fbclip.runtime.predictor import Predictor
from fbclip.terminal import progress

DATA = Path(os.environ.get("FBCLIP_DATA", "../shared/data"))
NAMED = DEFECTS[:4]  # those of the means; "uneven" stands alone
RATES = (0.1, 0.05, 0.01)
SIDE = 96  # pixels of the compared maps
PART = 192  # pixels of a rendered part
GOOD, DEFECTIVE = 26, 14  # of each rendered line; its first four good ones are the references
FIRST_LINE = 100  # seeds of lines below chose the constants
DRAWS, COUNTED_EVERY = 20, 4  # of thresholds from a memory's own references; each fourth good test tile is counted
OWN_RATES = ((8, 0.2), (16, 0.1), (16, 0.2))  # references and the rate that is asked for
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Figures = dict[str, float | None]


class Images(NamedTuple):
    """Images that the model has looked at: file or frame, pixels' hash, features (N, L, F), zero-shot logits (N, 1 + L)."""

    origins: Sequence[Path | Pixels]
    sha256: list[str]
    features: Floats
    logits: Floats


class Judged(NamedTuple):
    """What is said of images, 0..1: scores (N,) and patches (N, L)."""

    scores: Floats
    patches: Floats


class Bench:
    """A bundle under test."""

    def __init__(self, bundle: Path | None, seeds: Sequence[int], console: Console) -> None:
        self.predictor = Predictor(bundle, calibrated=False, memory=None)
        remember(self.predictor.backend)
        manifest = self.predictor.bundle.manifest
        if manifest.memory_shape is None:
            raise SystemExit(f"{self.predictor.bundle.path} has no inputs for a memory")
        self.shape, self.size = manifest.memory_shape, manifest.image_size
        self.seeds, self.console = seeds, console
        self.rise = upsampling_matrix(self.size, self.shape.grid)

    def look(self, name: str, origins: Iterable[Path | Pixels]) -> Images:
        """Describe images; those that are files in the order of their names."""
        listed = list(origins)
        hashes, described = [], []
        with progress(self.console) as bars:
            for origin in bars.track(listed, description=name):
                frame = read_image(origin) if isinstance(origin, Path) else origin
                hashes.append(pixels_sha256(frame))
                described.append(self.predictor.backend.describe(self.predictor.prepare(frame).batch))
        features, logits = (np.concatenate(part) for part in zip(*described, strict=True))
        return Images(listed, hashes, features, logits)

    def learn(self, references: Sequence[Path | Pixels], choice: Choice | None = None) -> Memory:
        return teach(self.predictor, references, choice or Choice(), None, Console(quiet=True)).memory

    def judge(self, memory: Memory | None, images: Images) -> Judged:
        """What a memory says of images, or the zero-shot model without one, as the graph computes it."""
        if memory is None:
            return Judged(probability(images.logits[:, 0]), probability(images.logits[:, 1:]))
        about = memory.about
        found = judge(about.recipe, self.shape, self.size, memory.tensors, images.features, images.logits)
        scores = np.array([each.score for each in found]) - about.score_line
        return Judged(probability(scores), probability(np.stack([each.patches for each in found]) - about.map_line))

    def pixel_auroc(self, patches: Floats, masks: NDArray[np.bool_]) -> float | None:
        """Of patches (N, L) and masks (N, SIDE, SIDE)."""
        grids = patches.reshape(-1, self.shape.grid, self.shape.grid)
        maps = [
            cv2.resize(self.rise @ grid @ self.rise.T, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for grid in grids
        ]
        return image_metrics(masks, np.stack(maps)).auroc

    def check(self, memory: Memory | None, images: Images) -> float:
        """The largest difference of score or map between what is computed here and a Predictor, on 20 of the images."""
        self.predictor.set_memory(memory)
        worst = 0.0
        chosen = Images(*(each[:: max(1, len(images.sha256) // 20)][:20] for each in images))
        for origin, score, patches in zip(chosen.origins, *self.judge(memory, chosen), strict=True):
            frame = read_image(origin) if isinstance(origin, Path) else origin
            (found,), (anomaly_map,) = self.predictor.run([self.predictor.prepare(frame)])
            grid = patches.reshape(self.shape.grid, self.shape.grid)
            worst = max(worst, abs(found - score), float(np.abs(self.rise @ grid @ self.rise.T - anomaly_map).max()))
        self.predictor.set_memory(None)
        return worst


def remember(backend: Backend) -> None:
    """Let a backend describe each picture once: references come again with every recipe and number of shots."""
    describe, known = backend.describe, {}

    def remembered(images: Pixels) -> Described:
        digest = pixels_sha256(images)
        if digest not in known:
            known[digest] = describe(images)
        return known[digest]

    backend.describe = remembered  # type: ignore[method-assign]


def probability(logits: NDArray[np.floating[Any]]) -> Floats:
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


def new_to(references: Iterable[Path | Pixels], images: Images) -> NDArray[np.bool_]:
    """Which of the images aren't references, nor have their pixels."""
    known = {pixels_sha256(read_image(path) if isinstance(path, Path) else path) for path in references}
    return np.array([digest not in known for digest in images.sha256])


def spread(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of each seed -> mean, standard deviation (ddof = 1) and all of them, by name."""
    columns = {name: [each[name] for each in found] for name in found[0]}
    return {
        name: {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "seeds": values,
        }
        for name, values in columns.items()
    }


def small_mask(path: Path) -> NDArray[np.bool_]:
    mask = cv2.resize(read_image(path)[..., 0], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(mask > 127)


def tiles(bench: Bench) -> dict[str, Any]:
    root = DATA / "magnetic_tile"
    good, test = (bench.look(part, sorted((root / part).iterdir())) for part in ("train/good", "test/good"))
    defective = {kind: bench.look(kind, sorted((root / "test" / kind).iterdir())) for kind in DEFECTS}
    masks = {
        kind: np.stack([small_mask(path) for path in sorted((root / "ground_truth" / kind).iterdir())])
        for kind in DEFECTS
    }

    def measure(memory: Memory | None, references: Sequence[Path | Pixels]) -> tuple[Figures, Floats]:
        """The figures, and the scores of all good tiles but the references."""
        usual = bench.judge(memory, test).scores[new_to(references, test)]
        calibrates = bench.judge(memory, good).scores[new_to(references, good)]
        found = {kind: bench.judge(memory, images) for kind, images in defective.items()}
        figures: Figures = {f"pixel {k}": bench.pixel_auroc(each.patches, masks[k]) for k, each in found.items()}
        figures |= {f"image {k}": image_auroc(usual.tolist(), each.scores.tolist()) for k, each in found.items()}
        for what in ("pixel", "image"):
            figures[f"{what} mean"] = float(np.mean([figures[f"{what} {kind}"] for kind in NAMED]))
        scores = np.concatenate([each.scores for each in found.values()])
        figures["image pooled"] = image_auroc(usual.tolist(), scores.tolist())
        line, calibrated = np.quantile(usual, 0.95), conformal_threshold(calibrates.tolist(), 0.05)
        figures |= {"misses at 5 %": share(scores < line), "misses calibrated": share(scores < calibrated)}
        figures["false alarms calibrated"] = share(usual >= calibrated)
        figures |= {"misses at 0.5": share(scores < MEMORY_LINE), "false alarms at 0.5": share(usual >= MEMORY_LINE)}
        return figures, np.concatenate([calibrates, usual])

    zero_shot, scores = measure(None, [])
    by_shots = {"0": spread([zero_shot])}
    rates = {"0": held_out([scores] * len(bench.seeds), bench.seeds)}
    checked = {"zero-shot": bench.check(None, test)}
    for shots in (2, 4, 8, 16):
        found = []
        for seed in bench.seeds:
            references = drawn(good.origins, shots, seed)
            memory = bench.learn(references)
            found.append(measure(memory, references))
            say(bench, f"tiles, K = {shots}, seed {seed}: {brief(found[-1][0], 'pixel mean', 'image mean')}")
        by_shots[str(shots)] = spread([figures for figures, _ in found])
        if shots == 8:
            rates["8"] = held_out([scores for _, scores in found], bench.seeds)
            checked["memory of 8"] = bench.check(memory, test)
    counts = {name: len(each.sha256) for name, each in (("train/good", good), ("test/good", test), *defective.items())}
    show(bench, "magnetic tiles", by_shots)
    show_rates(bench, rates)
    say(bench, f"20 tiles differ from a Predictor by at most: {checked}")
    return {"images": counts, "shots": by_shots, "held_out_rates": rates, "differs_from_predictor": checked}


def share(of: NDArray[np.bool_]) -> float:
    return float(np.mean(of))


def held_out(scores: Sequence[Floats], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """By target: what thresholds from one half of the good tiles, dealt at random, do to the other half.

    `interval` is where a threshold's own false-alarm rate lies with 95 % confidence; a share of so few tiles strays
    further, within `interval_of_shares`.
    """
    rows = []
    for rate in RATES:
        shares = []
        for each, seed in zip(scores, seeds, strict=True):
            dealt = np.random.default_rng(seed).permutation(each)
            calibrates, counted = dealt[: len(dealt) // 2], dealt[len(dealt) // 2 :]
            shares.append(share(counted >= conformal_threshold(calibrates.tolist(), rate)))
        n, m = len(calibrates), rank(len(calibrates), rate)
        low, high = rate_interval(n, rate)
        strays = [float(betabinom.ppf(tail, len(counted), m, n + 1 - m)) / len(counted) for tail in TAILS]
        rows.append(
            {
                "target": rate,
                "calibrated_on": n,
                "counted": len(counted),
                "shares": shares,
                "mean": float(np.mean(shares)),
                "interval": (low, high),
                "inside": sum(low <= each <= high for each in shares),
                "interval_of_shares": strays,
                "inside_of_shares": sum(strays[0] <= each <= strays[1] for each in shares),
            }
        )
    return rows


def jackknife(bench: Bench) -> dict[str, Any]:
    """What thresholds from a memory's own references do to good tiles that it hasn't seen, over many draws."""
    root = DATA / "magnetic_tile"
    pool = sorted((root / "train/good").iterdir())
    test = bench.look("test/good", sorted((root / "test/good").iterdir())[::COUNTED_EVERY])
    found = {}
    for shots, rate in OWN_RATES:
        shares = []
        for seed in range(DRAWS):
            memory = bench.learn(drawn(pool, shots, seed))
            own = np.array([each.score for each in memory.about.references]) - memory.about.score_line
            threshold = conformal_threshold(probability(own).tolist(), rate)
            shares.append({"share": share(bench.judge(memory, test).scores >= threshold)})
        found[f"K = {shots}, asked for {rate}"] = spread(shares)
    show(bench, f"false alarms by thresholds from {DRAWS} memories' own references", found, ["share"])
    return found


def elpv(bench: Bench) -> dict[str, Any]:
    root = package_folder("elpv_dataset")
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    found = {}
    for kind in ("mono", "poly"):
        cells = sorted((root / name, float(p)) for name, p, of in rows if of == kind)
        pool = [path for path, p in cells if p == 0]
        good = bench.look(f"{kind}, good", chosen_alike(pool, 200))
        broken = chosen_alike([path for path, p in cells if p >= 0.5], 200)
        defective = {f"{kind}crystalline": bench.look(f"{kind}, defective", broken)}
        found |= few_shot(bench, pool, good, defective)
    show(bench, "elpv, image AUROC", found, ["auroc"])
    return found


def textile(bench: Bench) -> dict[str, Any]:
    root = package_folder("conformal_clip_data") / "textile_images/simulated"
    files = {kind: sorted((root / kind).iterdir()) for kind in ("nominal", "local", "global")}
    looked = {kind: bench.look(kind, chosen_alike(paths, 250)) for kind, paths in files.items()}
    found = few_shot(bench, files["nominal"], looked.pop("nominal"), looked)
    show(bench, "textile, image AUROC", found, ["auroc"])
    return found


def few_shot(
    bench: Bench, pool: Sequence[Path | Pixels], good: Images, defective: Mapping[str, Images]
) -> dict[str, Any]:
    """Image AUROC of each kind of defect against the good images that taught nothing, by kind and shots.

    Args:
        pool: what references are drawn from.
    """
    found = {}
    for shots in (0, 4, 8):
        by_kind: dict[str, list[Figures]] = {kind: [] for kind in defective}
        for seed in bench.seeds if shots else (0,):
            references = drawn(pool, shots, seed)
            memory = bench.learn(references) if shots else None
            usual = bench.judge(memory, good).scores[new_to(references, good)]
            for kind, images in defective.items():
                scores = bench.judge(memory, images).scores
                by_kind[kind].append({"auroc": image_auroc(usual.tolist(), scores.tolist())})
                say(bench, f"{kind}, K = {shots}, seed {seed}: {brief(by_kind[kind][-1], 'auroc')}")
        found |= {f"{kind}, {shots}": spread(figures) for kind, figures in by_kind.items()}
    return found


class Camera(NamedTuple):
    """What pictures of one line have in common."""

    grey: bool
    gamma: float
    noise: float
    light: float

    def shoot(self, part: Floats, rng: Generator) -> Pixels:
        """A part float32 (PART, PART, 3), 0..1, as its picture."""
        part = part.mean(2, keepdims=True) if self.grey else part
        exposed = part ** np.float32(self.gamma * np.exp(rng.normal(0, 0.03)))
        noisy = exposed + rng.standard_normal(exposed.shape, dtype=np.float32) * np.float32(self.noise)
        return np.broadcast_to((noisy * 255).clip(0, 255).astype(np.uint8), (PART, PART, 3)).copy()

    def lit(self, part: Floats, rng: Generator) -> Floats:
        uneven = 1 + self.light * (noise(rng, PART, 2) - 0.5)
        return (part * uneven[..., None]).clip(0, 1).astype(np.float32)


class Part(NamedTuple):
    """A good part: float32 (PART, PART, 3), where it is (1) and isn't (0), and what lies behind it."""

    image: Floats
    support: Pixels
    behind: Floats


Line = Callable[[Generator], tuple[Callable[[], Part], Camera, float]]


def texture_line(rng: Generator) -> tuple[Callable[[], Part], Camera, float]:
    """Parts cut anywhere from one surface: how to make the next, its camera and how varied its defects are."""
    variety = float(rng.uniform(0.5, 2))
    whole = texture(rng, 3 * PART, variety)
    side = int(3 * PART / rng.choice([1.0, 1.5, 2.0])) + 1
    whole = cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    camera = Camera(rng.random() < 0.5, rng.uniform(0.75, 1.3), rng.uniform(0, 0.025), rng.uniform(0, 0.3))

    def make() -> Part:
        y, x = rng.integers(0, side - PART, 2)
        piece = whole[y : y + PART, x : x + PART]
        piece = piece[::-1] if rng.random() < 0.5 else piece
        piece = piece[:, ::-1] if rng.random() < 0.5 else piece
        return Part(camera.lit(piece, rng), np.ones((PART, PART), np.uint8), whole[:PART, :PART] * np.float32(0.3))

    return make, camera, variety


def board_line(rng: Generator) -> tuple[Callable[[], Part], Camera, float]:
    """Copies of one board that lie a little aside; as `texture_line`."""
    variety = float(rng.uniform(0.5, 2))
    margin, side = 8, PART + 16
    board, support, behind = surface(rng, side, min(variety, 1.0))
    for _ in range(int(rng.integers(5, 40))):
        draw_component(board, rng)
    camera = Camera(rng.random() < 0.5, rng.uniform(0.75, 1.3), rng.uniform(0, 0.025), rng.uniform(0, 0.25))
    inner = slice(margin, -margin)

    def make() -> Part:
        laid = cv2.getRotationMatrix2D((side / 2, side / 2), rng.normal(0, 0.5), 1 + rng.normal(0, 0.004))
        laid[:, 2] += rng.uniform(-3, 3, 2)
        image, where = (
            cv2.warpAffine(picture, laid, (side, side), flags=how, borderMode=cv2.BORDER_REFLECT_101)[inner, inner]
            for picture, how in ((board, cv2.INTER_LINEAR), (support, cv2.INTER_NEAREST))
        )
        return Part(camera.lit(image.astype(np.float32), rng), where.astype(np.uint8), behind[inner, inner])

    return make, camera, variety


def draw_component(board: Floats, rng: Generator) -> None:
    """A chip, a hole or a track."""
    side = len(board)
    y, x = (int(value) for value in rng.integers(0, side, 2))
    h, w = (int(value) for value in np.exp(rng.uniform(np.log(4), np.log(40), 2)))
    colour = tuple(float(value) for value in rng.uniform(0, 1, 3))
    if rng.random() < 0.6:
        cv2.rectangle(board, (x, y), (x + w, y + h), colour, -1, cv2.LINE_AA)
    elif rng.random() < 0.5:
        cv2.circle(board, (x, y), w // 2 + 2, colour, -1, cv2.LINE_AA)
    else:
        end = (int(value) for value in rng.integers(0, side, 2))
        cv2.line(board, (x, y), tuple(end), colour, int(rng.integers(1, 4)), cv2.LINE_AA)


def render(line: Line, seed: int) -> tuple[list[Pixels], NDArray[np.bool_]]:
    """The good, then the defective parts of a line, and their masks (N, SIDE, SIDE)."""
    rng = Generator(PCG64([line is board_line, seed]))
    make, camera, variety = line(rng)
    pictures, masks = [], []
    for number in range(GOOD + DEFECTIVE):
        part, nothing = make(), np.zeros((PART, PART), np.uint8)
        image, mask = part.image, nothing
        while number >= GOOD and not mask.any():  # some defects would lie beside the part
            image, mask = add_defect(part.image.copy(), nothing, part.support.copy(), part.behind, rng, variety)
        pictures.append(camera.shoot(image, rng))
        masks.append(cv2.resize(mask * np.uint8(255), (SIDE, SIDE), interpolation=cv2.INTER_AREA) > 127)
    return pictures, np.stack(masks)


RECIPES: dict[str, tuple[int, Choice]] = {
    "zero-shot": (0, Choice()),
    "whiten/flips (default)": (4, Choice()),
    "whiten/fixed": (4, Choice(orientation="fixed")),
    "nearest/flips": (4, Choice(mode="nearest")),
    "positions 1": (4, Choice(positions=1)),
    "positions 1, one reference": (1, Choice(positions=1)),
    "auto": (4, Choice(mode="auto")),
}


def boards(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, line, count in (("textures", texture_line, 12), ("boards", board_line, 8)):
        by_recipe: dict[str, list[Figures]] = {name: [] for name in RECIPES}
        chosen = []
        for seed in range(FIRST_LINE, FIRST_LINE + count):
            pictures, masks = render(line, seed)
            images = bench.look(f"{kind} {seed}", pictures[4:])
            for name, (shots, choice) in RECIPES.items():
                memory = bench.learn(pictures[:shots], choice) if shots else None
                by_recipe[name].append(line_figures(bench, bench.judge(memory, images), masks[4:]))
                if memory and name == "auto":
                    chosen.append(f"{memory.about.mode}/{memory.about.orientation}")
            say(bench, f"{kind} {seed}: default {brief(by_recipe['whiten/flips (default)'][-1])}")
        default, auto = by_recipe["whiten/flips (default)"], by_recipe["auto"]
        better = [{name: a[name] - d[name] for name in d} for a, d in zip(auto, default, strict=True)]  # type: ignore[operator]
        found[kind] = {
            "recipes": {name: spread(figures) for name, figures in by_recipe.items()},
            "auto_chose": {each: chosen.count(each) for each in sorted(set(chosen))},
            "auto_minus_default": spread(better),
        }
        rows = {**found[kind]["recipes"], "auto - default": found[kind]["auto_minus_default"]}
        show(bench, f"rendered {kind}, {count} lines; auto chose {found[kind]['auto_chose']}", rows)
    return found


def line_figures(bench: Bench, judged: Judged, masks: NDArray[np.bool_]) -> Figures:
    usual, defective = judged.scores[: GOOD - 4], judged.scores[GOOD - 4 :]
    return {
        "pixel": bench.pixel_auroc(judged.patches, masks),
        "image": image_auroc(usual.tolist(), defective.tolist()),
        "found at 0.5": share(defective >= MEMORY_LINE),
        "false alarms at 0.5": share(usual >= MEMORY_LINE),
    }


def brief(figures: Figures, *names: str) -> str:
    return ", ".join(f"{name} {figures[name]:.3f}" for name in names or figures)


def say(bench: Bench, text: str) -> None:
    bench.console.print(text, markup=False, highlight=False)


def show(bench: Bench, title: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Figures down, shots or recipes across, where there are more figures; else a row for each."""
    names = list(columns or next(iter(rows.values())))
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    across, down = (list(rows), names) if len(names) > len(rows) else (names, list(rows))
    for column in ("", *across):
        table.add_column(column, no_wrap=True)
    for left in down:
        cells = (rows[top][left] if across == list(rows) else rows[left][top] for top in across)
        table.add_row(left, *(f"{c['mean']:.3f}" + ("" if c["std"] is None else f" ± {c['std']:.3f}") for c in cells))
    bench.console.print(table)


def show_rates(bench: Bench, rates: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    table = Table(title="false alarms on held-out good tiles", box=None, pad_edge=False, title_justify="left")
    for column in ("K", "target", "mean", "seeds", "interval of the rate", "inside", "of a share", "inside"):
        table.add_column(column, no_wrap=True)
    for shots, rows in rates.items():
        for row in rows:
            (low, high), (least, most) = row["interval"], row["interval_of_shares"]
            table.add_row(
                *(shots, f"{row['target']:g}", f"{row['mean']:.3f}", " ".join(f"{s:.3f}" for s in row["shares"])),
                *(f"{low:.3f} to {high:.3f}", f"{row['inside']} of {len(row['shares'])}"),
                *(f"{least:.3f} to {most:.3f}", f"{row['inside_of_shares']} of {len(row['shares'])}"),
            )
    bench.console.print(table)


SETS = {"tiles": tiles, "jackknife": jackknife, "elpv": elpv, "textile": textile, "boards": boards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="the embedded default if left out")
    parser.add_argument("--json")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--only", choices=SETS)
    arguments = parser.parse_args()
    bench = Bench(arguments.bundle, [int(seed) for seed in arguments.seeds.split(",")], Console(width=160))
    said = {
        "command": shlex.join(["python", *sys.argv]),
        "model": bench.predictor.bundle.manifest.name,
        "model_sha256": bench.predictor.bundle.model_sha256(bench.predictor.precision),
        "precision": bench.predictor.precision,
        "seeds": list(bench.seeds),
    }
    file = Path(arguments.json) if arguments.json else None
    written = json.loads(file.read_text()) if file and file.is_file() else {}
    for name, measure in SETS.items():
        if arguments.only in (None, name):
            start = time.perf_counter()
            found = measure(bench)
            written[name] = {**said, "seconds": round(time.perf_counter() - start), **found}
            if file:
                write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", file)


if __name__ == "__main__":
    main()
