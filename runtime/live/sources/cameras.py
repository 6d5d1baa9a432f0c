"""Cameras on this machine: V4L2 (USB) and a Jetson's CSI."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import cv2

from fbclip.errors import UsageError
from fbclip.runtime.host import GSTREAMER, Machine, opencv
from fbclip.runtime.live.sources.devices import Fault, VideoDevice

USB2_BYTES = 40e6  # per second, what USB 2 carries of raw video


def connect_camera(
    device: Path, resolution: tuple[int, int] | None, fps: float | None, machine: Machine | None = None
) -> VideoDevice:
    """Open a V4L2 device (USB cameras), asking it for a resolution (width, height) and rate; it may choose others.

    Raises:
        Fault: "missing" with those that are there, or "refused".
    """
    if not device.exists():
        cameras = [f"{path} ({label})" for path, label in (machine or Machine()).cameras().items()]
        here = f"here are {', '.join(cameras)}" if cameras else "no camera is here, no /dev/video*"
        raise Fault("missing", f"there is no {device}; {here}")
    if not os.access(device, os.R_OK | os.W_OK):
        raise Fault("refused", f"permission denied for {device}: sudo usermod -aG video $USER, then log in again")
    capture = cv2.VideoCapture(str(device), cv2.CAP_V4L2)
    if not capture.isOpened():
        capture.release()
        raise Fault("refused", f"{device} can't be opened: another program has it, or it is no camera")
    return _asked(capture, resolution, fps)


def connect_numbered(number: int, resolution: tuple[int, int] | None, fps: float | None) -> VideoDevice:
    """Open a camera by its number, as Windows and macOS have them; as `connect_camera` else.

    Raises:
        Fault: "missing": these systems tell no more.
    """
    capture = cv2.VideoCapture(number)
    if not capture.isOpened():
        capture.release()
        raise Fault(
            "missing", f"camera {number} can't be opened: there is none, another program has it, or it isn't allowed"
        )
    return _asked(capture, resolution, fps)


def _asked(capture: cv2.VideoCapture, resolution: tuple[int, int] | None, fps: float | None) -> VideoDevice:
    """A camera that was asked for a resolution (width, height) and a rate."""
    if resolution:
        width, height = resolution
        if 2 * width * height * (fps or 30) > USB2_BYTES:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, width)
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, height)
    if fps:
        capture.set(cv2.CAP_PROP_FPS, fps)
    return VideoDevice(capture)


def csi_pipeline(sensor: int, resolution: tuple[int, int] | None, fps: float | None) -> str:
    """GStreamer's pipeline from a Jetson's CSI camera to BGR frames, the newest only."""
    wanted = "video/x-raw(memory:NVMM), format=NV12"
    if resolution:
        wanted += ", width={}, height={}".format(*resolution)
    if fps:
        rate = Fraction(fps).limit_denominator(1001)
        wanted += f", framerate={rate.numerator}/{rate.denominator}"
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! {wanted} ! nvvidconv ! video/x-raw, format=BGRx"
        " ! videoconvert ! video/x-raw, format=BGR ! appsink drop=true max-buffers=1 sync=false"
    )


def require_gstreamer(text: str) -> None:
    """UsageError where this OpenCV has no GStreamer, which CSI cameras need."""
    if "GSTREAMER" not in opencv()["backends"]:
        raise UsageError(
            f"{text} needs an OpenCV with GStreamer; OpenCV {cv2.__version__} from {Path(cv2.__file__).parent} "
            f"has none. On a Jetson: {GSTREAMER}"
        )


def connect_csi(sensor: int, resolution: tuple[int, int] | None, fps: float | None) -> VideoDevice:
    """Open a Jetson's CSI camera. Fault: "refused"."""
    capture = cv2.VideoCapture(csi_pipeline(sensor, resolution, fps), cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        capture.release()
        cure = "check the cable and the sensor's mode (v4l2-ctl --list-devices), then sudo systemctl restart nvargus-daemon"
        raise Fault("refused", f"CSI camera {sensor} does not open: {cure}")
    return VideoDevice(capture)
