"""What speed costs: python benchmarks/tradeoffs.py nano, merging or large [CHECKPOINT]; show prints the recorded tables.

nano     input side, 8 bit and an earlier feature layer, as deployed in ONNX Runtime: milliseconds, and accuracy on the
         magnetic tiles as in nano_real.py, with 100 good ones
merging  tokens merged inside the backbone against a lower input side, both in torch: the same figures
large    ViT-L/14 of generated weights in torch: input side, feature layers, merged tokens; time alone

CHECKPOINT is the embedded model's if left out. Times are medians of interleaved rounds, the processor's time of one
thread: taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/tradeoffs.py nano. Writes benchmarks/results/tradeoffs.json.

Token merging: Bolya et al., *Token Merging: Your ViT But Faster*, ICLR 2023 (arXiv 2210.09461). It needs no training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from nano_real import DATA, DEFECTS, tiles
from numpy.typing import NDArray
from torch import Tensor
from vit_large import generated_clip, generated_model

from fbclip.assets import NANO
from fbclip.bundle import DYNAMIC, Bundle
from fbclip.export.graph import DeployedModel, write_onnx
from fbclip.export.precision.int8 import Quantizer
from fbclip.export.variants import write_variant
from fbclip.files import sha256, write_text
from fbclip.images import read_image
from fbclip.model import checkpoint
from fbclip.model.backend import TorchBackend
from fbclip.model.clip import clip_config
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP
from fbclip.model.towers import VisionTower, linear
from fbclip.resample import resize
from fbclip.runtime.backends import Backend
from fbclip.runtime.backends.onnx import OnnxRuntimeBackend

RESULTS = Path(__file__).parent / "results/tradeoffs.json"
ROUNDS, LARGE_ROUNDS = 40, 1
GOOD_TILES = 100  # beside all 392 defective ones
ACCURACY = ("pixel_auroc", "aupro", "image_auroc")
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A way to run a model: input side in pixels, the feature layers, 8 bit, tokens merged in each block."""

    side: int
    layers: tuple[int, ...]
    int8: bool = False
    merged: int = 0

    def __str__(self) -> str:
        extra = [f"{self.merged} tokens merged per block"] * (self.merged > 0) + ["8 bit"] * self.int8
        return ", ".join(
            [f"{self.side} px", f"layer{'s' * (len(self.layers) > 1)} {' '.join(map(str, self.layers))}", *extra]
        )


def nano_variants(default: Variant) -> list[Variant]:
    layer = default.layers[0]
    sides = [replace(default, side=side) for side in (96, 128, 160, 256)]
    eight_bit = [replace(default, side=side, int8=True) for side in (128, default.side)]
    return [default, *sides, *eight_bit, *(replace(default, layers=(k,)) for k in (layer - 1, layer - 2))]


def merging_variants(default: Variant) -> list[Variant]:
    sides = [replace(default, side=side) for side in (160, 128)]
    return [default, *sides, *(replace(default, merged=r) for r in (32, 64))]


LARGE = [
    Variant(518, (1, 6, 12, 18, 24)),
    Variant(336, (1, 6, 12, 18, 24)),
    Variant(224, (1, 6, 12, 18, 24)),
    Variant(518, (6, 12, 24)),
    Variant(518, (24,)),
    Variant(518, (1, 6, 12, 18, 24), merged=50),
]


def nano_model(path: Path, variant: Variant) -> FBCLIP:
    model = checkpoint.load(path, image_size=variant.side, feature_layers=variant.layers)
    if variant.merged:
        merge_tokens(model, variant.merged)
    return model


# Token merging


def merge_tokens(model: FBCLIP, r: int) -> None:
    tower = model.visual.tower
    tower.forward = partial(merging_forward, tower, r)


def merging_forward(tower: VisionTower, r: int, image: Tensor) -> Tensor:
    """`VisionTower.forward` with r tokens fewer after each block; a feature layer gives each patch its merged token."""
    x = tower.embed(image)
    size = x.new_ones(*x.shape[:2], 1)  # patches in each token
    place = torch.arange(x.shape[1]).expand(x.shape[:2])  # of each patch's token among those left
    features = []
    for number, block in enumerate(tower.blocks, start=1):
        attn = block.attn
        q, k, v = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        # a token counts as often in the softmax as it has patches ("proportional attention")
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().mT[:, None])
        x = x + block.ls_1(linear(mixed.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias))
        target = matching(k.mean(dim=1), r)
        x, size = add_up(torch.cat([x * size, size], dim=-1), target, r)
        place = target.gather(1, place)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        if number in tower.feature_layers:
            features.append(x.gather(1, place[..., None].expand(-1, -1, x.shape[2])))
    return torch.stack(features, dim=1)


