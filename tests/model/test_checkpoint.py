from __future__ import annotations

import json
import pickle
import zipfile
from itertools import count
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fbclip.assets import NANO
from fbclip.errors import CheckpointError, UsageError
from fbclip.model import checkpoint
from fbclip.model.clip import clip_config, load_clip
from fbclip.model.config import default_config
from helpers import golden

SMALL_LAYERS = golden.FEATURE_LAYERS


def load(folder: Path, official: Path | None = None, weights: Path | None = None) -> checkpoint.FBCLIP:
    return checkpoint.load(
        official or folder / "official.pth",
        str(folder / "clip.json"),
        str(weights or folder / "clip.pt"),
        golden.IMAGE_SIZE,
        SMALL_LAYERS,
    )


def test_ours_comes_back(golden_files: Path, tmp_path: Path) -> None:
    model = load(golden_files)
    checkpoint.save(model, tmp_path / "ours.safetensors", {"note": "x"})
    again = checkpoint.load(tmp_path / "ours.safetensors")
    assert again.config == model.config
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["ours.safetensors"]


def test_lower_feature_layers_do_without_the_blocks_behind_them(golden_files: Path, tmp_path: Path) -> None:
    model = load(golden_files)
    checkpoint.save(model, tmp_path / "ours.safetensors")
    lower = checkpoint.load(tmp_path / "ours.safetensors", feature_layers=SMALL_LAYERS[:2])
    image = torch.rand(1, 3, golden.IMAGE_SIZE, golden.IMAGE_SIZE)
    with torch.no_grad():
        assert torch.equal(lower.visual.tower(image), model.visual.tower(image)[:, :2])
    with pytest.raises(CheckpointError, match=r"missing visual\.tower\.blocks\.2"):
        checkpoint.save(lower, tmp_path / "lower.safetensors")
        checkpoint.load(tmp_path / "lower.safetensors", feature_layers=SMALL_LAYERS)


def test_every_wrong_name_is_listed(golden_files: Path, tmp_path: Path) -> None:
    content = golden.official_checkpoint()
    parameters = content["model_trainable_params"]
    del parameters["fb_Attention.norm.bias"]
    parameters["stranger"] = torch.zeros(3)
    parameters["scale_weights"] = torch.zeros(5)
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as error:
        load(golden_files, tmp_path / "bad.pth")
    for part in ("missing fb_Attention.norm.bias (128,)", "extra stranger (3,)", "scale_weights is (5,), wanted (6,)"):
        assert part in str(error.value)


def test_the_clip_that_would_fit_is_named(golden_files: Path, tmp_path: Path) -> None:
    content = golden.official_checkpoint()
    content["prompt_learner"]["ctx_pos"] = torch.zeros(1, 1, 12, 768)
    content["model_trainable_params"]["fb_Attention.norm.weight"] = torch.zeros(1024)
    torch.save(content, tmp_path / "large.pth")
    with pytest.raises(CheckpointError, match="ViT-L-14-336"):
        load(golden_files, tmp_path / "large.pth")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("kind", ["official", "clip"])
def test_nothing_is_unpickled(golden_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"prompt_learner": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        if kind == "official":
            load(golden_files, official=tmp_path / "evil.pth")
        else:
            load(golden_files, weights=tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


EMBEDDED = NANO
with safe_open(EMBEDDED, framework="pt") as embedded:
    HEADER = json.loads(embedded.metadata()["fbclip"])
    TENSORS = {name: embedded.get_tensor(name) for name in embedded.keys()}  # noqa: SIM118


def write_ours(path: Path, header: Any) -> Path:
    """The embedded model's checkpoint with another header."""
    save_file(TENSORS, path, {"fbclip": header if isinstance(header, str) else json.dumps(header)})
    return path


def changed(place: str, value: Any) -> Any:
    """The embedded model's header with another value at a place like "config.clip.name"."""
    header = json.loads(json.dumps(HEADER))
    *path, last = place.split(".")
    part = header
    for name in path:
        part = part[name]
    part[last] = value
    return header


VISION, TEXT = "config.clip.model.vision_cfg", "config.clip.model.text_cfg"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "5",
        "[]",
        "[" * 200_000,
        "{}",
        '{"format": 1}',
        json.dumps(HEADER).replace('"format": 1', '"format": 1, "format": 1'),
        json.dumps(HEADER).replace('"format": 1', '"format": true'),
        json.dumps(HEADER).replace('"format": 1', '"format": 2'),
        changed("config", 5),
        changed("config", {}),
        changed("includes_clip", 1),
        changed("clip_fingerprint", None),
        changed("config.image_size", "96"),
        changed("config.image_size", 0),
        changed("config.image_size", 8 * 10**6),
        changed("config.feature_layers", [7]),
        changed("config.feature_layers", 5),
        changed("config.clip", None),
        changed("config.clip.std", [0, 1, 1]),
        changed("config.clip.model", []),
        changed(VISION, None),
        changed(f"{VISION}.width", 65_536),
        changed(f"{VISION}.width", 16_384),
        changed(f"{VISION}.width", -1),
        changed(f"{VISION}.width", 129),
        changed("config.feature_layers", [200]),
        changed(f"{VISION}.layers", 10**9),
        changed(f"{VISION}.layers", [1, 2]),
        changed(f"{VISION}.patch_size", 0),
        changed(f"{VISION}.mlp_ratio", "3"),
        changed(f"{VISION}.act_kwargs", {"a": 1}),
        changed(f"{VISION}.stranger", 1),
        changed(f"{TEXT}.context_length", 1000),
        changed(f"{TEXT}.context_length", 10**7),
        changed(f"{TEXT}.vocab_size", 10),
        changed(f"{TEXT}.heads", 3),
        changed("includes_clip", False),
        changed("config", {**changed(f"{VISION}.layers", 200)["config"], "feature_layers": [200]}),
        {**changed("config.clip.name", "/etc/clip.json"), "includes_clip": False},
        {**changed("config.clip.name", "hf-hub:somebody/something"), "includes_clip": False},
        {**changed("config.clip.weights", "/etc/hostname"), "includes_clip": False},
    ],
    ids=map(str, count()),
)
def test_headers_that_are_none_are_refused_before_anything_is_built(tmp_path: Path, header: Any) -> None:
    path = write_ours(tmp_path / "c.safetensors", header)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, 20_000, 1_000_000])
