"""The folder in which MindSpore's own compile cache works, private to this process.

MindSpore reads and writes `rank_0/graph_cache/compile_cache_<n>.mindir`, n counting the
graphs that the process compiled with the cache on; it takes the folder once, and for
good. It asks whether the code has changed by reading the script that was started and
what that imports, which is not always there (`python -c`) and not what counts, and once
it finds a difference, or no file, it loads nothing more in this process. So the stage
stands for the script, and MindSpore is told not to ask: what must not have changed, the
cache's folder is named after.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

Files = dict[str, bytes]  # by path below the stage, `compile_cache_N` for the number

HASH = "compile_dependency.hash"
NUMBER = re.compile(r"(?<=compile_cache_)\d+")
log = logging.getLogger("sdxl")


class Stage:
    """What MindSpore sees of the cache: nothing, or the one graph it is to load."""

    _made: ClassVar[list[Stage | None]] = []

    def __init__(self, root: Path) -> None:
        self.root = root
        self.number = 0
        self.script = root / "script.py"
        self.script.write_text("# It stands for the script that was started.\n")

    @classmethod
    def of_this_process(cls) -> Stage | None:
        """Give the one stage of this process; None where there can't be any."""
        if not cls._made:
            cls._made.append(cls._make())
        return cls._made[0]

    @classmethod
    def _make(cls) -> Stage | None:
        from mindspore.common import api

        try:
            if not hasattr(api, "entry_script_path"):
                raise OSError("this MindSpore's cache is not known")
            root = Path(tempfile.mkdtemp(prefix="sdxl-graphs-"))
            atexit.register(shutil.rmtree, root, ignore_errors=True)
            stage = cls(root)
        except OSError as error:
            log.warning("compile cache: off: %s", error)
            return None
        api.entry_script_path = str(stage.script)
        return stage

    def run(self, compile_it: Callable[[], None], files: Files | None) -> Files:
        """Compile with `files` in MindSpore's reach; give what it wrote itself."""
        self._empty()
        before = {path: _state(path) for path in self._put(files or {})}
        try:
            with self.environment("1", self.root):
                compile_it()
            written = [p for p in self._found() if before.get(p) != _state(p)]
            self._count(written)
            return {self._name(path): path.read_bytes() for path in written}
        finally:
            self._empty()

    def _put(self, files: Files) -> list[Path]:
        paths = []
        for name, data in files.items():
            path = self.root / name.replace(
                "compile_cache_N", f"compile_cache_{self.number}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            paths.append(path)
        return paths

    def _count(self, written: list[Path]) -> None:
        """Keep in step with MindSpore: which number the next graph will have."""
        numbers = [int(n) for path in written for n in NUMBER.findall(path.name)]
        self.number = max(numbers, default=self.number) + 1

    def _name(self, path: Path) -> str:
        return NUMBER.sub("N", str(path.relative_to(self.root)))

    def _found(self) -> list[Path]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        return [path for path in files if path.name != HASH and path != self.script]

    def _empty(self) -> None:
        for path in self._found():
            with contextlib.suppress(OSError):
                path.unlink()

    @staticmethod
    @contextmanager
    def environment(enable: str, path: Path | None) -> Iterator[None]:
        """Tell MindSpore by its environment, and put that back afterwards."""
        wanted = {"MS_COMPILER_CACHE_ENABLE": enable}
        if path is not None:
            wanted["MS_COMPILER_CACHE_PATH"] = str(path)
            wanted["MS_DEV_FORCE_USE_COMPILE_CACHE"] = "1"
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
