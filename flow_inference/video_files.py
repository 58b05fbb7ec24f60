"""Video files as streams of RGB images, read and written by PyAV.

PyAV brings FFmpeg with it, and it reports damage, where OpenCV's reader ends as if the video did.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from flow_data.file_names import WRITTEN_FORMATS
from flow_data.optional_packages import needs_extra

with needs_extra("video"):
    import av
    import av.error

FRAME_RATE_DENOMINATOR = 10**6  # 29.97002997 as a float becomes 30000/1001 again
END_TOLERANCE = 0.5  # seconds that a video may end before the time its container gives
SEGMENT_ID = b"\x18\x53\x80\x67"  # of the part of a Matroska file that holds all but its first few bytes


class VideoReader:
    """The frames of a video file, one after the other; every `for` loop starts at the first one again.

    A frame is `(H, W, 3)` uint8, RGB, turned as the file says (phones store portraits lying on their side; mirrored
    ones are not mirrored). Sound is ignored, and so is the time between frames: where it varies, `frame_rate` is the
    mean, and a video written with it lasts as long as this one. Pixels are taken to be square.

    Damage is an error where FFmpeg detects it, which it mostly does: a few overwritten bytes may decode to other
    images. Frames just before the damage may be wrong already, since they are coded as differences to a later one. A
    file that was cut off is an error if its container gives the length, as `.mp4`, `.mov`, `.mkv` and `.webm` do;
    `.gif`, `.ts` and raw streams just end.

    Args:
        path: Of the file.

    Attributes:
        frame_rate: Frames a second.
        num_frames: The number of frames that the container gives, or None. It is good for a progress bar only, since
            it includes the parts of a video that a phone has trimmed.
        size: Height and width of the stored frames in pixels, before they are turned.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no video, holds no moving images, or its beginning or index is damaged.
    """

    frame_rate: Fraction
    num_frames: int | None
    size: tuple[int, int]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _open_stream(self.path) as (_, stream):
            frame_rate = stream.average_rate or stream.guessed_rate
            if not frame_rate:
                raise ValueError(f"{self.path}: the video does not say how many frames a second it has")
            self.frame_rate = frame_rate
            self.num_frames = stream.frames or None
            self.size = (stream.height, stream.width)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decode frame by frame, with no more of the video in memory than the decoder needs.

        Raises:
            ValueError: As `frames_from` raises it.
        """
        return self.frames_from(0)

    def frames_from(self, start: int) -> Iterator[np.ndarray]:
        """Decode frame by frame, and yield those from one index on.

        The frames before it are decoded, too, since their index is not certain otherwise, but not converted to RGB.

        Args:
            start: Index of the first frame that is yielded, from 0.

        Raises:
            ValueError: The file is damaged or was cut off, raised after the frames before that; or frames change in
                size.
        """
        count, shape = 0, None
        with _open_stream(self.path) as (container, stream):
            stream.thread_type = "AUTO"  # all cores
            try:
                for frame in _decode(container, stream):
                    if count < start:
                        count += 1
                        continue
                    image = _to_rgb(frame)
                    if shape not in (None, image.shape):
                        raise ValueError(
                            f"{self.path}: frame {count} (from 0) is {_size(image.shape)}, those before it are "
                            f"{_size(shape)} (height x width); scale the video to one size first"
                        )
                    shape = image.shape
                    yield image
                    count += 1
            except (av.error.FFmpegError, _DamageError) as error:
                raise ValueError(
                    f"{self.path}: damaged or cut off after {count} frames ({_reason(error)}); copy the file again, "
                    "or have ffmpeg make a new video of what is left"
                ) from error
        if count == 0:
            raise ValueError(f"{self.path}: the video has no frames")


