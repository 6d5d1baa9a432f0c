"""Parts that move: where the part of a reference picture lies in a frame, so that every frame is looked at alike.

ORB features of the reference are found again in the frame, and a homography that most of them agree on (MAGSAC++) says
where the part lies. Where a part has too few features of its own, its turn and size come from the phase correlation of
log-polar spectra instead, its place from that of the pictures (Reddy and Chatterji, An FFT-based technique for
translation, rotation, and scale-invariant image registration, IEEE Transactions on Image Processing 1996). Either way
optical flow at the reference's corners then makes the pose exact to a fraction of a pixel.

A pose is believed where the frame, brought in line, looks like the reference: by the correlation of their edges. All
limits were chosen on rendered parts (benchmarks/align.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from fbclip.errors import ImageError, UsageError
from fbclip.images import read_image, read_mask

Points = NDArray[Any]  # (N, 2) of x and y, or a homography (3, 3); float64
Grey = NDArray[np.uint8]
Plane = NDArray[np.float32]
Pixels = TypeVar("Pixels", NDArray[np.uint8], NDArray[np.float32])

SIDE = 512  # pixels of the longer side that the search works on
FEATURES = 500
RATIO = 0.8  # of the distances to the best and the second best match (Lowe, IJCV 2004)
LEAST_MATCHES = 12  # that agree on a pose
REPROJECTION = 3.0  # pixels
NARROW = 32  # pixels of the reduced picture; narrower ones show no part
CORNERS, LEAST_CORNERS = 200, 16  # where the flow is measured
FLOW = {"winSize": (21, 21), "maxLevel": 2}
REFINEMENTS = 2
ALIKE = 0.7  # correlation of edges from which a pose is believed
SMALLEST, LARGEST = 0.7, 1.4  # of a part against the reference
SKEWED = 1.5  # longest by shortest of its sides, each against the reference's
ALIKE_TURNED = (
    0.45  # of a part's edges with its own, turned, from which its turn can't be told; parts that can: up to 0.4
)
AROUND = 15  # pixels of the reduced picture around edges that belong to them
VISIBLE = 0.99  # share of the part that lies in the frame
POLAR = 256  # side of the spectra


@dataclass(frozen=True, eq=False)
class Pose:
    """Where the part lies in a frame.

    Attributes:
        matrix: float64 (3, 3), from points (x, y, 1) of the reference to those of the frame; whole numbers are centres of
            pixels.
        reference_hw: height and width of the reference.
        likeness: correlation of the edges of frame and reference where the part is, -1..1.
    """

    matrix: Points = field(repr=False)
    reference_hw: tuple[int, int]
    likeness: float

    def corners(self, box: tuple[int, int, int, int]) -> Points:
        """The corners of a box (x0, y0, x1, y1) of the reference in the frame, float64 (4, 2) of x and y, clockwise from its
        upper left one."""
        x0, y0, x1, y1 = box
        return _project(self.matrix, np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]) - 0.5) + 0.5

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where a point (x, y) of the frame lies on the reference, in 0..1 of its width and height."""
        height, width = self.reference_hw
        ((x, y),) = _project(np.linalg.inv(self.matrix), np.array([point]) - 0.5) + 0.5
        return float(x / width), float(y / height)

    @property
    def scale(self) -> float:
        """Pixels of the frame along a side of a pixel of the reference, in its middle."""
        height, width = self.reference_hw
        origin, right, down = _project(self.matrix, np.array([(0, 0), (1, 0), (0, 1)]) + np.array((width, height)) / 2)
        return float(np.sqrt(abs(np.linalg.det([right - origin, down - origin]))))

    def onto_reference(self, frame: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """A box (x0, y0, x1, y1) of the reference as the frame uint8 (H, W, 3) shows it: (y1 - y0, x1 - x0, 3); the frame's
        edges are repeated."""
        x0, y0, x1, y1 = box
        matrix = self.matrix @ np.array([(1, 0, x0), (0, 1, y0), (0, 0, 1)])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = x1 - x0, y1 - y0
        return np.asarray(
            cv2.warpPerspective(frame, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE), np.uint8
        )

    def onto_frame(self, values: Pixels, frame_hw: tuple[int, int]) -> Pixels:
        """A map float32, or a mask uint8, of the reference's size on the frame, (H, W); 0 outside."""
        flags = cv2.INTER_NEAREST if values.dtype == np.uint8 else cv2.INTER_LINEAR
        height, width = frame_hw
        return np.asarray(cv2.warpPerspective(values, self.matrix, (width, height), flags=flags), values.dtype)


@dataclass(frozen=True, eq=False)
class Align:
    """A picture of the part in place, and how it is found in others. Any number of threads may ask.

    Attributes:
        image: the reference, uint8 (H, W, 3) RGB.
        mask: uint8 (H, W) of 0 and 1, what of it is the part; None for all of it.
    """

    image: NDArray[np.uint8] = field(repr=False)
    mask: NDArray[np.uint8] | None = field(default=None, repr=False)

    @classmethod
    def parse(
        cls, reference: Align | str | Path | NDArray[np.uint8], mask: str | Path | NDArray[np.uint8] | None = None
    ) -> Align:
        """Of pictures or their paths; an `Align` stays as it is.

        Raises:
            UsageError: no such picture, a mask of another size or that is all black, or a part that shows too little to be
                found.
        """
        if isinstance(reference, Align):
            return reference
        align = cls(_picture(reference, "align"), None if mask is None else _mask(mask))
        if align.mask is not None and align.mask.shape != align.image.shape[:2]:
            here, there = (f"{each.shape[1]}x{each.shape[0]}" for each in (align.mask, align.image))
            raise UsageError(f"the part's mask has the size of its picture, {there}; got {here}", option="mask")
        if align.mask is not None and not align.mask.any():
            raise UsageError("the part's mask is black all over: paint white where the part is", option="mask")
        if align.find(align.image) is None:
            raise UsageError(
                "a part is found by its edges and corners; this picture shows too few of them: take one of the whole part, "
                "sharp, with its outline",
                option="align",
            )
        if align._reference.likeness_turned() >= ALIKE_TURNED:
            raise UsageError(
                "how a part lies is told by what it looks like, and this one looks the same when it is turned: choose a part "
                "with a mark, a hole or a lug that tells, or inspect frames as they lie",
                option="align",
            )
        return align

    @cached_property
    def identity(self) -> str:
        """What distinguishes it, wherever the files may be: a hash of the pixels."""
        digest = hashlib.sha256(repr(self.image.shape).encode() + self.image.tobytes())
        if self.mask is not None:
            digest.update(self.mask.tobytes())
        return f"a picture of the part (sha256 {digest.hexdigest()[:16]})"

    def find(self, frame: NDArray[np.uint8]) -> Pose | None:
        """Where the part lies in a frame uint8 (H, W, 3) of any size; None where it isn't. The same frame, the same pose."""
        small = _Small(frame)
        if min(small.grey.shape) < NARROW:
            return None
        reference = self._reference
        for guess in (reference.by_features, reference.by_spectra):
            found = [(reference.likeness(pose, small.grey), pose) for pose in guess(small.grey)]
            if found and (best := max(found, key=lambda each: each[0]))[0] >= ALIKE:
                matrix = np.linalg.inv(small.reduce) @ best[1] @ reference.reduce
                height, width = self.image.shape[:2]
                return Pose(matrix / matrix[2, 2], (height, width), best[0])
        return None

    @cached_property
    def _reference(self) -> _Reference:
        return _Reference(self.image, self.mask)


class _Small:
    """A picture as the search works on it.

    Attributes:
        grey: uint8 (h, w), with `SIDE` pixels on its longer side where the picture has more.
        reduce: float64 (3, 3), from the picture's points to these.
    """

    def __init__(self, image: NDArray[np.uint8]) -> None:
        height, width = image.shape[:2]
        factor = min(1.0, SIDE / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        small = image if factor == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        self.grey = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)
        x, y = size[0] / width, size[1] / height
        self.reduce = np.array([(x, 0, x / 2 - 0.5), (0, y, y / 2 - 0.5), (0, 0, 1)])


class _Reference(_Small):
    """What is known of the reference beforehand."""

    def __init__(self, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> None:
        super().__init__(image)
        height, width = self.grey.shape
        if mask is not None:
            self.mask = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
        else:
            self.mask = _busy(self.grey)
        inside = np.argwhere(self.mask)[:, ::-1].astype(float)
        self.inside = inside[:: max(1, len(inside) // 500)]  # enough points of the part to tell how much is in view
        self.key_points, self.descriptors = _features(self.grey, self.mask)
        self.flat = _flattened(self.grey)
        corners = cv2.goodFeaturesToTrack(self.flat, CORNERS, 0.01, 5, mask=self.mask)
        self.corners = np.empty((0, 2), np.float32) if corners is None else corners.reshape(-1, 2).astype(np.float32)
        self.edges = _edges(self.grey)
        self.spectrum = _polar_spectrum(self.grey)

    def likeness_turned(self) -> float:
        """How much the part looks like itself where it is turned by 24 degrees or more: the median over turns. A pattern
        that repeats at some turns is told by its features; what is round is alike at all of them."""
        x, y = (float(each) for each in self.inside.mean(axis=0))
        turns = (cv2.getRotationMatrix2D((x, y), degrees, 1) for degrees in range(24, 348, 12))
        return float(np.median([self.likeness(np.vstack([turn, (0, 0, 1)]), self.grey) for turn in turns]))

    def by_features(self, grey: Grey) -> list[Points]:
        """Poses (3, 3), from points of the reference to those of a frame, that features agree on: one or none."""
        key_points, descriptors = _features(grey, None)
        if min(len(key_points), len(self.key_points)) < LEAST_MATCHES:
            return []
        pairs = cv2.BFMatcher(cv2.NORM_HAMMING).knnMatch(self.descriptors, descriptors, 2)
        matches = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < RATIO * pair[1].distance]
        if len(matches) < LEAST_MATCHES:
            return []
        here = self.key_points[[match.queryIdx for match in matches]]
        there = key_points[[match.trainIdx for match in matches]]
        pose, agreed = cv2.findHomography(here, there, cv2.USAC_MAGSAC, REPROJECTION, None, 2000, 0.999)
        if pose is None or int(agreed.sum()) < LEAST_MATCHES:
            return []
        return self._refined(np.asarray(pose, np.float64), grey)

    def by_spectra(self, grey: Grey) -> list[Points]:
        """The same by phase correlation, for both of the two turns that a spectrum can't tell apart."""
        (across, down), _ = cv2.phaseCorrelate(self.spectrum, _polar_spectrum(grey))
        # what is larger has a smaller spectrum; both were taken of squares of the longer side
        scale = float(np.exp(-across * np.log(POLAR / 2) / POLAR)) * max(grey.shape) / max(self.grey.shape)
        degrees = -down * 360 / POLAR
        found: list[Points] = []
        for turned in (degrees, degrees + 180):
            found += self._refined(self._shifted(scale, turned, grey), grey)
        return found

    def _shifted(self, scale: float, degrees: float, grey: Grey) -> Points:
        """A pose of this scale and turn, whose place the pictures tell by phase correlation."""
        height, width = self.grey.shape
        size = max(*self.grey.shape, *grey.shape)
        turn = np.vstack([cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale), (0, 0, 1)])
        detail = (self.flat.astype(np.float32) - FLAT) * self.mask
        turned = np.asarray(cv2.warpPerspective(detail, turn, (size, size)), np.float32)
        canvas = np.zeros((size, size), np.float32)
        canvas[: grey.shape[0], : grey.shape[1]] = _flattened(grey).astype(np.float32) - FLAT
        (x, y), _ = cv2.phaseCorrelate(turned, canvas)
        move = np.array([(1, 0, x), (0, 1, y), (0, 0, 1)])
        return np.asarray(move @ turn)

    def _refined(self, pose: Points, grey: Grey) -> list[Points]:
        """The pose by the flow from the reference's corners to the frame that is brought in line; none where it gets lost."""
        flat = _flattened(grey)
        for _ in range(REFINEMENTS):
            if not self._is_sound(pose, grey) or len(self.corners) < LEAST_CORNERS:
                return []
            moved, seen, _ = cv2.calcOpticalFlowPyrLK(  # type: ignore[call-overload]  # None makes new ones
                self.flat, self._in_line(flat, pose), self.corners, None, **FLOW
            )
            kept = seen.ravel() > 0
            if kept.sum() < LEAST_CORNERS:
                return []
            there = _project(pose, moved[kept].astype(np.float64))
            better, agreed = cv2.findHomography(
                self.corners[kept], there, cv2.USAC_MAGSAC, REPROJECTION / 2, None, 2000, 0.999
            )
            if better is None or int(agreed.sum()) < LEAST_CORNERS:
                return []
            pose = np.asarray(better, np.float64)
        return [pose] if self._is_sound(pose, grey) else []

    def likeness(self, pose: Points, grey: Grey) -> float:
        """The correlation of the edges of the frame, brought in line, with the reference's where the part is, -1..1."""
        here, there = (each[self.mask > 0] for each in (self.edges, _edges(self._in_line(grey, pose))))
        here, there = here - here.mean(), there - there.mean()
        return float(here @ there / max(np.linalg.norm(here) * np.linalg.norm(there), 1e-9))

    def _in_line(self, picture: Grey, pose: Points) -> Grey:
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = self.grey.shape[::-1]
        return np.asarray(
            cv2.warpPerspective(picture, pose, size, flags=flags, borderMode=cv2.BORDER_REPLICATE), np.uint8
        )

    def _is_sound(self, pose: Points, grey: Grey) -> bool:
        """Whether a part could lie so: seen from its front, of about its size, and nearly all of it in the frame."""
        if not np.isfinite(pose).all() or abs(np.linalg.det(pose)) < 1e-9:
            return False
        height, width = self.grey.shape
        box = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
        depth = np.c_[box, np.ones(4)] @ pose[2]
        if not (depth > 0).all() and not (depth < 0).all():
            return False
        sides = np.roll(there := _project(pose, box), -1, axis=0) - there
        turns = sides[:, 0] * np.roll(sides, -1, axis=0)[:, 1] - sides[:, 1] * np.roll(sides, -1, axis=0)[:, 0]
        lengths = np.linalg.norm(sides, axis=1) / (width, height, width, height)
        if (turns <= 0).any() or lengths.min() < SMALLEST or lengths.max() > LARGEST:
            return False
        shown = _project(pose, self.inside)
        in_view = ((shown >= 0) & (shown <= np.array(grey.shape[::-1]) - 1)).all(axis=1)
        return bool(lengths.max() <= SKEWED * lengths.min() and in_view.mean() >= VISIBLE)


FLAT = 128  # grey level of what has no contrast
NOISE = np.float32(16)  # grey levels, squared: what has less contrast isn't given more


def _project(matrix: Points, points: Points) -> Points:
    """Points (N, 2) through a homography."""
    lifted = np.c_[points, np.ones(len(points))] @ matrix.T
    return np.asarray(lifted[:, :2] / lifted[:, 2:])


def _features(grey: Grey, mask: Grey | None) -> tuple[Points, Grey]:
    """Places (N, 2) and descriptors (N, 32) of ORB's features."""
    key_points, descriptors = cv2.ORB.create(FEATURES, fastThreshold=10).detectAndCompute(grey, mask)
    if descriptors is None:
        return np.empty((0, 2)), np.empty((0, 32), np.uint8)
    return np.array([each.pt for each in key_points], np.float64), np.asarray(descriptors, np.uint8)


def _flattened(grey: Grey) -> Grey:
    """Without the light's slow changes, of one contrast: what optical flow may compare."""
    values = grey.astype(np.float32)
    detail = values - cv2.blur(values, (25, 25))
    spread = cv2.blur(cv2.multiply(detail, detail), (49, 49))
    even = cv2.divide(detail, cv2.sqrt(spread + NOISE), scale=40)
    return np.asarray(cv2.convertScaleAbs(even + FLAT), np.uint8)


def _busy(grey: Grey) -> Grey:
    """Where a picture without a mask shows a part: around its clear edges."""
    edges = cv2.normalize(_edges(grey), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)  # type: ignore[call-overload]
    _, clear = cv2.threshold(edges, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    grown = cv2.dilate(clear, np.ones((AROUND, AROUND), np.uint8))
    return np.asarray(grown, np.uint8)


def _edges(grey: Grey) -> Plane:
    """How steep grey levels are, smoothed so that half a pixel makes no difference, without the contrast of the light."""
    values = cv2.GaussianBlur(grey, (0, 0), 1).astype(np.float32)
    steep = cv2.magnitude(cv2.Sobel(values, cv2.CV_32F, 1, 0), cv2.Sobel(values, cv2.CV_32F, 0, 1))
    return np.asarray(np.sqrt(cv2.GaussianBlur(steep, (0, 0), 1.5)), np.float32)


def _polar_spectrum(grey: Grey) -> Plane:
    """The logarithm of the spectrum's size in logarithmic polar coordinates, where turns and scales are shifts."""
    side = max(grey.shape)
    square = np.full((side, side), grey.mean(), np.float32)
    square[: grey.shape[0], : grey.shape[1]] = grey
    square = cv2.resize(square, (POLAR, POLAR), interpolation=cv2.INTER_AREA)
    square = (square - square.mean()) * cv2.createHanningWindow((POLAR, POLAR), cv2.CV_32F)
    spectrum = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(square)))).astype(np.float32)
    middle = (POLAR / 2, POLAR / 2)
    return np.asarray(cv2.warpPolar(spectrum, (POLAR, POLAR), middle, POLAR / 2, cv2.WARP_POLAR_LOG), np.float32)


def _picture(picture: str | Path | NDArray[np.uint8], option: str) -> NDArray[np.uint8]:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UsageError(f"a picture is uint8 (H, W, 3); got {picture.dtype} {picture.shape}", option=option)
        return picture.copy()  # a camera's buffer is overwritten
    if not isinstance(picture, (str, Path)):
        raise UsageError(f"a picture is a path, or uint8 (H, W, 3); got {type(picture).__name__}", option=option)
    try:
        return read_image(Path(picture))
    except ImageError as error:
        raise UsageError(f"no picture of the part: {error}", option=option) from error


def _mask(mask: str | Path | NDArray[np.uint8]) -> NDArray[np.uint8]:
    if isinstance(mask, np.ndarray):
        if mask.dtype not in (np.uint8, np.bool_) or mask.ndim != 2:
            raise UsageError(f"a mask is uint8 (H, W); got {mask.dtype} {mask.shape}", option="mask")
        return (mask > 0).astype(np.uint8)
    try:
        return read_mask(Path(mask))
    except ImageError as error:
        raise UsageError(f"no mask of the part: {error}", option="mask") from error
