"""Set the threshold from good parts alone, so that at most one in ten raises a false alarm."""

# %%
from fbclip import Predictor, calibrate

# %% A copy of the embedded bundle with a threshold for this part: line3.fbclip
found = calibrate(None, "good", false_alarm_rate=0.1, defects="defects", name="line3")
calibration = found.calibration
print(f"{calibration.count} good parts: threshold {calibration.threshold:.3f} in {found.bundle.path}")
print(f"left out: {found.good.skipped} unreadable, {found.good.copies} copies, {found.good.unusable} unusable")
low, high = calibration.interval
print(f"this calibration's own rate is {100 * low:.1f} to {100 * high:.1f} % (95 % confidence)")

# %% Does it find defects?
print(f"{calibration.missed} of {calibration.defects} defects are missed")

# %% Used from now on by whoever names the bundle
with Predictor("line3.fbclip") as predict:
    for prediction in predict("defects"):
        print(prediction.verdict, round(prediction.score, 3), prediction.name)
