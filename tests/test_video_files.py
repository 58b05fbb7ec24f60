"""Video files: what is written is read back, what was damaged is named, and nothing that was written is lost."""

import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from conftest import PROJECT

from flow_data.file_names import VIDEO_SUFFIXES, WRITTEN_FORMATS, is_video
from flow_inference.video_files import VideoReader, VideoWriter

FRAME_RATE = Fraction(24000, 1001)
LOSS = 5  # gray levels that coding may cost in the mean of a frame


def moving_pattern(num_frames, height=96, width=128):
    """Frames `(N, H, W, 3)` of a texture that moves 3 pixels a frame; its brightness varies, as color is coarse."""
    texture = np.random.default_rng(0).normal(0, 1, (height, width + 3 * num_frames))
    texture = cv2.GaussianBlur(texture, (0, 0), 2)
    texture = np.clip(128 + 45 * texture / texture.std() + np.array([[[-30]], [[0]], [[30]]]), 0, 255)
    texture = np.moveaxis(texture, 0, 2).astype(np.uint8)
    return np.stack([texture[:, 3 * i : 3 * i + width] for i in range(num_frames)])


def write_video(path, frames, frame_rate=FRAME_RATE):
    with VideoWriter(path, frame_rate) as video:
        for frame in frames:
            video.write(frame)
    return path


def encode(path, frames, codec="libx264", pixels="yuv420p", title=""):
    """A file as other programs write them."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image.reformat(format=pixels)))
        container.mux(stream.encode(None))
    return path


def read_until_error(path):
    """(frames before it, message)."""
    frames = []
    with pytest.raises(ValueError) as error:
        frames.extend(VideoReader(path))  # extend keeps what came before
    return frames, str(error.value)


def difference(frames, others):
    """Mean of each frame."""
    return np.abs(np.asarray(frames, int) - np.asarray(others, int)).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".m4v", ".MKV"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    """Each frame is nearer to itself than to its neighbours: none is lost, doubled or out of order."""
    frames = moving_pattern(40)
    video = VideoReader(write_video(tmp_path / "new" / f"a{suffix}", frames))
    back = list(video)
    assert len(back) == 40 and back[0].dtype == np.uint8 and back[0].flags.writeable
    assert video.num_frames == (None if suffix == ".MKV" else 40)
    assert abs(video.frame_rate - FRAME_RATE) < (1e-3 if suffix == ".MKV" else 1e-12)  # Matroska counts nanoseconds
    assert difference(back, frames).max() < LOSS < difference(back[1:], frames[:-1]).min()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("rate", [25, 29.97002997002997, 12.5, Fraction(60000, 1001), Fraction(120000, 4003)])
def test_frame_rates_are_exact(tmp_path, rate):
    video = VideoReader(write_video(tmp_path / "a.mp4", moving_pattern(3), rate))
    assert video.frame_rate == Fraction(rate).limit_denominator(10**6)


def test_colors_keep_their_brightness_and_hue(tmp_path):
    """Of all RGB corners, as the file's own color matrix is used by writer and reader; within coding noise."""
    corners = np.array(np.meshgrid([0, 255], [0, 255], [0, 255])).reshape(3, 8).T.astype(np.uint8)
    image = np.ascontiguousarray(corners.repeat(16, 0)[None].repeat(32, 0))
    (back,) = VideoReader(write_video(tmp_path / "a.mp4", [image]))
    assert np.abs(back[:, 8::16].astype(int) - corners).max() <= 6


@pytest.mark.parametrize(("height", "width"), [(33, 64), (32, 65), (33, 65), (1, 1)])
def test_odd_sizes_are_padded_by_their_edge(tmp_path, height, width):
    frames = moving_pattern(3, height, width)
    back = np.stack(list(VideoReader(write_video(tmp_path / "a.mp4", frames))))
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert back.shape == padded.shape
    assert difference(back, padded).max() < LOSS


def test_a_reader_can_be_read_again_and_left_early(tmp_path):
    video = VideoReader(write_video(tmp_path / "a.mp4", moving_pattern(10)))
    first = next(iter(video))
    assert np.array_equal(first, list(video)[0])


