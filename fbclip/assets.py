"""What ships with the package: the embedded model, sample images and the templates of pages."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "fbclip-nano.fbclip"  # the bundle that is used where none is named
NANO = ASSETS / "fbclip-nano.safetensors"  # the checkpoint that it was exported from
SAMPLES = ASSETS / "samples"
