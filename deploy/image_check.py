"""Execute the steps of deploy/Dockerfile.cpu without Docker: in fresh Debian roots, as root, with debootstrap.

    MIRROR=http://deb.debian.org/debian SUITE=trixie python deploy/image_check.py

The base image is replaced by `debootstrap --variant=minbase`; all else is read from the Dockerfile. The server is then
started as the image's user, its root read-only, and asked with the image's own health check. pip's variables (PIP_…,
SSL_CERT_FILE) and proxies are handed on; BIND names files or folders, joined by colons, that steps may read, such as a
certificate. `--keep` leaves the roots where they are.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile.cpu"
HANDED_ON = re.compile(r"PIP_\w+|SSL_CERT_FILE|(https?|no)_proxy", re.I)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOKEN = "a-token-for-this-check"


@dataclass
class Stage:
    """A root that is being built, and what its next step runs with."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "root"
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def run(self, words: list[str], extra: dict[str, str], frozen: bool = False) -> subprocess.Popen[bytes]:
        """Start a program in the root, which is read-only but for /tmp and /data if it is `frozen`."""
        mounts = ["mount --bind /dev dev", "mount -t proc proc proc", "mount -t tmpfs tmpfs tmp"]
        for number, path in enumerate(filter(None, os.environ.get("BIND", "").split(":"))):
            inside = shlex.quote(path.lstrip("/"))
            make = f"mkdir -p {inside}" if Path(path).is_dir() else f"install -D /dev/null {inside}"
            mounts += [] if frozen else [f"{make} # {number}", f"mount --bind {shlex.quote(path)} {inside}"]
        if frozen:
            mounts = ["mount --bind . .", f"cd {shlex.quote(str(self.root))}", "mount -o remount,bind,ro .", *mounts]
            mounts += ["mount -t tmpfs -o mode=755,uid=10001,gid=10001 tmpfs data"]
        chroot = ["chroot", f"--userspec={self.user}", ".", "env", "-i", *_pairs(self.environment | extra)]
        inner = shlex.join([*chroot, "sh", "-c", f'cd {shlex.quote(self.folder)} && exec "$@"', "sh", *words])
        script = "\n".join(["set -e", *mounts, f"exec {inner}"])
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return subprocess.Popen([*namespaces, "sh", "-c", script], cwd=self.root)


def _pairs(environment: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]


def fresh_root(place: Path) -> Path:
    """What stands for the base image: a minimal Debian, without the packages that it was made from."""
    mirror, suite = os.environ.get("MIRROR", "http://deb.debian.org/debian"), os.environ.get("SUITE", "trixie")
    subprocess.run(["debootstrap", "--variant=minbase", suite, place, mirror], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["chroot", place, "apt-get", "clean"], check=True)
    shutil.rmtree(place / "var" / "lib" / "apt" / "lists")
    shutil.copy("/etc/resolv.conf", place / "etc" / "resolv.conf")
    return place


def build(base: Path, work: Path) -> Stage:
    """The last stage of the Dockerfile, all its steps done."""
    handed_on = {name: value for name, value in os.environ.items() if HANDED_ON.fullmatch(name)}
    stages: dict[str, Stage] = {}
    stage = Stage(base)
    with DOCKERFILE.open("rb") as file:
        steps = DockerfileParser(fileobj=file, env_replace=False).structure
    for step in steps:
        name, value = step["instruction"], step["value"]
        if name in ("COMMENT", "ARG", "EXPOSE"):
            continue
        print(f"{name} {value}"[:150], flush=True)
        if name == "FROM":
            words = value.split()
            stage = Stage(work / f"stage{len(stages)}")
            subprocess.run(["cp", "-a", base, stage.root], check=True)
            stages[words[2] if "AS" in words else "last"] = stage
        elif name == "RUN":
            if code := stage.run(["/bin/sh", "-c", value], handed_on).wait():
                sys.exit(f"the step ended with exit code {code}")
        elif name == "COPY":
            copy(value, stage, stages)
        else:
            configure(stage, name, value)
    return stage


