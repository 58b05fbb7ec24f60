"""Tiny trees of the published data sets, in their layouts with their real encodings, whose pairs differ."""

from pathlib import Path

import h5py
import numpy as np
import PIL.Image

from flow_data.flow_io import write_flow

SIZE = 3, 4  # h, w


def write_frame(path: Path, mark: int, mode: str = "RGB") -> None:
    """A frame of one gray value, by which it is identified."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", SIZE[::-1], mark).convert(mode).save(path, lossless=True)


def write_mark(path: Path, mark: int) -> None:
    """A flow of one value, by which it is identified."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flow(path, np.full((*SIZE, 2), mark, np.float32))


def make_chairs(root: Path, numbers=(1, 2, 3, 10)) -> None:
    for number in numbers:
        write_frame(root / f"data/{number:05d}_img1.ppm", number)
        write_frame(root / f"data/{number:05d}_img2.ppm", number + 100)
        write_mark(root / f"data/{number:05d}_flow.flo", number)
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n" + "2\n" * 6 + "1\n")


def make_things(root: Path, suffix: str = "png") -> None:
    """Frames 6 to 8 of three sequences, marks 6 to 8, in the final pass 106 to 108; the right camera's are 20 higher.

    Backward flow is negative.
    """
    for sequence in ("TRAIN/A/0000", "TRAIN/C/0010", "TEST/B/0001"):
        flow = root / "optical_flow" / sequence
        for number in (6, 7, 8):
            for side, mark in (("left", number), ("right", number + 20)):
                frame, letter = f"{sequence}/{side}/{number:04d}.{suffix}", side[0].upper()
                write_frame(root / f"frames_cleanpass/{frame}", mark)
                write_frame(root / f"frames_finalpass/{frame}", mark + 100)
                write_mark(flow / f"into_future/{side}/OpticalFlowIntoFuture_{number:04d}_{letter}.pfm", mark)
                write_mark(flow / f"into_past/{side}/OpticalFlowIntoPast_{number:04d}_{letter}.pfm", -mark)


