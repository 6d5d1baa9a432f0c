from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RELEASES, Run, standins
from rich.console import Console

from fbclip.bundle import Bundle
from fbclip.engines import Engine, EngineOptions, Platform, RtxEngine, RtxPlatform
from fbclip.export.engine import build_engine
from fbclip.runtime.doctor.checks import Check
from fbclip.runtime.doctor.examine import _cameras, check_bundle, check_machine, check_python, check_video, examine
from fbclip.runtime.doctor.gpu import _driver, _power, _rtx, check_nvidia, check_onnxruntime
from fbclip.runtime.host import Machine
from helpers.made_up_memory import write_memory


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def report(fbclip: Run, *arguments: object, code: int = 0) -> dict[str, dict[str, str]]:
    """The checks of `fbclip doctor --json -` by name; the table goes to standard error."""
    done = fbclip("doctor", "--json", "-", *arguments, code=code)
    values = json.loads(done.stdout)
    assert values["works"] == (code == 0)
    for check in values["checks"]:
        assert check["found"]
        if check["status"] in ("missing", "broken"):
            assert check["cure"], check
            assert check["cure"] in done.stderr
    assert ("inference works" in done.stderr) == values["works"]
    return {check["name"]: check for check in values["checks"]}


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, program: str) -> None:
    """Lay a package before the real one for every Python that is started from here."""
    package = folder / "fakes" / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(program)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *([before] if before else [])]))
    monkeypatch.syspath_prepend(package.parent)


def test_this_machine(fbclip: Run, tmp_path: Path) -> None:
    assert "inference works" in fbclip("doctor", "--json", "out/report.json").stdout
    values = json.loads((tmp_path / "out/report.json").read_text())
    checks = {check["name"]: check for check in values["checks"]}
    for name in ("Python", "NumPy", "Pillow", "CPU provider", "bundle", "precisions", "inference", "OpenCV"):
        assert checks[name]["status"] == "ok", checks[name]
    assert "measured" in checks["memory"]["found"]
    assert values["works"]


def test_doctor_starts_without_any_library_of_the_runtime() -> None:
    program = """
import sys
for name in ("torch", "numpy", "cv2", "PIL", "psutil", "onnxruntime", "onnx", "tensorrt", "pycuda"):
    sys.modules[name] = None
import fbclip.runtime.doctor.examine
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("module", "program", "name", "found", "cure"),
    [
        (
            "tensorrt",
            "raise OSError('libnvinfer.so.10: cannot open shared object file')",
            "TensorRT",
            "libnvinfer.so.10",
            "tensorrt",
        ),
        ("tensorrt", "import os; os.abort()", "TensorRT", "crashed with signal 6", "tensorrt"),
        ("pycuda", "raise ImportError('libcuda.so.1: no such file')", "PyCUDA", "libcuda.so.1", "pycuda"),
        ("pycuda", "import sys; sys.exit('no CUDA')", "PyCUDA", "SystemExit: no CUDA", "pycuda"),
        (
            "cv2",
            "print('noise'); raise ImportError('numpy.core.multiarray failed to import')",
            "OpenCV",
            "multiarray",
            "'numpy<2'",
        ),
    ],
)
def test_broken_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, program: str, name: str, found: str, cure: str
) -> None:
    fake_package(tmp_path, monkeypatch, module, program)
    look = check_video if module == "cv2" else check_nvidia
    check = by_name(look(Machine()))[name]
    assert check.status == "broken"
    assert found in check.found
    assert cure in check.cure


def test_broken_libraries_do_not_stop_the_command(fbclip: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(tmp_path, monkeypatch, "tensorrt", "raise OSError('libnvinfer.so.10 [/not markup]')")
    assert report(fbclip)["TensorRT"]["status"] == "broken"


def test_without_a_working_onnxruntime_inference_does_not_work(
    fbclip: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_package(tmp_path, monkeypatch, "onnxruntime", "raise ImportError('DLL load failed')")
    checks = report(fbclip, code=1)
    assert checks["ONNX Runtime"]["status"] == "broken"
    assert checks["ONNX Runtime"]["cure"] == "pip install --force-reinstall onnxruntime"
    assert checks["inference"]["status"] == "broken"
    assert "estimated" in checks["memory"]["found"]


FALLING_BACK = """
__version__ = "1.0"
class SessionOptions: pass
def set_default_logger_severity(severity): pass
class InferenceSession:
    def __init__(self, graph, options, providers): pass
    def get_providers(self): return ["CPUExecutionProvider"]