def configure(stage: Stage, name: str, value: str) -> None:
    """A step that sets what later ones, and the container, run with."""
    if name == "ENV":
        stage.environment |= dict(pair.split("=", 1) for pair in shlex.split(value))
    elif name == "USER":
        stage.user = f"{value}:{value}"
    elif name == "WORKDIR":
        stage.folder = value
        (stage.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "ENTRYPOINT":
        stage.entrypoint = json.loads(value)
    elif name == "CMD":
        stage.command = json.loads(value)
    elif name == "HEALTHCHECK":
        stage.health = json.loads(value.split(" CMD ")[1])
    else:
        raise SystemExit(f"{DOCKERFILE.name} has a step that this script doesn't know: {name}")


def copy(value: str, stage: Stage, stages: dict[str, Stage]) -> None:
    """COPY [--from=STAGE] SOURCE... TARGET: from the build context, less what .dockerignore leaves out."""
    *sources, target = shlex.split(value)
    place = stage.root / os.path.normpath(os.path.join(stage.folder, target)).lstrip("/")  # noqa: PTH118
    if sources[0].startswith("--from="):
        origin, wanted = stages[sources.pop(0).removeprefix("--from=")].root, None
    else:
        origin, wanted = ROOT, context()
    for source in sources:
        path = origin / source.lstrip("/")
        if wanted is None:
            subprocess.run(["cp", "-a", path, place], check=True)
            continue
        files = [name for name in wanted if name == source or name.startswith(f"{source}/")]
        if not files:
            raise SystemExit(f".dockerignore leaves {source} out")
        for name in files:
            inner = Path(name).relative_to(source)
            copied = place / (inner if path.is_dir() else path.name) if path.is_dir() or target.endswith("/") else place
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copied, follow_symlinks=False)


def context() -> list[str]:
    """Files of the build context, as Docker's own client reads .dockerignore."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    names = sorted(exclude_paths(str(ROOT), patterns))
    return [name for name in names if (ROOT / name).is_symlink() or (ROOT / name).is_file()]


def serve(image: Stage) -> Iterator[str]:
    """Start the container's command, ask it, and yield what it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"FBCLIP_TOKEN": TOKEN, "FBCLIP_SERVE_PORT": port, "FBCLIP_SERVE_HOST": "127.0.0.1"}
    server = image.run([*image.entrypoint, *image.command], given, frozen=True)
    try:
        begin = time.monotonic()
        while image.run(image.health, given, frozen=True).wait():
            if time.monotonic() - begin > 60 or server.poll() is not None:
                sys.exit("the server did not become healthy within 60 s")
            time.sleep(0.5)
        yield f"healthy after {time.monotonic() - begin:.1f} s"
        sample = ROOT / "fbclip" / "assets" / "samples" / "brushed-steel-scratch.jpg"
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/jpeg"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/predict", sample.read_bytes(), headers)
        with urllib.request.urlopen(request) as answer:
            verdict = json.load(answer)["verdict"]
        if verdict != "defect":
            sys.exit(f"{sample.name} has a defect; the server says {verdict}")
        yield f"{sample.name}: {verdict}"
        inside = child(server)
        if (owner := Path(f"/proc/{inside}").stat().st_uid) != 10001:
            sys.exit(f"the server runs as user 10001; got {owner}")
        begin = time.monotonic()
        os.kill(inside, signal.SIGTERM)  # as `docker stop` does; it is the first process in its container
        if code := server.wait(timeout=10):
            sys.exit(f"SIGTERM ends the server with exit code 0; got {code}")
        yield f"stopped by SIGTERM after {time.monotonic() - begin:.1f} s"
    finally:
        server.kill()  # and its child with it
    if image.run(["sh", "-c", "touch /opt/here 2>/dev/null"], {}, frozen=True).wait() == 0:
        sys.exit("the server's user can write outside /data and /tmp")
    yield "user 10001, root read-only"


def child(process: subprocess.Popen[bytes]) -> int:
    """The process that unshare started: the first of its namespace."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def size(root: Path) -> int:
    """Of the files of a root, in MB."""
    done = subprocess.run(["du", "-sxm", root], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def main() -> None:
    if os.geteuid() or not shutil.which("debootstrap"):
        sys.exit("this needs root and debootstrap: apt-get install debootstrap")
    begin = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="fbclip-image-"))
    try:
        base = fresh_root(work / "base")
        image = build(base, work)
        for line in serve(image):
            print(line, flush=True)
        print(f"{size(image.root)} MB, of which the base {size(base)} MB; {time.monotonic() - begin:.0f} s")
    finally:
        if "--keep" in sys.argv:
            print(work)
        else:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
