"""Publish a source as a data set on the Hub: Parquet files that anyone can read without this package.

python -m flow_data.publish sintel_clean --data_dir datasets/Sintel --repo_id user/name

Columns: `id`; `image1`, `image2` (images); `flow` and `valid`, structs of `bytes`, a whole file, and `path`, its
name, whose suffix is the format. `flow` is the owners' file, `valid` a PNG, or null where the flow file has the mask.
`flow_color` is a small image of the flow in colors, for people who look at the rows: no reader of samples uses it. It
is the last column, so that what readers want stays in one piece. One row is one row group, so that a row can be
fetched on its own.
"""

import argparse
import sys
from pathlib import Path

from flow_data.arguments import add_source_arguments, check_source_arguments
from flow_data.datasets import DATASETS
from flow_data.optional_packages import require_packages

MAX_SHARD_BYTES = 500 * 10**6


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require_packages("flow_data.publish")
    # After the arguments: these imports take seconds, which --help and mistakes must not.
    from flow_data.hub_upload import open_splits, publish, publish_to_folder

    try:
        splits = open_splits(args.source, args.data_dir, args.split)
        if args.output_dir is not None:
            publish_to_folder(args.source, splits, args.output_dir, args.max_shard_bytes)
            place = str(args.output_dir)
        else:
            place = publish(args.source, splits, args.repo_id, args.private, args.token, args.max_shard_bytes)
    except (ValueError, OSError) as error:
        sys.exit(f"flow_data.publish: error: {error}")
    terms = DATASETS[args.source].license.terms
    print(f"published: {place}\nterms of the data: {terms}; make sure that you may pass the data on")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flow_data.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    split_help = "default: every split that has ground truth, of what data_dir holds"
    add_source_arguments(parser, "the data set's own folder", split_help)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--repo_id", help="user/name; made if it is not there")
    place.add_argument(
        "--output_dir", type=Path, help="folder to write the same files into, instead of uploading them"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--token", help="token to push with; default: the one you logged in with")
    parser.add_argument(
        "--max_shard_bytes", type=int, default=MAX_SHARD_BYTES, help="of a file; so much disk is needed for a while"
    )
    args = parser.parse_args(argv)
    check_source_arguments(parser, args, positive=("max_shard_bytes",))
    return args


if __name__ == "__main__":
    main()
