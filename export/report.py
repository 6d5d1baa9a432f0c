"""The proof of an export, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fbclip.export.bundle import Parity


def print_parity(parities: list[Parity], console: Console) -> None:
    """One row per graph: largest differences from the torch model, budgets, size and time."""
    table = Table(box=None, pad_edge=False, title="ONNX Runtime against torch", title_justify="left")
    for column in ("graph", "images", "score max", "map max", "map 99.9 %", "budget", "nodes", "export s"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for p in parities:
        budget = f"{p.score_budget:g} / {p.map_budget:g}"
        table.add_row(
            p.precision,
            str(p.images),
            f"{p.score_max:.1e}",
            f"{p.map_max:.1e}",
            f"{p.map_p999:.1e}",
            budget,
            str(p.nodes),
            f"{p.seconds:.0f}",
        )
    console.print(table)
