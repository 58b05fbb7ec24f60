"""Flow of two images, of one sequence of frames or of one video, as predict_flow.py reads and writes it."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flow_data.file_names import VIDEO_SUFFIXES, WRITTEN_FORMATS, is_video, natural_order
from flow_data.flow_io import FLOW_SUFFIXES, FORMAT_SUFFIXES
from flow_inference.frame_sources import list_frames
from flow_inference.outputs import FlowFileWriter, FlowVideoWriter, result_paths
from flow_inference.video import VideoFlow

FOLDER_RATE = 24  # frames per second of a video that is made of a folder


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
                raise ValueError(f"{path} is no image; give images alone, or videos and folders alone")
    elif folder.is_file() and is_video(folder):
        raise ValueError(f"{folder} is a video: give it with --video")
    elif folder.is_file():
        raise ValueError(f"{folder} is one image; flow takes two frames")
    else:
        paths = list_frames(folder)
    return Source(paths, [path.stem for path in paths], len(paths) - 1, args.frame_rate or FOLDER_RATE)


def open_output(args: argparse.Namespace, source: Source) -> FlowFileWriter | FlowVideoWriter:
    """Open the writer of the output that the arguments name.

    Raises:
        ValueError: `--output` and `--format` do not fit together, or do not fit the frames.
        OSError: A video cannot be written there.
        MissingPackageError: Videos need the extra `video`.
    """
    suffix, further = args.output.suffix.lower(), (args.backward, args.occlusion, args.color_scale)
    if source.is_pair:
        if suffix not in FLOW_SUFFIXES:
            raise ValueError(f"--output must end in one of {', '.join(FLOW_SUFFIXES)}; got {args.output}")
        format = args.format or ("color" if suffix == ".png" else suffix[1:])
        if FORMAT_SUFFIXES[format] != suffix:
            raise ValueError(f"--format {format} writes a {FORMAT_SUFFIXES[format]}; got {args.output}")
        files = FlowFileWriter(lambda index: args.output, format, *further, args.confidence)
        check_targets(args, source, files.paths(0))
        return files
    if suffix in WRITTEN_FORMATS and not args.names_folder:
        if args.confidence:
            raise ValueError("--confidence needs a folder for --output; a video is of colors")
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

    files = FlowFileWriter(path_of, format, *further, args.confidence)
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

    def add(self, pair: VideoFlow) -> None:
        """Add a pair that has been written."""
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
