"""Flow of two images, of a sequence of frames, of a video, or of many videos and folders of frames.

    python predict_flow.py --model DIR_OR_REPO frame1.png frame2.png --output flow.flo
    python predict_flow.py --model DIR_OR_REPO frames/ --output flow/ --format kitti --backward --occlusion
    python predict_flow.py --model DIR_OR_REPO frames/*.png --output flow/
    python predict_flow.py --model DIR_OR_REPO --video in.mp4 --output flow.mp4
    accelerate launch predict_flow.py --model DIR_OR_REPO videos/ more/*.mp4 --output flow/ --format h5

Flow gives for every pixel of frame 1 its motion to frame 2: x to the right, then y down, in pixels of the frames.
Backward flow gives it for every pixel of frame 2, to frame 1. An occlusion mask is white where frame 2 does not show
the pixel of frame 1. In color images, the hue is the direction and the saturation the length.

Frames may be of any image format and depth. Images with an EXIF orientation are turned upright. Those of 16 bits are
mapped to 8 bits by one linear range of intensities for all: that of the first two, or --intensity_range.

Many sources are shared among the processes of a launch. What is complete is skipped, so that the same command resumes
after an interruption. Sources that cannot be read are reported at the end, with exit code 4.
"""

import argparse
import glob
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_data.file_names import (
    COLLECTION_FORMATS,
    VIDEO_SUFFIXES,
    WRITTEN_FORMATS,
    find_path,
    is_video,
    refuse_url,
)
from flow_data.flow_io import FLOW_SUFFIXES, FORMAT_SUFFIXES
from flow_data.optional_packages import MissingPackageError
from flow_data.out_of_memory import explain_out_of_memory
from flow_data.shipped_files import PRETRAINED, find_model
from flow_inference.cpu_threads import limit_spinning
from flow_inference.parent_process import is_accelerate_launch

# torch is imported once the arguments are known to be good, so that --help and mistakes take no time.
if TYPE_CHECKING:
    from flow_inference.sequence import Summary
    from flow_inference.video import FlowVideo

SMALL_SIDE = 128  # pixels: published weights have not been trained on less
SOME_FAILED = 4  # exit code: some sources of a collection cannot be read, the others are done
COLLECTION_FLAGS = ("lists", "shard", "batch_size", "split_frames", "report", "fail_fast")
OUT_OF_MEMORY = (  # advice
    "Estimate on smaller frames with --max_side. Correlation is computed on demand where memory looks too short for "
    'all pairs of pixels; "correlation": "on_demand" in config.json of the model\'s folder does so always.'
)


def main(argv: list[str] | None = None) -> None:
    """Predict flow as the command line says; mistakes and interruptions end the program with one line."""
    args = parse_args(argv)
    limit_spinning()
    try:
        (predict_many if is_collection(args) else predict_one)(args)
    except Exception as error:
        message = explain_out_of_memory(error, "the prediction", OUT_OF_MEMORY)
        if message is None and not isinstance(error, (ValueError, OSError, MissingPackageError)):
            raise
        sys.exit(f"predict_flow.py: error: {message or error}{kept(error)}")
    except KeyboardInterrupt as interruption:
        sys.exit(f"predict_flow.py: stopped{kept(interruption)}")


