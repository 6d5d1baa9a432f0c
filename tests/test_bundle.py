"""Bundles that are damaged, altered or made up: one line, never a traceback, and nothing outside is read."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st

from fbclip.assets import EMBEDDED
from fbclip.bundle import VARIANTS, Bundle, Manifest, save
from fbclip.errors import BundleError
from fbclip.files import sha256
from fbclip.runtime.backends import make_backend
from fbclip.untrusted import external_files, parse_array, parse_json

MANIFEST = json.loads((EMBEDDED / "manifest.json").read_text())
HASH = "0" * 64
DEEP = "[" * 200_000

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "part.fbclip"))


def rewrite(folder: Path, change: Change | None = None, **files: bytes) -> None:
    """Replace files of a bundle, and let its manifest say so."""
    values = copy.deepcopy(MANIFEST)
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content)
        values["files"][name] = sha256(folder / name)
    if change:
        change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def refusal(folder: Path) -> str:
    """What the bundle is refused with when it is loaded, or at the latest when its graph is started."""
    with pytest.raises(BundleError) as error:
        make_backend(Bundle.load(folder), "cpu")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


def put(**values: Any) -> Change:
    return lambda manifest: manifest.update(values)


IMPOSSIBLE = {
    "name": [5, "", "two\nlines", "x" * 501, None],
    "image_size": ["192", 0, -1, 200, 10**6, 192.0, True, None, 10**30],
    "grid": [0, 25, "24", 24.0],
    "feature_layers": [5, [], [0], [6, 6], [6, 5], ["6"], [True], list(range(1, 9)), {"0": 6}],
    "mean": [[0.5, 0.5], [0.5, 0.5, "0.5"], None],
    "std": [[0, 0.2, 0.2], [-0.2, 0.2, 0.2]],
    "prompts": [["a"], "ab", ["a", 5]],
    "blur_sigma": [-1, "4", None],
    "threshold": ["0.5", None, 1.5, -0.1, True, [0.5]],
    "precisions": [[1], [], ["fp64"], ["fp32", "fp32"], "fp32", ["fp16"], ["fp32", "int8"]],
    "opset": ["18", 0, 18.5],
    "frame_size": [[5], [5, 0], 5, [5, 10**6], [5, "5"]],
    "channel_order": ["xyz", "RGB", None, 1],
    "int8": ["dynamic", "other", 8],
    "score_kind": ["map", None],
    "files": [
        None,
        {},
        [],
        {"text.npy": 5},
        {"text.npy": "0" * 63},
        {"../x": HASH},
        {"a\x00b": HASH},
        {"/etc/x": HASH},
    ],
    "provenance": [None, [], "x"],
    "parity": [None, {"fp32": 5}, {"fp64": {}}],
    "format": [True, "4", 5, 0, -1, 3.0, None, [3]],
    "stranger": [1],
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_values_of_a_manifest(folder: Path, name: str) -> None:
    for value in IMPOSSIBLE[name]:
        rewrite(folder, put(**{name: value}))
        with pytest.raises(BundleError, match=rf"manifest\.json .*({name}|upgrade|export)") as error:
            Bundle.load(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_a_manifest_lacks_nothing(folder: Path, name: str) -> None:
    rewrite(folder, lambda values: values.pop(name))
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe{}",
        DEEP.encode(),
        b'{"a":' * 100_000,
        b"[]",
        b"5",
        b'"format"',
        b"null",
        b'{"format": 3}',
        json.dumps(MANIFEST).replace(str(MANIFEST["threshold"]), "NaN").encode(),
        json.dumps(MANIFEST).replace(str(MANIFEST["threshold"]), "-Infinity").encode(),
        json.dumps(MANIFEST).replace(str(MANIFEST["threshold"]), "1e999").encode(),
        json.dumps(MANIFEST).replace(str(MANIFEST["threshold"]), "9" * 5000).encode(),
        json.dumps(MANIFEST).replace('"threshold"', '"threshold": 0.999, "threshold"').encode(),
        json.dumps(MANIFEST).replace("fbclip-nano.safetensors", "\\ud800").encode(),
        json.dumps(MANIFEST).encode()[:-9],
        b" " * 2**20 + json.dumps(MANIFEST).encode(),
    ],
)
def test_texts_that_are_no_manifest(folder: Path, text: bytes) -> None:
    (folder / "manifest.json").write_bytes(text)
    assert "manifest.json" in refusal(folder)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["fp32", "rgb", HASH, "text.npy", "model.onnx", 192, 24, 0.5, [1, 2], {}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(data=st.data())
def test_mutated_manifests_are_read_or_refused_in_one_line(data: st.DataObject) -> None:
    values = copy.deepcopy(MANIFEST)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = values
        key = data.draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place[key] = data.draw(json_values)
    text = json.dumps(values).encode()
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.binary(max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
    try:
        manifest = Manifest.from_json(text, Path("manifest.json"))
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert 0 <= manifest.threshold <= 1
        assert manifest.channel_order in ("rgb", "bgr")
        assert {"text.npy", "model.onnx"} <= manifest.files.keys()


@given(text=st.text(max_size=40))
def test_json_is_read_as_python_reads_it_or_not_at_all(text: str) -> None:
    try:
        values = parse_json(text)
    except ValueError:
        return
    assert values == json.loads(text)


def test_older_formats_are_read(folder: Path) -> None:
    for version, missing in ((1, ("frame_size", "int8")), (2, ("int8",))):
        rewrite(folder, lambda values, v=version, m=missing: ([values.pop(n) for n in m], values.update(format=v))[0])
        assert Bundle.load(folder).manifest == Bundle.load().manifest


@pytest.mark.parametrize("place", ["link", "dangling", "loop", "folder", "pipe", "no folder", "long"])
def test_places_where_a_manifest_is_none(folder: Path, place: str) -> None:
    manifest = folder / "manifest.json"
    outside = Path(shutil.copy(manifest, folder.parent / "elsewhere.json"))
    manifest.unlink()
    match place:
        case "link":
            manifest.symlink_to(outside)
        case "dangling":
            manifest.symlink_to(folder / "nowhere")
        case "loop":
            manifest.symlink_to(manifest)
        case "folder":
            manifest.mkdir()
        case "pipe":
            os.mkfifo(manifest)
        case "no folder":
            folder = outside
        case "long":
            folder = folder / ("x" * 300)
    message = refusal(folder)
    assert str(folder) in message
    assert ("leads to" in message) == (place == "link")


def npy(values: Any, header: str | None = None) -> bytes:
    from io import BytesIO

    file = BytesIO()
    np.save(file, values)
    content = file.getvalue()
    if header is None:
        return content
    return content[:10] + header.encode().ljust(len(content[:128]) - 11) + b"\n" + content[128:]


TEXT = Bundle.load().text
NAN = np.full_like(TEXT, np.nan)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b"\x93NUMPY\x01\x00", "no header"),
        (npy(TEXT, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 10000000000000)}"), "bytes of values"),
        (npy(TEXT, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 100000000000000000000)}"), "bytes of values"),
        (npy(TEXT, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, -128)}"), "it holds"),
        (npy(TEXT, "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 256)}"), "it holds|float32"),
        (npy(TEXT, "{'descr': '|O', 'fortran_order': False, 'shape': (2, 64)}"), "it holds object"),
        (npy(TEXT, "{'descr': '<f4', 'shape': (2, 128"), "no header"),
        (npy(TEXT, "(" * 100), "no header"),
        (npy(TEXT, "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 128)}"), "float32"),
        (npy(TEXT.astype(np.float64)), "float32"),
        (npy(TEXT.astype(">f4")), "float32"),
        (npy(TEXT[:1]), "float32"),
        (npy(TEXT)[:-1], "bytes of values"),
        (npy(TEXT) + b"x", "bytes of values"),
        (npy(NAN), "have length 1"),
        (npy(NAN + np.inf), "have length 1"),
        (npy(2 * TEXT), "have length 1"),
        (npy(TEXT[:, :0]), "have length 1"),
        (npy(np.eye(2, 64, dtype=np.float32)), r"has .*text.*\[2, 128\]"),
        (npy(np.zeros((2, 200_000), np.float32)), "more than 1,048,576 bytes"),
        (npy(np.array([{}, {}], object)), "it holds object"),
    ],
)
def test_text_features_that_are_none(folder: Path, content: bytes, message: str) -> None:
    rewrite(folder, text__npy=content)
    with pytest.raises(BundleError, match=message) as error:
        make_backend(Bundle.load(folder), "cpu")
    assert "\n" not in str(error.value)


def test_an_archive_in_place_of_the_text_features(folder: Path) -> None:
    np.savez(folder / "other.npz", TEXT)
    rewrite(folder, text__npy=(folder / "other.npz").read_bytes())
    assert "no header of an .npy file" in refusal(folder)


@given(content=st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: npy(TEXT)[:128] + b))
def test_arrays_are_read_or_refused(content: bytes) -> None:
    for at in range(0, len(content), 7):
        try:
            array = parse_array(content[:at] + bytes([at % 251]) + content[at + 1 :])
        except ValueError:
            continue
        assert array.nbytes <= len(content)


def graph_with(change: Callable[[onnx.ModelProto], Any], name: str = "model.onnx") -> bytes:
    model = onnx.load(EMBEDDED / name, load_external_data=False)
    change(model)
    return bytes(model.SerializeToString())


def renamed_input(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["picture" if name == "image" else name for name in node.input]
    model.graph.input[0].name = "picture"


def renamed_output(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["points" if name == "score" else name for name in node.output]
    model.graph.output[0].name = "points"


def further_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info(model.graph.node[3].output[0], 1, None))


def without_weights(model: onnx.ModelProto) -> None:
    del model.graph.initializer[10:]


def other_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no graph of this bundle"),
        (b"no graph", "is no graph of this bundle|can't load"),
        ((EMBEDDED / "model.onnx").read_bytes()[:50_000], "is no graph of this bundle"),
        (b"\x08\x0a", "can't load"),
        (graph_with(renamed_input), "picture.*export the bundle again"),
        (graph_with(renamed_output), "points.*export the bundle again"),
        (graph_with(further_output), "export the bundle again"),
        (graph_with(without_weights), "can't load"),
        (graph_with(other_size), "export the bundle again|can't load"),
    ],
)
def test_graphs_that_are_none(folder: Path, content: bytes, message: str) -> None:
    (folder / VARIANTS["cpu", "fp32"]).unlink()
    rewrite(folder, lambda values: values["files"].pop(VARIANTS["cpu", "fp32"]), model__onnx=content)
    with pytest.raises(BundleError, match=message) as error:
        make_backend(Bundle.load(folder), "cpu")
    assert "\n" not in str(error.value)


def test_nothing_but_the_line_is_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime would tell on standard output that it tries again."""
    content = bytearray(graph_with(lambda model: None))
    at = content.rindex(b"Softmax")
    content[at] = 0xCE  # no UTF-8
    (folder / VARIANTS["cpu", "fp32"]).unlink()
    rewrite(folder, lambda values: values["files"].pop(VARIANTS["cpu", "fp32"]), model__onnx=bytes(content))
    assert "can't load" in refusal(folder)
    assert capfd.readouterr() == ("", "")


