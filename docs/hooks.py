"""What MkDocs does to the pages of this folder before it renders them.

- `reference/commands.md`: each command of the app, with its options, in place of a comment.
- Links that leave this folder (recorded results, source files) lead somewhere on a code host and nowhere on the site:
  there they are shown as the file's path.
- Python blocks lose the words that are for their test (`no test`, `needs pandas`), which are no fence to the renderer.
- A fence that is still not rendered as code ends the build.
"""

from __future__ import annotations

import re
from typing import Any

import typer
from mkdocs.exceptions import PluginError

COMMANDS = "<!-- the commands -->"
OUTSIDE = re.compile(
    r"\[([^\]]*)\]\((?:\.\./)+((?:benchmarks|runtime|export|fbclip|tests|cli\.py|CONTRIBUTING|README)[^)]*)\)"
)
MARKS = re.compile(r"^```python (?:no test|needs \w+)$", re.M)  # of tests/test_face.py


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page as it is rendered. `page.file.src_uri` is its path below `docs/`."""
    markdown = MARKS.sub("```python", markdown)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, describe_commands())
    return OUTSIDE.sub(
        lambda link: f"`{link[2]}`" if link[1] in ("result", "results", link[2]) else f"{link[1]} (`{link[2]}`)",
        markdown,
    )


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """The page's content as it was rendered.

    Raises:
        PluginError: a fence was taken for text.
    """
    if "<p>```" in html:
        raise PluginError(f"{page.file.src_uri}: a fence isn't rendered as code; look at its first line")
    return html


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
    """A table for each panel of the help."""
    lines = []
    for title, rows in command.panels(context).items():
        lines += [f"\n**{title}**\n", "| | |", "| --- | --- |"]
        for names, text in rows:
            shown = names.replace("|", "\\|")
            lines.append(f"| `{shown}` | {_escaped(text)} |")
    return lines


def _escaped(text: str) -> str:
    """Help as Markdown: what looks like a tag, an option or an address is code."""
    plain = " ".join(text.split())
    return re.sub(r"(?<![\w`-])(--?[a-z][\w-]*|[a-z]+://[^\s,;)]*[^\s,;).]|[\w.]*\*[\w.*]*|<[^>]*>)", r"`\1`", plain)
