"""Flow of two images, of a sequence of frames, or of a video.

    python predict_flow.py --model DIR_OR_REPO frame1.png frame2.png --output flow.flo
    python predict_flow.py --model DIR_OR_REPO frames/ --output flow/ --format kitti --backward --occlusion
    python predict_flow.py --model DIR_OR_REPO frames/*.png --output flow/
    python predict_flow.py --model DIR_OR_REPO --video in.mp4 --output flow.mp4

Flow gives for every pixel of frame 1 its motion to frame 2: x to the right, then y down, in pixels of the frames.
Backward flow gives it for every pixel of frame 2, to frame 1. An occlusion mask is white where frame 2 does not show
the pixel of frame 1. In color images, the hue is the direction and the saturation the length.

Frames may be of any image format and depth. Images with an EXIF orientation are turned upright. Those of 16 bits are
mapped to 8 bits by one linear range of intensities for all: that of the first two, or --intensity_range.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_data.file_names import (
    FORMAT_SUFFIXES,
    VIDEO_SUFFIXES,
    WRITTEN_FORMATS,
    find_path,
    is_video,
    natural_order,
    refuse_url,
)
from flow_data.flow_io import FLOW_SUFFIXES
from flow_data.optional_packages import MissingPackageError
from flow_data.out_of_memory import explain_out_of_memory
from flow_data.shipped_files import PRETRAINED, find_model

# torch is imported once the arguments are known to be good, so that --help and mistakes take no time.
if TYPE_CHECKING:
    from flow_inference.outputs import FlowFileWriter, FlowVideoWriter
    from flow_inference.video import FlowVideo, VideoFlow

SMALL_SIDE = 128  # pixels: published weights have not been trained on less
FOLDER_RATE = 24  # frames per second of a video that is made of a folder
OUT_OF_MEMORY = (  # advice
    "Estimate on smaller frames with --max_side. Correlation is computed on demand where memory looks too short for "
    'all pairs of pixels; "correlation": "on_demand" in config.json of the model\'s folder does so always.'
)


def main(argv: list[str] | None = None) -> None:
    """Predict flow as the command line says; mistakes and interruptions end the program with one line."""
    args = parse_args(argv)
    summary = Summary()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends it as Ctrl-C does
    try:
        video, output = predict(args, summary)
    except Exception as error:
        message = explain_out_of_memory(error, "the prediction", OUT_OF_MEMORY)
        if message is None and not isinstance(error, (ValueError, OSError, MissingPackageError)):
            raise
        sys.exit(f"predict_flow.py: error: {message or error}{summary.describe_kept(args.output)}")
    except KeyboardInterrupt:
        sys.exit(f"predict_flow.py: stopped{summary.describe_kept(args.output)}")
    print(f"{args.output}: {summary}")
    if video.mapped_range is not None:
        low, high = video.mapped_range
        print(f"intensities {low:g} to {high:g} of the frames were mapped to 0 to 255 (--intensity_range LO HI)")
    if 0 < summary.shortest_side < SMALL_SIDE and args.min_side is None:
        print(f"frames below {SMALL_SIDE} px have mostly better flow with --min_side 256")
    if loss := output.describe_loss():
        print(loss)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line; what is wrong with it ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    flow_files, videos = ", ".join(FLOW_SUFFIXES), ", ".join(WRITTEN_FORMATS)
    add("frames", nargs="*", metavar="FRAMES", help="two images of one size; or a sequence: a folder of images, or "
        "more than two images, which are taken in natural order of their names")  # fmt: skip
    add("--video", metavar="IN", help="a video file, instead of FRAMES")
    add("--model", help="folder, repository id, or file of weights of RAFT; default: the shipped "
        f"{PRETRAINED}")  # fmt: skip
    add("--output", required=True, help=f"of two images: a file ({flow_files}; .png is a color image); "
        f"of a sequence or a video: a folder for a file of each pair, or a video of colors ({videos})")  # fmt: skip
    add("--format", choices=[*FORMAT_SUFFIXES, "colour"], help="of the files in a folder (default: flo); of a .png: "
        "color (the default) or kitti, 16-bit flow")  # fmt: skip
    add("--backward", action="store_true", help="also write flow from frame 2 to frame 1, as *_backward")
    add("--occlusion", action="store_true", help="also write masks, as *_occlusion; white is occluded")
    add("--num_flow_updates", type=int, help="more are slower and mostly better; default: that of the model's "
        "configuration, which is mostly 12")  # fmt: skip
    add("--warm_num_flow_updates", type=int, help="of the pairs of a video that start from the flow of the pair "
        "before; default: 8, or --num_flow_updates if less")  # fmt: skip
    add("--no_warm_start", action="store_true", help="estimate each pair of a video on its own")
    add("--max_side", type=int, metavar="PX", help="estimate on frames reduced to this longer side; the flow is that "
        "of the original frames")  # fmt: skip
    add("--min_side", type=int, metavar="PX", help="estimate on frames enlarged to this shorter side, which helps "
        f"with frames below {SMALL_SIDE} px")  # fmt: skip
    add("--intensity_range", type=float, nargs=2, metavar=("LO", "HI"), help="intensities that become black and "
        "white; default: 0 to 255 of 8-bit frames, the lowest and highest of the first two of 16 bits")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1, mps, xpu; default: the GPU if there is one")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="default: bf16 in a video with warm start where the "
        "hardware has instructions for it, else no")  # fmt: skip
    add("--frame_rate", type=float, help=f"of a video of colors; default: the video's own, {FOLDER_RATE} of a folder")
    add("--color_scale", "--colour_scale", type=float, metavar="PX", help="length that is fully saturated; default: "
        "the longest of each image; in a video of colors it follows the flow")  # fmt: skip
    args = parser.parse_args(argv)
    if error := convert_and_check(args):
        parser.error(error)
    return args


def convert_and_check(args: argparse.Namespace) -> str | None:
    """Convert the paths and the format of the arguments, and return what is wrong with them."""
    if args.video is not None and args.frames:
        return "give either FRAMES or --video, not both"
    if args.video is None and not args.frames:
        return "give two images, a folder of frames, more than two images, or --video"
    try:
        for path in filter(None, [*args.frames, args.video, args.output]):
            refuse_url(path)
    except ValueError as error:
        return str(error)
    args.names_folder = args.output.endswith(("/", os.sep)) or os.path.isdir(args.output)  # pathlib drops the slash
    args.output, args.frames = Path(args.output), [Path(find_path(path)) for path in args.frames]
    args.video = None if args.video is None else Path(find_path(args.video))
    args.format = "color" if args.format == "colour" else args.format
    for name, reason in useless_flags(args).items():
        if getattr(args, name):
            return f"--{name} has no use here: {reason}"
    for name in ("num_flow_updates", "warm_num_flow_updates"):
        value = getattr(args, name)
        if value is not None and value < 1:
            return f"--{name} must be at least 1; got {value}"
    for name in ("frame_rate", "color_scale"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            return f"--{name} must be positive and finite; got {value}"
    return None


def useless_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that would change nothing, each with the reason."""
    is_pair, suffix = len(args.frames) == 2, args.output.suffix.lower()
    is_video_output = suffix in WRITTEN_FORMATS and not (is_pair or args.names_folder)
    format = args.format or ("color" if is_pair and suffix == ".png" else None)
    useless = {}
    if is_pair:
        useless |= dict.fromkeys(("warm_num_flow_updates", "no_warm_start"), "two images have no pair before them")
    elif args.no_warm_start:
        useless["warm_num_flow_updates"] = "without a warm start, no pair is warm"
    if not is_video_output:
        useless["frame_rate"] = "no video is written"
    if not is_video_output and format != "color":
        useless["color_scale"] = "no colors are written"
    return useless