def test_a_manifest_of_another_size_than_the_graph(folder: Path) -> None:
    rewrite(folder, put(image_size=96))
    assert "takes images of (192, 192), the manifest says (96, 96)" in refusal(folder)


def with_weights_in(folder: Path, location: str) -> Path:
    """Let the bundle's graph have its weights in a file of that name, whose hash the manifest has."""
    model = onnx.load(EMBEDDED / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / VARIANTS["cpu", "fp32"]).unlink()
    weights = (folder / "weights.bin").read_bytes()
    rewrite(
        folder,
        lambda values: values["files"].pop(VARIANTS["cpu", "fp32"]),
        model__onnx=model.SerializeToString(),
        weights__bin=weights,
    )
    return folder / "weights.bin"


def test_weights_in_a_file_of_any_name_are_checked(folder: Path) -> None:
    weights = with_weights_in(folder, "weights.bin")
    bundle = Bundle.load(folder)
    images = np.zeros((1, 192, 192, 3), np.uint8)
    assert make_backend(bundle, "cpu")[0].run(images)[0] == pytest.approx(
        make_backend(Bundle.load(), "cpu")[0].run(images)[0], abs=1e-5
    )
    before = bundle.model_sha256("fp32")
    weights.write_bytes(b"x" * 4000 + weights.read_bytes()[4000:])
    assert "weights.bin is damaged" in refusal(folder)
    values = json.loads((folder / "manifest.json").read_text())
    values["files"]["weights.bin"] = sha256(weights)
    (folder / "manifest.json").write_text(json.dumps(values))
    assert Bundle.load(folder).model_sha256("fp32") != before  # so that a calibration is of other weights