def kept(error: BaseException) -> str:
    """Return what has been noted about the flow that was written before an error."""
    return getattr(error, "flow_kept", "")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line; what is wrong with it ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    flow_files, videos = ", ".join(FLOW_SUFFIXES), ", ".join(WRITTEN_FORMATS)
    add("frames", nargs="*", metavar="INPUT", help="two images of one size; or a sequence: a folder of images, or "
        "more than two images, which are taken in natural order of their names; or a collection: videos, folders of "
        "frames, folders that are searched for both, and patterns in quotes")  # fmt: skip
    add("--video", metavar="IN", help="a video file, instead of INPUT")
    add("--model", help="folder, repository id, or file of weights of RAFT; default: the shipped "
        f"{PRETRAINED}")  # fmt: skip
    add("--output", required=True, help=f"of two images: a file ({flow_files}; .png is a color image); "
        f"of a sequence or a video: a folder for a file of each pair, or a video of colors ({videos}); of a "
        "collection: a folder")  # fmt: skip
    add("--format", choices=[*FORMAT_SUFFIXES, "colour", *COLLECTION_FORMATS], help="of the files in a folder "
        "(default: flo); of a .png: color (the default) or kitti, 16-bit flow; npz16 is float16, h5 one file of "
        "float16 for each video, jpg two images of 8 bits, flow_x_* and flow_y_*")  # fmt: skip
    add("--backward", action="store_true", help="also write flow from frame 2 to frame 1, as *_backward")
    add("--occlusion", action="store_true", help="also write masks, as *_occlusion; white is occluded")
    add("--confidence", action="store_true", help="also write the forward-backward error in pixels and the occlusion "
        "mask as arrays: in .npz and .h5 files of flow, else in *_confidence.npz")  # fmt: skip
    add("--bound", type=float, metavar="PX", help="length at which --format jpg clips x and y (default: 20)")
    add("--num_flow_updates", type=int, help="more are slower and mostly better; default: that of the model's "
        "configuration, which is mostly 12")  # fmt: skip
    add("--warm_num_flow_updates", type=int, help="of the pairs of a video that start from the flow of the pair "
        "before; default: 8, or --num_flow_updates if less")  # fmt: skip
    add("--no_warm_start", action="store_true", help="estimate each pair of a video on its own")
    add("--tolerance", type=float, metavar="PX", help="stop the updates of a pair once one moves its flow by this or "
        "less, as a mean; default: all updates")  # fmt: skip
    add("--max_side", type=int, metavar="PX", help="estimate on frames reduced to this longer side; the flow is that "
        "of the original frames")  # fmt: skip
    add("--min_side", type=int, metavar="PX", help="estimate on frames enlarged to this shorter side, which helps "
        f"with frames below {SMALL_SIDE} px")  # fmt: skip
    add("--intensity_range", type=float, nargs=2, metavar=("LO", "HI"), help="intensities that become black and "
        "white; default: 0 to 255 of 8-bit frames, the lowest and highest of the first two of 16 bits")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1, mps, xpu; default: the GPU if there is one")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="default: bf16 in a video with warm start where the "
        "hardware has instructions for it, else no")  # fmt: skip
    add("--frame_rate", type=float, help="of a video of colors; default: the video's own, 24 of a folder")
    add("--color_scale", "--colour_scale", type=float, metavar="PX", help="length that is fully saturated; default: "
        "the longest of each image; in a video of colors it follows the flow")  # fmt: skip
    many = parser.add_argument_group("collections")
    add = many.add_argument
    add("--list", action="append", dest="lists", metavar="FILE", help=".txt, .csv or .jsonl of further inputs, and "
        "perhaps output names")  # fmt: skip
    add("--shard", metavar="I/N", help="compute one of N parts of the collection, I from 1 on")
    add("--split_frames", type=int, metavar="N", help="cut longer sources into pieces of N pairs, which several "
        "processes share")  # fmt: skip
    add("--batch_size", metavar="N", help="pairs of a source that are estimated at once, without a warm start if more "
        "than 1; auto: as many as memory holds (default: 1)")  # fmt: skip
    add("--compile", action="store_true", help="compile the model with torch.compile, once for each size of frames")
    add("--report", type=Path, metavar="FILE", help="JSON file of what was done, how fast, and what failed")
    add("--fail_fast", action="store_true", help="stop at the first source that cannot be read")
    args = parser.parse_args(argv)
    if error := convert_and_check(args):
        parser.error(error)
    return args


