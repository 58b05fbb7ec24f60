"""What the page (app.py) shows: predictions as images, files and sentences.

Torch and whatever else takes seconds is imported by the functions, so that the page is there before.
"""

import functools
import json
import re
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flow_data.optional_packages import MissingPackageError

if TYPE_CHECKING:
    import numpy as np

    from modeling_raft import RaftForOpticalFlow

SERVER_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s/:;,'\"()]+/)+")  # the folders of an absolute path
OUT_OF_MEMORY = "Choose a smaller longest side."  # advice
PAIR_FORMATS = {"flo": "flow.flo", "npz": "flow.npz", "kitti": "flow_kitti.png", "color": "flow_color.png"}
SHOWN_SIDE = 1024  # pixels of the images in the page
MAX_VIDEO_SIDE = 960  # pixels: larger frames of videos are reduced


class PairJob(NamedTuple):
    """The files of a result of two frames.

    Args:
        folder: With `flow.npy`, `(2, H, W)` in pixels, and `VIEW.jpg`, the images of the page.
        size: (height, width) of the frames.
        views: Keys of `draw_views` that there are.
    """

    folder: Path
    size: tuple[int, int]
    views: list[str]


class Settings(NamedTuple):
    """What a visitor has chosen, for both kinds of predictions."""

    num_flow_updates: int
    max_side: int
    mixed_precision: str | None  # None: as `FlowVideo` chooses
    model: str
    weights: str | None  # an uploaded file

    def model_name(self) -> str:
        """Return the name of the model as Markdown, for a sentence."""
        return (
            escape_markdown(Path(self.weights).name if self.weights else self.model.strip()) or "the shipped weights"
        )

    def source(self) -> str:
        """Return the model as the expression that Python code loads it from."""
        if self.weights:
            return repr(Path(self.weights).name)
        return repr(self.model.strip()) if self.model.strip() else "pretrained_path()"


def describe_error(error: Exception) -> str:
    """Return a sentence for the page about an error, in which no folder of the server is named."""
    from flow_data.out_of_memory import explain_out_of_memory

    message = explain_out_of_memory(error, "the prediction", OUT_OF_MEMORY)
    if message is None and isinstance(error, FileNotFoundError):
        message = f"{error}. Uploads and results are deleted after an hour: give the files again."
    if message is None and isinstance(error, (ValueError, OSError, MissingPackageError)):
        message = str(error)
    if message is None:
        traceback.print_exception(error)
        message = "An error occurred in the program; the terminal in which it runs has the details."
    message = SERVER_PATH.sub("", message)
    return message if message.endswith((".", "?", "!")) else f"{message}."


