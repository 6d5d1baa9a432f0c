"""Checkpoints: save and load ours, import the official one. Nothing here unpickles objects.

Ours is a `.safetensors` file with the configuration in its metadata. It holds what was trained, and the CLIP
underneath too where that can't be had elsewhere (a trained tower, or weights from a file).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from fbclip.assets import NANO
from fbclip.bundle import Bundle
from fbclip.data.holdout import Seen
from fbclip.errors import CheckpointError
from fbclip.files import replacing, sha256
from fbclip.model.clip import (
    ClipConfig,
    StateDict,
    build_clip,
    load_clip,
    require_fit,
)
from fbclip.model.config import Config
from fbclip.model.network import FBCLIP
from fbclip.model.official import load_official
from fbclip.untrusted import MIB, Like, build, one_line, parse_json

FORMAT = 1
MOST_HEADER = MIB  # characters; usual are 1,000
MOST_GRID = 256  # patches along a side: what a spatial view precomputes grows with its third power, here to 84 MB
BEST, LAST = "checkpoint", "last"  # the files of a run, without their suffix


@dataclass(frozen=True)
class Header:
    """What our checkpoint says of itself, as JSON in its metadata."""

    format: int
    config: Mapping[str, Any]
    includes_clip: bool
    clip_fingerprint: Annotated[str, Like("[0-9a-f]{16}", "16 hexadecimal digits")]
    provenance: Mapping[str, Any]


def fingerprint(clip_projection: Tensor) -> str:
    """Tells CLIPs apart: the first 16 hex digits of the SHA-256 of the vision projection, float32."""
    return hashlib.sha256(clip_projection.detach().float().contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def save(model: FBCLIP, path: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write atomically.

    CLIP goes into the file unless it is an untouched pretrained tag, which is fetched by its name again.

    Raises:
        FBClipError, UsageError: see `fbclip.files.write_error`.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in _to_save(model).items()}
    header = {
        "format": FORMAT,
        "config": model.config.to_dict(),
        "includes_clip": any(_is_clip(name) for name in state),
        "clip_fingerprint": fingerprint(model.visual.tower.proj),
        "provenance": dict(provenance or {}),
    }
    content = serialize(state, metadata={"fbclip": json.dumps(header, allow_nan=False)})
    with replacing(path) as file:
        file.write(content)


def size_bytes(model: FBCLIP) -> int:
    """What `save` writes, but for the header."""
    return sum(value.nbytes for value in _to_save(model).values())


def _to_save(model: FBCLIP) -> StateDict:
    trained_tower = any(p.requires_grad for p in model.visual.tower.parameters())
    include_clip = trained_tower or model.config.clip.weights is None
    return {k: v for k, v in model.state_dict().items() if include_clip or not _is_clip(k)}


@dataclass(frozen=True)
class About:
    """How a checkpoint is meant to be run.

    Attributes:
        name: of the model.
        image_size: side that it is deployed at, in pixels, where that is not the one it was trained at.
        threshold: scores from here on are anomalous, 0..1; None where nothing chose one.
        seen: images that it was trained on; None where it doesn't say.
    """

    name: str
    image_size: int | None = None
    threshold: float | None = None
    seen: Seen | None = None


def about(path: Path) -> About:
    """What a checkpoint says of itself; a copy of the embedded one is known by its content.

    Raises:
        CheckpointError: unreadable.
    """
    if _is_torch_file(path):
        return About(path.stem)
    if path.stat().st_size == NANO.stat().st_size and sha256(path) == sha256(NANO):
        deployed = Bundle.load().manifest
        return About(path.stem, deployed.image_size, deployed.threshold, Seen())
    header = read_header(path)
    origin = header["provenance"]
    name, threshold = origin.get("name", path.stem), origin.get("threshold")
    if not (isinstance(name, str) and name.strip(".") and name == Path(name).name):
        raise CheckpointError(
            f"a model's name is a file's name; {path} has {name!r}: rename the file, and train it again"
        )
    if threshold is not None and not (isinstance(threshold, float) and 0 <= threshold <= 1):
        raise CheckpointError(f"a threshold is a probability between 0 and 1; {path} has {threshold!r}: train it again")
    # a run calls all its files alike, and knows a better name; a file that was renamed has a name
    name = name if path.stem in (BEST, LAST) else path.stem
    seen = Seen.from_dict(origin["seen"], path) if "seen" in origin else None
    return About(name, threshold=threshold, seen=seen)


def load(
    path: Path,
    clip: str | None = None,
    clip_weights: str | None = None,
    image_size: int | None = None,
    feature_layers: tuple[int, ...] | None = None,
) -> FBCLIP:
    """Load our checkpoint or the official one, float32, in eval mode.

    Args:
        path: `.safetensors` (ours) or a torch file (official).
        clip, clip_weights: the CLIP underneath, as `fbclip.model.clip.load_clip` takes it. Ours knows it, except for
            weights that came from a file; an official checkpoint defaults to ViT-L-14-336 with OpenAI's weights.
            Nothing is fetched unless both are named.
        image_size, feature_layers: override the deployed side (ours, see `about`) and the trained layers, or the
            published setting (official).

    Raises:
        CheckpointError: unreadable, or names and shapes that do not fit.
        UsageError: weights that would have to be fetched, and nobody named them.
    """
    if _is_torch_file(path):
        return load_official(path, clip, clip_weights, image_size, feature_layers)
    return _load_ours(path, clip, clip_weights, image_size or about(path).image_size, feature_layers)


def _is_torch_file(path: Path) -> bool:
    """Whether it is one, so an official checkpoint: a zip, or the older plain pickle."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def read_header(path: Path) -> dict[str, Any]:
    """The configuration and provenance of our checkpoint, without its tensors."""
    return dict(vars(_header(path)))


