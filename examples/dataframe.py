"""Results as a table: pandas where it is installed, else CSV as it is."""

# %%
import csv
from importlib.util import find_spec
from pathlib import Path

from fbclip import Predictor

# %% One row an image
with Predictor() as predict:
    rows = [
        {
            "name": prediction.name,
            "label": prediction.verdict,
            "score": prediction.score,
            "regions": len(prediction.regions),
            "marked_pixels": int(prediction.mask.sum()),
        }
        for prediction in predict("defects")
    ]

# %%
if find_spec("pandas"):
    import pandas

    table = pandas.DataFrame(rows).sort_values("score", ascending=False)
    table.to_csv("results.csv", index=False)
    print(table)
else:
    with Path("results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows in results.csv; pip install pandas for a table")