def test_a_checkpoint_that_is_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(EMBEDDED.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"^[^\n]*$"):
        checkpoint.load(path)


def compressed(path: Path) -> None:
    """Zeros in a thousandth of their size."""
    torch.save({"a": torch.zeros(5)}, path)
    with zipfile.ZipFile(path) as stored:
        parts = {part.filename: stored.read(part) for part in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            if name.endswith("data/0"):
                with archive.open(name, "w", force_zip64=True) as file:
                    for _ in range(200):
                        file.write(bytes(2**20))
            else:
                archive.writestr(name, content)


def few_values_seen_as_many(path: Path) -> None:
    torch.save({"state_dict": {"visual.proj": torch.zeros(1, dtype=torch.float16).expand(10**12)}}, path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02" + b"(" * 100_000,
        b"\x80\x02X\xff\xff\xff\x7fabc",
        b"\x80\x02]" + b"]a" * 1000,
        b"\x80\x02.",
        b"\x80\x02}.",
        b"PK\x03\x04" + bytes(100),
        b"PK",
        compressed,
        few_values_seen_as_many,
        lambda path: torch.save([torch.zeros(1)], path),
        lambda path: torch.save({"prompt_learner": 5, "model_trainable_params": {}}, path),
        lambda path: torch.save(
            {"prompt_learner": {}, "model_trainable_params": {"a": torch.zeros(2).to_sparse()}}, path
        ),
    ],
)
@pytest.mark.parametrize("kind", ["official", "clip"])
def test_torch_files_that_are_none(golden_files: Path, tmp_path: Path, content: Any, kind: str) -> None:
    path = tmp_path / "c.pth"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as error:
        load(golden_files, official=path) if kind == "official" else load(golden_files, weights=path)
    assert "\n" not in str(error.value)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    "text",
    ["", "5", "[]", "[" * 200_000, '{"embed_dim": 5}', '{"embed_dim": 5, "vision_cfg": 5, "text_cfg": {}}', "NaN"],
)
def test_clip_configurations_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "clip.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"a CLIP configuration is JSON with [^\n]*$"):
        clip_config(str(path))


class Archive(torch.nn.Module):
    """Laid out like OpenAI's archive: CLIP's parameters, float16, and three numbers among them."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(leaf, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_weights_files(golden_files: Path, tmp_path: Path, suffix: str) -> None:
    state, path = golden.weights("clip"), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".bin":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        extra = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
        torch.jit.script(Archive({**state, **extra})).save(str(path))
    config = golden_files / "plain.json"
    config.write_text((golden_files / "clip.json").read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    clip, loaded = load_clip(str(config), str(path))
    assert torch.equal(clip.visual.proj, state["visual.proj"])
    assert loaded.model["quick_gelu"] == (suffix == ".pt")  # only OpenAI published such archives


def test_weights_that_do_not_fit(golden_files: Path, tmp_path: Path) -> None:
    state = golden.weights("clip")
    del state["visual.proj"]
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=r"missing visual\.proj"):
        load(golden_files, weights=tmp_path / "clip.pt")


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "xlm-roberta-base-ViT-B-32"])
def test_towers_that_are_no_plain_vit(name: str) -> None:
    with pytest.raises(UsageError, match="plain vision and text transformers"):
        clip_config(name)


def test_the_published_setting() -> None:
    config = default_config(clip_config("ViT-L-14-336", "openai"))
    assert (config.image_size, config.feature_layers) == (518, (1, 6, 12, 18, 24))
    assert config.clip.model["quick_gelu"]
    assert default_config(clip_config("ViT-B-16")).feature_layers == (1, 3, 6, 9, 12)


@pytest.mark.parametrize(
    ("size", "layers"),
    [(500, None), (7, None), (518, (0, 3)), (518, (3, 2)), (518, (1, 25)), (518, tuple(range(1, 8)))],
)
def test_settings_that_cannot_be(size: int, layers: tuple[int, ...] | None) -> None:
    with pytest.raises(UsageError, match=r"input's side|feature layers are"):
        default_config(clip_config("ViT-L-14-336"), size, layers)
