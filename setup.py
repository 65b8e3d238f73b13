"""What pyproject.toml can't say: a build notes the commit that it is made from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent


def note_commit(folder: Path) -> None:
    """Into the package that was copied there. A source archive, which has no history, keeps the note that it came with."""
    source = HERE / "nodeservice" / "build_info.py"
    spec = importlib.util.spec_from_file_location("build_info", source)
    assert spec is not None
    assert spec.loader is not None
    build_info = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_info)
    target = folder / "nodeservice" / build_info.COMMIT_FILE
    found = build_info.commit_of(HERE)
    if found != build_info.UNKNOWN or not target.exists():
        target.write_text(f"{found}\n", encoding="ascii")


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            note_commit(Path(self.build_lib))


class SourceWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        note_commit(Path(base_dir))


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SourceWithCommit})
