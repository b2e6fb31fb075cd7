"""What a wheel has beside what pyproject.toml names: the plugin's sources, the two scripts and the samples.

They lie at the top of the repository; in a wheel they are below slurm_mps/share, where `slurm-mps install` looks.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

SHARED = ("spank", "prolog", "epilog", "etc")
HERE = Path(__file__).parent


def shared_files() -> list[Path]:
    """The files, relative to the top."""
    return [path.relative_to(HERE) for name in SHARED for path in sorted((HERE / name).iterdir()) if path.is_file()]


class BuildPy(build_py):
    """Copies them into the package that is built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in shared_files():
            target = Path(self.build_lib, "slurm_mps/share", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(HERE / name), str(target))


class Sdist(sdist):
    """Puts them into a source archive."""

    def make_distribution(self) -> None:
        self.filelist.extend(map(str, shared_files()))
        super().make_distribution()


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
