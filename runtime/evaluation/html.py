"""The evaluation as one self-contained HTML file: figures, curves, histograms, pictures. Needs the extra `eval`."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fbclip.errors import UsageError
from fbclip.metrics import PRO_LIMITS, Curve
from fbclip.runtime.evaluation.evaluate import VALUES, DataResult, Evaluation
from fbclip.runtime.evaluation.tables import HEADINGS, percent, reasons, rows
from fbclip.runtime.html import INK, chart, missing_packages, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_CURVES = 10  # classes that get a colour and a name each; more are drawn alike
KINDS = {
    "best": "Best: defects with the highest scores",
    "worst": "Worst: good images with the highest scores",
    "missed": "Missed: defects scored below the threshold, the lowest first",
}


def require_report() -> None:
    """Raise UsageError where the report's packages are missing, before any work is done."""
    if missing := missing_packages():
        raise UsageError(
            f"the HTML report needs {' and '.join(missing)}: pip install 'fbclip[eval]', or go without the report (fbclip eval --no-report)",
            option="report",
        )


def write_report(evaluation: Evaluation, stamped: Mapping[str, Any], path: Path) -> None:
    """Write the HTML file; nothing in it is fetched from elsewhere."""
    write_page(
        "report.html",
        path,
        stamp=stamped,
        headings=HEADINGS,
        values=VALUES,
        kinds=KINDS,
        percent=percent,
        skipped=evaluation.skipped,
        sections=[_section(result) for result in evaluation.results],
    )


def _section(result: DataResult) -> dict[str, Any]:
    """Figures and counts are of all draws, charts and pictures of the first."""
    threshold = result.classes[0].threshold
    scored = [s for c in result.classes for s in c.scores]
    good, defective = ([s.score for s in scored if s.item.label == label] for label in (0, 1))
    every = [s for draw in result.draws for c in draw.classes for s in c.scores]
    found, alarms = ([s.score >= threshold for s in every if s.item.label == label] for label in (1, 0))
    return {
        "name": result.data.name,
        "rows": rows(result),
        "reasons": reasons(result),
        "found": (sum(found), len(found)),
        "alarms": (sum(alarms), len(alarms)),
        "seeds": [draw.seed for draw in result.draws if draw.seed is not None],
        "charts": [*_curves(result), chart(lambda axes: _histogram(axes, good, defective, threshold))],
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
            charts.append(chart(_lines(f"{what}: ROC", "false positive rate", "recall", curves, _roc)))
            charts.append(chart(_lines(f"{what}: precision and recall", "recall", "precision", curves, _pr)))
    if pixels:
        limit = max(PRO_LIMITS)
        charts.append(chart(_lines("Regions: PRO", "false positive rate", "mean overlap", pixels, _pro, limit)))
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