def test_the_index_is_at_the_front(tmp_path):
    """Or a browser would have to load all of the file first."""
    data = write_video(tmp_path / "a.mp4", moving_pattern(10)).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("suffix", "codec", "pixels"), [
    (".webm", "libvpx-vp9", "yuv420p"), (".gif", "gif", "rgb8"), (".avi", "mpeg4", "yuv420p"),
    (".ts", "libx264", "yuv420p"), (".mp4", "libx264", "gray"), (".mkv", "ffv1", "gray"),
])  # fmt: skip
def test_other_formats_are_read(tmp_path, suffix, codec, pixels):
    frames = moving_pattern(12)
    if pixels == "gray":
        frames = frames[..., :1].repeat(3, axis=-1)
    back = list(VideoReader(encode(tmp_path / f"a{suffix}", frames, codec, pixels)))
    assert len(back) == 12
    assert difference(back, frames).max() < 20  # 8 color bits in the gif


@pytest.mark.parametrize(("matrix", "turned"), [
    ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # (x, y) -> (-y, x), y down: clockwise, as phones store it
    ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    ((0, -1, 1, 0), np.rot90),
])  # fmt: skip
def test_turned_videos_are_turned_back(tmp_path, matrix, turned):
    frames = moving_pattern(3)
    path = encode(tmp_path / "a.mp4", frames)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # of the track's matrix: ISO/IEC 14496-12, section 8.3.2
    for i, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[place + 4 * i : place + 4 * i + 4] = (value * 2**16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    back = list(VideoReader(path))
    assert difference(back, [turned(frame) for frame in frames]).max() < LOSS


def test_sound_is_left_out(tmp_path):
    path = tmp_path / "a.mp4"
    frames = moving_pattern(5)
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        container.mux(sound.encode(silence()))
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux([*stream.encode(None), *sound.encode(None)])
    assert len(list(VideoReader(path))) == 5


def silence():
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    sound.sample_rate = 44100
    return sound


# Damage


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", None), (".mkv", None), (".webm", "libvpx-vp9")])
def test_a_file_that_was_cut_off_gives_its_frames_and_then_an_error(tmp_path, suffix, codec):
    """Wherever it was; the frames are in their places."""
    frames = moving_pattern(48)
    path = tmp_path / f"a{suffix}"
    whole = (encode(path, frames, codec) if codec else write_video(path, frames)).read_bytes()
    lengths = [int(share * len(whole)) for share in np.linspace(0, 1, 30, endpoint=False)] + [len(whole) - 1]
    counts = []
    for length in lengths:
        path.write_bytes(whole[:length])
        good, message = read_until_error(path)
        counts.append(len(good))
        if good:
            assert f"{path}: damaged or cut off after {len(good)} frames" in message
            assert difference(good, frames[: len(good)]).max() < LOSS
    assert counts == sorted(counts) and 0 == counts[0] < counts[-4] < counts[-1]


def test_a_file_that_ends_between_two_frames_is_cut_off_too(tmp_path):
    """No half frame tells so, only the index. What is shown behind a frame that is lost does not come in its place."""
    frames = moving_pattern(30)
    path = write_video(tmp_path / "a.mp4", frames)
    with av.open(str(path)) as container:
        ends = sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    data = path.read_bytes()
    for num_packets in range(4, 30):
        path.write_bytes(data[: ends[num_packets - 1]])
        good, message = read_until_error(path)
        assert num_packets - 4 <= len(good) <= num_packets and "its index has 30" in message
        assert difference(good, frames[: len(good)]).max() < LOSS


def test_overwritten_bytes_are_noticed(tmp_path):
    """Of the frames before them no more than the last few, which look ahead, are decoded from garbage."""
    frames = moving_pattern(60)
    path = write_video(tmp_path / "a.mp4", frames)
    data = bytearray(path.read_bytes())
    start = len(data) * 2 // 3
    data[start : start + 1000] = np.random.default_rng(0).bytes(1000)
    path.write_bytes(data)
    good, message = read_until_error(path)
    assert 8 < len(good) < 60 and f"damaged or cut off after {len(good)} frames" in message
    assert difference(good, frames[: len(good)])[:-4].max() < LOSS


def test_a_frame_that_is_decoded_in_part_is_damage(tmp_path):
    """The packets' framing is whole here, only what is in one of them is not."""
    path = write_video(tmp_path / "a.mp4", moving_pattern(60))
    with av.open(str(path)) as container:
        packets = [(packet.size, packet.pos) for packet in container.demux(video=0) if packet.size]
    size, start = max(packets[10:])
    data = bytearray(path.read_bytes())
    data[start + 20 : start + size] = np.random.default_rng(0).bytes(size - 20)
    path.write_bytes(data)
    good, message = read_until_error(path)
    assert 4 < len(good) < 60 and "a frame is decoded in part only" in message


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_part_that_was_never_written_is_damage(tmp_path, suffix):
    """As a download leaves it that makes the file as large as it will be."""
    path = write_video(tmp_path / f"a{suffix}", moving_pattern(60))
    data = path.read_bytes()
    half = len(data) * 2 // 3
    path.write_bytes(data[:half] + bytes(len(data) - half))
    good, message = read_until_error(path)
    assert 0 < len(good) < 60 and f"after {len(good)} frames" in message


def test_frames_that_change_in_size_are_refused(tmp_path):
    small, large = moving_pattern(6, 48, 64), moving_pattern(6)
    parts = [encode(tmp_path / f"{len(part[0])}.h264", part) for part in (large, small)]
    path = tmp_path / "a.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    good, message = read_until_error(path)
    assert len(good) == 6
    assert f"{path}: frame 6 (from 0) is 48 x 64, those before it are 96 x 128" in message


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 99, bytes(5000)])
def test_other_files_are_no_videos(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: no video, or its beginning or index is damaged"):
        VideoReader(path)


def test_a_lost_index_is_damage(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_pattern(10))  # its index is at the end
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") + 100])
    with pytest.raises(ValueError, match="a.mp4: .* index (is|may be) damaged"):
        VideoReader(path)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        container.mux([*stream.encode(silence()), *stream.encode(None)])
    with pytest.raises(ValueError, match="a.mp4: must be a video, and there are no moving images in it, only audio"):
        VideoReader(path)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(image.reformat(format="yuvj420p")))
        container.mux([*cover.encode(None), *sound.encode(silence()), *sound.encode(None)])
    with pytest.raises(ValueError, match="a.mp4: must be a video, and there are no moving images in it, only audio"):
        VideoReader(path)


