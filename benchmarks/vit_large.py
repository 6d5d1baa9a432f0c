"""ViT-L/14 at 518 px with generated weights, torch on the CPU: fbclip's forward pass against the literal reference.

python benchmarks/vit_large.py            # one process: interleaved times, agreement
python benchmarks/vit_large.py model      # peak memory of one of them alone (model or reference)
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import golden

from fbclip import reference
from fbclip.clip import build_clip, clip_config
from fbclip.model import FBCLIP, default_config

ROUNDS = 2


def large_model() -> FBCLIP:
    """ViT-L-14-336 with weights by the rule of the recorded numbers."""
    config = clip_config("ViT-L-14-336", "openai")
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build_clip(config, None).state_dict().items()}
    clip = build_clip(config, {name: golden.weight(name, shape) for name, shape in shapes.items()})
    model = FBCLIP(default_config(config), clip)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("text.", "visual.tower.")):
                parameter.copy_(golden.weight(name, tuple(parameter.shape)))
    return model.eval()


@torch.no_grad()
def main(only: str | None) -> None:
    model = large_model()
    text = model.encode_text()
    image = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "model": lambda: model.visual(image, text),
        "reference": lambda: reference.forward(model.visual, image, text),
    }
    start_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if only:
        runs[only]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"run": only, "peak_mb": round(peak), "before_mb": round(start_mb)}))
        return
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            outputs[name] = run()
            seconds[name].append(time.perf_counter() - start)
    drift = max((a - b).abs().max().item() for a, b in zip(*outputs.values(), strict=True))
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    ratio = medians["reference"] / medians["model"]
    print(json.dumps({"seconds": medians, "reference_over_model": round(ratio, 2), "largest_difference": drift}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