def matching(keys: Tensor, r: int) -> Tensor:
    """Bipartite soft matching: where each token goes (B, N), among N - r, by their keys (B, N, D).

    Every second token looks for its most similar one among the others; the r most similar pairs merge. The class
    token is among those that look, and merges with none.
    """
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].mT
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(dim=-1)
    kept = best.argsort(dim=-1, descending=True)[:, r:].sort(dim=-1).values
    left = kept.shape[1]
    target = torch.empty(keys.shape[:2], dtype=torch.long)
    target[:, 1::2] = left + torch.arange(keys.shape[1] // 2)
    target[:, ::2] = (left + partner).scatter(1, kept, torch.arange(left).expand_as(kept))
    return target


def add_up(weighted: Tensor, target: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Tokens times size, and size (B, N, C + 1) -> the means of those with one target (B, N - r, C), and their sizes."""
    batch, tokens, width = weighted.shape
    sums = weighted.new_zeros(batch, tokens - r, width).scatter_add(1, target[..., None].expand_as(weighted), weighted)
    return sums[..., :-1] / sums[..., -1:], sums[..., -1:]


# Measuring


class TileScore(NamedTuple):
    score: float
    model_map: NDArray[np.float32]


@dataclass
class Scorer:
    """What `nano_real.tiles` asks of a Predictor."""

    backend: Backend
    side: int

    def __call__(self, path: Path) -> TileScore:
        scores, maps = self.backend.run(resize(read_image(path), self.side)[None])
        return TileScore(float(scores[0]), maps[0])


def deployed(path: Path, variant: Variant, folder: Path) -> OnnxRuntimeBackend:
    """The graph that `fbclip export` would write for the CPU."""
    model = nano_model(path, variant)
    with torch.no_grad():
        text = model.encode_text()
    shape = model.config.memory_shape
    model = DeployedModel(model)
    portable, graph = folder / "model.onnx", folder / "deployed.onnx"
    write_onnx(model, text, portable)
    if variant.int8:
        Quantizer(portable, DYNAMIC, [], folder).write(graph)
    else:
        write_variant("cpu", portable, graph)
    return OnnxRuntimeBackend(graph, text.numpy(), memory=shape)


def accuracy(scorer: Scorer) -> Row:
    """On the magnetic tiles; pixel figures are means of the four defects that are local."""
    found = tiles(scorer, DATA / "magnetic_tile", GOOD_TILES)
    mean = lambda kind: round(statistics.fmean(found[f"{defect} {kind}"] for defect in DEFECTS[:4]), 4)  # noqa: E731
    return dict(zip(ACCURACY, (mean("pixel"), mean("AUPRO"), round(found["tiles image"], 4)), strict=True))


def times(runs: Mapping[Variant, Callable[[], object]], rounds: int) -> dict[Variant, Row]:
    """Median milliseconds, and the median over rounds of the time relative to the first one's of the same round.

    It is the processor's time of the one thread, so what else runs on that core counts only by the caches it takes.
    """
    seconds: dict[Variant, list[float]] = {variant: [] for variant in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for variant, run in runs.items():
            start = time.process_time()
            run()
            seconds[variant].append(time.process_time() - start)
    default = next(iter(seconds.values()))
    return {
        variant: {
            "ms": round(statistics.median(own) * 1e3, 1),
            "relative": round(statistics.median(t / d for t, d in zip(own, default, strict=True)), 3),
        }
        for variant, own in seconds.items()
    }


def frame(side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)


def measure(
    variants: Sequence[Variant], make: Callable[[Variant, Path], Backend], known: Mapping[str, Row] | None = None
) -> list[Row]:
    """The rows of these variants; `known` are rows whose accuracy is not measured again."""
    with tempfile.TemporaryDirectory() as folder:
        backends: dict[Variant, Backend] = {}
        found: dict[Variant, Row] = {}
        for variant in variants:
            own = Path(folder, str(len(backends)))
            own.mkdir()
            backends[variant] = make(variant, own)
            row = (known or {}).get(str(variant))
            found[variant] = {k: row[k] for k in ACCURACY} if row else accuracy(Scorer(backends[variant], variant.side))
            print(variant, found[variant], flush=True)
        timed = times({v: partial(b.run, frame(v.side)) for v, b in backends.items()}, ROUNDS)
    return [{"variant": str(v), **timed[v], **found[v]} for v in variants]


def nano(path: Path, default: Variant) -> list[Row]:
    return measure(nano_variants(default), partial(deployed, path))


def merging(path: Path, default: Variant, recorded: Row) -> list[Row]:
    """Torch and the graphs agree within 1e-4: rows of the same checkpoint in the record of `nano` are taken from there."""
    known = {row["variant"]: row for row in recorded["rows"]} if recorded.get("checkpoint") == sha256(path) else {}
    return measure(merging_variants(default), lambda variant, _: TorchBackend(nano_model(path, variant)), known)


def large() -> list[Row]:
    config = default_config(clip_config("ViT-L-14-336"))
    clip = generated_clip(config.clip)

    def run(variant: Variant) -> Callable[[], object]:
        model = generated_model(replace(config, image_size=variant.side, feature_layers=variant.layers), clip)
        if variant.merged:
            merge_tokens(model, variant.merged)
        return partial(TorchBackend(model).run, frame(variant.side))

    timed = times({variant: run(variant) for variant in LARGE}, LARGE_ROUNDS)
    return [{"variant": str(v), **timed[v]} for v in LARGE]


def show(results: Mapping[str, Any]) -> None:
    """The recorded rows as Markdown tables."""
    for name, recorded in results.items():
        rows = recorded["rows"]
        print(f"\n{name}\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(str(value) for value in row.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("nano", "merging", "large", "show"))
    parser.add_argument("checkpoint", type=Path, nargs="?", default=NANO)
    parser.add_argument("--side", type=int, default=Bundle.load().manifest.image_size, help="the default, in pixels")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.task == "show":
        show(results)
        return
    torch.set_num_threads(1)
    if arguments.task == "large":
        found: Row = {"rounds": LARGE_ROUNDS, "rows": large()}
    else:
        path = arguments.checkpoint
        default = Variant(arguments.side, checkpoint.load(path).config.feature_layers)
        task = arguments.task
        rows = nano(path, default) if task == "nano" else merging(path, default, results.get("nano", {}))
        step = checkpoint.read_header(path)["provenance"].get("step")
        found = {"checkpoint": sha256(path), "step": step, "rounds": ROUNDS, "rows": rows}
    write_text(json.dumps({**results, arguments.task: found}, indent=1) + "\n", str(RESULTS))
    show({arguments.task: found})


if __name__ == "__main__":
    main()
