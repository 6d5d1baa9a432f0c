"""Figures on a labelled data set: how well are good and defective parts told apart?"""

# %%
import sys

from fbclip import evaluate

data = sys.argv[1] if len(sys.argv) > 1 else "data"  # a folder as MVTec AD, VisA and others have it: see `fbclip data`

# %%
evaluation = evaluate(None, data)  # or "part.fbclip"
print(evaluation.subject.threshold_from)
for result in evaluation.results:
    for one in result.classes:
        figures = {name: round(value, 3) for name, value in one.values.items() if value is not None}
        print(one.name, len(one.scores), "images", figures)

# %% What the threshold does to each image
threshold = evaluation.subject.threshold
for result in evaluation.results:
    for one in result.classes:
        missed = [scored for scored in one.scores if scored.item.label and scored.score < threshold]
        false = [scored for scored in one.scores if not scored.item.label and scored.score >= threshold]
        print(f"{one.name}: {len(missed)} defects missed, {len(false)} false alarms")
