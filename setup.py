"""What a wheel has beside what pyproject.toml names.

The plugin's sources, the two scripts and the samples lie at the top of the repository; in a wheel they are below
slurm_mps/share, where `slurm-mps install` looks. The documentation goes where such things are looked for, below the
prefix: share/doc/slurm-mps, laid out as the repository is, and share/man.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

SHARED = ("spank", "prolog", "epilog", "etc")
HERE = Path(__file__).parent
DOC, MAN = "share/doc/slurm-mps", "share/man"
#: Where `make man` puts the pages. A source archive and the packages bring them along and need no Sphinx.
MADE = HERE / "build/docs/man"
MAKERS = ("sphinx>=8", "myst-parser>=4", "jsonschema>=4.10")


def shared_files() -> list[Path]:
    """The files, relative to the top."""
    return [path.relative_to(HERE) for name in SHARED for path in sorted((HERE / name).iterdir()) if path.is_file()]


def documents() -> list[Path]:
    """The pages as they are written, and their pictures, relative to the top."""
    kinds, others = (".md", ".svg"), ("generated", "examples")
    found = [path.relative_to(HERE) for path in sorted(HERE.glob("docs/**/*")) if path.suffix in kinds]
    tops = [Path(name) for name in ("README.md", "CHANGELOG.md") if (HERE / name).exists()]
    return tops + [path for path in found if path.parts[1] not in others]


def makes_man_pages() -> bool:
    """Whether the man pages are to be made here: a checkout has what they are made of."""
    return (HERE / "docs/conf.py").exists()


def man_pages(directory: Path) -> list[Path]:
    """The man pages, made below `directory` where they do not come with the sources.

    Where that cannot be done there are none: `slurm-mps --help` says the same, and the rest is worth installing.
    """
    if not makes_man_pages():
        return sorted(MADE.glob("*.[1-8]"))
    pages, doctrees = directory / "man", directory / "doctrees"
    line = [sys.executable, "-m", "sphinx", "-q", "-b", "man", "-d", doctrees, "docs", pages]
    done = subprocess.run(line, cwd=HERE, check=False)  # noqa: S603 - a line of our own
    if done.returncode:
        print("slurm-mps: without man pages, which Sphinx did not make", file=sys.stderr)  # noqa: T201 - pip -v shows it
        return []
    return sorted(pages.glob("*.[1-8]"))


class BuildPy(build_py):
    """Copies the former into the package that is built, and names the latter as data of the distribution."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in shared_files():
            target = Path(self.build_lib, "slurm_mps/share", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(HERE / name), str(target))
        data = [(f"{DOC}/{name.parent}", [str(name)]) for name in documents()]
        pages = man_pages(Path(self.get_finalized_command("build").build_temp).absolute())
        data += [(f"{MAN}/man{page.suffix[1]}", [str(page)]) for page in pages]
        self.distribution.data_files = data


class Sdist(sdist):
    """Puts them into a source archive."""

    def make_distribution(self) -> None:
        made = [path.relative_to(HERE) for path in MADE.glob("*.[1-8]")]
        self.filelist.extend(map(str, [*shared_files(), *documents(), *made]))
        super().make_distribution()


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist}, setup_requires=MAKERS if makes_man_pages() else ())