def predict(args: argparse.Namespace, summary: "Summary") -> tuple["FlowVideo", "FlowFileWriter | FlowVideoWriter"]:
    """Estimate the flow of every pair of frames and write it, adding to the summary what has been written.

    Raises:
        ValueError, OSError: Frames cannot be read, flow cannot be written, or the arguments do not fit the frames.
        MissingPackageError: A format needs a package that is not installed.
    """
    from tqdm.auto import tqdm

    from flow_inference.devices import choose_device
    from flow_inference.frame_changes import DUPLICATE_TOLERANCE
    from flow_inference.video import FlowVideo
    from modeling_raft.convert_raft_checkpoint import load_raft

    source = find_frames(args)
    output = open_output(args, source)
    device = choose_device(args.device)
    video = FlowVideo(
        load_raft(find_model(args.model)).eval().to(device),
        source.frames,
        num_flow_updates=args.num_flow_updates,
        warm_num_flow_updates=args.warm_num_flow_updates,
        warm_start=not (source.is_pair or args.no_warm_start),
        backward=args.backward or args.occlusion,
        max_side=args.max_side,
        min_side=args.min_side,
        duplicate_tolerance=None if source.is_pair else DUPLICATE_TOLERANCE,  # the flow of two images was asked for
        mixed_precision=args.mixed_precision,
        intensity_range=args.intensity_range,
    )
    with output, tqdm(total=source.num_pairs, unit="pair", disable=source.is_pair) as bar:
        for pair in video:
            output.write(pair)
            summary.add(pair)
            bar.update()
    if summary.pairs == 0:
        raise ValueError(f"{args.video or args.frames[0]}: flow takes two frames, and there is one")
    return video, output