class VideoWriter:
    """Write images as an H.264 video that players and browsers show.

        with VideoWriter("flow.mp4", frame_rate=25) as video:
            video.write(image)

    Images that have been written are not lost, except for the last seconds. Until the end they are in
    `PATH.partial.mp4` beside the file, which can be played at any time, also after the process was killed or the disk
    was full. When the `with` block ends, also by an error or Ctrl-C, it becomes the file (both exist for a moment),
    with the index at the front, so that browsers start before they have received all of it.

    The pixel format (yuv420p, the only one that plays everywhere) stores color at half the resolution: edges of flow
    colors bleed by a pixel. Its sides are even, so the last column or row of odd sizes is repeated.

    Args:
        path: Ends in one of WRITTEN_FORMATS; folders are made.
        frame_rate: Frames a second.
        crf: Constant rate factor of x264: 0 is lossless, 18 looks so, and each 6 more halve the size.

    Raises:
        ValueError: Unknown suffix, or a frame rate that is no positive number.
        OSError: The file cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], frame_rate: Fraction | float, crf: int = 18) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in WRITTEN_FORMATS:
            raise ValueError(f"{self.path}: a video is written as one of {', '.join(WRITTEN_FORMATS)}")
        if not (math.isfinite(frame_rate) and frame_rate > 0):
            raise ValueError(f"{self.path}: frame_rate must be a positive number; got {frame_rate}")
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path}: is a folder; the video needs the name of a file")
        self.frame_rate = Fraction(frame_rate).limit_denominator(FRAME_RATE_DENOMINATOR)
        self.crf = crf
        self.partial = self.path.with_name(f"{self.path.name}.partial.mp4")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.write_bytes(b"")  # PyAV opens it with the first image only, which is late for an error
        self._shape: tuple[int, ...] | None = None
        self._stream: Any = None
        self._failed = self._closed = False
        with self._naming_the_file():
            # Fragments can be played without the index, which a killed process does not write.
            options = {"movflags": "hybrid_fragmented", "flush_packets": "1"}
            self._container = av.open(_url(self.partial), "w", format="mp4", container_options=options)

    def write(self, image: np.ndarray) -> None:
        """Append an image.

        Args:
            image: `(H, W, 3)` uint8, RGB, all of one size.

        Raises:
            ValueError: It is no such image, or its size differs from that of the first.
            OSError: It cannot be written, because the disk is full, for example.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"{self.path}: images must be (H, W, 3) uint8; got {image.shape} {image.dtype}")
        if self._shape not in (None, image.shape):
            raise ValueError(
                f"{self.path}: all images must have one size; got {_size(image.shape)} after {_size(self._shape)} "
                "(height x width)"
            )
        if self._closed or self._failed:
            raise ValueError(f"{self.path}: the video is closed")
        height, width, _ = self._shape = image.shape
        even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        # Unless the file says so, players assume BT.709 in large images and BT.601 in small ones.
        frame = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        with self._naming_the_file():
            if self._stream is None:
                self._stream = self._add_stream(*even.shape[:2])
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file and give it its name; without an image there is no file.

        Raises:
            OSError: It cannot be finished; the partial file has what could be written.
        """
        if self._closed:
            return
        self._closed = True
        if self._failed:
            with suppress(av.error.FFmpegError):
                self._container.close()
            return
        with self._naming_the_file():
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if self._stream is not None:
                _copy_with_index_first(self.partial, self.path)
            self.partial.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _add_stream(self, height: int, width: int) -> Any:
        # A fragment ends at the next keyframe, and the frames in the encoder's lookahead are in no file yet.
        second = str(max(1, round(self.frame_rate)))
        options = {"crf": str(self.crf), "g": second, "rc-lookahead": "10", "bf": "2"}
        stream: Any = self._container.add_stream("libx264", rate=self.frame_rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # 16 to 235
        return stream

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, OSError) as error:
            self._failed = True
            rest = f"; {self.partial} has the images before that" if self._stream is not None else ""
            raise OSError(f"{self.path}: the video cannot be written ({_reason(error)}){rest}") from error


class _DamageError(Exception):
    """Damage that FFmpeg only marks before it reads on."""


@contextmanager
def _open_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream that a player would show."""
    with open(path, "rb"):
        pass  # for Python's errors, which name the file and what is wrong
    try:
        container = av.open(_url(path), metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: no video, or its beginning or index is damaged ({_reason(error)})") from error
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams}))
            found = f"only {kinds}" if kinds else "nor anything else: its index may be damaged"
            raise ValueError(f"{path}: must be a video, and there are no moving images in it, {found}")
        shown = container.streams.best("video")  # FFmpeg's rule, as in players
        stream = shown if shown in streams else streams[0]
        if stream.codec_context is None:
            raise ValueError(f"{path}: FFmpeg has no decoder for its images, or its beginning or index is damaged")
        yield container, stream