def _header(path: Path) -> Header:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # of any class: the reader is Rust's
        raise CheckpointError(
            f"{path} is neither an fbclip checkpoint nor an official one: {one_line(error)}"
        ) from error
    if "fbclip" not in metadata:
        raise CheckpointError(
            f"{path} holds tensors but no fbclip configuration: it may be CLIP's weights, "
            f"which go beside a checkpoint made by fbclip train"
        )
    try:
        if len(metadata["fbclip"]) > MOST_HEADER:
            raise ValueError(f"it has more than {MOST_HEADER:,} characters")
        values = parse_json(metadata["fbclip"])
        found = values.get("format") if isinstance(values, dict) else None
        if type(found) is int and found != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {found}; this fbclip reads format {FORMAT}: "
                f"upgrade with pip install -U fbclip"
            )
        return build(Header, values)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} has a configuration that is none: {one_line(error)}") from error


def _config(header: Header, path: Path, image_size: int | None, feature_layers: tuple[int, ...] | None) -> Config:
    """The configuration of our checkpoint, with another input side and other layers where they are given."""
    try:
        config = build(Config, header.config, "config")
        if (grid := config.image_size / config.clip.patch_size) > MOST_GRID:
            raise ValueError(f"image_size is at most {MOST_GRID} patches; got {config.image_size}, which are {grid:g}")
    except ValueError as error:
        raise CheckpointError(f"{path} has a configuration that is none: {one_line(error)}") from error
    return replace(
        config, image_size=image_size or config.image_size, feature_layers=feature_layers or config.feature_layers
    )


def _load_ours(
    path: Path,
    clip: str | None,
    clip_weights: str | None,
    image_size: int | None,
    feature_layers: tuple[int, ...] | None,
) -> FBCLIP:
    header = _header(path)
    config = _config(header, path, image_size, feature_layers)
    own = config.clip
    if header.includes_clip:
        if clip or clip_weights:
            raise CheckpointError(f"{path} carries its own CLIP ({own.name}); name no other", option="clip")
        require_tensors(config, path)
        loaded = build_clip(_used(config), None)
    else:
        # names in a file may be no paths and no addresses
        if not clip and own.weights not in open_clip.list_pretrained_tags_by_model(own.name.replace("/", "-")):
            raise CheckpointError(
                f"{path} was trained on {own.name} with {own.weights}, which open_clip doesn't have: "
                f"name it, and its weights",
                option="clip",
            )
        asked = bool(clip and clip_weights)
        loaded, clip_cfg = load_clip(clip or own.name, clip_weights or own.weights, fetch=asked)
        config = replace(config, clip=clip_cfg)
    model = FBCLIP(config, loaded)
    if (found := fingerprint(model.visual.tower.proj)) != header.clip_fingerprint and not header.includes_clip:
        raise CheckpointError(
            f"{path} was trained on another CLIP than {config.clip.name} as given (fingerprint "
            f"{header.clip_fingerprint}, got {found}): name the one it was trained on "
            f"with its weights",
            option="clip",
        )
    restore(model, path)
    return model.eval()


def _used(config: Config) -> ClipConfig:
    """Its CLIP without the vision blocks behind the last feature layer, which our checkpoints don't hold."""
    vision = {**config.clip.vision, "layers": max(config.feature_layers)}
    return replace(config.clip, model={**config.clip.model, "vision_cfg": vision})


def require_tensors(config: Config, path: Path) -> None:
    """Compare the shapes of our checkpoint's tensors with those of its configuration before any of it is built, so
    that a configuration takes no more memory than the file has.

    Raises:
        CheckpointError: they don't fit, or nothing can be built from the configuration.
    """
    try:
        with torch.device("meta"):
            model = FBCLIP(config, build_clip(_used(config), None))
    except Exception as error:  # whatever open_clip and torch say to sizes that don't go together
        raise CheckpointError(f"{path} has a configuration of no model: {one_line(error)}") from error
    _require_shapes(model, path)


def restore(model: FBCLIP, path: Path) -> None:
    """Load the tensors of our checkpoint into a model of its configuration."""
    names = _require_shapes(model, path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name).float() for name in names}
    except Exception as error:
        raise CheckpointError(f"{path} can't be read: {one_line(error)}") from error
    model.load_state_dict(state, strict=False)


def _require_shapes(model: FBCLIP, path: Path) -> list[str]:
    """The names of the tensors that our checkpoint has for a model, all of the right shape."""
    includes_clip = _header(path).includes_clip
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not _is_behind(name, len(model.visual.tower.blocks))]  # noqa: SIM118
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if includes_clip or not _is_clip(k)}
    require_fit(f"the tensors of {path}", wanted, shapes)
    return names


def _is_clip(name: str) -> bool:
    return name.startswith(("text.", "visual.tower."))


def _is_behind(name: str, blocks: int) -> bool:
    """Whether a tensor belongs to a vision block that feature layers lower than the trained ones do without."""
    block = re.match(r"visual\.tower\.blocks\.(\d+)\.", name)
    return block is not None and int(block[1]) >= blocks