@dataclass
class Source:
    """The frames to predict.

    Args:
        frames: As `FlowVideo` takes them.
        names: Names of the files of the pairs, each that of its first frame; None: files are numbered.
        num_pairs: Number of pairs; None: not known before the end.
        frame_rate: Frames per second.
        is_pair: There are just two images.
    """

    frames: Iterable[Any]
    names: list[str] | None
    num_pairs: int | None
    frame_rate: Fraction | float
    is_pair: bool = False


def find_frames(args: argparse.Namespace) -> Source:
    """Open the frames that the arguments name.

    Raises:
        ValueError, OSError: There are no such frames.
        MissingPackageError: Videos need the extra `video`.
    """
    from flow_inference.frame_sources import list_frames

    if args.video is not None and not args.video.is_dir():
        from flow_inference.video_files import VideoReader

        reader = VideoReader(args.video)
        num_pairs = None if reader.num_frames is None else reader.num_frames - 1
        return Source(reader, None, num_pairs, args.frame_rate or reader.frame_rate)
    if len(args.frames) == 2:
        return Source(args.frames, None, 1, FOLDER_RATE, is_pair=True)
    folder = args.video or args.frames[0]
    if len(args.frames) > 1:
        paths = sorted(args.frames, key=lambda path: natural_order(str(path)))
        for path in paths:
            if path.is_dir() or is_video(path):
                raise ValueError(f"{path} is no image; give images only, one folder, or one video with --video")
    elif folder.is_file() and is_video(folder):
        raise ValueError(f"{folder} is a video: give it with --video")
    elif folder.is_file():
        raise ValueError(f"{folder} is one image; flow takes two frames")
    else:
        paths = list_frames(folder)
    return Source(paths, [path.stem for path in paths], len(paths) - 1, args.frame_rate or FOLDER_RATE)


def open_output(args: argparse.Namespace, source: Source) -> "FlowFileWriter | FlowVideoWriter":
    """Open the writer of the output that the arguments name.

    Raises:
        ValueError: `--output` and `--format` do not fit together, or do not fit the frames.
        OSError: A video cannot be written there.
        MissingPackageError: Videos need the extra `video`.
    """
    from PIL import Image

    from flow_inference.outputs import FlowFileWriter, FlowVideoWriter, result_paths

    suffix, further = args.output.suffix.lower(), (args.backward, args.occlusion, args.color_scale)
    if source.is_pair:
        if suffix not in FLOW_SUFFIXES:
            raise ValueError(f"--output must end in one of {', '.join(FLOW_SUFFIXES)}; got {args.output}")
        format = args.format or ("color" if suffix == ".png" else suffix[1:])
        if FORMAT_SUFFIXES[format] != suffix:
            raise ValueError(f"--format {format} writes a {FORMAT_SUFFIXES[format]}; got {args.output}")
        files = FlowFileWriter(lambda index: args.output, format, *further)
        check_targets(args, source, files.paths(0))
        return files
    if suffix in WRITTEN_FORMATS and not args.names_folder:
        if args.format not in (None, "color"):
            raise ValueError(f"--format {args.format} needs a folder for --output; a video is of colors")
        check_targets(args, source, result_paths(args.output, args.backward, args.occlusion, suffix))
        return FlowVideoWriter(args.output, source.frame_rate, *further)
    # A folder may have a dot in its name; one that looks like the file of a single pair is a mistake.
    file_suffixes = (*FLOW_SUFFIXES, *VIDEO_SUFFIXES, *Image.registered_extensions())
    if suffix in file_suffixes and not args.names_folder:
        raise ValueError(
            f"--output must be a folder, or a video ending in one of {', '.join(WRITTEN_FORMATS)}; got {args.output}"
        )
    format = args.format or "flo"

    def path_of(index: int) -> Path:
        name = f"frame_{index + 1:06d}" if source.names is None else source.names[index]
        return args.output / f"{name}{FORMAT_SUFFIXES[format]}"

    files = FlowFileWriter(path_of, format, *further)
    if source.names is not None:
        check_targets(args, source, [path for index in range(len(source.names) - 1) for path in files.paths(index)])
    return files