def predict_two_frames(
    path1: str, path2: str, settings: Settings, model: "RaftForOpticalFlow", backward: bool, folder: Path
) -> tuple[PairJob, str, "np.ndarray"]:
    """Predict as predict_flow.py does, and write the images of the page and the files to download.

    Returns:
        The result, a summary, and the color wheel.

    Raises:
        ValueError, OSError: An image cannot be read, or they differ in size.
    """
    import numpy as np
    from PIL import Image

    from flow_data.visualize import draw_scale, longest_vector
    from flow_inference.outputs import FlowFileWriter
    from flow_inference.pair_images import draw_views
    from flow_inference.video import FlowVideo

    start = time.perf_counter()
    video = FlowVideo(
        model,
        [path1, path2],
        num_flow_updates=settings.num_flow_updates,
        warm_start=False,
        backward=backward,
        max_side=settings.max_side,
        duplicate_tolerance=None,
        mixed_precision=settings.mixed_precision,
    )
    (pair,) = video
    seconds = time.perf_counter() - start
    flow, (height, width) = pair.flow.cpu(), pair.flow.shape[-2:]
    np.save(folder / "flow.npy", flow.numpy())
    views = draw_views(pair, SHOWN_SIDE)
    for name, image in views.items():
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=90, subsampling=0)
    notes = []
    for format, name in PAIR_FORMATS.items():
        writer = FlowFileWriter(functools.partial(_always, folder / name), format)
        try:
            writer.write(pair)
        except ValueError as error:  # the format can hold none of it
            notes.append(f"{error}.")
        if loss := writer.describe_loss():
            notes.append(f"{name}: {loss}.")
    lengths = np.hypot(*flow.numpy())
    summary = (
        f"**{width} x {height} px, {pair.num_flow_updates} updates, flow estimated in {seconds:.1f} s.** Mean length "
        f"{lengths.mean():.2f} px, longest {lengths.max():.2f} px. From {escape_markdown(Path(path1).name)} to "
        f"{escape_markdown(Path(path2).name)}, by {settings.model_name()}."
    )
    if pair.cut:
        notes.append("The frames have little in common, and this flow hardly means anything.")
    if pair.flat:
        notes.append("A frame is of one color, so nothing can be matched and the flow means nothing.")
    if video.mapped_range is not None:
        notes.append("Intensities {:g} to {:g} of the frames were mapped to 0 to 255.".format(*video.mapped_range))
    return PairJob(folder, (height, width), list(views)), " ".join([summary, *notes]), draw_scale(longest_vector(flow))


def escape_markdown(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!<>|~$-])", r"\\\1", text)


def _always(path: Path, index: int) -> Path:
    return path


def pixel_at(job: PairJob, x: float, y: float) -> tuple[str, "np.ndarray", "np.ndarray"]:
    """Describe the flow of a pixel, and mark it in frame 1 and its place in frame 2.

    Raises:
        ValueError: There is no such pixel.
    """
    import numpy as np
    from PIL import Image

    from flow_inference.pair_images import mark_pixel

    height, width = job.size
    if x is None or y is None or not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"pixel must be within 0 to {width - 1} and 0 to {height - 1}; got {x}, {y}")
    x, y = int(x), int(y)
    u, v = (float(value) for value in np.load(job.folder / "flow.npy", mmap_mode="r")[:, y, x])
    leaves = "" if -0.5 <= x + u < width - 0.5 and -0.5 <= y + v < height - 0.5 else ", outside of the frame"
    text = (
        f"Pixel ({x}, {y}): flow (u, v) = ({u:+.2f}, {v:+.2f}) px, length {np.hypot(u, v):.2f} px; "
        f"in frame 2 at ({x + u:.2f}, {y + v:.2f}){leaves}."
    )
    frames = [np.asarray(Image.open(job.folder / f"frame{number}.jpg")) for number in (1, 2)]
    return text, mark_pixel(frames[0], x, y, job.size), mark_pixel(frames[1], x + u, y + v, job.size)


def python_code(path1: str, path2: str, settings: Settings, backward: bool) -> str:
    """The Python code that predicts the same."""
    names = ", ".join(json.dumps(Path(path).name, ensure_ascii=False) for path in (path1, path2))
    options = [f"num_flow_updates={settings.num_flow_updates}", f"max_side={settings.max_side}"]
    options += ["backward=True"] if backward else []
    options += [f'mixed_precision="{settings.mixed_precision}"'] if settings.mixed_precision else []
    options.append("duplicate_tolerance=None")
    return (
        "from flow_inference import FlowVideo, pretrained_path\n"
        "from modeling_raft.convert_raft_checkpoint import load_raft\n\n"
        f"model = load_raft({settings.source()})\n"
        f"(pair,) = FlowVideo(model, [{names}], {', '.join(options)})\n"
        "flow = pair.flow  # (2, height, width), x to the right, then y down, in pixels\n"
    )


def video_frames(reader: Any, max_frames: int) -> Iterator["np.ndarray"]:
    """Yield the first frames of a video, those that are too large reduced."""
    from flow_inference.pair_images import resize_image

    for frame in islice(reader, max_frames):
        yield resize_image(frame, MAX_VIDEO_SIDE) if max(frame.shape[:2]) > MAX_VIDEO_SIDE else frame


