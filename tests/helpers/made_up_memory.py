"""The files in which Linux tells its memory, of a made-up machine."""

from __future__ import annotations

from pathlib import Path


def write_memory(root: Path, total_kb: int, available_kb: int) -> None:
    """/proc below a root, of a machine without swap."""
    values = dict.fromkeys(("MemFree", "Buffers", "Cached", "Shmem", "Active", "Inactive", "Slab"), 1000)
    values |= {"MemTotal": total_kb, "MemAvailable": available_kb, "SwapTotal": 0, "SwapFree": 0}
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text("".join(f"{name}: {kilobytes} kB\n" for name, kilobytes in values.items()))
    (root / "proc/vmstat").write_text("pswpin 0\npswpout 0\n")
