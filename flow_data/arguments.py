"""Command-line arguments that name a data set, and their checks: the same for every command that takes them."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from flow_data.datasets import DATASETS, check_source, check_split
from flow_data.synthetic import SyntheticOptions


def add_source_arguments(parser: argparse.ArgumentParser, data_dir_help: str, split_help: str) -> None:
    """Add `source`, `--data_dir` and `--split`; `check_source_arguments` checks them."""
    parser.add_argument("source", help=", ".join(sorted(DATASETS)))
    parser.add_argument("--data_dir", help=data_dir_help)
    parser.add_argument("--split", help=split_help)


def check_source_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, positive: Iterable[str] = ()
) -> None:
    """Exit with the parser's error where the arguments of a data set, or numbers, are wrong.

    Args:
        parser: of the command.
        args: with what `add_source_arguments` adds, and perhaps what `add_synthetic_flags` adds.
        positive: names of arguments that must be at least 1.
    """
    try:
        check_source(args.source)
        if args.split is not None:
            check_split(args.source, args.split)
    except ValueError as error:
        parser.error(str(error))
    given = given_options(vars(args))
    if given and args.source != "synthetic":
        parser.error(f"--synthetic_{next(iter(given))} is for the source synthetic; {args.source} is read from files")
    if args.data_dir is None and DATASETS[args.source].folder is not None:
        parser.error(f"--data_dir is missing: the folder of {args.source}")
    for name in positive:
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")


def add_synthetic_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags `--synthetic_NAME` of the options but textures; each is None unless it is given."""
    group = parser.add_argument_group("synthetic pairs, as the training flags of the same names")
    group.add_argument("--synthetic_image_size", type=int, nargs=2, help="height and width")
    group.add_argument("--synthetic_displacement", type=float, nargs=2, help="range of a pair's mean flow, pixels")
    group.add_argument("--synthetic_shapes", type=int, nargs=2, help="range of the number of moving shapes")
    group.add_argument(
        "--synthetic_appearance", type=float, help="strength of exposure, light, blur and noise, 0 to 1"
    )
    group.add_argument("--synthetic_nonrigid", type=float, help="probability that a layer deforms")
    group.add_argument("--synthetic_ego_motion", type=float, help="share of pairs with a travelling camera")


def given_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of synthetic pairs that flags give, by their names in `SyntheticOptions`.

    Args:
        values: Name of a flag -> its value. Of `synthetic_NAME`, None is no value; other flags do not matter.
    """
    options = {}
    for field in fields(SyntheticOptions):
        value = values.get(f"synthetic_{field.name}")
        if value is not None:
            options[field.name] = tuple(value) if isinstance(value, list) else value
    return options


def synthetic_options(values: Mapping[str, Any], textures: str | None = None) -> SyntheticOptions:
    """Make the options of synthetic pairs from the values of flags.

    Args:
        values: As for `given_options`.
        textures: Folder of images, where no flag gives it.

    Raises:
        ValueError: A value does not fit; the message begins with the name of its flag.
    """
    try:
        return SyntheticOptions(**{"textures": textures} | given_options(values))
    except ValueError as error:
        raise ValueError(f"synthetic_{error}") from error
