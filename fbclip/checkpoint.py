"""Checkpoints: save and load ours, import the official one. Nothing here unpickles objects.

Ours is a `.safetensors` file with the configuration in its metadata. It holds what was trained, and the CLIP
underneath too where that can't be had elsewhere (a trained tower, or weights from a file).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fbclip.clip import (
    ClipConfig,
    StateDict,
    build_clip,
    fitting_clips,
    load_clip,
    load_torch_file,
    plain_tensors,
    require_fit,
)
from fbclip.errors import CheckpointError, FBClipError
from fbclip.files import new_folder
from fbclip.model import FBCLIP, Config, default_config
from fbclip.untrusted import MIB, Like, build, one_line, parse_json

FORMAT = 1
MOST_HEADER = MIB  # characters; usual are 1,000
MOST_GRID = 256  # patches along a side: what a spatial view precomputes grows with its third power, here to 84 MB
DEFAULT_CLIP, DEFAULT_WEIGHTS = "ViT-L-14-336", "openai"  # the published checkpoints' CLIP

# official name -> ours
_PARAMETERS = {
    "ctx_pos": "prompts.ctx_pos",
    "ctx_neg": "prompts.ctx_neg",
    "scale_weights": "visual.scale_weights",
    **{
        f"token_selector.{i}.{leaf}": f"prompts.token_selector.{i}.{leaf}"
        for i in (0, 2)
        for leaf in ("weight", "bias")
    },
    **{f"text_projection_mlp.{i}.{leaf}": f"prompts.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")},
    **{
        f"fb_Attention.gate.{i}.{leaf}": f"visual.separation.gate.{i}.{leaf}"
        for i in (0, 2)
        for leaf in ("weight", "bias")
    },
    **{f"fb_Attention.norm.{leaf}": f"visual.separation.norm.{leaf}" for leaf in ("weight", "bias")},
    **{
        f"fb_Attention.{short}_{theirs}": f"visual.separation.{branch}.{ours}"
        for short, branch in (("fg", "foreground"), ("bg", "background"))
        for theirs, ours in (
            ("scale", "scale"),
            ("norm.weight", "norm.weight"),
            ("norm.bias", "norm.bias"),
            ("to_q.weight", "to_q.weight"),
            ("to_k.weight", "to_k.weight"),
            ("to_v.weight", "to_v.weight"),
            ("to_out.0.weight", "to_out.weight"),
            ("to_out.0.bias", "to_out.bias"),
        )
    },
}

# Carried by official checkpoints, but without part in the forward pass (spec, section 8).
_UNUSED = (
    "fusion_weights",
    "fusion_weight",
    "layer_selector",
    "gate_network.0.weight",
    "gate_network.0.bias",
    "gate_network.2.weight",
    "gate_network.2.bias",
)
_UNUSED_MANY = re.compile(
    r"compound_prompts_text\.\d+|compound_prompt_projections\.\d+\.(weight|bias)"
    r"|token_(prefix|suffix)_(pos|neg)|tokenized_prompts_(pos|neg)"
)


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
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    trained_tower = any(p.requires_grad for p in model.visual.tower.parameters())
    include_clip = trained_tower or model.config.clip.weights is None
    if not include_clip:
        state = {k: v for k, v in state.items() if not _is_clip(k)}
    header = {
        "format": FORMAT,
        "config": model.config.to_dict(),
        "includes_clip": include_clip,
        "clip_fingerprint": fingerprint(model.visual.tower.proj),
        "provenance": dict(provenance or {}),
    }
    with new_folder(path) as folder:
        temporary = folder / "checkpoint.safetensors"
        try:
            save_file(state, temporary, metadata={"fbclip": json.dumps(header, allow_nan=False)})
        except SafetensorError as error:  # which a full disk is to it
            raise FBClipError(f"can't write {path}: {one_line(error)}") from error
        temporary.chmod(0o644)
        temporary.replace(path)


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
        clip, clip_weights: the CLIP underneath, as `fbclip.clip.load_clip` takes it. Ours knows it, except for
            weights that came from a file; an official checkpoint defaults to ViT-L-14-336 with OpenAI's weights.
        image_size, feature_layers: override the trained (ours) or published (official) setting.

    Raises:
        CheckpointError: unreadable, or names and shapes that do not fit.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        is_torch_file = file.read(2) in (b"PK", b"\x80\x02")  # a zip, or the older plain pickle
    if is_torch_file:
        return _load_official(
            path, clip or DEFAULT_CLIP, clip_weights or (None if clip else DEFAULT_WEIGHTS), image_size, feature_layers
        )
    return _load_ours(path, clip, clip_weights, image_size, feature_layers)


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
            f"{path} holds tensors but no fbclip configuration; pass CLIP weights as --clip-weights, "
            f"a checkpoint made by fbclip train as --checkpoint"
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
            raise CheckpointError(f"{path} carries its own CLIP ({own.name}); leave out --clip and --clip-weights")
        require_tensors(config, path)
        loaded = build_clip(_used(config), None)
    else:
        # names in a file may be no paths and no addresses
        if not clip and own.weights not in open_clip.list_pretrained_tags_by_model(own.name.replace("/", "-")):
            raise CheckpointError(
                f"{path} was trained on {own.name} with {own.weights}, which open_clip doesn't have: "
                f"name it with --clip and --clip-weights"
            )
        loaded, clip_cfg = load_clip(clip or own.name, clip_weights or own.weights)
        config = replace(config, clip=clip_cfg)
    model = FBCLIP(config, loaded)
    if (found := fingerprint(model.visual.tower.proj)) != header.clip_fingerprint and not header.includes_clip:
        raise CheckpointError(
            f"{path} was trained on another CLIP than {config.clip.name} as given (fingerprint "
            f"{header.clip_fingerprint}, got {found}): name the one it was trained on "
            f"with --clip and --clip-weights"
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


def _load_official(
    path: Path, clip: str, clip_weights: str | None, image_size: int | None, feature_layers: tuple[int, ...] | None
) -> FBCLIP:
    if clip_weights is None:
        raise CheckpointError(f"an official checkpoint holds no CLIP: {clip} needs --clip-weights TAG or FILE")
    state = _read_official(path)
    loaded, config = load_clip(clip, clip_weights)
    model = FBCLIP(default_config(config, image_size, feature_layers), loaded)
    ours = model.state_dict()
    wanted = {name: tuple(ours[own].shape) for name, own in _PARAMETERS.items()}
    got = {name: tuple(value.shape) for name, value in state.items() if not _UNUSED_MANY.fullmatch(name)}
    unused = {name: got.get(name, ()) for name in _UNUSED}  # must be there, in whatever shape
    require_fit(f"the tensors of {path}", wanted | unused, got, hint=_other_clip(got, wanted))
    model.load_state_dict({own: state[name].float() for name, own in _PARAMETERS.items()}, strict=False)
    return model.eval()


def _other_clip(got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Names the CLIPs that would fit, where the widths show that this one can't."""
    try:
        trained, here = (
            (shapes["fb_Attention.norm.weight"][0], shapes["ctx_pos"][-1], shapes["text_projection_mlp.2.weight"][0])
            for shapes in (got, wanted)
        )
    except (KeyError, IndexError):
        return ""  # too broken to tell
    if trained == here:
        return ""
    names = ", ".join(fitting_clips(*trained)) or "none of open_clip's"
    return f". It was trained on a CLIP with widths {trained} (vision, text, joint), this one has {here}; that fit: {names}"


def _read_official(path: Path) -> StateDict:
    """The tensors of both parts of an official checkpoint, in one dictionary."""
    try:
        content = load_torch_file(path)
        parts = [content["prompt_learner"], content["model_trainable_params"]]
        return {name: value for part in parts for name, value in plain_tensors(part, path).items()}
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, and is not loaded: {one_line(error)}"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"an official checkpoint is a dictionary with prompt_learner and model_trainable_params; "
            f"{path} is not: missing {one_line(error)}"
        ) from error
    except Exception as error:  # of any class: torch's pickle and zip readers
        raise CheckpointError(f"can't read {path}: {one_line(error)}") from error