def get_available_providers(): return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
"""


def test_a_provider_that_falls_back_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(tmp_path, monkeypatch, "onnxruntime", FALLING_BACK)
    machine = jetson(tmp_path)
    checks = by_name(check_onnxruntime(machine))
    assert checks["CPU provider"].status == "ok"
    for name in ("CUDA provider", "TensorRT provider"):
        assert checks[name].status == "broken"
        assert "fell back to CPUExecutionProvider" in checks[name].found
        assert "jetson-ai-lab" in checks[name].cure
    write(
        machine.root, "etc/nv_tegra_release", "# R38 (release), REVISION: 4.0, GCID: 1, BOARD: generic, EABI: aarch64"
    )
    assert "docs/guides/jetson.md" in by_name(check_onnxruntime(machine))["CUDA provider"].cure


def test_a_damaged_bundle(fbclip: Run, tmp_path: Path) -> None:
    path = shutil.copytree(Bundle.load().path, tmp_path / "copy.fbclip")
    with (path / "model.onnx").open("ab") as graph:
        graph.write(b"x")
    checks = report(fbclip, "--bundle", path, code=1)
    assert "is damaged" in checks["bundle"]["found"]
    assert "is damaged" in checks["inference"]["found"]
    shutil.copy(Bundle.load().path / "model.onnx", path)
    (path / "parity.json").write_text("{}")  # which inference doesn't need
    checks = report(fbclip, "--bundle", path, code=1)
    assert "parity.json is damaged" in checks["bundle"]["found"]
    assert checks["inference"]["status"] == "ok"
    (line,) = fbclip("doctor", "--quiet", "--bundle", path, code=1).stdout.splitlines()
    assert "the bundle can't be used" in line and "parity.json is damaged" in line
    shutil.copy(Bundle.load().path / "parity.json", path)
    (path / "memory.npz").write_bytes(b"no archive")
    (line,) = fbclip("doctor", "--quiet", "--bundle", path, code=1).stdout.splitlines()
    assert "inference does not work" in line and "memory.npz is no memory of this model" in line
    (path / "manifest.json").write_bytes(b"\xff")
    for broken in (path, tmp_path / "nowhere"):
        assert by_name(check_bundle(Machine(), broken))["bundle"].status == "broken"


def test_plans(tmp_path: Path) -> None:
    path = shutil.copytree(Bundle.load().path, tmp_path / "copy.fbclip")
    platform = Platform("Orin", "8.7", "10.3.0")
    engine = Engine(platform, "fp32", EngineOptions(), Bundle.load().graph_sha256("fp32"), "0" * 64)
    write(path, "engines/orin-trt10.3.0-fp32.plan", "")
    write(path, "engines/orin-trt10.3.0-fp32.json", engine.to_json())
    write(path, "engines/other-trt10.3.0-fp32.plan", "")
    rtx = RtxEngine(RtxPlatform("1.7.1.116", ("8.9",)), "fp32", EngineOptions(), "0" * 64, "0" * 64)
    write(path, "engines/rtx/1.7.1.116-fp32.plan", "")
    write(path, "engines/rtx/1.7.1.116-fp32.json", rtx.to_json())
    write(path, "engines/rtx/1.6-fp16.plan", "")
    checks = by_name(check_bundle(Machine(), path))
    assert "is no sidecar" in checks["other-trt10.3.0-fp32.plan"].found
    assert "fbclip export --engine" in checks["other-trt10.3.0-fp32.plan"].cure
    assert checks["orin-trt10.3.0-fp32.plan"].status == "info"
    assert str(platform) in checks["orin-trt10.3.0-fp32.plan"].found
    assert "compute capability 8.9" in checks["1.7.1.116-fp32.plan"].found
    assert "fbclip export --rtx" in checks["1.6-fp16.plan"].cure


@pytest.mark.parametrize(
    ("program", "status"), [("raise OSError('libnvinfer.so.10')", "info"), ("import os; os.abort()", "broken")]
)
def test_a_broken_tensorrt_beside_a_plan_leaves_inference_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, status: str
) -> None:
    path = shutil.copytree(Bundle.load().path, tmp_path / "copy.fbclip")
    write(path, "engines/orin-trt10.3.0-fp32.plan", "")
    engine = Engine(Platform("Orin", "8.7", "10.3.0"), "fp32", EngineOptions(), "", "")
    write(path, "engines/orin-trt10.3.0-fp32.json", engine.to_json())
    fake_package(tmp_path, monkeypatch, "pycuda", "")
    write(tmp_path, "fakes/pycuda/driver.py", "")
    fake_package(tmp_path, monkeypatch, "tensorrt", program)
    checks = by_name(check_bundle(Machine(), path))
    assert checks["inference"].status == "ok"
    assert checks["orin-trt10.3.0-fp32.plan" if status == "info" else "engines"].status == status


@pytest.mark.parametrize(
    ("variable", "launches"),
    [
        ("STANDIN_UNUSED", "CUDA graph"),
        ("STANDIN_NO_CUDA_BINDINGS", "enqueue (cuda-bindings is not installed)"),
        ("STANDIN_NO_CAPTURE", "enqueue (cuStreamBeginCapture: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)"),
    ],
)
def test_a_plan_that_fits_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, launches: str) -> None:
    bundle = Bundle.load(shutil.copytree(Bundle.load().path, tmp_path / "copy.fbclip"))
    monkeypatch.setenv(variable, "1")
    with standins(RELEASES[-1], monkeypatch):
        plan = build_engine(bundle, "fp32", EngineOptions(), Console(quiet=True))
        check = by_name(check_bundle(Machine(), bundle.path))[plan.name]
    assert check.status == "ok"
    assert "as here; tensorrt, fp32: a sample image scores" in check.found
    assert check.found.endswith(f"; launches: {launches}")


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def command(folder: Path, name: str, program: str) -> None:
    write(folder, name, f"#!/bin/sh\n{program}\n")
    (folder / name).chmod(0o755)


def jetson(folder: Path) -> Machine:
    root = folder / "jetson"
    write(
        root, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    )
    write(root, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    write_memory(root, 7_800_000, 3_000_000)
    for end, cpu in (("min", "729600"), ("max", "1510400")):
        write(root, f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{end}_freq", cpu)
        write(root, f"sys/class/devfreq/17000000.gpu/{end}_freq", "1020000000")
    command(root, "bin/nvpmodel", "echo 'NV Power Mode: 15W'; echo 0")
    return Machine(root, f"{root / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_a_jetson(tmp_path: Path) -> None:
    machine = jetson(tmp_path)
    checks = by_name(check_nvidia(machine))
    assert checks["Jetson"].found == "NVIDIA Jetson Orin Nano Developer Kit; L4T R36 (release), REVISION: 4.3"
    assert checks["power mode"].found == "15W (ID 0)"
    assert "nvpmodel -p" in checks["power mode"].cure
    assert "jetson_clocks" in checks["clocks"].cure
    assert checks["TensorRT"].status == "missing"
    assert "python3-libnvinfer" in checks["TensorRT"].cure
    assert "--system-site-packages" in checks["TensorRT"].cure
    assert "install the CUDA toolkit" in checks["PyCUDA"].cure
    write(machine.root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq", "1510400")
    write(machine.root, "usr/local/cuda/bin/nvcc", "")
    checks = by_name(check_nvidia(machine))
    assert checks["clocks"].status == "ok"
    assert checks["PyCUDA"].cure.startswith("PATH=/usr/local/cuda/bin:$PATH pip install")
    assert "mkswap" in by_name(check_machine(machine))["memory"].cure
    assert "python3-opencv" in by_name(check_video(machine))["GSTREAMER"].cure


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("echo 'NVPM ERROR: no permission' >&2; exit 1", "no permission"),
        ("echo nonsense", "says nonsense"),
        ("exec sleep 60", "did not answer within 0.2 s"),
    ],
)
def test_a_strange_nvpmodel(tmp_path: Path, program: str, found: str) -> None:
    machine = jetson(tmp_path)
    command(machine.root, "bin/nvpmodel", program)
    check = by_name(_power(Machine(machine.root, machine.path, patience=0.2 if "sleep" in program else 120)))[
        "power mode"
    ]
    assert check.status == "broken"
    assert found in check.found


def test_a_gpu_in_a_pc(tmp_path: Path) -> None:
    write(tmp_path, "sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    write(tmp_path, "sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    machine = Machine(tmp_path, str(tmp_path / "bin"))
    checks = by_name(check_nvidia(machine))
    assert checks["driver"].status == "missing"
    assert checks["TensorRT"].status == "missing"  # no fault where there is no GPU, a lack where there is one
    write(tmp_path, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n")
    checks = by_name(check_nvidia(machine))
    assert checks["driver"].status == "broken"
    assert "no nvidia-smi on PATH" in checks["driver"].found
    command(tmp_path, "bin/nvidia-smi", "echo 'NVIDIA RTX A2000, 550.54.15, 6138 MiB, 8.6'")
    checks = by_name(check_nvidia(machine))
    assert (checks["driver"].status, checks["driver"].found) == ("ok", "550.54.15")
    assert checks["GPU"].found.startswith("NVIDIA RTX A2000")
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder@)\n"
    write(tmp_path, "proc/driver/nvidia/version", opened)
    assert by_name(_driver(machine))["driver"].found == "580.159.04"


def test_tensorrt_rtx_says_whether_it_builds_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real builder, which needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    machine = Machine(tmp_path, str(tmp_path / "bin"))
    check = _rtx(machine)
    assert check.status == "ok"
    assert "builder starts, for compute capability 8.0" in check.found
    assert check.found.endswith("engines can be built here")
    for capability, status in (("8.9", "ok"), ("9.0", "info")):
        command(tmp_path, "bin/nvidia-smi", f"echo {capability}")
        check = _rtx(machine)
        assert check.status == status
        assert f"this GPU has {capability}" in check.found
    fake_package(tmp_path, monkeypatch, "tensorrt_rtx", "raise OSError('libtensorrt_rtx.so: cannot open')")
    assert _rtx(machine).status == "broken"


def test_cuda_libraries_that_are_not_found_have_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, monkeypatch, "onnxruntime", FALLING_BACK)
    write(tmp_path, "fakes/onnxruntime/capi/__init__.py", "")
    write(tmp_path, "fakes/onnxruntime/capi/build_and_package_info.py", "cuda_version = '99.0'")  # nobody has it
    check = by_name(check_onnxruntime(Machine(tmp_path)))["CUDA libraries"]
    assert check.status == "info"
    assert "libcublasLt.so.99" in check.found
    assert check.cure == "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    provider = by_name(check_onnxruntime(jetson(tmp_path)))
    assert provider["CUDA libraries"].status == "missing"
    assert "libonnxruntime_providers_cuda.so" in provider["CUDA provider"].found


def test_what_auto_takes_and_what_it_does_not(fbclip: Run, tmp_path: Path) -> None:
    path = shutil.copytree(Bundle.load().path, tmp_path / "copy.fbclip")
    assert by_name(check_bundle(Machine(), path))["device auto"].found == "takes cpu"
    write(path, "engines/orin-trt10.3.0-fp32.plan", "")
    check = by_name(check_bundle(Machine(), path))["device auto"]
    assert check.status == "info"
    assert check.found.startswith("takes cpu; tensorrt is not used: ")


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """pytest's own folders are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_cameras(readable_by_all: Path) -> None:
    root = readable_by_all
    assert by_name(check_video(Machine(root)))["cameras"].found == "none: no /dev/video*"
    for number, mode in ((0, 0o666), (2, 0o666), (10, 0o600)):
        write(root, f"dev/video{number}", "")
        (root / f"dev/video{number}").chmod(mode)
        write(root, f"sys/class/video4linux/video{number}/name", "UVC Camera\n")
        write(root, f"sys/class/video4linux/video{number}/index", "1\n" if number == 2 else "0\n")
    if os.geteuid():
        pytest.skip("takes root to become another user")
    try:
        os.seteuid(65534)
        checks = {check.name: check for check in _cameras(Machine(root))}
    finally:
        os.seteuid(0)
    assert list(checks) == ["/dev/video0", "/dev/video2", "/dev/video10"]
    assert (checks["/dev/video0"].status, checks["/dev/video0"].found) == ("ok", "UVC Camera")
    assert "metadata" in checks["/dev/video2"].found
    assert checks["/dev/video10"].status == "broken"
    assert "usermod -aG video" in checks["/dev/video10"].cure


def test_an_empty_root_and_no_commands(tmp_path: Path) -> None:
    checks = examine(None, Machine(tmp_path, str(tmp_path)))
    assert not [check for check in checks if check.status == "broken"]
    assert by_name(check_python(Machine(tmp_path, "")))["Python"].status in ("ok", "info")
