"""The command line: help, groups of options, files and variables, refusals, completion, and older forms."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import pytest
import typer
from conftest import Run
from typer.testing import CliRunner

from fbclip.assets import EMBEDDED, SAMPLES
from fbclip.cli import app
from fbclip.commands.command import Command, Commands
from fbclip.commands.mount import IMAGES, STREAMS, mounted, option, refuse
from fbclip.data.layouts import NAMES
from fbclip.errors import UsageError
from fbclip.runtime.target import Target

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ENTRY = Path(sys.executable).with_name("fbclip")


@dataclass(frozen=True)
class Looks:
    PANEL: ClassVar = "Looks"
    colour: Annotated[str, option("Colour.", metavar="NAME")] = "red"
    sides: Annotated[int, option("Sides.", "--sides", "--edges", metavar="N", min=3, max=9)] = 4
    round_: Annotated[bool, option("Round.", "--round")] = False
    smooth: Annotated[bool, option("Rough.")] = True
    tags: Annotated[list[str] | None, option("Tags.", metavar="NAME")] = None
    speed: Annotated[float | None, option("Of a stream.", metavar="N"), STREAMS] = None
    size: Annotated[str | None, option("Of images.", metavar="WxH"), IMAGES] = None


class Small:
    """An application of one command with a group; `built` is what the command got."""

    def __init__(self) -> None:
        self.app = typer.Typer(cls=Commands, rich_markup_mode=None)
        self.built: Looks | None = None
        self.source: list[str] | None = None

        @mounted(first=("sides",))
        def draw(
            context: typer.Context,
            looks: Looks,
            source: Annotated[list[str] | None, typer.Argument(metavar="[SOURCE...]")] = None,
        ) -> None:
            """Draw."""
            refuse(context, STREAMS if source == ["stream"] else IMAGES, looks)
            self.built, self.source = looks, source

        @mounted()
        def other() -> None:
            """Another."""

        for command in (draw, other):
            self.app.command(cls=Command)(command)

    def run(self, *arguments: str, **environment: str) -> Looks:
        result = CliRunner().invoke(self.app, ["draw", *arguments], env=environment)
        if result.exception:
            raise result.exception
        assert self.built
        return self.built


@pytest.fixture
def small() -> Small:
    return Small()


def refused(*arguments: str) -> str:
    """What the real command says of a command line that is wrong, without the entry point's "fbclip: "."""
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, UsageError), error
    return f"{error.flag}: {error}" if error.flag else str(error)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_reads_at_80_columns(name: str) -> None:
    """No line is longer, nothing is cut or broken, and nothing is called as Python calls it."""
    text = CliRunner().invoke(app, [*filter(None, [name]), "-h"], env={"COLUMNS": "80"}).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"<\w+|\bbool\b|list\[|x>=|INTEGER|None", text)
    words = text.split()
    for parameter in COMMANDS[name].params if name else ():
        if getattr(parameter, "hidden", False):
            continue
        assert set(parameter.help.split()) <= set(words), parameter.name
        flags = [flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag in words]
        assert flags or parameter.param_type_name == "argument", parameter.name
        is_flag = getattr(parameter, "is_flag", False)
        assert is_flag or parameter.metavar.strip("[]") in text, f"{parameter.name} has no name for its value"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_begins_with_what_is_used_most(name: str) -> None:
    text = CliRunner().invoke(app, [name, "-h"]).stdout
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles[titles[0] == "Arguments"] in ("Options used most", "Options")
    assert titles[-1] == "Other options"
    if "Options used most" in titles:
        block = text.partition("Options used most:\n")[2].partition("\n\n")[0]
        assert len(re.findall(r"^  -", block, re.MULTILINE)) == 5


def test_the_help_lists_every_layout() -> None:
    (layout,) = (parameter.help for parameter in COMMANDS["data"].params if parameter.name == "layout")
    listed = re.split(r", | or ", layout.partition(": ")[2].partition(". Default")[0])
    assert tuple(listed) == NAMES


def test_a_group_is_built_from_its_options(small: Small) -> None:
    assert small.run() == Looks()
    assert small.run("--colour", "blue", "--sides=5", "--round", "--no-smooth", "--tags", "a", "--tags", "b") == Looks(
        "blue", 5, True, False, ["a", "b"]
    )
    assert small.run("--edges", "6").sides == 6
    text = CliRunner().invoke(small.app, ["draw", "--help"]).stdout
    assert "Options used most:\n  --sides N " in text
    assert "\nLooks:\n  --colour NAME " in text
    assert "--edges" not in text
    assert "  --no-smooth  " in text


def test_an_option_for_another_kind_of_source_is_refused_by_its_group(small: Small, tmp_path: Path) -> None:
    assert small.run("stream", "--speed", "2").speed == 2
    assert small.run("--size", "2x3").size == "2x3"
    with pytest.raises(UsageError, match="SOURCE is images, which --speed can't be used with"):
        small.run("--speed", "2")
    with pytest.raises(UsageError, match="SOURCE is a stream, which --size can't be used with"):
        small.run("stream", "--size", "2x3")
    with pytest.raises(UsageError, match=r"which --speed \(of the environment\) can't"):
        small.run(FBCLIP_DRAW_SPEED="2")
    (tmp_path / "line.toml").write_text("speed = 2")
    with pytest.raises(UsageError, match=r"which --speed \(of .*line\.toml\) can't"):
        small.run("--config", str(tmp_path / "line.toml"))