def predict_video(
    path: str,
    settings: Settings,
    model: "RaftForOpticalFlow",
    zip_format: str | None,
    folder: Path,
    stop: threading.Event,
    report: Callable[[int, int | None], None],
    max_frames: int,
) -> tuple[str, list[Path], str]:
    """Predict as predict_flow.py --video does, and write the video of the page and the files to download.

    Args:
        path: Of the video.
        settings: As they were chosen.
        model: What predicts.
        zip_format: Of a file of flow for each pair, as `FORMAT_SUFFIXES` has it; None: none.
        folder: To write to.
        stop: Ends the prediction, when it is set, with what there is.
        report: Called after each pair with their number so far, and the number of all if it is known.
        max_frames: Frames after these are ignored.

    Returns:
        The timeline; the video of the page, the video of colors, perhaps the archive, or nothing if it was stopped
        before the first pair; and what went wrong, or was left out.

    Raises:
        ValueError, OSError: It is no video, or it has not two frames.
    """
    from flow_data.flow_io import FORMAT_SUFFIXES
    from flow_inference.cancellation import CancelledError, cancellable
    from flow_inference.outputs import FlowFileWriter, FlowVideoWriter
    from flow_inference.pair_images import draw_beside
    from flow_inference.timeline import describe_timeline, draw_timeline, measure_motion
    from flow_inference.video import FlowVideo
    from flow_inference.video_files import VideoReader, VideoWriter

    reader = VideoReader(path)
    total = None if reader.num_frames is None else min(reader.num_frames, max_frames) - 1
    video = FlowVideo(
        model,
        video_frames(reader, max_frames),
        num_flow_updates=settings.num_flow_updates,
        max_side=settings.max_side,
        mixed_precision=settings.mixed_precision,
    )
    shown, colors, archive = folder / "frames_and_flow.mp4", folder / "flow.mp4", folder / "flow.zip"
    files = None
    if zip_format is not None:
        suffix = FORMAT_SUFFIXES[zip_format]
        files = FlowFileWriter(lambda index: folder / f"frame_{index + 1:06d}{suffix}", zip_format)
    motions, notes = [], []
    try:
        with (
            cancellable(model, stop.is_set),
            VideoWriter(shown, reader.frame_rate) as both,
            FlowVideoWriter(colors, reader.frame_rate) as writer,
            zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed,
        ):
            for pair in video:
                writer.write(pair)
                both.write(draw_beside(pair.frame1, pair.flow, writer.scale))
                if files is not None:
                    files.write(pair)
                    (written,) = files.paths(pair.index)
                    packed.write(written, written.name)
                    written.unlink()
                motions.append(measure_motion(pair))
                report(len(motions), total)
                if stop.is_set():
                    raise CancelledError
    except CancelledError:
        notes.append(f"Stopped after {len(motions)} of {total or 'an unknown number of'} pairs.")
    except (ValueError, OSError) as error:  # damage in the middle of a video, or two sizes
        if not motions:
            raise
        notes.append(f"{describe_error(error)} The result is of the {len(motions)} pairs before.")
    if not motions:
        if not notes:
            raise ValueError(f"{Path(path).name}: flow takes two frames, and there is one")
        return "", [], " ".join(notes)
    if not stop.is_set() and len(motions) + 1 == max_frames and (reader.num_frames or max_frames + 1) > max_frames:
        notes.append(f"This is of the first {max_frames} frames.")
    if files is not None and (loss := files.describe_loss()):
        notes.append(f"{loss}.")
    timeline = f"{draw_timeline(motions, reader.frame_rate)}<p>{describe_timeline(motions, reader.frame_rate)}</p>"
    return timeline, [shown, colors, *([archive] if files is not None else [])], " ".join(notes)
