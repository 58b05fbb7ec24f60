"""Files that ship with the project, found from a checkout and from an installed wheel: recipes, weights, templates."""

import importlib.metadata
import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT_FILE = "setup.cfg"  # stands beside the packages in a checkout, and never in an installation
DISTRIBUTION = "raft-flow-trainer"
PRETRAINED = "pretrained/raft-small-synthetic"  # weights trained on synthetic pairs only
FRAMES = "examples/frames"  # of an animation, made for this project
SHARE = f"share/{DISTRIBUTION}"  # setup.cfg's data_files put everything below this folder of the environment


def shipped_path(name: str) -> Path:
    """Find a file or folder that ships with the project.

    Args:
        name: Relative to the root of a checkout: `"pretrained/raft-small-synthetic"`, `"configs/chairs.yaml"`,
            `"model_card.md"`. An installed wheel has it at the same place below `share/raft-flow-trainer`.

    Returns:
        An absolute path, which exists.

    Raises:
        FileNotFoundError: The project ships no such file, or it was installed incompletely.
    """
    root = CHECKOUT if (CHECKOUT / PROJECT_FILE).is_file() else _installed_root()
    if root is None:
        raise FileNotFoundError(f"{name} ships with {DISTRIBUTION}, and that is not installed; install it again")
    if not (root / name).exists():
        raise FileNotFoundError(f"{DISTRIBUTION} ships no {name}; it was looked for in {root}")
    return root / name


def _installed_root() -> Path | None:
    """The folder of an installation's shared files, by pip's record of what it has installed where."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in distribution.files or []:
        before, found, _ = file.as_posix().partition(f"{SHARE}/")
        if found:
            # The record's `..` are taken out of the text, since folders of an environment may be symbolic links. After
            # `pip install --target` they are wrong, and the folder stands beside the packages.
            recorded, beside = (os.path.normpath(str(distribution.locate_file(at + SHARE))) for at in (before, ""))
            return Path(recorded if os.path.isdir(recorded) else beside)
    return None


def pretrained_path() -> Path:
    """Find the weights that ship with the project, a folder for `from_pretrained`; no network is needed.

    Raises:
        FileNotFoundError: As from `shipped_path`.
    """
    return shipped_path(PRETRAINED)


def find_model(name: str | None) -> str:
    """Find where a model is to be loaded from.

    Args:
        name: A folder, a file of weights or a repository id; None, or `"pretrained/raft-small-synthetic"` wherever one
            is: the shipped weights.

    Returns:
        The name as it was given, or the path of the shipped weights.

    Raises:
        FileNotFoundError: The shipped weights are wanted and cannot be found.
    """
    return str(pretrained_path()) if name is None else find_shipped(name)


def find_shipped(name: str) -> str:
    """Find the shipped weights or frames by their names in a checkout, wherever one is; other names stay as they are.

    Raises:
        FileNotFoundError: As from `shipped_path`.
    """
    return str(shipped_path(name)) if name in (PRETRAINED, FRAMES) and not os.path.exists(name) else name


def find_config(name: str, folder: str = "configs") -> Path:
    """Find a YAML file by its path, or by its name among those that ship with the project.

    Args:
        name: A path; or the name of a shipped file, with or without its suffix: `"chairs"` is `configs/chairs.yaml`.
        folder: Of the shipped files, as `shipped_path` takes it.

    Returns:
        The path as it was given where there is such a file, else that of the shipped file.

    Raises:
        FileNotFoundError: There is neither such a file nor a shipped one of that name.
    """
    path = Path(name)
    if path.is_file():
        return path
    if len(path.parts) == 1:
        try:
            return shipped_path(f"{folder}/{path.name.removesuffix('.yaml')}.yaml")
        except FileNotFoundError:
            pass  # the message below names what the user typed
    raise FileNotFoundError(f"no such file: {name}")
