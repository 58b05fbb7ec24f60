"""Push a finished run to the Hub, after training or whenever an upload has failed; or the page, app.py, as a Space.

python -m flow_training.hub push DIR user/name [--private] [--token TOKEN]
python -m flow_training.hub push_space user/name [--private] [--token TOKEN]

Exit codes: 0, it is pushed; 1, DIR is no finished run, or there is no app.py; 2, the command is wrong; 3, the Hub
refuses or cannot be reached.
"""

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from flow_data.shipped_files import CHECKOUT, PRETRAINED

# Nothing here imports torch or the model: each upload is a process of its own, which must start quickly.
PROG = "flow_training.hub"
UPLOAD_FAILED = 3  # exit code, also of train_flow.py: the training itself went well
TIMEOUT = 60.0  # seconds without a byte from the Hub or to it; the default of the client is to wait forever

RUN_CONFIG, CARD = "run_config.yaml", "README.md"
FINISHED_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", RUN_CONFIG, CARD)
SPACE_PACKAGES = ("flow_data", "flow_inference", "modeling_raft")  # what app.py imports
PUBLISHED_FILES = (*FINISHED_FILES, "*.py")  # of the folder itself: neither checkpoints nor logs


def create_repository(model_id: str, token: str | None, private: bool) -> str:
    """Create the repository, unless it exists, and make sure that it can be written.

    It is called before a run starts, so that a wrong token is an error then and not at the end.

    Returns:
        Its full id, user/name.

    Raises:
        OSError: It cannot be created or written: the token, the name or the network is wrong.
    """
    try:
        api = _api(token)
        repo_id = api.create_repo(model_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # a token that may only read finds an existing repository, too
    except Exception as error:  # what the client raises, in many types
        place = f"{model_id} on the Hub, {constants.ENDPOINT}"
        raise OSError(f"cannot create {place}, or write to it: {_reason(error, token)}") from error
    return repo_id


def check_finished(folder: Path) -> None:
    """Raise FileNotFoundError, which names what is missing, where a folder holds no finished run."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    missing = [name for name in FINISHED_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no finished run: {', '.join(missing)} missing. Give a run's output_dir; one that has "
            "not ended is resumed with train_flow.py --resume_from_checkpoint latest"
        )


def push_folder(folder: Path, repo_id: str, token: str | None, message: str) -> str:
    """Upload what a run publishes, in one commit, so that no download ever mixes two states.

    Args:
        folder: A run's, or one with the same files.
        repo_id: An existing repository, user/name.
        token: None for the token of the user who is logged in.
        message: Of the commit.

    Returns:
        The URL of the commit.

    Raises:
        OSError: A file cannot be read, or the Hub refuses or cannot be reached, after some attempts.
    """
    try:
        paths = sorted({path for pattern in PUBLISHED_FILES for path in folder.glob(pattern)} - {folder / CARD})
        operations = [CommitOperationAdd(path.name, path) for path in paths]
        operations.append(CommitOperationAdd(CARD, _card_for(folder, repo_id)))
        return _api(token).create_commit(repo_id, operations, commit_message=message).commit_url
    except Exception as error:  # what the client raises, in many types
        raise OSError(f"cannot push {folder} to {repo_id}: {_reason(error, token)}") from error


def space_files(checkout: Path = CHECKOUT) -> dict[str, Path]:
    """Find what a Space of the page consists of: path in its repository -> file.

    Args:
        checkout: Of this project; an installation does not have the page.

    Raises:
        FileNotFoundError: It is no checkout.
    """
    if not (checkout / "app.py").is_file():
        raise FileNotFoundError(f"{checkout} has no app.py; run push_space in a checkout of the project")
    files = {path.relative_to(checkout / "space").as_posix(): path for path in sorted(checkout.glob("space/**/*.*"))}
    patterns = ("app.py", "setup.cfg", "LICENSE", f"{PRETRAINED}/*")
    for pattern in (*patterns, *(f"{package}/**/*.py" for package in SPACE_PACKAGES)):
        files |= {path.relative_to(checkout).as_posix(): path for path in sorted(checkout.glob(pattern))}
    return {name: path for name, path in files.items() if path.is_file() and "__pycache__" not in path.parts}


def push_space(files: dict[str, Path], repo_id: str, token: str | None, private: bool, message: str) -> str:
    """Upload the page as a Space, in one commit.

    Args:
        files: Of `space_files`.
        repo_id: user/name; created if it does not exist.
        token: None for the token of the user who is logged in.
        private: Make the Space private if it is new.
        message: Of the commit.

    Returns:
        The URL of the commit.

    Raises:
        OSError: A file cannot be read, or the Hub refuses or cannot be reached.
    """
    try:
        api = _api(token)
        created = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        repo_id = created.repo_id
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        return api.create_commit(repo_id, operations, commit_message=message, repo_type="space").commit_url
    except Exception as error:  # what the client raises, in many types
        raise OSError(f"cannot push the page to the Space {repo_id}: {_reason(error, token)}") from error


def push_command(folder: Path, repo_id: str) -> str:
    """The command that pushes a finished run later."""
    return shlex.join(["python", "-m", PROG, "push", str(folder), repo_id])


def loaded_from(run_config: dict[str, Any]) -> str:
    """Where the code in a run's card loads the model from: the repository that it is pushed to, else its folder."""
    pushed = run_config.get("push_to_hub") and run_config.get("hub_model_id")
    return str(pushed or run_config["output_dir"])


def quoted(text: str) -> str:
    """A text as a string literal of the Python code in the card."""
    return json.dumps(text, ensure_ascii=False)


def _card_for(folder: Path, repo_id: str) -> bytes:
    """The card, with code that loads the model from the repository that it is pushed to now."""
    run_config = yaml.safe_load((folder / RUN_CONFIG).read_text())
    card, source = (folder / CARD).read_text(), quoted(loaded_from(run_config))
    for before in ("model=", "from_pretrained("):  # elsewhere, the folder's name may be another word of the code
        card = card.replace(before + source, before + quoted(repo_id))
    return card.encode()


def _api(token: str | None) -> HfApi:
    get_session().timeout = TIMEOUT
    return HfApi(token=token)


def _reason(error: BaseException, token: str | None) -> str:
    """Explain in one line why the client or the Hub refused; the token, which errors may quote, is hidden."""
    chain = [error]
    while chain[-1].__cause__ is not None and not isinstance(chain[-1], HfHubHTTPError):
        chain.append(chain[-1].__cause__)
    texts = [" ".join(str(link).split()) or type(link).__name__ for link in chain]
    text = ": ".join(dict.fromkeys(texts))  # some repeat the text of their cause
    for secret in (token, get_token()):
        if secret is not None and secret.strip():
            text = text.replace(secret.strip(), "TOKEN")
    status = chain[-1].response.status_code if isinstance(chain[-1], HfHubHTTPError) else None
    if status in (401, 403):
        text += " -- it takes a token that may write there: `hf auth login`, the variable HF_TOKEN, or as a flag"
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROG}: error: {message}\n")


