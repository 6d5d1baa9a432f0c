"""A window on the screen with the newest record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import cv2

from fbclip.errors import FBClipError, UsageError
from fbclip.images import to_bgr
from fbclip.runtime.live.records import Notice, Record

WINDOW = "fbclip"


class Window:
    """The overlay of the latest result on the screen. q, Esc or closing it ends the run, as Ctrl-C does.

    Raises:
        UsageError: no window can be opened here.
    """

    name = "window"

    def __init__(self) -> None:
        require_window()
        self._is_open = False
        self._was_closed = False

    def write(self, record: Record) -> None:
        if self._was_closed:
            return
        try:
            picture = to_bgr(record.draw())
            if not self._is_open:
                cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
                cv2.resizeWindow(WINDOW, picture.shape[1], picture.shape[0])
                self._is_open = True
            cv2.imshow(WINDOW, picture)
            key = cv2.waitKey(1) & 0xFF
            self._was_closed = key in (ord("q"), 27) or not _is_shown()
        except cv2.error as error:
            raise FBClipError(f"the window can't be drawn: {error.err}") from error
        if self._was_closed:
            if sys.platform == "win32":  # there kill ends the process at once
                signal.raise_signal(signal.SIGINT)
            else:
                os.kill(os.getpid(), signal.SIGINT)

    def notify(self, notice: Notice) -> None:
        if self._is_open and not self._was_closed:
            cv2.setWindowTitle(WINDOW, f"fbclip: {notice.message}")

    def close(self) -> None:
        if self._is_open:
            with suppress(cv2.error):  # the user closed it
                cv2.destroyWindow(WINDOW)
            self._is_open = False


def _is_shown() -> bool:
    try:
        return cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) >= 1
    except cv2.error:  # Qt knows nothing of windows once the last one is closed
        return False


def require_window() -> None:
    """Open a window in a process of its own: without a display some builds of OpenCV abort theirs."""
    instead = "or watch in a browser with fbclip serve, or record a video"
    if not cv2.currentUIFramework():
        raise UsageError(
            f"a window needs an OpenCV with windows, and opencv-python-headless has none: pip uninstall -y "
            f"opencv-python-headless && pip install opencv-python, {instead}",
            option="show",
        )
    program = "import cv2; cv2.namedWindow('fbclip'); cv2.waitKey(1)"
    probe = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UsageError(
            f"a window needs a display, and none opens here ({reason}): run on a desktop, {instead}", option="show"
        )
