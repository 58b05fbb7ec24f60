"""Draws the examples of the page: two pairs of frames, and a clip with drawings on twos and a scene cut.

    python space/examples/draw_examples.py

They show the cartoon of `examples/frames`, this project's own work, under its license.
"""

import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "examples" / "frames")]

from draw_frames import draw_frame  # noqa: E402  # a program beside the frames that it draws

from flow_inference.video_files import VideoWriter  # noqa: E402

PAIRS = {"slow": (0, 2), "fast": (30, 34)}  # name -> times of its frames
CLIP = [*range(12), *(time // 2 * 2 for time in range(12, 20)), *range(60, 68)]  # on ones, on twos, another place
FRAME_RATE = 12


if __name__ == "__main__":
    for name, times in PAIRS.items():
        for number, time in enumerate(times, start=1):
            draw_frame(time).save(FOLDER / f"{name}_{number}.png", optimize=True)
    with VideoWriter(FOLDER / "clip.mp4", FRAME_RATE, crf=24) as video:
        for time in CLIP:
            frame = np.asarray(draw_frame(time))
            video.write(frame[:, ::-1].copy() if time >= 60 else frame)