def test_of_two_videos_the_one_that_players_show_is_read(tmp_path):
    """The one that is marked as default, although it is the second."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        for default in (False, True):
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 48 if default else 32, "yuv420p"
            stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
        for stream, value in zip(container.streams.video, (0, 200), strict=True):
            for _ in range(3):
                image = np.full((32, stream.width, 3), value, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    frames = list(VideoReader(path))
    assert len(frames) == 3 and all(frame.shape == (32, 48, 3) and frame.mean() > 150 for frame in frames)


def test_titles_need_not_be_unicode(tmp_path):
    path = encode(tmp_path / "a.mp4", moving_pattern(3), title="some title")
    path.write_bytes(path.read_bytes().replace(b"some title", b"some\xfftitle"))
    assert len(list(VideoReader(path))) == 3


def test_a_colon_in_a_path_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(list(VideoReader(write_video("12:30.mp4", moving_pattern(3))))) == 3


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        VideoReader(tmp_path / "gone.mp4")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        VideoReader(tmp_path)
    with pytest.raises(IsADirectoryError, match="folder.mp4"):
        (tmp_path / "folder.mp4").mkdir()
        VideoWriter(tmp_path / "folder.mp4", 25)


# Nothing that was written is lost


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_a_video_of_what_was_written(tmp_path, error):
    frames = moving_pattern(20)
    path = tmp_path / "a.mp4"
    with pytest.raises(error), VideoWriter(path, FRAME_RATE) as video:
        for frame in frames:
            video.write(frame)
        raise error
    back = list(VideoReader(path))
    assert len(back) == 20 and difference(back, frames).max() < LOSS
    assert list(tmp_path.iterdir()) == [path]


WRITE_FOR_EVER = """
import sys
import numpy as np
from flow_inference.video_files import VideoWriter
video = VideoWriter(sys.argv[1], 25)
random = np.random.default_rng(0)
while True:
    video.write(random.integers(0, 256, (96, 128, 3), dtype=np.uint8))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_partial_file_that_plays(tmp_path):
    path = tmp_path / "a.mp4"
    partial = tmp_path / "a.mp4.partial.mp4"
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, path], cwd=PROJECT)
    try:
        give_up = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size > 3 * 10**6):  # more than a fragment
            assert time.monotonic() < give_up and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    frames = []
    try:
        frames.extend(VideoReader(partial))
    except ValueError as error:
        assert f"cut off after {len(frames)} frames" in str(error)
    assert len(frames) > 100 and not path.exists()