def test_the_command_line_wins_then_the_environment_then_the_file(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "line.toml"
    file.write_text(
        'sides = 5\ncolour = "green"\nsource = ["a", "b"]\n'
        "[draw]\nround = true\nsmooth = false\nsides = 6\ntags = ['x', 'y']\n[other]\n"
    )
    config = ("--config", str(file))
    assert small.run(*config) == Looks("green", 6, True, False, ["x", "y"])
    assert small.source == ["a", "b"]
    assert small.run(*config, FBCLIP_DRAW_SIDES="7").sides == 7
    assert small.run(*config, "--sides", "8", FBCLIP_DRAW_SIDES="7").sides == 8
    assert small.run(*config, "--smooth", "c").smooth
    assert small.source == ["c"]
    assert small.run(FBCLIP_CONFIG=str(file)).colour == "green"
    assert small.run(FBCLIP_DRAW_ROUND="1", FBCLIP_DRAW_SOURCE="d").round_
    assert small.source == ["d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colur = 'red'", "has an unknown option colur: the nearest is colour; fbclip draw -h"),
        ("[draw]\nside = 3", "unknown option side: the nearest is sides"),
        ("[drawn]\nsides = 3", r"unknown table \[drawn\]: the nearest is draw"),
        ("sides = 2", "a whole number from 3 to 9; got '?2"),
        ("sides = true", "sides takes no true or false; got true or false in"),
        ("round = 'yes'", "round is true or false; got a text"),
        ("colour = 1979-05-27", "colour is a text, a number or a list"),
        ("config = 'other.toml'", "unknown option config"),
        ("sides = ", "is no TOML"),
    ],
)
def test_a_file_is_read_as_strictly_as_the_command_line(small: Small, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "line.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        small.run("--config", str(file))
    with pytest.raises(UsageError, match=r"nowhere\.toml can't be read: No such file"):
        small.run("--config", "nowhere.toml")


def test_every_option_has_a_variable_and_secrets_one_for_all() -> None:
    named = {name: {p.name: p.envvar for p in command.params} for name, command in COMMANDS.items()}
    assert named["infer"]["min_area"] == ["FBCLIP_INFER_MIN_AREA"]
    assert named["train"]["start"] == ["FBCLIP_TRAIN_FROM"]
    assert named["serve"]["token"] == ["FBCLIP_SERVE_TOKEN", "FBCLIP_TOKEN"]
    assert named["infer"]["mqtt"] == ["FBCLIP_INFER_MQTT", "FBCLIP_MQTT"]
    assert named["bench"]["bundle"] == ["FBCLIP_BENCH_BUNDLE", "FBCLIP_BUNDLE"]
    assert named["export"]["bundle"] == ["FBCLIP_EXPORT_BUNDLE"]  # another thing: one to deploy
    assert all(name.isidentifier() for names in named.values() for each in names.values() for name in each)


def test_options_of_the_real_command_from_file_and_environment(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "line.toml").write_text('bundle = "nowhere.fbclip"\n[infer]\nthreshold = 0.9\n')
    assert "nowhere.fbclip has none" in fbclip("infer", "--config", "line.toml", code=2).stderr
    (tmp_path / "line.toml").write_text("[infer]\nsave = false\nthreshold = 0.9\n")
    done = fbclip("infer", "--config", "line.toml")
    assert "1 with defects, 3 good" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["line.toml"]


def test_a_checkpoint_on_the_command_line_wins_over_the_bundle_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["eval", "nowhere", "--checkpoint", "nowhere.pth"]
    monkeypatch.setenv("FBCLIP_BUNDLE", "other.fbclip")
    assert "no checkpoint at nowhere.pth" in refused(*arguments)
    assert "got both" in refused(*arguments, "--bundle", "other.fbclip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "--min-area", "x"], "--min-area: a number; got 'x'; see fbclip infer -h"),
        (
            ["infer", "--min-area", "-1"],
            "--min-area: a least area is a number of pixels, or of mm2, 0 or more; got -1.0",
        ),
        (["infer", "--map-size", "x"], "--map-size: frame or model; got 'x'; see fbclip infer -h"),
        (["eval", "x", "--batch-size", "0"], r"--batch: a whole number, 1 or more; got '?0'?; see fbclip eval -h"),
        (["infer", "--thresh", "1"], "no such option: --thresh; the nearest is --threshold; see fbclip infer -h"),
        (["infer", "--bundle"], "option '--bundle' requires an argument; see fbclip infer -h"),
        (["infr"], "no such command 'infr'"),
        (["--nothing"], "no such option: --nothing"),
        (["calibrate"], r"GOOD\.\.\. is missing; see fbclip calibrate -h"),
        (["data", "a", "b"], "got unexpected extra argument"),
        (["export", "--frame-size", "3"], "--frame-size: a frame size is HEIGHTxWIDTH in pixels"),
        (["export", "--frame-size", "3x3", "--resolution", "3x3"], "--frame-size is the older form of --resolution"),
        (["bench", "--batch", "0"], "--batch: images at once are numbers from 1 with commas, like 1,4; got '0'"),
        (["calibrate", "part.fbclip"], r"beside the bundle .*: fbclip calibrate GOOD\.\.\. --bundle part\.fbclip"),
    ],
)
def test_what_is_wrong_is_told_with_option_rule_and_value(arguments: list[str], message: str) -> None:
    said = refused(*arguments)
    assert re.match(message, said), said
    assert "\n" not in said


