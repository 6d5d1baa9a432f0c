"""Watch a camera: an alarm where 3 of the last 5 frames are defects.

A video in its place ends by itself: python examples/camera.py belt.avi
"""

# %%
import sys

from fbclip import Predictor

source = sys.argv[1] if len(sys.argv) > 1 else "0"  # or /dev/video0, csi://0, rtsp://…, http://…

# %% Each frame once; a camera drops those that come while the model is busy.
with Predictor() as predict:
    for result in predict.stream(source, vote="3/5"):
        prediction = result.prediction
        print(f"{result.frame.name}  {prediction.verdict}  {prediction.score:.3f}", "ALARM" if result.alarm else "")
        if result.alarm_began:
            prediction.save("alarm.jpg")
