"""Which CLIP: its configuration by open_clip's names, and its weights, read without running anybody's code."""

from __future__ import annotations

import logging
import math
import os
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Annotated, Any, cast

import open_clip
import torch
from torch import Tensor

from fbclip.errors import CheckpointError, UsageError
from fbclip.resample import CLIP_MEAN, CLIP_STD
from fbclip.untrusted import MIB, Line, Range, one_line, read_json, read_value

log = logging.getLogger(__name__)

HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # of a repository, where no file is named
ANSWER_S = 5.0  # seconds in which the hub has to answer before anything is fetched

StateDict = dict[str, Tensor]
MOST_LISTED = 10_000  # characters of the names that don't fit


@dataclass(frozen=True)
class ClipConfig:
    """Which CLIP: an open_clip model configuration and how its images were normalised.

    `weights` remembers the pretrained tag, so that a checkpoint trained on a frozen CLIP need not carry it.
    """

    name: Line
    model: Mapping[str, Any]  # open_clip's: embed_dim, vision_cfg, text_cfg, quick_gelu
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    weights: Line | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for sizes that no CLIP has, made up to take more memory or time than there is."""
        try:
            for tower in ("vision_cfg", "text_cfg"):
                read_value(Mapping[str, Any], self.model.get(tower), tower)
            for part in (self.model, self.vision, self.model["text_cfg"]):
                for name in _SIZES.keys() & part.keys():
                    read_value(_SIZES[name], part[name], name)
            read_value(_SIZES["embed_dim"], self.model.get("embed_dim"), "embed_dim")
            if min(self.std) <= 0:
                raise ValueError(f"std is above 0; got {self.std}")
        except ValueError as error:
            raise UsageError(f"{self.name} is no configuration of a CLIP: {error}") from error

    @property
    def vision(self) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], self.model["vision_cfg"])

    @property
    def layers(self) -> int:
        return int(self.vision.get("layers", 12))

    @property
    def width(self) -> int:
        """Of the vision tower, C."""
        return int(self.vision.get("width", 768))

    @property
    def patch_size(self) -> int:
        return int(self.vision.get("patch_size", 16))

    @property
    def image_size(self) -> int:
        """Side the weights were trained at, in pixels."""
        return int(self.vision.get("image_size", 224))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClipConfig:
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


# Of open_clip's configurations; its largest plain CLIP, ViT-bigG-14, has 48 layers and a width of 1664.
_SIZES: dict[str, Any] = {
    "embed_dim": Annotated[int, Range(1, 16_384)],
    "layers": Annotated[int, Range(1, 200)],
    "width": Annotated[int, Range(1, 16_384)],
    "head_width": Annotated[int, Range(1, 1024)],
    "heads": Annotated[int, Range(1, 1024)],
    "mlp_ratio": Annotated[float, Range(0.1, 16)],
    "patch_size": Annotated[int, Range(1, 256)],
    "image_size": Annotated[int, Range(1, 4096)],
    "context_length": Annotated[int, Range(20, 1024)],  # of tokens: the prompts have 18
    "vocab_size": Annotated[int, Range(49_408, 1_000_000)],  # CLIP's own tokenizer has the lowest
    "quick_gelu": bool,
}

# Anything beyond these would change what a token is, and FB-CLIP's numbers with it.
_PLAIN_VISION = {
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "ls_init_value",
    "no_ln_pre",
    "patch_dropout",
    "pool_type",
    "final_ln_after_pool",
    "output_tokens",
    "norm_kwargs",
    "act_kwargs",
}
_PLAIN_TEXT = {
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "ls_init_value",
    "no_causal_mask",
    "norm_kwargs",
    "act_kwargs",
    "output_tokens",
}


def check_plain(name: str, model: Mapping[str, Any]) -> None:
    """Raise UsageError unless both towers are CLIP's plain transformers with CLIP's own tokenizer."""
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    reasons = []
    if "timm_model_name" in vision:
        reasons.append(f"its vision tower is timm's {vision['timm_model_name']}")
    if isinstance(vision.get("layers"), (list, tuple)):
        reasons.append("its vision tower is a ResNet")
    if "hf_model_name" in text:
        reasons.append(f"its text tower is {text['hf_model_name']}")
    if "hf_tokenizer_name" in text:
        reasons.append(f"its tokenizer is {text['hf_tokenizer_name']}, not CLIP's")
    if model.get("custom_text") or "multimodal_cfg" in model:
        reasons.append("it is not laid out like CLIP (custom text tower)")
    if not reasons:
        extra = sorted(
            {f"vision {k}" for k in vision.keys() - _PLAIN_VISION if vision[k]}
            | {f"text {k}" for k in text.keys() - _PLAIN_TEXT if text[k]}
        )
        reasons += [f"it sets {', '.join(extra)}"] if extra else []
    if reasons:
        raise UsageError(
            f"FB-CLIP needs CLIP's plain vision and text transformers; {name} does not fit: {'; '.join(reasons)}. "
            f"Use one like ViT-B-16, ViT-L-14-336 or ViT-H-14"
        )


def clip_config(clip: str, weights: str | None = None) -> ClipConfig:
    """Which CLIP a name or a file stands for, without loading weights.

    Args:
        clip: an open_clip model name, or the path of a model configuration (.json).
        weights: a pretrained tag of that name, the path of a weights file, or None.

    Raises:
        UsageError: unknown name or tag, unreadable configuration, or no plain ViT.
    """
    if clip.endswith(".json"):
        config = _config_from_file(Path(clip))
    else:
        model = open_clip.get_model_config(clip.replace("/", "-"))
        if model is None:
            raise UsageError(
                f"a CLIP is an open_clip model name or a .json configuration; {clip!r} is neither. "
                f"Names: python -c 'import open_clip; print(open_clip.list_models())'",
                option="clip",
            )
        check_plain(clip, model)
        config = ClipConfig(clip, model)
    if weights is None or Path(weights).is_file():
        return config
    tag = open_clip.get_pretrained_cfg(config.name, weights)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.name)) or "none"
        raise UsageError(
            f"weights are a file or a pretrained tag of {config.name}; {weights!r} is neither (tags: {tags})",
            option="clip_weights",
        )
    model = {**config.model, "quick_gelu": bool(tag.get("quick_gelu", config.model.get("quick_gelu", False)))}
    return ClipConfig(config.name, model, tuple(tag["mean"]), tuple(tag["std"]), weights)


def _config_from_file(path: Path) -> ClipConfig:
    if not path.exists():
        raise UsageError(f"no CLIP configuration at {path}")
    try:
        raw = read_value(Mapping[str, Any], read_json(path, MIB), "it")
        model = read_value(Mapping[str, Any], raw.get("model_cfg", raw), "model_cfg")
        if missing := {"embed_dim", "vision_cfg", "text_cfg"} - model.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        images = read_value(Mapping[str, Any], raw.get("preprocess_cfg", {}), "preprocess_cfg")
        colours = tuple[float, float, float]
        mean, std = (
            read_value(colours, images.get(name, list(usual)), name)
            for name, usual in (("mean", CLIP_MEAN), ("std", CLIP_STD))
        )
        for part in ("vision_cfg", "text_cfg"):
            read_value(Mapping[str, Any], model[part], part)
        check_plain(path.stem, model)
        return ClipConfig(path.stem, model, mean, std)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            f"a CLIP configuration is JSON with embed_dim, vision_cfg and text_cfg; {path} is not: {one_line(error)}"
        ) from error


def read_weights(path: Path) -> tuple[StateDict, bool]:
    """Read a CLIP state dict without running anybody's code.

    Takes `.safetensors`, a torch file (`.pt`, `.bin`; weights only), or OpenAI's TorchScript archive.

    Returns:
        The tensors as float32 by open_clip's names, and whether it was a TorchScript archive
        (only OpenAI published those, and all were trained with QuickGELU).
    """
    archive = False
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        elif archive := _is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = load_torch_file(path)
        state = state.get("state_dict", state) if isinstance(state, Mapping) else state
        tensors = plain_tensors(state, path)
    except Exception as error:  # of any class: torch, its pickle, zip and TorchScript readers, safetensors
        raise CheckpointError(
            f"CLIP weights must be .safetensors, a torch file of tensors only, or OpenAI's archive; "
            f"{path} can't be read as that: {one_line(error)}"
        ) from error
    tensors = {name.removeprefix("module."): tensor.float() for name, tensor in tensors.items()}
    for stray in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's archives carry these as tensors
        tensors.pop(stray, None)
    return tensors, archive


def load_torch_file(path: Path) -> Any:
    """What is in a file of torch.save: tensors and plain values, in memory of about the file's size.

    Raises:
        Exception: of any class that torch's readers have.
    """
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")  # about what the file is like
        if file.read(2) != b"PK":  # the older plain pickle
            return torch.load(_Bounded(path), map_location="cpu", weights_only=True)
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            if (unpacked := sum(part.file_size for part in archive.infolist())) > size:
                raise ValueError(f"it unpacks to {unpacked:,} bytes from {size:,}; torch.save doesn't compress")
        return torch.load(path, map_location="cpu", weights_only=True)


class _Bounded(BufferedReader):
    """A file that is asked for no more than it holds: a pickle names the length of what follows, up to 2 GB."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path))
        self.size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def plain_tensors(state: Any, path: Path) -> StateDict:
    """The tensors of a state dict, none larger than its file gives reason for.

    Raises:
        ValueError: no dictionary, or tensors of another kind.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds no state dict but a {type(state).__name__}")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
            raise ValueError(f"{one_line(name, 60)} is no plain tensor")
    size = path.stat().st_size
    if sum(math.prod(value.shape) for value in tensors.values()) > size:  # views of the same few values
        raise ValueError(f"its tensors have more values than the file has bytes ({size:,})")
    return tensors


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())


def load_clip(clip: str, weights: str | None, fetch: bool = True) -> tuple[open_clip.CLIP, ClipConfig]:
    """Build CLIP and load its weights: `load_clip("ViT-L-14-336", "openai")` or two files, then without network.

    Without weights the towers are initialised at random, which only makes sense when they are trained.

    Args:
        fetch: weights of a tag that are not on this machine.

    Raises:
        UsageError, CheckpointError: with every missing, extra or misshapen name.
    """
    config = clip_config(clip, weights)
    if weights is None:
        return build_clip(config, None), config
    path = Path(weights)
    if not path.is_file():
        path = _weights_of(config.name, weights, fetch)
    state, archive = read_weights(path)
    if archive:
        config = ClipConfig.from_dict({**config.to_dict(), "model": {**config.model, "quick_gelu": True}})
    return build_clip(config, state), config


def _weights_of(name: str, tag: str, fetch: bool) -> Path:
    """The file of a pretrained tag: from the hub's cache, without network; else fetched, if that was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    known = open_clip.get_pretrained_cfg(name, tag)
    repository, file = os.path.split(known.get("hf_hub", ""))
    names = (f"{Path(file).stem}.safetensors", file) if file else HUB_FILES
    for candidate in names if repository else ():
        if isinstance(found := huggingface_hub.try_to_load_from_cache(repository, candidate), str):
            return Path(found)
    if not fetch:
        raise UsageError(
            f"the weights {tag!r} of {name} are not on this machine, and nothing is fetched unasked: "
            f"name both, {name} and {tag}, to fetch them, or name their file",
            option="clip_weights",
        )
    try:
        if repository:  # asked once and briefly: the hub's client would go on trying for a minute
            with suppress(HfHubHTTPError):  # it answers: perhaps only the other file is there
                huggingface_hub.get_hf_file_metadata(
                    huggingface_hub.hf_hub_url(repository, names[-1]), timeout=ANSWER_S
                )
        return Path(open_clip.download_pretrained(known))
    except Exception as error:  # whatever the hub's client raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"could not fetch {name} {tag!r}: {reason}; with no network, name the file", option="clip_weights"
        ) from error


