"""The shape of the house: files and lines a room, floors, arrows, circles, the longest functions, the README's sentences.

    python benchmarks/house.py            # this checkout
    python benchmarks/house.py OTHER      # another one, for before and after

Arrows are imports between files, as import-linter's graph has them, those inside functions too. A floor stands on all
that it imports: the number of floors is the longest way down. Needs the extra `dev`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import grimp


def rooms(root: Path) -> dict[str, tuple[int, int]]:
    """Files and lines of each folder with Python files, by its path."""
    found: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for top in ("cli.py", "fbclip", "export", "runtime"):
        for path in [root / top] if top.endswith(".py") else sorted((root / top).rglob("*.py")):
            if not any(part.is_symlink() for part in (path, *path.parents) if part != root and root in part.parents):
                room = str(path.parent.relative_to(root))
                found[room] += 1
                lines[room] += len(path.read_text("utf-8").splitlines())
    return {room: (found[room], lines[room]) for room in sorted(found)}


Arrows = dict[str, set[str]]
NAMES_ALL = ("fbclip", "fbclip.cli")  # the public face and the command line


def arrows(root: Path) -> Arrows:
    """What each file imports of the others."""
    sys.path.insert(0, str(root))
    graph = grimp.build_graph("fbclip")
    files = graph.modules - set(NAMES_ALL)
    return {module: graph.find_modules_directly_imported_by(module) & files for module in sorted(files)}


def floors(below: Arrows) -> int:
    """Files on the longest way down, each importing the next; a circle counts once."""
    deep: dict[str, int] = {}

    def depth(module: str, above: frozenset[str]) -> int:
        if module not in deep:
            deep[module] = 1 + max((depth(each, above | {module}) for each in below[module] - above), default=0)
        return deep[module]

    return max(depth(module, frozenset()) for module in below)


def circles(below: Arrows) -> int:
    """Files that reach themselves by imports."""

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        waiting = list(below[module])
        while waiting:
            if (each := waiting.pop()) not in found:
                found.add(each)
                waiting += below[each]
        return found

    return sum(module in reached(module) for module in below)


def longest_functions(root: Path, count: int = 10) -> list[tuple[int, str]]:
    """Lines and names of the longest functions."""
    found = []
    for path in [root / "cli.py", *(p for top in ("fbclip", "export", "runtime") for p in (root / top).rglob("*.py"))]:
        if path.is_symlink():
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                found.append((node.end_lineno - node.lineno + 1, f"{path.relative_to(root)}:{node.name}"))
    return sorted(found, reverse=True)[:count]


def words_a_sentence(readme: str) -> tuple[int, float]:
    """Words of the prose, without code, tables and headings, and how many a sentence has."""
    prose = re.sub(r"```.*?```|^[|#!].*?$", "", readme, flags=re.DOTALL | re.MULTILINE)
    words = len(re.findall(r"\w[\w'-]*", prose))
    return words, words / max(1, len(re.findall(r"[.!?:](?=\s|$)", prose)))


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    below = arrows(root)
    print("| room | files | lines |\n| --- | --- | --- |")
    for room, (files, lines) in rooms(root).items():
        print(f"| {room} | {files} | {lines} |")
    count = sum(map(len, below.values()))
    print(f"\n{len(below)} files, {count} arrows, {floors(below)} floors, {circles(below)} files in circles\n")
    print("| lines | function |\n| --- | --- |")
    for lines, name in longest_functions(root):
        print(f"| {lines} | {name} |")
    readme = (root / "README.md").read_text("utf-8")
    words, mean = words_a_sentence(readme)
    print(f"\nREADME: {len(readme.splitlines())} lines, {words} words of prose, {mean:.1f} words a sentence")


if __name__ == "__main__":
    main()
