"""Mutated foreign data, by the thousand: what each parser is fed, and the only errors that may come out of it.

    python tests/helpers/fuzz.py pictures --count 300000 --seed 1

Everything is drawn from the seed: a failure prints the number of its case, and `--only` repeats it alone.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import resource
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.data.inspect import inspect
from fbclip.data.layouts import open_dataset
from fbclip.errors import FBClipError, ImageError, UsageError
from fbclip.images import decode_image, read_image, read_mask

SLOW_S = 2.0  # for one case of at most 200 kB on a core: no file of that size may hold a line up for longer
PIXELS = 4_000_000  # taken from a mutated picture: sizes of billions are to be refused, large ones cost only time
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "0.5", "x", "\0", "\ud800", "../..", "/etc/passwd", "a" * 5000, [], [[]], {}, [None], {"a": 1}, ["x"] * 5, [1, 2],
)  # fmt: skip
Mutate = Callable[[random.Random, bytes], bytes]


class Escaped(AssertionError):
    """An exception that no foreign data may cause, or a case that took too long."""


# --- mutations -----------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to eight changes: bits, bytes, numbers, and cuts, copies and repetitions of parts."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not changed:
            break
        at = rng.randrange(len(changed)) if rng.random() < 0.5 else rng.randrange(min(len(changed), 600))
        match rng.randrange(8):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.randrange(256)
            case 2:
                form = rng.choice(("<H", ">H", "<I", ">I"))
                size = struct.calcsize(form)
                changed[at : at + size] = struct.pack(form, rng.choice(INTERESTING) & (2 ** (8 * size) - 1))
            case 3:
                del changed[at : at + rng.randrange(1, 64)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randrange(1, 32))
            case 5:
                other = rng.randrange(len(changed))
                changed[at:at] = changed[other : other + rng.randrange(1, 256)]
            case 6:
                del changed[at:]
            case 7:
                changed[at:at] = changed[at : at + rng.randrange(1, 16)] * rng.randrange(1, 200)
    return bytes(changed[:200_000])


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """What happens to tables: other separators, encodings, line ends, quotes, rows and cells; or to any bytes."""
    text = data.decode("utf-8", "replace")
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    match rng.randrange(12):
        case 0:
            text = text.replace(",", rng.choice((";", "\t", "|", " ")))
        case 1:
            encoding = rng.choice(("utf-16", "utf-8-sig", "cp1252", "latin-1", "utf-32", "utf-16-be"))
            return (text + "Stück\n").encode(encoding, "replace")
        case 2:
            text = text.replace("\n", rng.choice(("\r\n", "\r", "\n\n", "\0", "\x85")))
        case 3:
            lines[at] = rng.choice((",,,", "", '"', '"unclosed', ";", "x" * 10_000, "a,b,c,d,e,f,g,h,i"))
        case 4:
            lines[at] = lines[at].replace("/", "\\")
        case 5:
            del lines[at]
        case 6:
            lines.insert(at, lines[rng.randrange(len(lines))])
        case 7:
            cells = lines[at].split(",")
            cells[rng.randrange(len(cells))] = str(rng.choice(VALUES[:24])).replace("\ud800", "?")
            lines[at] = ",".join(cells)
        case 8:
            lines[at] = lines[at].upper()
        case _:
            return mutate_bytes(rng, data)
    return (text if text != data.decode("utf-8", "replace") else "\n".join(lines)).encode("utf-8", "replace")


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Another value, a missing, another or a doubled key somewhere in a JSON text; sometimes any bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    if rng.random() < 0.03:
        return rng.choice((b"[" * 200_000, b'{"a":' * 100_000, b"", b"\xff\xfe{}", b"null", b"1e999", b"[]"))
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = rng.choice(list(_places(content)))
        if isinstance(holder, dict) and rng.random() < 0.2:
            holder[rng.choice(("extra", "", "__class__", str(key).upper()))] = holder.pop(key)
        elif rng.random() < 0.15:
            del holder[key]
        elif isinstance(holder[key], (int, float)) and rng.random() < 0.4:
            holder[key] = rng.choice(
                (holder[key] * 2, -holder[key], holder[key] + 1, holder[key] * 10**9, str(holder[key]))
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        if not content:
            break
    text = json.dumps(content)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


# --- pictures ------------------------------------------------------------------------------------------------------


@cache
def pictures() -> tuple[bytes, ...]:
    """Whole pictures of every kind that is read, 48 by 40 pixels, with what cameras and programs add to them."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(90, 160, (40, 48, 3)).astype(np.uint8))
    grey = rgb.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.0, "maker"
    made = []

    def add(image: Image.Image, form: str, **settings: Any) -> None:
        file = io.BytesIO()
        image.copy().save(file, form, **settings)
        made.append(file.getvalue())

    for settings in ({}, {"progressive": True}, {"exif": exif}, {"comment": b"x" * 40, "dpi": (72, 72)}):
        add(rgb, "JPEG", **settings)
    add(grey, "JPEG"), add(rgb.convert("CMYK"), "JPEG")
    add(rgb, "MPO", save_all=True, append_images=[rgb])
    for image in (rgb, grey, deep, rgb.convert("P"), rgb.convert("1"), rgb.convert("RGBA"), grey.convert("LA")):
        add(image, "PNG")
    add(rgb, "PNG", exif=exif, icc_profile=b"x" * 200), add(rgb, "PNG", save_all=True, append_images=[grey])
    add(rgb.convert("P"), "PNG", transparency=3)
    for compression in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        add(rgb, "TIFF", compression=compression, exif=exif)
    for image in (
        deep,
        grey.convert("F"),
        grey.convert("I"),
        rgb.convert("CMYK"),
        rgb.convert("LAB"),
        rgb.convert("1"),
    ):
        add(image, "TIFF")
    add(rgb, "TIFF", save_all=True, append_images=[grey.copy(), rgb.copy()])
    for image in (rgb, grey, rgb.convert("P"), rgb.convert("1")):
        add(image, "BMP")
    add(rgb, "WEBP", exif=exif), add(rgb.convert("RGBA"), "WEBP", lossless=True)
    add(rgb, "WEBP", save_all=True, append_images=[rgb])
    add(rgb, "GIF"), add(rgb, "PPM"), add(rgb, "JPEG2000")
    return tuple(made)


