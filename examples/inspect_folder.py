"""Inspect a folder of pictures: overlays of what isn't good, and the worst first."""

# %%
import sys
from pathlib import Path

from fbclip import Predictor

folder = sys.argv[1] if len(sys.argv) > 1 else "defects"
out = Path("overlays")
out.mkdir(exist_ok=True)

# %% Score all pictures. `Predictor("part.fbclip")` is a bundle of your own.
with Predictor() as predict:
    print(predict, predict.explain_threshold(), sep="\n")
    predictions = predict(folder)

# %% The worst first
for prediction in sorted(predictions, key=lambda each: -each.score):
    print(f"{prediction.verdict:8} {prediction.score:.3f}  {len(prediction.regions)} regions  {prediction.name}")
    if prediction.is_anomalous:
        prediction.save(out / f"{Path(prediction.name).stem}.jpg")
