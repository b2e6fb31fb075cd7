"""What a wheel has beside what pyproject.toml names: files that lie outside of the package.

The plugin's sources, the hooks and the samples go below slurm_mps/share, where `slurm-mps install` looks for them. The
documentation goes below the prefix: share/doc/slurm-mps, laid out as the repository is, and share/man.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHARED = ("spank", "prolog", "epilog", "etc")
PAGES = ("README.md", "CHANGELOG.md", "docs/**/*.md", "docs/**/*.svg", "docs/*.json")
NOT_PAGES = ("docs/generated", "docs/examples")  # the parts that docs/conf.py makes man pages of


def shared_files() -> list[Path]:
    """The files of the repository that the package needs, relative to HERE."""
    return [path.relative_to(HERE) for name in SHARED for path in sorted((HERE / name).iterdir()) if path.is_file()]


def documents() -> list[Path]:
    """The pages as they are written, their pictures and the schema of the reports, relative to HERE."""
    found = sorted(path.relative_to(HERE) for pattern in PAGES for path in HERE.glob(pattern))
    return [path for path in found if not str(path.parent).startswith(NOT_PAGES)]


def make_man_pages(directory: Path) -> list[Path]:
    """Have Sphinx make the man pages below `directory`, and return them. Sources without docs give none."""
    if not (HERE / "docs").exists():
        return []
    line = [sys.executable, "-m", "sphinx", "-q", "-b", "man", "-d", directory / "doctrees", "docs", directory / "man"]
    subprocess.run(line, cwd=HERE, check=True)  # noqa: S603 - a line of our own
    return sorted((directory / "man").glob("*.[1-8]"))


class BuildPy(build_py):
    """Copies the shared files into the package that is built, and names the documentation as data beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in shared_files():
            target = Path(self.build_lib, "slurm_mps/share", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(HERE / name), str(target))
        data = [(f"share/doc/slurm-mps/{name.parent}", [str(name)]) for name in documents()]
        pages = make_man_pages(Path(self.get_finalized_command("build").build_temp).absolute())
        data += [(f"share/man/man{page.suffix[1]}", [str(page)]) for page in pages]
        self.distribution.data_files = data


setup(cmdclass={"build_py": BuildPy})