def fuzz_picture(rng: random.Random, folder: Path) -> bool:
    """Whether a mutated picture could be read; ImageError otherwise."""
    data = mutate_bytes(rng, rng.choice(pictures()))
    path = folder / f"picture{rng.choice(('.png', '.jpg', '.tif', '.bmp', '.webp'))}"
    way = rng.randrange(4)
    try:
        if way < 2:
            image = decode_image(data, PIXELS)
        else:
            path.write_bytes(data)
            image = (read_image if way == 2 else read_mask)(path)
    except ImageError as error:
        _one_line(error)
        return False
    assert image.dtype == np.uint8 and image.ndim == (2 if way == 3 else 3) and image.size, image.shape
    return True


# --- tables --------------------------------------------------------------------------------------------------------


@cache
def tables() -> tuple[tuple[str, bytes, Mutate], ...]:
    """Names and contents of indexes that data sets come with, and what to do to them."""
    rows = "image,label,mask,class,defect,split\n" + "".join(
        f"part/test/bad/{i}.png,1,part/ground_truth/bad/{i}_mask.png,part,bad,test\npart/test/good/{i}.png,0,,part,,test\n"
        for i in range(2)
    )
    record = {"img_path": "part/test/bad/0.png", "mask_path": "part/ground_truth/bad/0_mask.png", "anomaly": 1}
    good = {
        "img_path": "part/test/good/0.png",
        "mask_path": "",
        "specie_name": "good",
        "cls_name": "part",
        "anomaly": 0,
    }
    meta = {"train": {"part": [good]}, "test": {"part": [record, good]}}
    iad = {
        "meta": {"normal_class": "OK", "prefix": "part/"},
        "train": [{"anomaly_class": "OK", "image_path": "test/good/0.png", "mask_path": None, "category": "part"}],
        "test": [{"anomaly_class": "AK", "image_path": "test/bad/0.png", "mask_path": "ground_truth/bad/0_mask.png"}],
    }
    visa = "object,split,label,image,mask\npart,test,anomaly,part/test/bad/0.png,part/ground_truth/bad/0_mask.png\n"
    return (
        ("index.csv", rows.encode(), mutate_text),
        ("meta.json", json.dumps(meta).encode(), mutate_json),
        ("realiad_jsons/part.json", json.dumps(iad).encode(), mutate_json),
        ("split_csv/1cls.csv", visa.encode(), mutate_text),
        ("labels.csv", b"id,hemorrhage\n0,1\n1,0\n", mutate_text),
    )


