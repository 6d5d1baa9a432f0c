"""The evaluation as one self-contained HTML file: figures, curves, histograms, pictures. Needs the extra `eval`."""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fbclip
from fbclip.errors import UsageError
from fbclip.metrics import PRO_LIMITS, Curve
from fbclip.runtime.evaluate import VALUES, DataResult, Evaluation
from fbclip.runtime.infer import replacing
from fbclip.runtime.results import HEADINGS, reasons, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(fbclip.__file__).parent / "assets" / "report.html"
INK = "#010203"  # stands for the page's text colour, dark or light
NAMED_CURVES = 10  # classes that get a colour and a name each; more are drawn alike
KINDS = {
    "best": "Best: defects with the highest scores",
    "worst": "Worst: good images with the highest scores",
    "missed": "Missed: defects scored below the threshold, the lowest first",
}


def require_report() -> None:
    """Raise UsageError where the report's packages are missing, before any work is done."""
    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise UsageError(
            f"the HTML report needs {' and '.join(missing)}: pip install 'fbclip[eval]', or pass --no-report"
        )


def write_report(evaluation: Evaluation, stamped: Mapping[str, Any], path: Path) -> None:
    """Write the HTML file; nothing in it is fetched from elsewhere."""
    import jinja2

    template = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = template.render(
        stamp=stamped,
        threshold=evaluation.subject.threshold,
        headings=HEADINGS,
        values=VALUES,
        kinds=KINDS,
        skipped=evaluation.skipped,
        sections=[_section(result, evaluation.subject.threshold) for result in evaluation.results],
    )
    with replacing(path) as file:
        file.write(text.encode())


def _section(result: DataResult, threshold: float) -> dict[str, Any]:
    scored = [s for c in result.classes for s in c.scores]
    good = [s.score for s in scored if not s.item.label]
    defective = [s.score for s in scored if s.item.label]
    return {
        "name": result.data.name,
        "rows": rows(result),
        "reasons": reasons(result),
        "found": (sum(s >= threshold for s in defective), len(defective)),
        "alarms": (sum(s >= threshold for s in good), len(good)),
        "charts": [*_curves(result), _chart(lambda axes: _histogram(axes, good, defective, threshold))],
        "pictures": {
            kind: [
                {"data": base64.b64encode(p.jpeg).decode(), "item": p.scored.item, "score": p.scored.score}
                for c in result.classes
                for p in c.pictures[kind]
            ]
            for kind in KINDS
        },
    }


def _curves(result: DataResult) -> list[str]:
    images = [(c.name, c.image.curve) for c in result.classes if c.image.curve]
    pixels = [(c.name, c.pixel.curve) for c in result.classes if c.pixel.curve]
    charts = []
    for what, curves in (("Images", images), ("Pixels", pixels)):
        if curves:
            charts.append(_chart(_lines(f"{what}: ROC", "false positive rate", "recall", curves, _roc)))
            charts.append(_chart(_lines(f"{what}: precision and recall", "recall", "precision", curves, _pr)))
    if pixels:
        limit = max(PRO_LIMITS)
        charts.append(_chart(_lines("Regions: PRO", "false positive rate", "mean overlap", pixels, _pro, limit)))
    return charts


def _roc(curve: Curve) -> tuple[Any, Any]:
    return curve.fpr, curve.recall


def _pr(curve: Curve) -> tuple[Any, Any]:
    return curve.recall, curve.precision


def _pro(curve: Curve) -> tuple[Any, Any]:
    return curve.fpr, curve.overlap


def _lines(
    title: str,
    x: str,
    y: str,
    curves: list[tuple[str, Curve]],
    pick: Callable[[Curve], tuple[Any, Any]],
    right: float = 1.0,
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        named = len(curves) <= NAMED_CURVES
        for number, (name, curve) in enumerate(curves):
            # a name that begins with _ would be hidden from the legend
            style = {"color": f"C{number}", "label": f"\u200b{name}"} if named else {"color": "C0", "alpha": 0.4}
            axes.plot(*pick(curve), linewidth=1.5, **style)
        axes.set(title=title, xlabel=x, ylabel=y, xlim=(0, right), ylim=(0, 1.02))
        if named and len(curves) > 1:
            axes.legend(frameon=False, fontsize=7, labelcolor=INK, ncols=1 + len(curves) // 6)

    return draw


def _histogram(axes: Axes, good: list[float], defective: list[float], threshold: float) -> None:
    low, high = min([*good, *defective, threshold]), max([*good, *defective, threshold])
    bins = np.linspace(low, max(high, low + 1e-6), 41).tolist()
    for scores, name, colour in ((good, "good", "#2ea043"), (defective, "defective", "#da3633")):
        if scores:
            axes.hist(scores, bins=bins, alpha=0.6, color=colour, label=f"{name} ({len(scores)})")
    axes.axvline(threshold, color=INK, linewidth=1.2, linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set(title="Scores", xlabel="image score", ylabel="images")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _chart(draw: Callable[[Axes], None]) -> str:
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
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
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