def build_clip(config: ClipConfig, state: StateDict | None) -> open_clip.CLIP:
    """CLIP of this configuration, float32, in eval mode; random where `state` is None."""
    model = {k: v for k, v in config.model.items() if k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}
    if state is None:
        return cast(open_clip.CLIP, open_clip.CLIP(**model).eval())
    with torch.device("meta"):  # the weights are assigned, so none are drawn at random first
        clip = open_clip.CLIP(**model)
    clip.attn_mask = None  # the causal mask, which FB-CLIP's text tower does without
    wanted = {k: tuple(v.shape) for k, v in clip.state_dict().items()}
    if "logit_scale" in state:
        state = {**state, "logit_scale": state["logit_scale"].reshape(wanted["logit_scale"])}
    else:
        state = {**state, "logit_scale": torch.zeros(wanted["logit_scale"])}  # FB-CLIP's temperature is fixed
    require_fit(f"CLIP weights for {config.name}", wanted, {k: tuple(v.shape) for k, v in state.items()})
    clip.load_state_dict(state, assign=True)
    return cast(open_clip.CLIP, clip.eval())


def require_fit(
    what: str, wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]], hint: str = ""
) -> None:
    """Raise CheckpointError that lists every missing, extra and misshapen name."""
    problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in got]
    problems += [f"extra {name} {got[name]}" for name in got if name not in wanted]
    problems += [
        f"{name} is {got[name]}, wanted {wanted[name]}" for name in wanted if name in got and got[name] != wanted[name]
    ]
    if problems:
        listed = one_line("; ".join(problems), MOST_LISTED)
        raise CheckpointError(f"{what} do not fit ({len(problems)} names): {listed}{hint}")


def fitting_clips(vision: int, text: int, joint: int) -> list[str]:
    """open_clip's plain models with these widths (C, D, E), the ones a checkpoint of those widths was trained on."""
    found = []
    for name in open_clip.list_models():
        model = open_clip.get_model_config(name)
        widths = (model["vision_cfg"].get("width", 768), model["text_cfg"].get("width", 512), model["embed_dim"])
        if widths == (vision, text, joint):
            try:
                check_plain(name, model)
            except UsageError:
                continue
            found.append(name)
    return found
