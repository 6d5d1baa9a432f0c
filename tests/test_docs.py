"""README and docs: commands that exist, links that lead somewhere, Python that runs. The site's build is `make docs`."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import fbclip
from fbclip.assets import SAMPLES
from fbclip.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
INLINE = re.compile(r"`(fbclip [^`]+)`")
WORDS = re.compile(r"…|\.\.\.|[A-Z]{2,}|COMMAND")  # what stands for something else
NAMED = re.compile(r"(?<![\w/])docs/[\w/.-]+\.(?:md|jpg|png)")
CODE = ("fbclip", "runtime", "export", "benchmarks", "tests")


def commands(text: str) -> Iterator[str]:
    """Every command line of fbclip in a page: in blocks, where a line may end in a comment, and between the lines."""
    for _, language, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").split("  # ")[0].split("    #")[0]
            line = re.sub(r"^(\w+=\S+ )+", "", line)  # an environment
            if line.startswith("fbclip ") and language in ("", "console", "bash"):
                yield line
    for line in INLINE.findall(FENCE.sub("", text)):
        yield " ".join(line.split())


@cache
def command_group() -> Any:
    return typer.main.get_command(app)


def unknown_options(line: str) -> list[str]:
    """Of a command line, the options that its command does not have; or the command's name, where there is none."""
    group = command_group()
    words = shlex.split(line.split(" | ")[0].split(" >")[0].split(" && ")[0])[1:]
    options = {name for parameter in group.params for name in parameter.opts} | {"-h", "--help"}
    while words and words[0].startswith("-"):
        if (word := words.pop(0)) not in options:
            return [word]
    if not words or WORDS.fullmatch(words[0]):
        return []
    if words[0] not in group.commands:
        return [words[0]]
    command = group.commands[words[0]]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.split("=")[0].rstrip(",.;:") for word in words[1:] if re.match(r"--?[a-z]", word)]
    return [word for word in given if word not in options | {"-h", "--help"}]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page: Path) -> None:
    wrong = {line: unknown for line in commands(page.read_text()) if (unknown := unknown_options(line))}
    assert not wrong


def test_wrong_commands_are_noticed() -> None:
    text = "```\n$ fbclip infer --camera 0 --vot 3/5   # an alarm\nfbclip inspect\n```\nand `fbclip export --fp17`"
    assert [unknown_options(line) for line in commands(text)] == [["--vot"], ["inspect"], ["--fp17"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = [link.split("#")[0] for link in LINK.findall(FENCE.sub("", page.read_text()))]
    relative = [link for link in links if link and "://" not in link]
    assert not [link for link in relative if not (page.parent / link).exists()]


def test_pages_that_the_code_names_exist() -> None:
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")] + [ROOT / "cli.py", ROOT / "Makefile"]
    named = {name for path in files for name in NAMED.findall(path.read_text()) if path != Path(__file__)}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_files_that_the_docs_name_exist() -> None:
    file = re.compile(r"`((?:fbclip|runtime|export|benchmarks|tests|docs)/[a-z0-9_/-]+\.\w+)[`:]")
    named = {(page.name, name) for page in PAGES for name in file.findall(page.read_text())}
    assert named
    assert not [(page, name) for page, name in named if not (ROOT / name).exists()]


def test_sections_that_the_code_names_exist() -> None:
    method = (ROOT / "docs" / "method.md").read_text()
    files = [path for folder in ("fbclip", "runtime", "export") for path in (ROOT / folder).rglob("*.py")]
    network = (ROOT / "fbclip" / "model" / "network.py").read_text()
    named = {number for path in files for number in re.findall(r"method\.md, section (\d+)", path.read_text())}
    named |= set(re.findall(r"sections? (\d+(?:\.\d)?)", network))
    assert named
    assert not [number for number in named if not re.search(rf"^###? {re.escape(number)}\.? ", method, re.M)]


def test_tests_that_the_docs_name_exist() -> None:
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    here = ""
    for file, name in re.findall(
        r"(test_\w+\.py)?(?:::(test_\w+))?`", (ROOT / "docs/reference/robustness.md").read_text()
    ):
        here = file or here  # `::test_that` is of the file named before it
        if file or name:
            assert here in files
            assert not name or f"def {name}(" in files[here].read_text(), f"{here}::{name}"


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    errors = {name for name in fbclip.__all__ if name.endswith("Error")}  # a filter of their own takes these
    named = {*re.findall(r"^        - (\w+)$", page, re.M), *re.findall(r"^      heading: fbclip\.(\w+)$", page, re.M)}
    assert named == {*fbclip.__all__} - errors - {"__version__"}


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, from top to bottom, in a folder with a picture."""
    blocks = [block for _, language, block in FENCE.findall((ROOT / "README.md").read_text()) if language == "python"]
    assert blocks
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLES / "brushed-steel-scratch.jpg", "part.png")  # the content says what it is
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["prediction"].verdict == "defect"
