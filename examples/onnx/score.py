"""Score a picture with numpy and ONNX Runtime alone: python score.py MODEL picture.ppm

MODEL is a folder that `fbclip export --bundle B --standalone MODEL` wrote, the picture a binary PPM of its size: nothing is
resized here. Prints verdict, score and the highest value of the anomaly map.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def read_ppm(path):
    content = Path(path).read_bytes()
    header = re.match(rb"P6\s+(\d+)\s+(\d+)\s+255\s", content)
    if not header or len(content) - header.end() != int(header[1]) * int(header[2]) * 3:
        raise SystemExit(f"{path} is no binary PPM of 8 bit")
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(int(header[2]), int(header[1]), 3)  # RGB


def shows_nothing(image):
    """Black, or of one colour: no picture of a part."""
    pixels = image.reshape(-1, 3).astype(np.float64)
    return bool((np.ptp(pixels, axis=0) <= 1).all() or (pixels.mean(0).max() < 10 and pixels.std(0).max() < 1))


def main(folder, picture):
    card = json.loads(Path(folder, "model.json").read_text(encoding="utf-8"))
    image = read_ppm(picture)
    if card["input"] != "uint8-nhwc" or image.shape[:2] != (card["height"], card["width"]):
        raise SystemExit(f"{folder} takes {card['input']} of {card['width']}x{card['height']} pixels")
    if card["channel_order"] == "bgr":
        image = image[..., ::-1]
    session = ort.InferenceSession(Path(folder, "model.onnx"), providers=["CPUExecutionProvider"])
    scores, maps = session.run(["score", "anomaly_map"], {"image": np.ascontiguousarray(image)[None]})
    score, lowest, highest = float(scores[0]), float(maps[0].min()), float(maps[0].max())
    if not all(-1e-3 <= value <= 1.001 for value in (score, lowest, highest)):  # also where it is no number
        raise SystemExit("the model gives no probability: nothing is known of the picture")
    verdict = "unusable" if shows_nothing(image) else "good" if score < card["threshold"] else "defect"
    print(f"{verdict} {score:.9g} {highest:.9g}")


main(*sys.argv[1:])