def test_a_wrong_command_line_is_one_line_of_the_real_command(fbclip: Run) -> None:
    done = fbclip("infer", "--every", 0, code=2)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("fbclip: --every: a whole number, 1 or more; got ")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["train", "--batch-size", "7"], "batch", 7),
        (["eval", "data", "--batch-size", "7"], "batch", 7),
        (["bench", "--batch", "1,4", "--frame-size", "90x120"], "frame_size", "90x120"),
        (["export", "--half", "--batch", "1,2,4"], "fp16", True),
        (["export", "--frame-size", "1080x1920"], "frame_size", "1080x1920"),
        (["infer", "--camera", "0", "--no-save"], "save", False),
        (["calibrate", "part.fbclip", "good"], "good", ["part.fbclip", "good"]),
    ],
)
def test_older_command_lines_are_understood(arguments: list[str], name: str, value: object) -> None:
    command, *rest = arguments
    found = COMMANDS[command].make_context(command, rest).params[name]
    assert (list(found) if isinstance(value, list) else found) == value


def test_one_form_for_sizes() -> None:
    from fbclip.commands.groups import frame_hw
    from fbclip.parsing import parse_resolution

    assert parse_resolution("1920x1080") == (1920, 1080)
    assert frame_hw("1920x1080", None) == frame_hw(None, "1080x1920") == (1080, 1920)


def test_the_bundle_to_calibrate_may_come_either_way(tmp_path: Path) -> None:
    part = Path(shutil.copytree(EMBEDDED, tmp_path / "part.fbclip"))
    for sources, bundle in (([str(part), "good"], None), (["good"], part)):
        target = Target.choose("calibrate", sources, bundle, None)
        assert (target.bundle.path, target.path, target.good) == (part, part, ["good"])


def test_completion() -> None:
    def complete(words: str, **more: str) -> str:
        environment = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), **more}
        return subprocess.run([ENTRY], env=environment, capture_output=True, text=True).stdout

    assert complete("fbclip inf", _FBCLIP_COMPLETE="complete_bash").split() == ["infer"]
    assert complete("fbclip infer --thr", _FBCLIP_COMPLETE="complete_bash").split() == ["--threshold"]
    assert "complete" in complete("", _FBCLIP_COMPLETE="source_bash")


def test_no_command_has_a_heap_of_parameters() -> None:
    """Each is a function of its groups, and every option says in the help what its value is."""
    for name, command in COMMANDS.items():
        function = inspect.getclosurevars(inspect.unwrap(command.callback)).nonlocals["function"]
        assert len(inspect.signature(function).parameters) <= 10, name
        for parameter in inspect.signature(command.callback).parameters.values():
            assert len(get_args(parameter.annotation)) > 1 or parameter.name == "context", (name, parameter.name)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [("FBCLIP_INFER_TRESHOLD", "FBCLIP_INFER_THRESHOLD"), ("FBCLIP_INFER_NO_SAVE", "FBCLIP_INFER_SAVE")],
)
def test_a_mistyped_variable_is_told(variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert f"{variable} sets no option of fbclip infer: the nearest is {nearest}" in refused("infer")
    monkeypatch.setenv("FBCLIP_EVAL_BATCH", "nonsense of another command")
    monkeypatch.delenv(variable)
    assert "sets no option" not in refused("infer", "nowhere.png")


@pytest.mark.parametrize("arguments", [["--metrics", "host"], ["--metrics-port", "0"]])
def test_metrics_are_at_a_host_and_port(arguments: list[str]) -> None:
    assert refused("infer", "--watch", ".", *arguments).startswith(
        "--metrics: metrics are at HOST:PORT, or at a port of"
    )


def test_options_for_another_command_never_lead_to_the_samples(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "line.toml").write_text('[serve]\nsource = "pictures"\nwatch = true\n')
    refused = fbclip("infer", "--config", "line.toml", code=2)
    assert "no source is given; got line.toml without [infer]" in refused.stderr
    assert not refused.stdout
    (tmp_path / "line.toml").write_text("[serve]\nport = 8001\n")
    assert "1 image" in fbclip("infer", str(SAMPLES / "casting-pit.jpg"), "--config", "line.toml", "--no-save").stdout