def write_mask(path: Path, mark: int) -> None:
    """A gray mask of 0, with 255 at one pixel by which it is identified."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(SIZE, np.uint8)
    mask.flat[mark] = 255
    PIL.Image.fromarray(mask).save(path)


def make_sintel(root: Path) -> None:
    """Occlusions of all pairs, invalid pixels of the first scene only."""
    for scene, start in (("alley_1", 1), ("market_2", 9)):
        for number in range(start, start + 3):
            name = f"{scene}/frame_{number:04d}"
            for part in ("training", "test"):
                write_frame(root / part / f"clean/{name}.png", number)
                write_frame(root / part / f"final/{name}.png", number + 100)
            if number < start + 2:
                write_mark(root / f"training/flow/{name}.flo", number)
                write_mask(root / f"training/occlusions/{name}.png", number)
            if scene == "alley_1":  # the last frame has one, too
                write_mask(root / f"training/invalid/{name}.png", number + 3)


def make_kitti(root: Path, folder: str = "image_2", mode: str = "RGB") -> None:
    for number in (0, 7, 10):
        for part in ("training", "testing"):
            for frame in (9, 10, 11, 12):  # some downloads have 20 frames a scene
                write_frame(root / part / f"{folder}/{number:06d}_{frame:02d}.png", number + frame, mode)
        write_mark(root / f"training/flow_occ/{number:06d}_10.png", number)
        write_mark(root / f"training/flow_noc/{number:06d}_10.png", 200)


def make_kitti_2012(root: Path) -> None:
    make_kitti(root, "image_0", "L")
    for part in ("training", "testing"):
        for frame in (10, 11):
            write_frame(root / part / f"colored_0/000000_{frame}.png", 200)


def make_hd1k(root: Path) -> None:
    for sequence in (0, 3):
        for number in (9, 10, 11):
            name = f"{sequence:06d}_{number:04d}.png"
            write_frame(root / f"hd1k_input/image_2/{name}", number + sequence)
            write_mark(root / f"hd1k_flow_gt/flow_occ/{name}", number + sequence)


def make_middlebury(root: Path) -> None:
    for mark, scene in enumerate(("RubberWhale", "Venus"), start=1):
        for number in (9, 10, 11):  # some scenes have eight frames
            write_frame(root / f"other-data/{scene}/frame{number:02d}.png", number * mark)
        write_mark(root / f"other-gt-flow/{scene}/flow10.flo", mark)
    for number in (10, 11):  # no public ground truth
        write_frame(root / f"other-data/Beanbags/frame{number:02d}.png", 0)


def make_spring(root: Path) -> None:
    """Frames 1 to 3 of two scenes, marks 1 to 3 and 11 to 13; the right camera's are 20 higher, backward is negative.

    Ground truth is twice as fine; only every second value is the mark.
    """
    for part, scenes in (("train", ("0001", "0012")), ("test", ("0003",))):
        for scene in scenes:
            for camera, start in (("left", int(scene) - 1), ("right", int(scene) + 19)):
                for number in (1, 2, 3):
                    folder, mark = root / part / scene, start + number
                    write_frame(folder / f"frame_{camera}/frame_{camera}_{number:04d}.png", mark)
                    for direction, sign, end in (("FW", 1, 3), ("BW", -1, 1)):
                        if part == "train" and number != end:
                            name = f"flow_{direction}_{camera}"
                            write_flo5(folder / name / f"{name}_{number:04d}.flo5", sign * mark)


def write_flo5(path: Path, mark: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flow = np.full((2 * SIZE[0], 2 * SIZE[1], 2), 99, np.float32)
    flow[::2, ::2] = mark
    with h5py.File(path, "w") as file:
        file.create_dataset("flow", data=flow, compression="gzip", compression_opts=5)


def make_tartanair(root: Path) -> None:
    """Frames 0 to 2 of three trajectories; two environments, one in a folder twice; a mask for the first pair only."""
    for start, trajectory in enumerate(("ocean/Easy/P000", "ocean/Hard/P011", "office/office/Easy/P001")):
        for number in (0, 1, 2):
            mark, name = 10 * start + number, f"{number:06d}_{number + 1:06d}"
            write_frame(root / trajectory / f"image_left/{number:06d}_left.png", mark)
            write_frame(root / trajectory / f"image_right/{number:06d}_right.png", 200)
            if number < 2:
                write_mark(root / trajectory / f"flow/{name}_flow.npy", mark)
        for other in ("000000_000002", "000001_000003", "000001_000000"):  # no flow to the next frame
            write_mark(root / trajectory / f"flow/{other}_flow.npy", 99)
            np.save(root / trajectory / f"flow/{other}_mask.npy", np.full(SIZE, 100, np.uint8))
        mask = np.zeros(SIZE, np.uint8)
        mask[0, 1:4] = 1, 10, 100
        np.save(root / trajectory / "flow/000000_000001_mask.npy", mask)


MAKERS = {
    "flying_chairs": make_chairs,
    "flying_things_clean": make_things,
    "flying_things_final": make_things,
    "sintel_clean": make_sintel,
    "sintel_final": make_sintel,
    "kitti_2012": make_kitti_2012,
    "kitti_2015": make_kitti,
    "hd1k": make_hd1k,
    "middlebury": make_middlebury,
    "spring": make_spring,
    "tartanair": make_tartanair,
}


def marks(dataset) -> dict[str, tuple]:
    """id -> the marks of frame 1, frame 2 and the flow (None without ground truth)."""
    return {
        row["id"]: (
            int(np.array(row["image1"]).flat[0]),
            int(np.array(row["image2"]).flat[0]),
            None if row["flow"] is None else float(row["flow"]["flow"][0, 0, 0]),
        )
        for row in dataset
    }
