"""The installed command: Ctrl-C and every error end in one line. Imports little, for Ctrl-C may come at any moment."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = "interrupted; what was finished is kept"
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells have it
LONGEST = 500  # characters of a message that a library chose
_process = os.getpid()
_interrupted = False


def main() -> None:
    """Run the command line; exit code 2 for wrong usage or input, 1 for a failure, 130 after Ctrl-C."""
    listening = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the shell may have it ignored
    if listening:
        signal.signal(signal.SIGINT, _interrupt)
    ended_by: BaseException = SystemExit(0)
    try:
        from fbclip.cli import app
        from fbclip.terminal import open_up

        open_up()
        app()
    except BaseException as error:
        ended_by = error
    if listening:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more ends it at once, and what is left needs no unwinding
    code = _explain(ended_by)
    if (lost := _flush()) and not code:
        code = _explain(lost)
    from fbclip.stopping import ending

    with ending():
        sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: unwind what is under way. Not out of an import, which may turn that into another error, print it or
    forget it: there nothing is under way yet, but for a file that is half written perhaps."""
    global _interrupted
    _interrupted = True
    if not _is_importing(frame) or os.getpid() != _process:  # a worker that was forked is another's business
        raise KeyboardInterrupt
    if abandon := getattr(sys.modules.get("fbclip.files"), "abandon", None):
        abandon()
    try:
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
        os.write(2, f"fbclip: {INTERRUPTED}\n".encode())
    finally:
        os._exit(EXIT_INTERRUPTED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _explain(error: BaseException) -> int | str:
    """Say in one line what went wrong, if anything did; returns the exit code."""
    from fbclip.errors import FBClipError, Interrupted
    from fbclip.files import FULL, write_error

    if isinstance(error, SystemExit) and not (_interrupted and error.code):  # what went wrong was said
        return 0 if error.code is None else error.code
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt) or (_interrupted and not isinstance(error, Interrupted)):
        _tell(INTERRUPTED)
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of our output left
        return 1
    if isinstance(error, OSError) and error.errno in FULL:
        error = write_error(error, os.fsdecode(error.filename or "the output"))
    if isinstance(error, FBClipError):
        _tell(f"{error.flag}: {error}" if error.flag else str(error))
        return error.exit_code
    reason = " ".join(str(error).split())[:LONGEST]
    _tell(f"{type(error).__name__}: {reason}; for the traceback run fbclip --debug {' '.join(sys.argv[1:2])} …")
    return 1


def _tell(line: str) -> None:
    from contextlib import suppress

    from fbclip.logs import last_line
    from fbclip.terminal import printable

    with suppress(OSError):  # then nobody can be told
        print(last_line(printable(line)), file=sys.stderr, flush=True)


def _flush() -> OSError | None:
    """Write out what Python holds back, or else throw it away, since Python would complain at its end."""
    try:
        if sys.stdout:
            sys.stdout.flush()
        return None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return error
