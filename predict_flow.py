"""Flow of two images, of a sequence of frames, or of a video.

    python predict_flow.py --model DIR_OR_REPO frame1.png frame2.png --output flow.flo
    python predict_flow.py --model DIR_OR_REPO frames/ --output flow/ --format kitti --backward --occlusion
    python predict_flow.py --model DIR_OR_REPO frames/*.png --output flow/
    python predict_flow.py --model DIR_OR_REPO --video in.mp4 --output flow.mp4

Flow says for every pixel of frame 1 how far it moves until frame 2: x to the right, then y down, in pixels of the
frames. Backward flow says it for every pixel of frame 2, until frame 1. An occlusion mask is white where frame 2 does
not show the pixel of frame 1. Colour pictures: the hue is the direction, the saturation the length.

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
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from flow_data.file_names import find_path
from flow_data.flow_io import FLOW_SUFFIXES
from flow_data.out_of_memory import explain_out_of_memory
from flow_data.pairing import natural_order
from flow_inference.devices import choose_device
from flow_inference.frame_sources import list_frames, refuse_url
from flow_inference.held_frames import TOLERANCE
from flow_inference.outputs import SUFFIXES, FlowFiles, FlowFilms, result_paths
from flow_inference.video import WARM_UPDATES, FlowVideo, VideoFlow
from flow_inference.video_files import VIDEO_SUFFIXES, WRITTEN_FORMATS, VideoReader, is_video
from modeling_raft.convert_raft_checkpoint import load_raft

SMALL_SIDE = 128  # pixels: published weights have not been trained on less
FOLDER_RATE = 24  # frames a second of a film made of a folder
OUT_OF_MEMORY = (  # what helps then
    "Estimate on smaller frames with --max_side. Correlation is computed on demand where memory looks too short for "
    'all pairs of pixels; "correlation": "on_demand" in config.json of the model\'s folder does so always.'
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    seen = Summary()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends it as Ctrl-C does
    try:
        source = find_frames(args)
        output = open_output(args, source)
        device = choose_device(args.device)
        model = load_raft(args.model).eval().to(device)
        video = FlowVideo(
            model,
            source.frames,
            num_flow_updates=args.num_flow_updates,
            warm_num_flow_updates=args.warm_num_flow_updates,
            warm_start=not (source.is_pair or args.no_warm_start),
            backward=args.backward or args.occlusion,
            max_side=args.max_side,
            min_side=args.min_side,
            held_tolerance=None if source.is_pair else TOLERANCE,  # who asks for the flow of two images wants it
            mixed_precision=args.mixed_precision,
            intensity_range=args.intensity_range,
        )
        with output, tqdm(total=source.num_pairs, unit="pair", disable=source.is_pair) as bar:
            for pair in video:
                output.write(pair)
                seen.add(pair)
                bar.update()
        if seen.pairs == 0:
            raise ValueError(f"{args.video or args.frames[0]}: flow takes two frames, and there is one")
    except Exception as error:
        message = explain_out_of_memory(error, "the prediction", OUT_OF_MEMORY)
        if message is None and not isinstance(error, (ValueError, OSError)):
            raise
        sys.exit(f"predict_flow.py: error: {message or error}{seen.kept_in(args.output)}")
    except KeyboardInterrupt:
        sys.exit(f"predict_flow.py: stopped{seen.kept_in(args.output)}")
    print(f"{args.output}: {seen}")
    if video.mapped_range is not None:
        low, high = video.mapped_range
        print(f"intensities {low:g} to {high:g} of the frames were mapped to 0 to 255 (--intensity_range LO HI)")
    if 0 < seen.shortest_side < SMALL_SIDE and args.min_side is None:
        print(f"frames below {SMALL_SIDE} px have mostly better flow with --min_side 256")
    if isinstance(output, FlowFiles) and (loss := output.describe_loss()):
        print(loss)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    flow_files, films = ", ".join(FLOW_SUFFIXES), ", ".join(WRITTEN_FORMATS)
    add("frames", nargs="*", metavar="FRAMES", help="two images of one size; or a sequence: a folder of images, or "
        "more than two images, which are taken in natural order of their names")  # fmt: skip
    add("--video", metavar="IN", help="a video file, in the place of FRAMES")
    add("--model", required=True, help="folder, repository id, or file of weights of RAFT")
    add("--output", required=True, help=f"of two images: a file ({flow_files}; .png is a colour picture); "
        f"of a sequence or a video: a folder for a file of each pair, or a video of colours ({films})")  # fmt: skip
    add("--format", choices=list(SUFFIXES), help="of the files in a folder (default: flo); of a .png: colour (the "
        "default) or kitti, 16-bit flow")  # fmt: skip
    add("--backward", action="store_true", help="write flow from frame 2 to frame 1, too, as *_backward")
    add("--occlusion", action="store_true", help="write masks, too, as *_occlusion; white is occluded")
    add("--num_flow_updates", type=int, help="more are slower and mostly better; default: as the model's "
        "configuration says, which is 12 mostly")  # fmt: skip
    add("--warm_num_flow_updates", type=int, help="of the pairs of a video that start from the flow of the pair "
        f"before; default: {WARM_UPDATES}, or --num_flow_updates if less")  # fmt: skip
    add("--no_warm_start", action="store_true", help="estimate each pair of a video on its own")
    add("--max_side", type=int, metavar="PX", help="estimate on frames reduced to this longer side; the flow is that "
        "of the frames as they are")  # fmt: skip
    add("--min_side", type=int, metavar="PX", help="estimate on frames enlarged to this shorter side, which helps "
        f"with frames below {SMALL_SIDE} px")  # fmt: skip
    add("--intensity_range", type=float, nargs=2, metavar=("LO", "HI"), help="intensities that become black and "
        "white; default: 0 to 255 of 8-bit frames, the lowest and highest of the first two of 16 bits")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1, mps, xpu; default: the GPU if there is one")
    add("--mixed_precision", choices=["no", "bf16", "fp16"], help="default: bf16 in a video with warm start where the "
        "hardware is quick at it, else no")  # fmt: skip
    add("--frame_rate", type=float, help=f"of a video of colours; default: the video's own, {FOLDER_RATE} of a folder")
    add("--colour_scale", type=float, metavar="PX", help="length that is fully saturated; default: the longest of "
        "each picture; in a video of colours it follows the flow")  # fmt: skip
    args = parser.parse_args(argv)
    if args.video is not None and args.frames:
        parser.error("give either FRAMES or --video, not both")
    if args.video is None and not args.frames:
        parser.error("give two images, a folder of frames, more than two images, or --video")
    for path in filter(None, [*args.frames, args.video, args.output]):
        try:
            refuse_url(path)
        except ValueError as error:
            parser.error(str(error))
    args.names_folder = args.output.endswith(("/", os.sep)) or os.path.isdir(args.output)  # pathlib drops the slash
    args.output, args.frames = Path(args.output), [Path(find_path(path)) for path in args.frames]
    args.video = None if args.video is None else Path(find_path(args.video))
    for name, reason in useless_flags(args).items():
        if getattr(args, name):
            parser.error(f"--{name} has no use here: {reason}")
    for name in ("num_flow_updates", "warm_num_flow_updates"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1; got {value}")
    for name in ("frame_rate", "colour_scale"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} must be positive and finite; got {value}")
    return args


def useless_flags(args: argparse.Namespace) -> dict[str, str]:
    """Flags that would change nothing -> why."""
    is_pair, suffix = len(args.frames) == 2, args.output.suffix.lower()
    is_film = suffix in WRITTEN_FORMATS and not (is_pair or args.names_folder)
    is_coloured = is_film or (args.format or "colour" if is_pair and suffix == ".png" else args.format) == "colour"
    useless = {}
    if is_pair:
        useless |= dict.fromkeys(("warm_num_flow_updates", "no_warm_start"), "two images have no pair before them")
    elif args.no_warm_start:
        useless["warm_num_flow_updates"] = "without a warm start, no pair is warm"
    if not is_film:
        useless["frame_rate"] = "no video is written"
    if not is_coloured:
        useless["colour_scale"] = "no colours are written"
    return useless


@dataclass
class Source:
    """Frames, and what they are called.

    Args:
        frames: What `FlowVideo` takes.
        names: Of the first frame of each pair; None: they are numbered.
        num_pairs: None: not known before the end.
        frame_rate: Frames a second.
        is_pair: Just two images.
    """

    frames: Iterable[Any]
    names: list[str] | None
    num_pairs: int | None
    frame_rate: Fraction | float
    is_pair: bool = False


def find_frames(args: argparse.Namespace) -> Source:
    """The frames that the arguments name."""
    if args.video is not None and not args.video.is_dir():
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


def open_output(args: argparse.Namespace, source: Source) -> FlowFiles | FlowFilms:
    """Where the arguments want flow to be written.

    Raises:
        ValueError: What `--output` and `--format` say does not fit together, or the frames.
    """
    suffix, further = args.output.suffix.lower(), (args.backward, args.occlusion, args.colour_scale)
    if source.is_pair:
        if suffix not in FLOW_SUFFIXES:
            raise ValueError(f"--output must end in one of {', '.join(FLOW_SUFFIXES)}; got {args.output}")
        format = args.format or ("colour" if suffix == ".png" else suffix[1:])
        if SUFFIXES[format] != suffix:
            raise ValueError(f"--format {format} writes a {SUFFIXES[format]}; got {args.output}")
        files = FlowFiles(lambda index: args.output, format, *further)
        check_targets(args, source, files.paths(0))
        return files
    if suffix in WRITTEN_FORMATS and not args.names_folder:
        if args.format not in (None, "colour"):
            raise ValueError(f"--format {args.format} needs a folder for --output; a video is of colours")
        check_targets(args, source, result_paths(args.output, args.backward, args.occlusion, suffix))
        return FlowFilms(args.output, source.frame_rate, *further)
    # A folder may have a dot in its name; one that looks like the file of a single pair is a mistake.
    file_suffixes = (*FLOW_SUFFIXES, *VIDEO_SUFFIXES, *Image.registered_extensions())
    if suffix in file_suffixes and not args.names_folder:
        raise ValueError(
            f"--output must be a folder, or a video ending in one of {', '.join(WRITTEN_FORMATS)}; got {args.output}"
        )
    format = args.format or "flo"

    def path_of(index: int) -> Path:
        name = f"frame_{index + 1:06d}" if source.names is None else source.names[index]
        return args.output / f"{name}{SUFFIXES[format]}"

    files = FlowFiles(path_of, format, *further)
    if source.names is not None:
        check_targets(args, source, [path for index in range(len(source.names) - 1) for path in files.paths(index)])
    return files


def check_targets(args: argparse.Namespace, source: Source, targets: list[Path]) -> None:
    """Refuse to write what is read, and one result over another.

    Raises:
        ValueError: It would be; the message names the file.
    """
    resolved = [path.resolve() for path in targets]
    if len(set(resolved)) < len(resolved):
        doubled = sorted({path.name for path in resolved if resolved.count(path) > 1})
        raise ValueError(
            f"{args.output}: several results would be written to {', '.join(doubled[:3])}, as pictures have almost "
            "one name; rename them"
        )
    read = {Path(path).resolve() for path in (source.frames if isinstance(source.frames, list) else [args.video])}
    if overwritten := read & set(resolved):
        raise ValueError(f"{min(overwritten)} is read, and would be overwritten; choose another --output")


@dataclass
class Summary:
    """What was seen of the flow, in a few words."""

    pairs: int = 0
    held: int = 0
    cuts: list[int] = field(default_factory=list)
    length: float = 0.0  # sum of the pairs' means, pixels
    longest: float = 0.0  # pixels
    shortest_side: int = 0  # of the frames, pixels
    flat: int = 0  # pairs with a frame of one color

    def add(self, pair: VideoFlow) -> None:
        self.shortest_side = min(pair.flow.shape[-2:])
        self.flat += pair.flat
        lengths = torch.linalg.vector_norm(pair.flow, dim=0)
        self.pairs += 1
        self.held += pair.held
        self.length += float(lengths.mean())
        self.longest = max(self.longest, float(lengths.max()))
        if pair.cut:
            self.cuts.append(pair.index + 1)

    def kept_in(self, output: Path) -> str:
        pairs = "pair" if self.pairs == 1 else f"{self.pairs} pairs"
        return f" (the flow of the {pairs} before is in {output})" if self.pairs and output.exists() else ""

    def __str__(self) -> str:
        pairs = "1 pair" if self.pairs == 1 else f"{self.pairs} pairs"
        lines = [f"{pairs}, mean length {self.length / self.pairs:.2f} px, longest {self.longest:.2f} px"]
        if self.held:
            lines.append(f"held frames, which repeat the one before and have zero flow: {self.held}")
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
