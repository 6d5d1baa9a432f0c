"""The published checkpoints: files of torch.save, whose tensors have other names. Nothing in them is run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

from fbclip.errors import CheckpointError
from fbclip.model.clip import StateDict, fitting_clips, load_clip, load_torch_file, plain_tensors, require_fit
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP
from fbclip.untrusted import one_line

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

# Carried by official checkpoints, but without part in the forward pass (docs/method.md, section 8).
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


def load_official(
    path: Path,
    clip: str | None,
    clip_weights: str | None,
    image_size: int | None,
    feature_layers: tuple[int, ...] | None,
) -> FBCLIP:
    if clip and clip_weights is None:
        raise CheckpointError(
            f"an official checkpoint holds no CLIP: name the weights of {clip}, a tag or a file", option="clip_weights"
        )
    state = _read_official(path)
    asked = bool(clip and clip_weights)
    loaded, config = load_clip(clip or DEFAULT_CLIP, clip_weights or DEFAULT_WEIGHTS, fetch=asked)
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
