"""Images that clients send to be scored: bounded in bytes, pixels, time and number."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import cv2
import numpy as np
from anyio.to_thread import run_sync
from fastapi import HTTPException
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request

from fbclip.errors import FBClipError, ImageError
from fbclip.images import decode_image, encode_image
from fbclip.memory import Tensors
from fbclip.runtime.backends import Backend, Results
from fbclip.runtime.host import give_back_memory
from fbclip.runtime.prediction import Prediction
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.serving.feed import SHOWN_SIDE

MAP_SCALE = 65535  # of a map's value 1 in its 16-bit picture


@dataclass(frozen=True)
class UploadLimits:
    """What the server takes from clients.

    Attributes:
        upload_bytes: of one image as it is sent.
        upload_pixels: of one image; its header is asked before anything is decoded. Its sides are bounded too, see
            `decode_image`.
        upload_seconds: to send it in.
        queue: images at once, being sent, waiting or in work.
        viewers: pages at once that watch.
    """

    upload_bytes: int = 20 << 20
    upload_pixels: int = 25_000_000
    upload_seconds: float = 30
    queue: int = 8
    viewers: int = 16


class Uploads:
    """Scores images of clients, one after the other, away from the event loop."""

    def __init__(self, predictor: Predictor, limits: UploadLimits) -> None:
        self.predictor = predictor
        self.limits = limits
        self.under_way = 0
        self.fault: str | None = None  # why the last image could not be judged
        self._turns = anyio.Semaphore(1)  # decoded images and maps are large: one at a time

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue for one request, from before its body is read.

        Raises:
            HTTPException: 429, none is free.
        """
        if self.under_way >= self.limits.queue:
            detail = f"at most {self.limits.queue} images are taken at once: try again in a second"
            raise HTTPException(429, detail, {"Retry-After": "1"})
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def read(self, request: Request) -> bytes:
        """The body, an encoded image.

        Raises:
            HTTPException: 408 too slow, 413 too long, 415 no image by its Content-Type.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind != "application/octet-stream":
            cure = "curl -H 'Content-Type: image/jpeg' --data-binary @FILE"
            raise HTTPException(415, f"the body is the image, its Content-Type image/…; got {kind or 'none'}: {cure}")
        return await read_body(request, self.limits.upload_bytes, self.limits.upload_seconds)

    async def score(self, data: bytes, with_overlay: bool, with_map: bool) -> dict[str, Any]:
        """What the model says of an encoded image, and pictures of it in base64.

        Raises:
            ImageError: no image, damaged, or not of the size the bundle takes.
            HTTPException: 413, more pixels than allowed.
        """
        async with self._turns:
            return await run_sync(self._score, data, with_overlay, with_map)

    def _score(self, data: bytes, with_overlay: bool, with_map: bool) -> dict[str, Any]:
        try:
            return self._scored(data, with_overlay, with_map)
        finally:
            give_back_memory()  # blocks of a large picture, some 200 MB, would be kept for the next one

    def _scored(self, data: bytes, with_overlay: bool, with_map: bool) -> dict[str, Any]:
        prediction = self._judged(decode_image(data, self.limits.upload_pixels))
        height, width = prediction.image.shape[:2]
        # in one pass: a map of 25 million pixels is 100 MB, and so is every step between
        level = prediction.anomaly_map
        grey = cv2.addWeighted(level, MAP_SCALE, level, 0, 0, dtype=cv2.CV_16U) if with_map else None
        return {
            **prediction.to_dict(),
            "width": width,
            "height": height,
            "overlay_png": _base64(encode_image(prediction.overlay(SHOWN_SIDE), ".png")) if with_overlay else None,
            "map_png": None if grey is None else _base64(encode_image(grey, ".png")),
        }

    def _judged(self, image: NDArray[np.uint8]) -> Prediction:
        """The prediction; what the model could not judge is remembered until it can."""
        try:
            prediction = self.predictor(image)
        except ImageError:
            raise  # its own fault
        except Exception as error:
            self.fault = " ".join(str(error).split()) if isinstance(error, FBClipError) else type(error).__name__
            raise
        self.fault = None
        return prediction


class InTurn(Backend):
    """A backend that the pipeline and uploads share: one thread runs it, in the order they ask."""

    def __init__(self, backend: Backend) -> None:
        self.device = backend.device
        self._backend = backend
        self._thread = ThreadPoolExecutor(1, "model")
        self._busy_since: float | None = None  # of the call under way

    @property
    def launches(self) -> str | None:  # type: ignore[override]
        return self._backend.launches

    def run(self, images: NDArray[np.uint8]) -> Results:
        """Images uint8 (B, H, W, 3) -> scores float32 (B,), maps float32 (B, H', W'), both 0..1."""
        return self._thread.submit(self._run, images).result()

    def _run(self, images: NDArray[np.uint8]) -> Results:
        self._busy_since = time.monotonic()
        try:
            return self._backend.run(images)
        finally:
            self._busy_since = None

    @property
    def busy_s(self) -> float:
        """Seconds that the call under way has taken so far; 0 where none is."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def set_memory(self, tensors: Tensors | None) -> None:
        """Exchange the memory, in turn with what is asked."""
        self._thread.submit(self._backend.set_memory, tensors).result()

    def close(self) -> None:
        """Close the backend, once a call under way is done; safe to call again."""
        self._backend.close()


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """A request's body, of at most `limit` bytes.

    Raises:
        HTTPException: 400 cut off or of no length, 408 not there in time, 413 longer; told from Content-Length before
            any of it is read.
    """
    too_long = HTTPException(413, f"at most {limit:,} bytes are taken")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise HTTPException(400, "Content-Length is no number of bytes")
    if int(length) > limit:
        raise too_long
    data = bytearray()
    try:
        with anyio.fail_after(seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_long
    except TimeoutError as error:
        raise HTTPException(408, f"the body was not there in {seconds:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the connection ended within the body") from error
    return bytes(data)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
