"""Lay the tests of the installed transformers where conftest.py finds them: .venv has the library, not its tests.

python tests/transformers_own/fetch_tests.py
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

PACKAGE = "transformers_tests"  # under another name than `tests`, which this project's folder has


def tests_folder() -> Path:
    """Folder to import `transformers_tests` from: one for each version, in the environment that has the library."""
    return Path(sys.prefix) / f"transformers-{transformers.__version__}-tests"


def download_source(folder: Path) -> Path:
    """The source distribution of the installed version, from where pip gets its packages.

    Raises:
        SystemExit: pip cannot get it; pip has said why.
    """
    requirement = f"transformers=={transformers.__version__}"
    options = ["--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(folder)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement]).returncode:
        raise SystemExit(f"pip cannot download the source of {requirement}: only a released version has one")
    (archive,) = folder.glob("transformers-*.tar.gz")
    return archive


def unpack_tests(archive: Path, folder: Path) -> None:
    """The files of `tests/` in a source distribution, and nothing else of it, into `folder`."""
    with tarfile.open(archive) as source:
        for member in source:
            parts = Path(member.name).parts  # transformers-VERSION/tests/test_modeling_common.py
            if member.isfile() and parts[1:2] == ("tests",):
                member.name = str(Path(*parts[2:]))
                source.extract(member, folder, filter="data")
    (folder / "__init__.py").touch()


def main() -> None:
    target = tests_folder()
    if target.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unpacked = Path(scratch) / "unpacked"
        unpack_tests(download_source(Path(scratch)), unpacked / PACKAGE)
        os.replace(unpacked, target)  # there as a whole or not at all


if __name__ == "__main__":
    main()