def convert_and_check(args: argparse.Namespace) -> str | None:
    """Convert the paths and the format of the arguments, and return what is wrong with them."""
    if args.video is not None and (args.frames or args.lists):
        return "give either INPUT or --video, not both"
    if args.video is None and not (args.frames or args.lists):
        return "give two images, a folder of frames, more than two images, videos, --list, or --video"
    try:
        for path in filter(None, [*args.frames, args.video, args.output]):
            refuse_url(path)
        args.shard = None if args.shard is None else parse_shard(args.shard)
        args.batch_size = None if args.batch_size is None else parse_batch_size(args.batch_size)
    except ValueError as error:
        return str(error)
    args.frames = [path for text in args.frames for path in expand_images(text)]
    args.names_folder = args.output.endswith(("/", os.sep)) or os.path.isdir(args.output)  # pathlib drops the slash
    args.inputs = args.frames if args.video is None else [args.video]  # as collections take them
    args.output, args.frames = Path(args.output), [Path(find_path(path)) for path in args.frames]
    args.video = None if args.video is None else Path(find_path(args.video))
    args.format = "color" if args.format == "colour" else args.format
    for name, reason in useless_flags(args).items():
        if getattr(args, name):
            return f"--{'list' if name == 'lists' else name} has no use here: {reason}"
    for name in ("num_flow_updates", "warm_num_flow_updates"):
        value = getattr(args, name)
        if value is not None and value < 1:
            return f"--{name} must be at least 1; got {value}"
    for name in ("frame_rate", "color_scale", "bound", "tolerance"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            return f"--{name} must be positive and finite; got {value}"
    if args.report is not None and args.report.is_dir():
        return f"--report must be a file; {args.report} is a folder"
    if args.split_frames is not None and args.split_frames < 2:
        return f"--split_frames must be at least 2; got {args.split_frames}"
    if args.batch_size not in (None, 1):
        args.no_warm_start = True  # where a pair waits for the one before it
    return None


def parse_shard(text: str) -> tuple[int, int]:
    """Return the numbers of I/N; 0 to N - 1 name the same N parts as 1 to N."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) <= int(count) and int(count) >= 1):
        raise ValueError(f"--shard must be I/N with I from 1 to N; got {text}")
    return int(index), int(count)


def parse_batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) >= 1):
        raise ValueError(f"--batch_size must be a whole number, at least 1, or auto; got {text}")
    return text if text == "auto" else int(text)


def expand_images(text: str) -> list[str]:
    """Return the images that a pattern in quotes names; any other text as it is."""
    if os.path.lexists(text) or not glob.has_magic(text):
        return [text]
    paths = sorted(glob.glob(text, recursive=True))
    return paths if paths and all(looks_like_image(Path(path)) for path in paths) else [text]


def looks_like_image(path: Path) -> bool:
    """Return whether a path is neither a folder, nor a video, nor a pattern."""
    return not (path.is_dir() or is_video(path)) and (path.is_file() or path.suffix not in ("", ".*"))


def is_collection(args: argparse.Namespace) -> bool:
    """Return whether the arguments name several sources, or ask for what only collections have.

    Raises:
        ValueError: They ask for that, and name images; or one of several is neither video, image nor folder.
    """
    images = [path for path in args.frames if looks_like_image(path)]
    if len(images) < len(args.frames):
        from PIL import Image

        known = Image.registered_extensions()
        if strays := [path for path in images if path.is_file() and path.suffix.lower() not in known]:
            raise ValueError(f"{strays[0]} is no video, no image and no folder; leave it out")
    if args.format in COLLECTION_FORMATS or any(getattr(args, name) for name in COLLECTION_FLAGS):
        if images:
            raise ValueError(
                f"{images[0]} is an image; for formats and flags of collections, give the folder of frames"
            )
        return True
    if args.video is not None or images:
        return False
    folder = args.frames[0]
    if len(args.frames) > 1 or not folder.is_dir():
        return folder.is_dir() or is_video(folder) or glob.has_magic(str(folder)) or len(args.frames) > 1
    if args.output.suffix.lower() in WRITTEN_FORMATS and not args.names_folder:
        return False
    from PIL import Image

    suffixes = Image.registered_extensions()
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if any(is_video(entry) and entry.is_file() for entry in entries):
        return True
    if any(entry.suffix.lower() in suffixes for entry in entries):
        return int(os.environ.get("WORLD_SIZE", "1")) > 1  # one sequence, which the processes must not all compute
    return any(entry.is_dir() for entry in entries)


def useless_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that would change nothing, each with the reason."""
    is_pair, suffix = len(args.frames) == 2 and looks_like_image(args.frames[0]), args.output.suffix.lower()
    is_video_output = suffix in WRITTEN_FORMATS and not (is_pair or args.names_folder)
    format = args.format or ("color" if is_pair and suffix == ".png" else None)
    useless = {}
    if is_pair:
        useless |= dict.fromkeys((*COLLECTION_FLAGS, "bound"), "two images are one pair")
        useless |= dict.fromkeys(("warm_num_flow_updates", "no_warm_start"), "two images have no pair before them")
    elif args.no_warm_start or args.batch_size not in (None, 1):
        useless["warm_num_flow_updates"] = "without a warm start, no pair is warm"
    if args.format != "jpg":
        useless["bound"] = "it is for --format jpg"
    if not is_video_output:
        useless["frame_rate"] = "no video is written"
    if not is_video_output and format != "color":
        useless["color_scale"] = "no colors are written"
    return useless


def predict_one(args: argparse.Namespace) -> None:
    """Predict the flow of two images, a sequence or a video, and print what it is like."""
    from flow_inference.sequence import Summary

    summary = Summary()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends it as Ctrl-C does
    try:
        video, loss = predict(args, summary)
    except BaseException as error:
        error.flow_kept = summary.describe_kept(args.output)  # type: ignore[attr-defined]
        raise
    print(f"{args.output}: {summary}")
    if video.mapped_range is not None:
        low, high = video.mapped_range
        print(f"intensities {low:g} to {high:g} of the frames were mapped to 0 to 255 (--intensity_range LO HI)")
    if 0 < summary.shortest_side < SMALL_SIDE and args.min_side is None:
        print(f"frames below {SMALL_SIDE} px have mostly better flow with --min_side 256")
    if loss:
        print(loss)


def predict(args: argparse.Namespace, summary: "Summary") -> tuple["FlowVideo", str | None]:
    """Estimate the flow of every pair of frames and write it, adding to the summary what has been written.

    Returns:
        The video, and a message about flow that the format could not hold.

    Raises:
        ValueError, OSError: Frames cannot be read, flow cannot be written, or the arguments do not fit the frames.
        MissingPackageError: A format needs a package that is not installed.
    """
    from tqdm.auto import tqdm

    from flow_inference.frame_changes import DUPLICATE_TOLERANCE
    from flow_inference.sequence import find_frames, open_output
    from flow_inference.video import FlowVideo

    source = find_frames(args)
    output = open_output(args, source)
    video = FlowVideo(
        load_model(args),
        source.frames,
        num_flow_updates=args.num_flow_updates,
        warm_num_flow_updates=args.warm_num_flow_updates,
        warm_start=not (source.is_pair or args.no_warm_start),
        backward=args.backward or args.occlusion or args.confidence,
        max_side=args.max_side,
        min_side=args.min_side,
        duplicate_tolerance=None if source.is_pair else DUPLICATE_TOLERANCE,  # the flow of two images was asked for
        mixed_precision=args.mixed_precision,
        intensity_range=args.intensity_range,
        tolerance=args.tolerance,
    )
    with output, tqdm(total=source.num_pairs, unit="pair", disable=source.is_pair) as bar:
        for pair in video:
            output.write(pair)
            summary.add(pair)
            bar.update()
    if summary.pairs == 0:
        raise ValueError(f"{args.video or args.frames[0]}: flow takes two frames, and there is one")
    return video, output.describe_loss()


def load_model(args: argparse.Namespace) -> Any:
    """Load the model in eval mode, on the device of this process."""
    from flow_inference.devices import choose_device
    from modeling_raft.convert_raft_checkpoint import load_raft

    device = choose_device(args.device, int(os.environ.get("LOCAL_RANK", "0")))
    model = load_raft(find_model(args.model)).eval().to(device)
    if args.compile:
        from flow_inference.compilation import compile_model

        compile_model(model)
    return model


def predict_many(args: argparse.Namespace) -> None:
    """Predict the flow of a collection, and print in the first process what was done."""
    stop = StopRequest()  # before imports that take seconds
    if not args.names_folder and args.output.suffix.lower() in (*FLOW_SUFFIXES, *VIDEO_SUFFIXES):
        raise ValueError(f"--output must be a folder; got {args.output}. For a video of colors, give it with --video")
    from flow_inference.collection import CollectionOptions, predict_collection

    given = {"format": args.format or "flo", "warm_start": not args.no_warm_start}
    for name in ("backward", "occlusion", "confidence", "color_scale", "bound", "split_frames", "batch_size",
                 "num_flow_updates", "warm_num_flow_updates", "max_side", "min_side", "mixed_precision",
                 "intensity_range", "tolerance"):  # fmt: skip
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    options = CollectionOptions(**given)
    report = predict_collection(
        load_model(args),
        args.inputs,
        args.output,
        options,
        lists=args.lists or (),
        shard=args.shard,
        fail_fast=args.fail_fast,
        stop=stop,
        show_progress=True,
        model_name=args.model or PRETRAINED,
    )
    if int(os.environ.get("RANK", "0")) != 0:  # a launcher would end the others if this one failed
        return
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        code = SOME_FAILED if report.failed else int(stop())
        args.report.write_text(json.dumps(report.as_json() | {"exit_code": code}, indent=2) + "\n")
    print(f"{args.output}: {report}")
    if stop():
        sys.exit("predict_flow.py: stopped; what is complete is kept, and the same command resumes")
    if report.failed:
        sys.exit(SOME_FAILED)


class StopRequest:
    """Whether SIGTERM or Ctrl-C have asked for the end; a second Ctrl-C, seconds later, interrupts at once.

    The death of a launcher counts as well: one that is killed cannot pass anything on.
    """

    def __init__(self) -> None:
        self.received: float | None = None
        self.parent = os.getppid() if "LOCAL_RANK" in os.environ or is_accelerate_launch() else None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._record)

    def __call__(self) -> bool:
        return self.received is not None or self.parent not in (None, os.getppid())

    def _record(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received = time.monotonic()
            print(
                "\nstopping after this frame; Ctrl-C once more, some seconds from now, stops at once", file=sys.stderr
            )
        elif number == signal.SIGINT and time.monotonic() - self.received > 2:
            raise KeyboardInterrupt


if __name__ == "__main__":
    main()
