"""Files take their names when they are whole: with real processes, kills, full disks, links and devices."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbclip import files
from fbclip.errors import FBClipError, UsageError
from fbclip.files import new_folder, new_run, replacing, require_file, require_writable, sweep, write_error, write_text
from helpers.disks import largest_file, read_only, tiny_disk


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(files.PREFIX))


def test_two_processes_never_publish_torn_files(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    program = (
        "import sys; from fbclip.files import write_text\n"
        "for _ in range(300): write_text(sys.argv[2] * 200_000 + '\\n', sys.argv[1])"
    )
    writers = [start(program, target, letter) for letter in "ab"]
    contents = set()
    while any(writer.poll() is None for writer in writers):
        if target.exists():
            contents.add(target.read_text())
    assert [writer.communicate() and writer.returncode for writer in writers] == [0, 0]
    assert contents == {letter * 200_000 + "\n" for letter in "ab"}
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_swept_up_and_what_a_living_one_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "with replacing(Path(sys.argv[1]) / 'x') as f: f.write(b'half'); f.flush(); print(flush=True); input()"
    folder = "with new_folder(Path(sys.argv[1]) / 'y') as f: (f / 'z').touch(); print(flush=True); input()"
    head = "import sys; from pathlib import Path; from fbclip.files import *\n"
    killed, living = ([start(head + program, tmp_path) for program in (file, folder)] for _ in range(2))
    for process in (*killed, *living):
        assert process.stdout
        process.stdout.readline()
    assert len(left_behind(tmp_path)) == 4
    for process in killed:
        process.kill()
        process.wait()
    monkeypatch.setattr(files, "NEW_S", 0.0)  # they have locked what they made long since
    monkeypatch.setattr(files, "_swept", set())
    write_text("whole", tmp_path / "other")
    assert len(left_behind(tmp_path)) == 2
    for process in living:
        process.communicate("go on\n")
        assert process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "x"]


def test_what_only_looks_like_a_leftover_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "NEW_S", 0.0)
    (tmp_path / "mine").write_text("stays")
    (tmp_path / ".fbclip-0.tmp").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / ".fbclip-1.tmp")
    sweeping = threading.Thread(target=sweep, args=(tmp_path,), daemon=True)
    sweeping.start()
    sweeping.join(20)
    assert not sweeping.is_alive()
    assert (tmp_path / "mine").read_text() == "stays"


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    write_text("old", target)
    with pytest.raises(ZeroDivisionError), replacing(target) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("write", ["bytes", "numpy", "pillow"])
def test_a_full_disk_is_told_as_such_whoever_writes(tmp_path: Path, write: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    with tiny_disk(tmp_path / "disk", "64k"):
        target = tmp_path / "disk" / "x"
        write_text("old", target)
        full = pytest.raises(FBClipError, match=r"^the disk is full: can't write .*/x; free some space")
        with full as caught, replacing(target, durable=write == "bytes") as file:
            if write == "bytes":
                file.write(noise.tobytes())
            elif write == "numpy":
                np.save(file, noise)
            else:
                Image.fromarray(noise).save(file, "PNG")
        assert caught.value.exit_code == 1
        assert target.read_text() == "old"
        assert left_behind(tmp_path / "disk") == []


def test_a_full_disk_is_told_as_such_in_a_folder_too(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", "64k"):
        with pytest.raises(FBClipError, match="the disk is full"), new_folder(tmp_path / "disk" / "b") as folder:
            np.save(folder / "x.npy", np.zeros(100_000))  # it writes past Python, and only says that it failed
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_limit_of_files_is_a_failure_too(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(FBClipError, match="File too large") as caught:
        write_text("x" * 2000, tmp_path / "x")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, 1),
        (errno.EDQUOT, 1),
        (errno.EFBIG, 1),
        (errno.EIO, 1),
        (errno.EMFILE, 1),
        (errno.EACCES, 2),
        (errno.EROFS, 2),
    ],
)
def test_a_failure_and_a_wrong_place_have_their_exit_codes(number: int, code: int) -> None:
    error = write_error(OSError(number, os.strerror(number)), "results/x.json")
    assert error.exit_code == code
    assert "can't write results/x.json" in str(error)
    assert "\n" not in str(error)


def test_a_link_stays_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "latest.json").symlink_to("real/x.json")
    for text in ("one", "two"):
        write_text(text, tmp_path / "latest.json")
        assert (tmp_path / "latest.json").is_symlink()
        assert (tmp_path / "real" / "x.json").read_text() == text
    write_text("gone", "/dev/null")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    require_file(tmp_path / "pipe")
    write_text("through", tmp_path / "pipe")
    assert os.read(reader, 100) == b"through"
    os.close(reader)


def test_modes_are_those_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text("x", tmp_path / "x")
        with new_folder(tmp_path / "y") as folder:
            folder.rename(tmp_path / "y")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "y").stat().st_mode & 0o777 == 0o750


def test_the_longest_name_there_may_be_can_be_written(tmp_path: Path) -> None:
    for name in ("a" * 255, "漆" * 85):
        write_text("x", tmp_path / name)
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(UsageError, match="File name too long"):
        write_text("x", tmp_path / ("a" * 256))


def test_places_that_take_nothing_are_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for target in (tmp_path / "folder", tmp_path / "file" / "x.json", "/proc/x.json"):
        with pytest.raises(UsageError, match=r"^can't write .*; choose another place$"):
            require_file(target)
    require_file(None)
    require_file("-")
    require_file(tmp_path / "new" / "x.json")
    with read_only(tmp_path / "folder"):
        with pytest.raises(UsageError, match="Read-only file system"):
            require_writable(tmp_path / "folder")
        with pytest.raises(UsageError, match="Read-only file system"):
            new_run(tmp_path / "folder", "exp")
    with tiny_disk(tmp_path / "disk", "32k"):
        (tmp_path / "disk" / "ballast").write_bytes(bytes(32 * 1024))
        (tmp_path / "disk" / "empty").touch()
        for require in (
            lambda: require_writable(tmp_path / "disk"),
            lambda: require_file(tmp_path / "disk" / "x"),
            lambda: new_run(tmp_path / "disk", "exp"),
        ):
            with pytest.raises(FBClipError, match="the disk is full"):
                require()
        require_writable(tmp_path / "disk", room=False)
        assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["ballast", "empty"]


def test_runs_are_numbered(tmp_path: Path) -> None:
    assert [new_run(tmp_path / "runs", "exp").name for _ in range(3)] == ["exp", "exp2", "exp3"]
    assert new_run(tmp_path / "runs", "exp", exist_ok=True).name == "exp"
    (tmp_path / "runs" / "exp4").symlink_to("nowhere")
    assert new_run(tmp_path / "runs", "exp").name == "exp5"
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match="File exists"):
        new_run(tmp_path / "dangling", "exp")


def test_ctrl_c_while_a_file_is_half_written_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fbclip import main, files\n"
        "def app():\n"
        "    with files.replacing(Path(sys.argv[1])) as file:\n"
        "        file.write(b'half'); file.flush(); print(flush=True); slow()\n"
        "main.signal.signal(2, main._interrupt)\n"
    )
    for way in ("import time\ndef slow(): time.sleep(60)", IMPORTING):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"{program}{way}\nimport fbclip.cli; fbclip.cli.app = app; main.main()",
                tmp_path / "x",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert (process.returncode, said) == (130, "fbclip: interrupted; what was finished is kept\n")
        assert left_behind(tmp_path) == []
        assert not (tmp_path / "x").exists()


# a module that takes long to import, and makes another error of whatever comes meanwhile
IMPORTING = """
Path('slow_module.py').write_text('''
import time
try:
    time.sleep(60)
except BaseException as error:
    raise ImportError("initialization failed") from error
''')
sys.path.insert(0, '.')
def slow(): import slow_module
"""
