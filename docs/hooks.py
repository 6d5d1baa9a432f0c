"""What MkDocs does to the pages of this folder before it renders them.

- `reference/commands.md`: each command of the app, with its options, in place of a comment.
- Links that leave this folder (recorded results, source files) lead somewhere on a code host and nowhere on the site:
  there they are shown as the file's path.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import typer

COMMANDS = "<!-- the commands -->"
ARGUMENTS = "Arguments"
VARIABLES = re.compile(r" ?\[env var: [^;\]]*\]|env var: [^;\]]*; ")  # one rule names them all
OUTSIDE = re.compile(
    r"\[([^\]]*)\]\((?:\.\./)+((?:benchmarks|runtime|export|fbclip|tests|cli\.py|CONTRIBUTING|README)[^)]*)\)"
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as it is rendered. `page.file.src_uri` is its path below `docs/`."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, describe_commands())
    return OUTSIDE.sub(
        lambda link: f"`{link[2]}`" if link[1] in ("result", "results", link[2]) else f"{link[1]} (`{link[2]}`)",
        markdown,
    )


def describe_commands() -> str:
    """Markdown: a section for each command, as its `-h` has it."""
    from fbclip.cli import app

    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="fbclip")
    commands = [group.get_command(context, name) for name in group.list_commands(context)]
    return "\n".join(["## fbclip", *_parameters(group, context), *map(_section, commands)])


def _section(command: Any) -> str:
    context = typer.Context(command, info_name=f"fbclip {command.name}")
    usage = " ".join(command.collect_usage_pieces(context))
    head = [f"\n## fbclip {command.name}\n", f"{command.help}\n", f"```text\nfbclip {command.name} {usage}\n```\n"]
    return "\n".join([*head, *_parameters(command, context)])


def _parameters(command: Any, context: typer.Context) -> list[str]:
    """A table for each panel of the help; `-h` itself is left out."""
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    lines = []
    panels = sorted(dict.fromkeys(map(_panel, shown)), key=ARGUMENTS.__ne__)
    for panel, parameters in groupby(sorted(shown, key=lambda each: panels.index(_panel(each))), key=_panel):
        lines += [f"\n**{panel}**\n", "| | |", "| --- | --- |"]
        for parameter in parameters:
            record = parameter.get_help_record(context) or (parameter.make_metavar(context), parameter.help or "")
            names, text = (each.replace(" <list[str]>", "").replace("|", "\\|") for each in record)
            lines.append(f"| `{names}` | {_escaped(text)} |")
    return lines


def _panel(parameter: Any) -> str:
    default = ARGUMENTS if parameter.param_type_name == "argument" else "Options"
    return getattr(parameter, "rich_help_panel", None) or default


def _escaped(text: str) -> str:
    """Help as Markdown: what looks like a tag, an option or an address is code."""
    plain = VARIABLES.sub("", " ".join(text.split()))
    return re.sub(r"(?<![\w`-])(--?[a-z][\w-]*|[a-z]+://[^\s,;)]*[^\s,;).]|[\w.]*\*[\w.*]*|<[^>]*>)", r"`\1`", plain)
