"""Self-contained HTML pages: the frame that they share, their charts. Needs the extra `eval`."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fbclip
from fbclip.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATES = Path(fbclip.__file__).parent / "assets"
INK = "#010203"  # stands for the page's text colour, dark or light


def missing_packages() -> list[str]:
    """What pages and charts need and is not installed."""
    return [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]


def write_page(template: str, path: Path, **values: Any) -> None:
    """Write the HTML file of a template in `assets`; nothing in it is fetched from elsewhere."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    with replacing(path) as file:
        page = environment.get_template(template).render(**values)
        file.write(page.encode(errors="backslashreplace"))  # names that are no UTF-8


def chart(draw: Callable[[Axes], None], size: tuple[float, float] = (4.2, 3.4)) -> str:
    """An SVG to stand in the page: its ink is the page's text colour, its text is text."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style: Any = {
        **ink,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
        "svg.hashsalt": "fbclip",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, color=INK)
        draw(axes)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})  # type: ignore[no-untyped-call]
    svg = text.getvalue()
    # ids are one name space in a page of several drawings, and a chart's file header has no place in it
    unique = f"{zlib.crc32(svg.encode()):x}-"
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{unique}", svg[svg.index("<svg") :])
    return svg.replace(INK, "currentColor")
