"""What people read, on any console and with any name; and how the command ends, whatever happens."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Run
from PIL import Image
from rich.console import Console
from rich.table import Table

from fbclip.runtime.live.sinks.pictures import names_of
from fbclip.terminal import cell, make_console, print_table, printable, progress, say, track
from helpers.disks import tiny_disk
from helpers.waiting import eventually

COMMAND = Path(sys.executable).with_name("fbclip")
CONSOLES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "posix": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "strict": {"PYTHONIOENCODING": "utf-8:strict"},
}
NAMES = [
    *(b"part[left].png", b"part[right].png", b"[red]x.png", b"a:smile:b.png", b"two\nlines  0 with defects.png"),
    *(b"\x1b[31mred.png", b"Ri\xdf.png", "Riß_ö.png".encode(), "😀.png".encode(), "漆".encode() * 82 + b".png"),
    b"a" * 251 + b".png",
    b"a" * 251 + b".bmp",
]


def picture(red: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Not of one colour, which no camera shows of a part."""
    shade = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (Image.new("L", size, red), shade, shade))


def make_names(folder: Path) -> list[str]:
    """Files of odd names; as Python reads these."""
    folder.mkdir()
    for number, name in enumerate(NAMES):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:  # noqa: PTH118, PTH123
            picture(20 * number).save(file, "PNG")
    return sorted(os.fsdecode(name) for name in NAMES)