def _is_cover(stream: Any) -> bool:
    """Return whether a stream is the cover image of a song."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decode(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Yield all frames that are certainly whole, then raise FFmpeg's error or `_DamageError` if more are missing."""
    packets = _demux(container, stream)
    reached = -math.inf
    while True:
        try:
            packet = next(packets, None)
        except (av.error.FFmpegError, _DamageError):
            # Frames in the decoder may belong after a lost frame: packets come in decoding order, which differs from
            # the order of display, but no frame is displayed before the time at which it is decoded.
            buffered = _whole(stream.decode(None))
            yield from (frame for frame in buffered if frame.pts is not None and frame.pts <= reached)
            raise
        if packet is None:
            return
        reached = packet.dts if packet.dts is not None else reached
        yield from _whole(stream.decode(packet))


def _demux(container: Any, stream: Any) -> Iterator[av.Packet]:
    """Yield all coded frames, then an empty packet, which drains the decoder.

    Raises:
        _DamageError: A frame is cut short, or frames are missing at the end.
    """
    num_packets, end = 0, 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _DamageError("a frame is cut short")
        if packet.size == 0:
            if "mp4" in container.format.name and num_packets < len(stream.index_entries):
                raise _DamageError(f"its index has {len(stream.index_entries)}")
            if "matroska" in container.format.name and container.size < _matroska_size(container.name):
                raise _DamageError(f"it has {container.size} of {_matroska_size(container.name)} bytes")
            if end < _promised_end(container, stream) - END_TOLERANCE:
                raise _DamageError(f"it ends after {end:.1f} of {_promised_end(container, stream):.1f} seconds")
        elif packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        num_packets += packet.size > 0
        yield packet


def _whole(frames: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    for frame in frames:
        if frame.is_corrupt:
            raise _DamageError("a frame is decoded in part only")
        yield frame


def _matroska_size(url: str) -> int:
    """Return the bytes that a Matroska or WebM file should have; 0 if it does not say (RFC 9559, RFC 8794)."""
    with open(url.removeprefix("file:"), "rb") as file:
        head = file.read(4096)
    place = head.find(SEGMENT_ID) + len(SEGMENT_ID)
    if place < len(SEGMENT_ID) or not any(head[place : place + 1]):
        return 0
    length = 9 - head[place].bit_length()  # the first 1 of the number says how many bytes it has
    largest = 2 ** (7 * length) - 1
    size = int.from_bytes(head[place : place + length], "big") & largest
    return place + length + size if size < largest else 0  # the largest stands for unknown, as in a live stream


def _promised_end(container: Any, stream: Any) -> float:
    """Return the seconds at which the stream ends according to its entry in Matroska; 0 without an entry.

    The entry is a tag, which programs that cut a video may leave unchanged; then the container is shorter than that.
    """
    tag = stream.metadata.get("DURATION", "").rstrip("\0 ").split(":")
    if len(tag) != 3 or container.duration is None:
        return 0.0
    with suppress(ValueError):
        return min(int(tag[0]) * 3600 + int(tag[1]) * 60 + float(tag[2]), container.duration / av.time_base)
    return 0.0


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as in numpy
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _copy_with_index_first(source: Path, target: Path) -> None:
    """Copy the stream of one file into another, which gets its name when it is complete."""
    unfinished = target.with_name(f"{target.name}.unfinished")
    container_format = WRITTEN_FORMATS[target.suffix.lower()]
    options = {} if container_format == "matroska" else {"movflags": "faststart"}
    try:
        with (
            av.open(_url(source)) as read,
            av.open(_url(unfinished), "w", format=container_format, container_options=options) as written,
        ):
            stream = written.add_stream_from_template(read.streams.video[0])
            for packet in read.demux(video=0):
                if packet.size > 0:  # the last one is the end
                    packet.stream = stream
                    written.mux(packet)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _url(path: Path) -> str:
    """Return a path as FFmpeg takes it, which reads a colon as the end of a protocol's name."""
    return f"file:{path}"


def _size(shape: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, (shape or ())[:2]))


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
