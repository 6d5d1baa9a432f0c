"""deploy/: what the images are built from, compose.yaml by Compose's own schema, queries by metrics that are served."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyOptions
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from prometheus_client.parser import text_string_to_metric_families

import fbclip
from fbclip.assets import SAMPLES
from helpers.serving import TOKEN, command
from helpers.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
MADE_UP = {"FBCLIP_TOKEN": TOKEN, "FBCLIP_PICTURES": "./pictures", "GRAFANA_PASSWORD": "unknown"}


def steps(path: Path) -> list[tuple[str, str]]:
    with path.open("rb") as file:
        structure = DockerfileParser(fileobj=file, env_replace=False).structure
    return [(step["instruction"], step["value"]) for step in structure]


def compose() -> str:
    """compose.yaml with its variables filled in."""
    text = (DEPLOY / "compose.yaml").read_text()
    return re.sub(r"(?<!\$)\$\{(\w+):\?[^}]+\}", lambda match: MADE_UP[match[1]], text)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_is_in_its_context(path: Path) -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    context = exclude_paths(str(ROOT), [line for line in patterns if line and line[0] != "#"])
    copied = [value.split()[:-1] for name, value in steps(path) if name == "COPY" and "--from" not in value]
    sources = [source for group in copied for source in group]
    assert {"fbclip", "export", "runtime", "cli.py"} <= {*sources}
    assert not [source for source in sources if source not in context]
    assert not [name for name in context if name.startswith(("tests", "docs", ".git", "runs")) or "__pycache__" in name]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_in_particular_and_says_how_it_is(path: Path) -> None:
    done = dict(steps(path))  # the last of each kind counts
    assert done["USER"] == "fbclip"
    assert "/opt/healthcheck.py" in done["HEALTHCHECK"]
    assert json.loads(done["ENTRYPOINT"]) == ["fbclip"]
    assert f"-t fbclip:{fbclip.__version__}-{path.suffix[1:]} " in path.read_text()
    base = next(value for name, value in steps(path) if name == "ARG")
    assert re.search(r":\D*\d+\.\d", base), "a base is pinned by its release"


@pytest.mark.parametrize("name", ["cpu", "cuda", "build"])
def test_what_images_install_is_the_tested_set(name: str) -> None:
    text = (DEPLOY / "requirements" / f"{name}.txt").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M))
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "<" not in line]
    tested = dict(re.findall(r"^([\w.-]+)==([\w.]+)", "\n".join(lines), re.M))
    assert {package: tested[package] for package in locked if package in tested}
    assert not [
        (package, tested[package]) for package in locked if locked[package] != tested.get(package, locked[package])
    ]
    assert text.count("--hash=sha256:") >= len(locked)


def test_compose_is_as_its_schema_says() -> None:
    options = PyOptions()
    options.apply_merge = True
    made = options.from_yaml(compose())
    made.validate()
    assert made.service_names() == ["fbclip", "mosquitto", "prometheus", "grafana"]
    with pytest.raises(ValueError, match="read_onyl"):
        options.from_yaml(compose().replace("    user:", "    read_onyl: true\n    user:"))


def test_services_are_hardened_pinned_and_of_this_machine() -> None:
    made = yaml.safe_load(compose())
    for name, service in made["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service.get("volumes", []):
            if (source := volume.split(":")[0]).startswith("./") and source != MADE_UP["FBCLIP_PICTURES"]:
                assert (DEPLOY / source).exists(), volume
                assert volume.endswith(":ro")
            else:
                assert source == MADE_UP["FBCLIP_PICTURES"] or source in made["volumes"]
    assert made["services"]["fbclip"]["image"] == f"fbclip:{fbclip.__version__}-cpu"
    assert {secret["environment"] for secret in made["secrets"].values()} <= {*MADE_UP}
    example = (DEPLOY / ".env.example").read_text()
    assert [*MADE_UP] == sorted(re.findall(r"^(\w+)=", example, re.M), key=[*MADE_UP].index)
    assert not re.search(r"(TOKEN|PASSWORD)=.", example), "no secret is kept here"


def test_the_command_of_the_line_starts(tmp_path: Path) -> None:
    """`serve --config line.toml`, its paths moved here and its broker, which is another container, left out."""
    text = (DEPLOY / "line.toml").read_text()
    moved = text.replace('"/pictures"', '"pictures"').replace('"/data/', '"').replace('mqtt = "mqtt://mosquitto/', "# ")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    moved = moved.replace("0.0.0.0:9464", f"127.0.0.1:{port}")
    assert (text.count('"/'), moved.count('"/'), moved.count("mqtt")) == (3, 0, 0)
    (tmp_path / "line.toml").write_text(moved)
    (tmp_path / "pictures").mkdir()
    shutil.copy(SAMPLES / "casting-pit.jpg", tmp_path / "pictures")
    with command(tmp_path, "--config", "line.toml", token=TOKEN) as server:
        assert server.json("/healthz") == {"status": "ok"}
        own = f"http://127.0.0.1:{port}/metrics"
        eventually(lambda: b"fbclip_results_total 1" in urllib.request.urlopen(own).read())
        line = ["python3", DEPLOY / "healthcheck.py"]
        ask = {"FBCLIP_SERVE_PORT": str(server.port), "PATH": "/usr/bin:/bin"}
        assert subprocess.run(line, env=ask).returncode == 0
        deaf = subprocess.run(line, env={**ask, "FBCLIP_SERVE_PORT": "9"}, capture_output=True)
        assert deaf.returncode == 1


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names that a server on a watched folder serves, after its first picture."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "in").mkdir()
    with command(folder, "in", "--watch") as server:
        shutil.copy(SAMPLES / "casting-pit.jpg", folder / "in")
        eventually(lambda: b"fbclip_results_total 1" in server.ask("/metrics")[1])
        families = list(text_string_to_metric_families(server.ask("/metrics")[1].decode()))
    return {family.name for family in families} | {sample.name for family in families for sample in family.samples}


def named(expression: str) -> set[str]:
    return {*re.findall(r"\b(?:fbclip|process)_\w+", expression)}


def expressions() -> dict[str, str]:
    """Every query of the dashboard and of the alerts, by what it is for."""
    board: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "fbclip.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }
    found |= {variable["name"]: variable["query"]["query"] for variable in board["templating"]["list"]}
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    return found | {rule["alert"]: rule["expr"] for group in alerts["groups"] for rule in group["rules"]}


def test_queries_name_metrics_that_are_served(metrics: set[str]) -> None:
    unknown = {use: missing for use, query in expressions().items() if (missing := named(query) - metrics)}
    assert not unknown
    assert all(named(query) or query.startswith("up{") for query in expressions().values())


def test_the_dashboard_finds_its_source() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "fbclip.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"] for source in sources}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len({*ids})
    folder = yaml.safe_load((provisioning / "dashboards" / "fbclip.yaml").read_text())["providers"][0]["options"][
        "path"
    ]
    mounted = yaml.safe_load(compose())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{folder}:ro" in mounted


def test_prometheus_reads_its_configuration() -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool, of Debian's package prometheus, is not here")
    configuration = DEPLOY / "prometheus" / "prometheus.yml"
    done = subprocess.run([promtool, "check", "config", configuration], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