def check_targets(args: argparse.Namespace, source: Source, targets: list[Path]) -> None:
    """Refuse to write over a file that is read, and one result over another.

    Raises:
        ValueError: A file would be overwritten; the message names it.
    """
    resolved = [path.resolve() for path in targets]
    if len(set(resolved)) < len(resolved):
        repeated = sorted({path.name for path in resolved if resolved.count(path) > 1})
        raise ValueError(
            f"{args.output}: several results would be written to {', '.join(repeated[:3])}, as images have almost "
            "one name; rename them"
        )
    read = {Path(path).resolve() for path in (source.frames if isinstance(source.frames, list) else [args.video])}
    if overwritten := read & set(resolved):
        raise ValueError(f"{min(overwritten)} is read, and would be overwritten; choose another --output")


@dataclass
class Summary:
    """What has been written, for a message of a few lines."""

    pairs: int = 0
    duplicates: int = 0
    cuts: list[int] = field(default_factory=list)  # numbers of the last frames of scenes, from 1
    length: float = 0.0  # sum of the mean lengths of the pairs, pixels
    longest: float = 0.0  # pixels
    shortest_side: int = 0  # of the frames, pixels
    flat: int = 0  # pairs with a frame of one color

    def add(self, pair: "VideoFlow") -> None:
        """Add a pair that has been written."""
        import torch

        self.shortest_side = min(pair.flow.shape[-2:])
        self.flat += pair.flat
        lengths = torch.linalg.vector_norm(pair.flow, dim=0)
        self.pairs += 1
        self.duplicates += pair.duplicate
        self.length += float(lengths.mean())
        self.longest = max(self.longest, float(lengths.max()))
        if pair.cut:
            self.cuts.append(pair.index + 1)

    def describe_kept(self, output: Path) -> str:
        """Return where the flow is that was written before an error; nothing where there is none."""
        pairs = "pair" if self.pairs == 1 else f"{self.pairs} pairs"
        return f" (the flow of the {pairs} before is in {output})" if self.pairs and output.exists() else ""

    def __str__(self) -> str:
        pairs = "1 pair" if self.pairs == 1 else f"{self.pairs} pairs"
        lines = [f"{pairs}, mean length {self.length / self.pairs:.2f} px, longest {self.longest:.2f} px"]
        if self.duplicates:
            lines.append(f"duplicate frames, which repeat the one before and have zero flow: {self.duplicates}")
        if self.flat:
            number = "1 pair" if self.flat == 1 else f"{self.flat} pairs"
            lines.append(f"in {number} a frame is of one color, so nothing can be matched and the flow means nothing")
        if self.cuts:
            if self.pairs == 1:
                return "\n".join([*lines, "the images have little in common, and this flow hardly means anything"])
            numbers = ", ".join(map(str, self.cuts[:10])) + (", ..." if len(self.cuts) > 10 else "")
            lines.append(f"scenes end with frame {numbers}; the flow from there to the next frame means nothing")
        return "\n".join(lines)


if __name__ == "__main__":
    main()