@pytest.mark.parametrize(
    "location", ["unlisted.bin", "../elsewhere.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "", "./weights.bin"]
)
def test_weights_that_the_manifest_does_not_list(folder: Path, location: str) -> None:
    weights = with_weights_in(folder, location)
    shutil.copy(weights, folder / "unlisted.bin")
    shutil.copy(weights, folder.parent / "elsewhere.bin")
    assert "isn't in the manifest" in refusal(folder)


def test_weights_through_a_link_out_of_the_bundle(folder: Path) -> None:
    weights = with_weights_in(folder, "weights.bin")
    weights.rename(folder.parent / "elsewhere.bin")
    weights.symlink_to(folder.parent / "elsewhere.bin")
    assert "stay inside it" in refusal(folder)


def tensor_in(place: str) -> onnx.ModelProto:
    """A model with one tensor whose values are in a file, in an unusual place."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value="far.bin")
    model = onnx.ModelProto(ir_version=8)
    node = model.graph.node.add(op_type="Constant", output=["w"])
    match place:
        case "constant":
            node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        case "list of constants":
            node.attribute.add(name="value", type=onnx.AttributeProto.TENSORS).tensors.add().CopyFrom(tensor)
        case "branch":
            node.attribute.add(name="then", type=onnx.AttributeProto.GRAPH).g.initializer.add().CopyFrom(tensor)
        case "sparse":
            model.graph.sparse_initializer.add().values.CopyFrom(tensor)
        case "function":
            inner = model.functions.add(name="f").node.add(op_type="Constant", output=["w"])
            inner.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        case "training":
            model.training_info.add().algorithm.initializer.add().CopyFrom(tensor)
        case "large":
            model.graph.initializer.add(name="v", data_type=1, dims=[5000], raw_data=bytes(20_000))
            model.graph.initializer.add().CopyFrom(tensor)
    return model


@pytest.mark.parametrize(
    "place", ["constant", "list of constants", "branch", "sparse", "function", "training", "large"]
)
def test_every_place_where_a_graph_can_name_a_file(tmp_path: Path, place: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tensor_in(place).SerializeToString())
    assert external_files(path) == {"far.bin"}


@given(data=st.data())
def test_mutated_graphs_are_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(tensor_in("branch").SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.onnx"
    path.write_bytes(content)
    try:
        external_files(path)
    except ValueError as error:
        assert "\n" not in str(error)


def test_the_command_refuses_in_one_line(fbclip: Run, folder: Path) -> None:
    """Whatever comes of a bundle's files in the library, the installed command ends with 2 and one line."""
    (folder / "manifest.json").write_text(DEEP)
    for command in (["infer"], ["serve"], ["export", "--triton", "models"]):
        done = fbclip(*command, "--bundle", folder, code=2)
        assert done.stderr.count("\n") == 1, done.stderr
    assert fbclip("calibrate", folder, folder.parent, code=2).stderr.count("\n") == 1


REPLACED = """
import os, signal, sys
from pathlib import Path
from fbclip import bundle, files
embedded = bundle.Bundle.load()
point, path = sys.argv[1], Path(sys.argv[2])
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def write(folder):
    for name in embedded.manifest.files: (folder / name).write_bytes((embedded.path / name).read_bytes())
    if point == "writing": die()
    return embedded.manifest
if point.startswith("rename"):
    files._exchange = lambda one, other: False
    rename, left = Path.rename, [int(point[-1])]
    def counted(self, target):
        found = rename(self, target)
        left[0] -= 1
        if not left[0]: die()
        return found
    Path.rename = counted
if point == "exchanged":
    exchange = files._exchange
    files._exchange = lambda one, other: exchange(one, other) and die()
bundle.save(path, embedded.text, write)
"""


@pytest.mark.parametrize("point", ["writing", "exchanged", "rename 1", "rename 2", "none"])
def test_killed_while_it_is_replaced(folder: Path, point: str) -> None:
    """The old bundle or the new one is under the name, and the next one to be written sweeps up what was left."""
    rewrite(folder, put(threshold=0.25))
    done = subprocess.run([sys.executable, "-c", REPLACED, point, folder])
    assert done.returncode == (0 if point == "none" else -signal.SIGKILL)
    assert Bundle.load(folder).manifest.threshold == (
        0.25 if point in ("writing", "rename 1") else MANIFEST["threshold"]
    )
    make_backend(Bundle.load(folder), "cpu")
    for left in folder.parent.iterdir():
        os.utime(left, (1, 1))  # as if that had been a while ago
    subprocess.run([sys.executable, "-c", REPLACED, "none", folder], check=True)
    assert [path.name for path in folder.parent.iterdir()] == ["part.fbclip"]


def test_what_could_not_be_loaded_is_not_written(folder: Path) -> None:
    """The older bundle stays."""

    def write(new: Path) -> Manifest:
        for name in MANIFEST["files"].keys() - {"text.npy"}:
            shutil.copy(EMBEDDED / name, new)
        return Bundle.load().manifest

    with pytest.raises(BundleError, match="have length 1"):
        save(folder, 2 * TEXT, write)
    assert Bundle.load(folder).manifest == Bundle.load().manifest
    assert [path.name for path in folder.parent.iterdir()] == ["part.fbclip"]


def test_a_link_that_is_switched_never_mixes_two_bundles(tmp_path: Path) -> None:
    """A loaded bundle goes on with the files of the folder that the link led to."""
    for number in (1, 2):
        shutil.copytree(EMBEDDED, tmp_path / f"release-{number}" / "part.fbclip")
    new = tmp_path / "release-2" / "part.fbclip"
    (new / "text.npy").write_bytes(b"of another export")
    (tmp_path / "now").symlink_to("release-1")
    bundle = Bundle.load(tmp_path / "now" / "part.fbclip")
    (tmp_path / "later").symlink_to("release-2")
    (tmp_path / "later").rename(tmp_path / "now")
    old = tmp_path / "release-1" / "part.fbclip"
    assert bundle.path == old.resolve()
    assert bundle.graph("fp32").parent == bundle.calibration.parent == bundle.memory_file.parent == old.resolve()
    with pytest.raises(BundleError, match=r"release-2.*text\.npy is damaged"):
        Bundle.load(tmp_path / "now" / "part.fbclip")
    assert bundle.sha256 == sha256(old / "manifest.json")
