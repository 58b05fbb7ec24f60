"""Names of files: formats by suffix, natural order, URLs, and names that differ in Unicode normalization only.

Normalization: "ü" is one character (NFC), or "u" and two dots (NFD).

Linux takes the two for different names, people see one: macOS and some archives write NFD where tables hold NFC. So a
name is first looked up as it is, and then in the other form.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

COLLECTION_FORMATS = {"h5": ".h5", "jpg": ".jpg"}  # a file of each video; two images of each pair
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv"),
)
WRITTEN_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # suffix -> FFmpeg's name
URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # pathlib makes one slash of two; c:/ is a drive


def is_video(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has the suffix of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Refuse a URL, since frames, folders and videos are read from files.

    Raises:
        ValueError: The path is a URL.
    """
    if URL.match(str(path)):
        raise ValueError(f"{path} is a URL; download it, and give the path of the file")


def natural_order(name: str) -> list[str | int]:
    """Sort key under which frame_2 comes before frame_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


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