def _repo_id(text: str) -> str:
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no user/name: {error}") from error
    return text


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n")
    parser = _Parser(prog=f"python -m {PROG}", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="push|push_space", required=True)
    push = commands.add_parser("push", help="upload a finished run", epilog=details, allow_abbrev=False)
    push.add_argument("folder", type=Path, metavar="DIR", help="output_dir of a finished run")
    space = commands.add_parser("push_space", help="upload the page as a Space", epilog=details, allow_abbrev=False)
    for command, message in ((push, "Upload RAFT"), (space, "Upload the page")):
        add = command.add_argument
        add("repo_id", type=_repo_id, metavar="user/name", help="repository; created if it does not exist")
        add("--private", action="store_true", help="make the repository private if it is new")
        add("--token", help="token to push with; default: HF_TOKEN, or the one you logged in with")
        add("--commit_message", default=message, help="default: %(default)s")
    push.add_argument("--end_with", type=int, metavar="PID", help=argparse.SUPPRESS)  # the training that started it
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.command == "push" and args.end_with is not None:
        threading.Thread(target=_end_with_parent, args=[args.end_with], daemon=True).start()
    try:
        if args.command == "push":
            check_finished(args.folder)
        else:
            files = space_files()
    except OSError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    try:
        if args.command == "push":
            repo_id = create_repository(args.repo_id, args.token, args.private)
            url = push_folder(args.folder, repo_id, args.token, args.commit_message)
        else:
            url = push_space(files, args.repo_id, args.token, args.private, args.commit_message)
        print(f"pushed: {url}")
    except OSError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return UPLOAD_FAILED
    return 0


def _end_with_parent(parent: int) -> None:
    """End this process when the training that started it is killed, as its upload is outdated soon."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(UPLOAD_FAILED)


if __name__ == "__main__":
    sys.exit(main())
