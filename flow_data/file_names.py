"""Names of files that differ in Unicode normalization only: "ü" as one character (NFC), or as "u" and two dots (NFD).

Linux takes the two for different names, people see one: macOS and some archives write NFD where tables hold NFC. So a
name is first looked up as it is, and then in the other form.
"""

import os
import unicodedata
from collections.abc import Iterable, Mapping


def normalize(name: str) -> str:
    """The composed form (NFC) of a name."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def index_names(names: Iterable[str]) -> dict[str, str]:
    """What `find_name` looks names up in: each name, and its composed form, -> the name."""
    names = sorted(names)
    return {normalize(name): name for name in reversed(names)} | {name: name for name in names}


def find_name(name: str, index: Mapping[str, str]) -> str | None:
    """The same name in an index, else one that differs in normalization only, else None."""
    return index.get(name) or index.get(normalize(name))


def find_path(path: str | os.PathLike[str]) -> str:
    """The path of a file or folder as the disk has it.

    Args:
        path: whose folders and last part may each differ from those on the disk in normalization.

    Returns:
        The same path where it exists, is ASCII, or nothing on the disk fits it.
    """
    path = os.fspath(path)
    if path.isascii() or os.path.lexists(path):
        return path
    folder, name = os.path.split(path)
    if not name or folder == path:
        return path
    folder = find_path(folder)
    try:
        found = find_name(name, index_names(os.listdir(folder or ".")))
    except (OSError, ValueError):  # no such folder; a name that no file can have
        found = None
    return path if found is None else os.path.join(folder, found)