def fuzz_table(rng: random.Random, folder: Path) -> bool:
    """Whether a mutated index could be read; UsageError otherwise."""
    root = folder / "set"
    if not root.is_dir():
        for place in ("part/test/good", "part/test/bad", "part/ground_truth/bad", "realiad_jsons", "split_csv"):
            (root / place).mkdir(parents=True)
        for i in range(2):
            for place in (f"test/good/{i}.png", f"test/bad/{i}.png", f"ground_truth/bad/{i}_mask.png"):
                Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(root / "part" / place)
    name, content, mutate = rng.choice(tables())
    path = root / name
    path.write_bytes(mutate(rng, content))
    try:
        dataset = open_dataset(rng.choice((root, path)), rng.choice((None, None, "csv", "meta", "visa", "real-iad")))
        if rng.random() < 0.05:
            inspect(dataset)
    except UsageError as error:
        _one_line(error)
        return False
    finally:
        path.unlink()
    return True


# --- bundles -------------------------------------------------------------------------------------------------------


def fuzz_manifest(rng: random.Random, folder: Path) -> bool:
    """Whether a bundle with a mutated manifest, calibration or text features loads; UsageError otherwise."""
    from fbclip.runtime.calibration import Calibration

    root = folder / "b.fbclip"
    if not root.is_dir():
        root.mkdir()
        for file in EMBEDDED.iterdir():
            (root / file.name).symlink_to(file) if file.suffix == ".onnx" else shutil.copy(file, root)
    name = rng.choice(("manifest.json", "manifest.json", "calibration.json", "text.npy"))
    whole = _calibration() if name == "calibration.json" else (EMBEDDED / name).read_bytes()
    (root / name).write_bytes((mutate_bytes if name == "text.npy" else mutate_json)(rng, whole))
    if name == "text.npy":  # as a forger does, who renews its hash
        _renew(root, name)
    try:
        bundle = Bundle.load(root)
        Calibration.load(bundle)
    except UsageError as error:
        _one_line(error)
        return False
    finally:
        (root / name).unlink()
        if name != "calibration.json":
            shutil.copy(EMBEDDED / name, root)
        if name == "text.npy":
            shutil.copy(EMBEDDED / "manifest.json", root)
    assert np.isfinite(bundle.text).all() and 0 <= bundle.manifest.threshold <= 1
    return True


@cache
def _calibration() -> bytes:
    """A calibration of the embedded bundle, as `fbclip calibrate` writes it."""
    from rich.console import Console

    from fbclip.runtime.calibrate import calibrate
    from fbclip.runtime.predictor import Predictor

    rng = np.random.default_rng(0)
    frames = [rng.integers(90, 160, (64, 64, 3)).astype(np.uint8) for _ in range(9)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(EMBEDDED, Path(folder) / "b.fbclip"))
        bundle = Bundle.load(root)
        made, _, _ = calibrate(Predictor(bundle), frames, 0.2, [], Console(quiet=True))
        made.save(bundle)
        return bundle.calibration.read_bytes()


def _renew(root: Path, name: str) -> None:
    from fbclip.files import sha256

    values = json.loads((EMBEDDED / "manifest.json").read_bytes())
    values["files"][name] = sha256(root / name)
    (root / "manifest.json").write_text(json.dumps(values))


# --- streams -------------------------------------------------------------------------------------------------------