WRITE_CALMLY = """
import sys, time
import numpy as np
from flow_inference.video_files import VideoWriter
video = VideoWriter(sys.argv[1], 24)
for number in range(96):
    image = np.zeros((72, 128, 3), np.uint8)
    image[:, :number] = 200
    video.write(image)
print("written", flush=True)
time.sleep(100)
"""


def test_of_a_killed_calm_video_only_the_last_seconds_are_lost(tmp_path):
    """It compresses so well that it would fit into the buffers on its way to the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_CALMLY, tmp_path / "a.mp4"], cwd=PROJECT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"written\n"
    process.kill()
    process.communicate()
    frames = []
    try:
        frames.extend(VideoReader(tmp_path / "a.mp4.partial.mp4"))
    except ValueError as error:
        assert "cut off after" in str(error)
    assert len(frames) >= 96 - 48


def test_an_older_video_stays_until_the_new_one_is_whole(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_pattern(3))
    before = path.read_bytes()
    with VideoWriter(path, 25) as video:
        for frame in moving_pattern(5):
            video.write(frame)
        assert path.read_bytes() == before
    assert len(list(VideoReader(path))) == 5


def test_without_an_image_there_is_no_file(tmp_path):
    VideoWriter(tmp_path / "a.mp4", 25).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    (tmp_path / "a.mp4.partial.mp4").symlink_to("/dev/full")
    noise = np.random.default_rng(0).integers(0, 256, (8, 96, 128, 3), dtype=np.uint8)
    with pytest.raises(OSError, match="a.mp4: the video cannot be written .No space left on device"):
        with VideoWriter(path, 25) as video:
            for i in range(400):
                video.write(noise[i % 8])
    assert not path.exists()


def test_bad_images_are_refused_and_the_good_ones_kept(tmp_path):
    path = tmp_path / "a.mp4"
    good = moving_pattern(1)[0]
    bad = {
        "images must be .H, W, 3. uint8; got .96, 128. uint8": good[..., 0],
        "images must be .H, W, 3. uint8; got .96, 128, 3. float32": good.astype(np.float32),
        "images must be .H, W, 3. uint8; got .96, 128, 4. uint8": good[..., [0, 1, 2, 2]],
        "images must be .H, W, 3. uint8; got .0, 128, 3. uint8": good[:0],
        "one size; got 95 x 128 after 96 x 128": good[1:],
    }
    with VideoWriter(path, 25) as video:
        video.write(good)
        for message, image in bad.items():
            with pytest.raises(ValueError, match=f"a.mp4: .*{message}"):
                video.write(image)
        video.write(good[:, ::-1])  # not contiguous
    with pytest.raises(ValueError, match="a.mp4: the video is closed"):
        video.write(good)
    back = list(VideoReader(path))
    assert len(back) == 2 and difference(back, [good, good[:, ::-1]]).max() < LOSS


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_bad_rates_are_named(tmp_path, rate):
    with pytest.raises(ValueError, match=f"a.mp4: frame_rate must be a positive number; got {rate}"):
        VideoWriter(tmp_path / "a.mp4", rate)


def test_unknown_suffixes_are_named(tmp_path):
    with pytest.raises(ValueError, match="a.webm: a video is written as one of .mp4, .m4v, .mov, .mkv"):
        VideoWriter(tmp_path / "a.webm", 25)
    assert set(WRITTEN_FORMATS) < set(VIDEO_SUFFIXES)
    assert is_video("some/Clip.MP4") and is_video(Path("a.gif"))
    assert not any(is_video(name) for name in ("mp4", "a.png", "a.mp4.txt", ".mp4"))