def run(folder: Path, console: str, *arguments: str) -> tuple[int, bytes, bytes]:
    """The installed command in an environment of nothing but a console."""
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", **CONSOLES[console]}
    done = subprocess.run([COMMAND, *arguments], cwd=folder, env=environment, capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("console", CONSOLES)
def test_any_name_on_any_console(tmp_path: Path, console: str) -> None:
    names = make_names(tmp_path / "in")
    code, out, err = run(tmp_path, console, "infer", "in", "--csv", "o.csv", "--json", "o.jsonl", "--project", "r[/x]s")
    assert (code, err) == (0, b"")
    assert b"\x1b" not in out
    shown = out.decode({"strict": "utf-8", "latin-1": "latin-1"}.get(console, "ascii"))
    assert shown.splitlines()[-2:] == ["12 images: 0 with defects, 12 good", "pictures are in r[/x]s/exp"]
    for name in ("part[left].png", "part[right].png", "[red]x.png", "a:smile:b.png", r"\x1b[31mred.png", r"Ri\xdf.png"):
        assert f"\n{name} " in shown
    assert "\ntwo\\nlines  0 with defects.png " in shown
    spelled = {"ascii": r"Ri\xdf_\xf6.png", "posix": r"Ri\xc3\x9f_\xc3\xb6.png"}.get(console, "Riß_ö.png")
    assert f"\n{spelled} " in shown
    with (tmp_path / "o.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert sorted(row["source"] for row in csv.DictReader(file)) == [f"in/{name}" for name in names]
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    pictures = {
        os.fsencode(record["source"]) if console != "posix" else record["source"]: record["overlay"]
        for record in records
    }
    assert len(pictures) == len(set(pictures.values())) == len(NAMES)
    made = {entry.name for entry in os.scandir(os.fsencode(tmp_path / "r[/x]s" / "exp"))}
    assert len(made) == len(NAMES)
    if console != "posix":  # there the names in JSON are what Python makes of bytes that it takes for ASCII
        assert {os.path.basename(os.fsencode(path)) for path in pictures.values()} == made  # noqa: PTH119


def test_a_watched_folder_with_any_name_loses_no_notice(tmp_path: Path) -> None:
    make_names(tmp_path / "in")
    arguments = ("infer", "--watch", "in", "--max-frames", str(len(NAMES)), "--threshold", "0", "--json", "o.jsonl")
    for console in ("ascii", "strict"):
        code, out, err = run(tmp_path, console, *arguments)
        assert (code, err) == (0, b""), out
        assert b"lost" not in out
        assert b" alarm on " in out
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) > 2 * len(NAMES)


def test_a_video_whose_name_is_no_utf8_is_inspected(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(3):
        writer.write(np.asarray(picture(90, (64, 48))))
    writer.release()
    (tmp_path / "v.avi").rename(tmp_path / "Ri\udcdf.avi")
    code, _, err = run(tmp_path, "strict", "infer", "Ri\udcdf.avi", "--json", "o.jsonl")
    assert (code, err) == (0, b"")
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["source"] for r in records if r["kind"] == "result"] == [f"Ri\udcdf.avi#{n}" for n in range(3)]


def test_more_images_than_are_shown_on_a_console_without_an_ellipsis(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(21):
        picture(number, (20, 20)).save(tmp_path / "many" / f"{number}.png")
    code, out, _ = run(tmp_path, "latin-1", "infer", "many", "--no-save")
    assert code == 0
    assert out.splitlines()[-2:] == [
        b"... and 1 more with lower scores (all of them: in a CSV or JSON file)",
        b"21 images: 0 with defects, 21 good",
    ]


def test_help_on_a_console_of_ascii(tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "ascii", "infer", "-h")
    assert (code, out.isascii()) == (0, True)
    assert b"rtsp://..." in out


def test_the_command_alone_prints_its_help(fbclip: Run) -> None:
    for arguments in ((), ("--debug",)):
        done = fbclip(*arguments, code=2)
        assert "calibrate" in done.stdout
        assert done.stderr == ""
    assert fbclip("--version").stdout.startswith("fbclip ")


def test_what_is_printable() -> None:
    assert printable("Stück 漆 😀.png") == "Stück 漆 😀.png"
    assert printable("a\nb\x1b[31m\x9b\udcdf\u202e\u2028") == r"a\nb\x1b[31m\x9b\xdf\u202e\u2028"


def test_a_line_is_one_line_and_its_brackets_stay() -> None:
    console = Console(file=io.StringIO(), width=20)
    say(console, "wrote [/x]/:smile:/" + 40 * "a" + "\nforged")
    console.print(cell("[red]x"))
    assert console.file.getvalue() == "wrote [/x]/:smile:/" + 40 * "a" + "\\nforged\n[red]x\n"  # type: ignore[attr-defined]


def test_no_text_on_our_console_can_colour_the_terminal() -> None:
    console = make_console()
    console.file = io.StringIO()
    console.print("a\x1b[31mb\x9bc\u202e:smile:", markup=False)
    assert console.file.getvalue() == "a\\x1b[31mb\\x9bc\\u202e:smile:\n"


def test_names_in_tables_stay_whole_on_a_narrow_screen_and_prose_is_wrapped() -> None:
    names = ["a name of two words " + 60 * "x", "[b]short"]
    for width in (80, 1000):
        console = Console(file=io.StringIO(), width=width)
        table = Table(box=None, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("what")
        for name in names:
            table.add_row(cell(name), "0.123", "plain words")
        print_table(console, table)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        for name in names:
            assert any(line.startswith(name) and " 0.123 " in line for line in lines)
    console = Console(file=io.StringIO(), width=30)
    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what")
    table.add_row("short", "these are many words that go over several lines")
    print_table(console, table)
    assert max(map(len, console.file.getvalue().splitlines())) <= 30  # type: ignore[attr-defined]


def test_long_work_is_a_line_every_ten_seconds_where_no_terminal_is() -> None:
    console = Console(file=io.StringIO(), width=1000)
    seconds = iter(range(0, 1000, 4))
    with progress(console, clock=lambda: next(seconds)) as bars:
        task = bars.add_task("reading [x]", total=20, note="")
        for number in range(20):
            bars.update(task, completed=number, note=f"loss {number}")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert 3 <= len(lines) <= 12
    assert all(re.fullmatch(r"reading \[x\]: \d+ of 20, loss \d+(, about 0:\d\d:\d\d left)?", line) for line in lines)


def test_short_work_says_nothing_where_no_terminal_is() -> None:
    console = Console(file=io.StringIO())
    assert list(track(range(3), "reading", console)) == [0, 1, 2]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_names_of_results_are_unique_and_short() -> None:
    sources = [Path(folder) / name for folder in "ab" for name in ("x.png", "x.jpg", "x-2.png", "y" * 251 + ".png")]
    names = names_of(sources)
    assert list(names) == list(map(str, sources))
    assert len(set(names.values())) == len(sources)
    assert max(len(f"{name}.npy") for name in names.values()) <= 255
    assert names["a/x.png"] == "x"


def ended(program: str, *arguments: str, stdout: int | None = subprocess.PIPE) -> tuple[int, str]:
    """Exit code and standard error of the command, whose work is `program`."""
    code = f"from fbclip import cli, main\ndef app():\n    {program}\ncli.app = app; main.main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("raise MemoryError('Unable to allocate 7 TiB')", 1, "fbclip: MemoryError: Unable to allocate 7 TiB; for the"),
        (
            "raise OSError(5, 'Input/output error', 'x')",
            1,
            "fbclip: OSError: [Errno 5] Input/output error: 'x'; for the",
        ),
        (
            "raise OSError(28, 'No space left on device', 'x\\ny')",
            1,
            r"fbclip: the disk is full: can't write x\ny; free",
        ),
        ("raise ImportError('two\\nlines')", 1, "fbclip: ImportError: two lines; for the traceback run fbclip --debug"),
        ("import json; json.loads('[' * 100000)", 1, "fbclip: RecursionError: "),
        ("raise BrokenPipeError", 1, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise KeyboardInterrupt", 130, "fbclip: interrupted; what was finished is kept\n"),
        ("import signal; signal.raise_signal(2)", 130, "fbclip: interrupted; what was finished is kept\n"),
    ],
)
def test_whatever_ends_the_command_is_one_line(program: str, code: int, said: str) -> None:
    found, error = ended(program)
    assert (found, error[: len(said)]) == (code, said)
    assert error.count("\n") == bool(said)


def test_debug_shows_the_traceback() -> None:
    code, error = ended("raise OSError(5, 'broken')", "--debug")
    assert code == 1
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("fbclip: OSError: ")


def test_an_output_that_takes_nothing_is_one_line(fbclip: Run, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        assert ended("print('x')", stdout=full.fileno()) == (
            1,
            "fbclip: the disk is full: can't write the output; free some space, or choose another disk\n",
        )
    reader, writer = os.pipe()
    os.close(reader)
    assert ended("print('x')", stdout=writer) == (1, "")
    os.close(writer)


def test_a_pipe_that_is_narrow_and_does_not_wait_gets_all() -> None:
    """Programs that share a pipe may set it so: a write takes what fits, and the next one none at all."""
    program = "import os, typer; os.write(1, b'x' * 100_000); typer.echo('y' * 1_000_000)"
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = f"from fbclip import cli, main\ndef app(): {program}\ncli.app = app; main.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer)
    os.close(writer)
    with os.fdopen(reader) as read:
        assert read.read() == "x" * 100_000 + "y" * 1_000_000 + "\n"
    assert process.wait() == 0


def test_ctrl_c_at_any_moment_of_the_start(tmp_path: Path) -> None:
    """From where the command is heard of on: before, Python itself starts."""
    program = "import fbclip.main as m, sys; print(flush=True); sys.argv = ['fbclip', 'infer', '--no-save']; m.main()"
    endings = []
    for moment in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.01 + 0.06 * moment)  # how long the process may live, not a wait for something
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        endings.append((process.returncode, error))
    said = ("interrupted; what was finished is kept", "stopped by SIGINT; what was inspected is written")
    assert set(endings) <= {(130, f"fbclip: {line}\n") for line in said} | {(0, "")}
    assert endings[0][0] == 130
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_was_finished_and_says_what(tmp_path: Path) -> None:
    make_images(tmp_path / "in", 60)
    arguments = ["infer", "in", "--json", "o.jsonl", "--csv", "o.csv", "--no-save"]
    process = subprocess.Popen(
        [COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = tmp_path / "o.jsonl"
    eventually(lambda: lines.exists() and lines.read_text().count("\n") >= 3)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert (process.returncode, error) == (130, "fbclip: stopped by SIGINT; what was inspected is written\n")
    count = len([json.loads(line) for line in lines.read_text().splitlines()])
    assert 3 <= count < 60
    said = int(out.splitlines()[-1].removesuffix(" good").split(" images: 0 with defects, ")[0])
    assert said == count


def make_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        picture(4 * number).save(folder / f"{number:02d}.png")


def test_a_disk_that_fills_up_keeps_whole_lines_and_says_what_was_done(fbclip: Run, tmp_path: Path) -> None:
    make_images(tmp_path / "in", 40)
    with tiny_disk(tmp_path / "disk", "64k"):
        (tmp_path / "disk" / "ballast").write_bytes(bytes(56 * 1024))
        done = fbclip("infer", "in", "--json", "disk/o.jsonl", "--csv", "disk/o.csv", "--no-save", code=1)
        text = (tmp_path / "disk" / "o.jsonl").read_text()
        with (tmp_path / "disk" / "o.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    records = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n")
    assert 5 < len(records) < 40
    assert [row["source"] for row in rows][:5] == [record["source"] for record in records][:5]
    lost = re.search(r"^json lost (\d+) results and notices: the disk is full", done.stdout, re.M)
    inspected = re.search(r"^(\d+) images: 0 with defects, ", done.stdout, re.M)
    assert inspected and lost and int(inspected[1]) < 40
    assert len(records) < int(inspected[1]) <= len(records) + int(lost[1])  # notices are counted too
    assert re.fullmatch(
        r"fbclip: the disk is full: can't write disk/o\.(jsonl|csv); free some space, .*\n", done.stderr
    )


def test_a_disk_that_fills_up_keeps_whole_pictures(fbclip: Run, tmp_path: Path) -> None:
    make_images(tmp_path / "in", 40)
    with tiny_disk(tmp_path / "disk", "200k"):
        done = fbclip("infer", "in", "--project", "disk/r", "--json", "o.jsonl", "--save-map", code=1)
        assert done.stderr.startswith("fbclip: the disk is full: can't write disk/r/exp/")
        assert done.stderr.count("\n") == 1
        assert done.stdout.splitlines()[-1] == "pictures and maps are in disk/r/exp"
        records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
        lost = re.search(r"^pictures lost (\d+) results and notices: the disk is full", done.stdout, re.M)
        assert lost and 0 < int(lost[1]) < len(records) < 40
        for record in records[: -int(lost[1])]:
            Image.open(tmp_path / record["overlay"]).load()
            assert np.load(tmp_path / record["map"]).shape == (30, 40)
        assert f"\n{len(records)} images: " in done.stdout
        assert not list((tmp_path / "disk").rglob(".fbclip-*"))


def test_where_results_can_not_go_is_told_before_the_work(fbclip: Run, tmp_path: Path) -> None:
    make_images(tmp_path / "in", 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for arguments in (
        ("infer", "in", "--json", "folder"),
        ("infer", "in", "--csv", "file/o.csv"),
        ("infer", "in", "--project", "file"),
        ("doctor", "--json", "folder"),
        ("bench", "--json", "folder"),
    ):
        error = fbclip(*arguments, code=2).stderr
        assert error.startswith("fbclip: can't write ")
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "in"]


def test_a_second_run_adds_its_lines(fbclip: Run, tmp_path: Path) -> None:
    make_images(tmp_path / "in", 2)
    for _ in range(2):
        fbclip("infer", "in", "--json", "o.jsonl", "--csv", "o.csv", "--no-save")
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == [record["source"] for record in records] == ["in/00.png", "in/01.png"] * 2
    assert [float(row["time"]) for row in rows] == [record["time"] for record in records]


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_results_never_take_the_place_of_what_is_inspected(fbclip: Run, tmp_path: Path, option: str) -> None:
    make_images(tmp_path / "in", 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    assert "choose another file" in fbclip("infer", "in", option, "in/00.png", "--no-save", code=2).stderr
    for name in ("00", "01"):
        (tmp_path / "in" / f"{name}.png").rename(tmp_path / "in" / f"{name}.jpg")
    done = fbclip("infer", "in", "--project", ".", "--name", "in", "--exist-ok", code=2)
    assert "results would replace in/00.jpg, which is inspected" in done.stderr
    assert {f"{path.stem}.png": path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
