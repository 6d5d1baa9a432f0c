"""The bundle that `fbclip calibrate` and `fbclip adapt` write into: which one it is, and its copy where it must be one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fbclip.assets import EMBEDDED
from fbclip.bundle import SUFFIX, Bundle
from fbclip.errors import BundleError, UsageError
from fbclip.files import new_folder, require_writable

Say = Callable[[str], None]
# What is written into a bundle after its export, and the places of a copy that may not be folders.
CALIBRATED, ADAPTED = ("calibration.json", "calibration.png"), ("memory.npz", "memory.jpg")


@dataclass(frozen=True)
class Target:
    """Where something learned from good parts goes.

    Attributes:
        bundle: with the model that looks at them: the one at `path` where there is one.
        path: the bundle that is written into; it becomes a copy where it isn't there yet.
        good: the sources of good images.
        command: "calibrate" or "adapt", for messages.
    """

    bundle: Bundle
    path: Path
    good: list[str]
    command: str

    @classmethod
    def choose(
        cls, command: str, sources: Sequence[str], bundle: Path | None, out: Path | None, needs_good: bool = True
    ) -> Target:
        """What to write into. Nothing is written yet.

        Without a bundle it is a copy of the embedded one in the working folder: what is inside the installed package
        belongs to every project of the machine and is lost with the next upgrade.

        Args:
            sources: images of good parts; before them perhaps the bundle.
            bundle: the one to write into, or to copy.
            out: where the copy goes.
            needs_good: whether there must be images.

        Raises:
            BundleError, UsageError: no such bundle, no good images, another bundle where the copy goes, or a place that
                can't be written to.
        """
        good = list(sources)
        if bundle is None and good and _is_bundle(good[0]):
            bundle, good = Path(good[0]), good[1:]
        if needs_good and not good:
            where = f"beside the bundle there are no images of good parts: fbclip {command} GOOD... --bundle {bundle}"
            raise UsageError(where if bundle else f"there are no images of good parts: fbclip {command} GOOD...")
        for place in good:
            if _is_bundle(place):  # its pictures are no good parts
                raise UsageError(
                    f"{place} is a bundle, not good parts: to {command} it, fbclip {command} GOOD... --bundle {place}"
                )
        loaded = Bundle.load(bundle)
        path = out or (Path(f"{loaded.name}{SUFFIX}") if bundle is None else loaded.path)
        if path.suffix != SUFFIX:
            raise UsageError(f"a bundle is a folder NAME{SUFFIX}; got {path}", option="out")
        target = cls(loaded, path, good, command)
        there = target.require_same()
        require_writable(path if path.exists() else path.parent)
        return replace(target, bundle=there) if there else target

    def require_same(self) -> Bundle | None:
        """The bundle that is at the path, or None.

        Raises:
            UsageError, BundleError: it is of another model, or can't be written into.
        """
        if not self.path.exists():
            return None
        there = Bundle.load(self.path)
        if there.manifest != self.bundle.manifest:
            raise UsageError(
                f"{self.path} is here and isn't {self.described}: fbclip {self.command} GOOD... --bundle {self.path} to "
                f"mean it, or choose another name",
                option="name" if self.command == "calibrate" else "out",
            )
        for name in (*CALIBRATED, *ADAPTED):
            if os.path.lexists(place := there.inside(name)) and not place.is_file():
                raise BundleError(f"{place} is no file: remove it")
        return there

    @property
    def described(self) -> str:
        return "the embedded bundle" if self.bundle.path == EMBEDDED else str(self.bundle.path)

    def write(self, write_into: Callable[[Bundle], None], say: Say) -> None:
        """Let something be written into the bundle at the path, which becomes a copy if it isn't there.

        Raises:
            FBClipError, UsageError: it can't be written; see `fbclip.files.write_error`.
        """
        if not self.path.exists():
            with new_folder(self.path) as folder:
                shutil.copytree(
                    self.bundle.path,
                    folder,
                    symlinks=True,
                    ignore=shutil.ignore_patterns("calibration.*"),
                    copy_function=shutil.copyfile,  # without the rights, which may be to read only in an installed package
                    dirs_exist_ok=True,
                )
                folder.chmod(0o755)
                write_into(replace(self.bundle, path=folder))
                try:
                    folder.rename(self.path)
                except OSError:
                    if not self.path.exists():
                        raise
                else:
                    say(f"copied {self.described} to {self.path}")
                    return
        there = self.require_same()  # it may be of another run that was quicker
        assert there is not None
        write_into(there)


def _is_bundle(place: str) -> bool:
    path = Path(place)
    return path.suffix == SUFFIX or os.path.isfile(path / "manifest.json")  # noqa: PTH113 - an address may be long
