"""What `auto` takes where what is there does not work."""

from __future__ import annotations

import logging
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from fbclip.assets import EMBEDDED
from fbclip.bundle import Bundle
from fbclip.engines import Engine, EngineOptions, Platform
from fbclip.errors import BundleError, DeviceError
from fbclip.runtime import backends
from fbclip.runtime.backends import candidates, make_backend

HERE = Platform("Orin", "8.7", "10.3.0")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """With a plan, on a machine whose driver seems to work."""
    path = shutil.copytree(EMBEDDED, tmp_path / "b.fbclip")
    (path / "engines").mkdir()
    (path / "engines/other.plan").write_bytes(b"plan")
    monkeypatch.setattr(backends, "driver_fault", lambda: None)
    return Bundle.load(path)


def write_engine(bundle: Bundle, name: str, platform: Platform = HERE) -> Path:
    plan = bundle.engines / f"{name}.plan"
    plan.write_bytes(name.encode())
    digest = sha256(name.encode()).hexdigest()
    engine = Engine(platform, "fp32", EngineOptions(), bundle.graph_sha256("fp32"), digest)
    plan.with_suffix(".json").write_text(engine.to_json())
    return plan


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import sys; sys.exit(7)", "SystemExit"),
        ("x = 1", "ILogger"),
    ],
)
def test_a_broken_package_is_told_and_passed_over(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    content: str,
    told: str,
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/tensorrt.py").write_text(f"print('from the vendor')\n{content}\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with caplog.at_level(logging.INFO, "fbclip"):
        backend, _ = make_backend(bundle)
    assert backend.device == "cpu"
    assert "tensorrt is not used" in caplog.text and told in caplog.text
    assert capsys.readouterr().out == ""
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(DeviceError, match=told):
        make_backend(bundle, "tensorrt")


def test_a_folder_of_engines_that_leads_out_is_told(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.move(bundle.engines, tmp_path / "elsewhere")
    (bundle.path / "engines").symlink_to(tmp_path / "elsewhere")
    assert candidates(bundle)[-1] == "cpu"
    assert "engines are not used" in caplog.text
    assert make_backend(bundle)[0].device == "cpu"


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"later": 1}'])
def test_a_sidecar_that_says_nothing_is_no_reason_to_refuse_another(bundle: Bundle, content: str) -> None:
    fits = write_engine(bundle, "fits")
    (bundle.engines / "another.json").write_text(content)
    assert bundle.engine("fp32", HERE)[0] == fits
    fits.with_suffix(".json").unlink()
    with pytest.raises(BundleError, match=r"another.json is no sidecar"):
        bundle.engine("fp32", HERE)