@cache
def streams() -> tuple[bytes, ...]:
    """Whole answers of MJPEG servers: head, then three pictures, in several manners of real cameras."""
    jpegs = [data for data in pictures() if data.startswith(b"\xff\xd8")][:4]
    answers = []
    for kind in (
        "multipart/x-mixed-replace; boundary=frame",
        "multipart/x-mixed-replace",
        "multipart/mixed; boundary=f",
    ):
        for end, length in ((b"\r\n", True), (b"\n", True), (b"\r\n", False)):
            parts = b""
            for jpeg in jpegs[:3]:
                size = b"Content-Length: %d" % len(jpeg) + end if length else b""
                parts += b"--frame" + end + b"Content-Type: image/jpeg" + end + size + end + jpeg + end
            answers.append(f"HTTP/1.0 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode() + parts)
    answers.append(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + b"".join(jpegs))
    return tuple(answers)


@cache
def _camera() -> tuple[int, list[bytes]]:
    """The port of a server that answers every connection with what the list holds, and closes it; and the list."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=16)
    answer = [b""]

    def serve() -> None:
        while True:
            with suppress(OSError), listening.accept()[0] as connection:
                connection.settimeout(2)
                connection.recv(65536)
                connection.sendall(answer[0])

    threading.Thread(target=serve, daemon=True).start()
    return listening.getsockname()[1], answer


def fuzz_stream(rng: random.Random, folder: Path) -> bool:
    """Whether a mutated stream gave a frame; Fault otherwise."""
    from fbclip.runtime.live.sources.devices import Fault, prepare_opencv
    from fbclip.runtime.live.sources.streams import connect_stream

    prepare_opencv()
    port, answer = _camera()
    answer[0] = mutate_bytes(rng, rng.choice(streams()))
    frames = 0
    try:
        with closing(connect_stream(f"http://127.0.0.1:{port}/", 0.5)) as device:
            for _ in range(20):  # a stream of 200 kB holds no more pictures than these
                device.grab()
                try:
                    image = device.retrieve()
                except Fault as fault:
                    assert fault.cause == "garbage", fault
                    continue
                assert image.dtype == np.uint8 and image.shape[2:] == (3,), image.shape
                frames += 1
    except Fault as fault:
        assert "\n" not in str(fault) and str(fault)
    return frames > 0


# --- the server's bodies -------------------------------------------------------------------------------------------


@cache
def _client() -> Any:
    """A client of the application itself, without a token."""
    from starlette.testclient import TestClient

    from fbclip.runtime.predictor import Predictor
    from fbclip.runtime.serving.access import Access
    from fbclip.runtime.serving.app import create_app

    return TestClient(create_app(Predictor(), Access("127.0.0.1", 80, None)), base_url="http://127.0.0.1")


def fuzz_body(rng: random.Random, folder: Path) -> bool:
    """Whether the server took a mutated body; otherwise it answers 4xx with {"detail": one line}."""
    if rng.random() < 0.5:
        kind = rng.choice(("image/jpeg", "image/png", "application/octet-stream", "IMAGE/TIFF; x=y"))
        body, headers = mutate_bytes(rng, rng.choice(pictures())), {"Content-Type": kind}
        query = rng.choice(("", "?map=1", "?overlay=1", "?overlay=maybe", "?map=1&map=2&x=%00"))
        answer = _client().post(f"/v1/predict{query}", content=body, headers=headers)
    else:
        body = mutate_json(rng, b'{"threshold": 0.5}')
        headers = {"Content-Type": "application/json"}
        if rng.random() < 0.2:
            headers[rng.choice(("Origin", "Host", "Cookie", "Authorization"))] = rng.choice(
                ("http://[", "[", "null", "fbclip_80=%ff; =; a", "Bearer", "", "a" * 5000)
            )
        answer = _client().put("/v1/threshold", content=body, headers=headers)
    content = answer.json()
    if answer.status_code == 200:
        assert all(np.isfinite(value) for value in (content.get("score", 0), content["threshold"])), content
        return True
    assert 400 <= answer.status_code < 500 and list(content) == ["detail"], (answer.status_code, content)
    assert isinstance(content["detail"], str) and "\n" not in content["detail"], content
    return False


# --- running -------------------------------------------------------------------------------------------------------

TARGETS: dict[str, Callable[[random.Random, Path], bool]] = {
    "pictures": fuzz_picture,
    "tables": fuzz_table,
    "manifests": fuzz_manifest,
    "streams": fuzz_stream,
    "bodies": fuzz_body,
}


def _one_line(error: FBClipError) -> None:
    assert "\n" not in str(error) and str(error), f"an error is one line; got {str(error)[:200]!r}"


def run(target: str, count: int, seed: int = 0, only: int | None = None, report: bool = False) -> tuple[int, int]:
    """Feed a parser `count` mutated inputs; returns how many it took and how many it refused.

    Raises:
        Escaped: names the case; `only` repeats it.
    """
    taken = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count) if only is None else [only]:
            start = time.process_time()
            try:
                taken += TARGETS[target](random.Random(f"{target} {seed} {number}"), Path(place))
            except Exception as error:
                raise Escaped(f"{target} --seed {seed} --only {number}: {traceback.format_exc(limit=-6)}") from error
            if (seconds := time.process_time() - start) > SLOW_S:
                raise Escaped(f"{target} --seed {seed} --only {number}: {seconds:.1f} s")
            if report and number % 10_000 == 9_999:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
                print(
                    f"{number + 1} in {time.monotonic() - began:.0f} s, {taken} taken, peak {peak:.0f} MB", flush=True
                )
    return taken, (count if only is None else 1) - taken


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libtiff writes to standard error from C."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="Repeat this case alone.")
    given = parser.parse_args()
    with quiet():
        taken, refused = run(given.target, given.count, given.seed, given.only, report=True)
    print(f"{given.target}: {taken} taken, {refused} refused with one line, nothing else came out")


if __name__ == "__main__":
    main()
