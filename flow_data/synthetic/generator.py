"""Image pairs with exactly known flow, drawn on the fly: textured layers that move before each other.

A layer is a plane with a texture and an outline. It lies in frame 1, and its motion carries it to frame 2, where the
depth order is the same; so the flow is known everywhere, where a pixel is hidden in frame 2, too. Scenes, motions,
outlines, textures and what the camera makes of them each have a file of their own. A pair is a pure function of
(options, seed, split, index).

Shapes: `H W` frame, `L` layers, the background first.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from flow_data.sample import FlowSample
from flow_data.synthetic.appearance import apply_appearance, draw_appearances, draw_shutter
from flow_data.synthetic.motion import match_displacement, project
from flow_data.synthetic.options import SyntheticOptions
from flow_data.synthetic.rendering import find_flow, find_masks, find_occlusion, paint
from flow_data.synthetic.scenes import Cut, Scene, draw_ego_motion, draw_layered
from flow_data.synthetic.textures import Pool, cut_from_image, cut_pool, list_images, read_image

if TYPE_CHECKING:  # takes a second, and the command line needs the names of the data sets only
    from datasets import Dataset

SPLITS = {"training": 0, "validation": 1, "all": 0}  # `all` leaves what is held out held out
POOL_SIZES = {"training": 256, "validation": 64, "all": 256}  # textures; about 1 MB of memory and 40 ms of time each
IMAGES_PER_PAIR = 3  # of the user's, for all layers
PROBES = 1500  # pixels, about, that the mean displacement is taken over when motions are scaled


class SyntheticPair(NamedTuple):
    """A pair and which of its pixels frame 2 does not show.

    Args:
        sample: Frames, flow of the layer that covers most of each pixel, and `valid`, which is True everywhere.
        occlusion: `(H, W)` bool, True where the pixel of frame 1 is hidden in frame 2 or leaves it.
    """

    sample: FlowSample
    occlusion: np.ndarray


def synthetic(options: SyntheticOptions, split: str = "training", seed: int = 0, num_pairs: int = 22232) -> Dataset:
    """A dataset of pairs that are drawn when they are accessed. Splits share neither pairs nor drawn textures.

    Args:
        options: What to draw.
        split: "training" or "validation".
        seed: Of the whole dataset, not negative.
        num_pairs: Length; by default that of the training split of FlyingChairs.

    Returns:
        Items `{"id", "image1", "image2", "flow": {"flow", "valid"}, "occlusion"}`: PIL images, flow `(H, W, 2)`
        float32 in pixels, valid `(H, W)` bool, and as in Sintel a gray image, 255 where a pixel is occluded.
        `dataset["id"]` draws every pair, `dataset.select_columns("id")["id"]` does not.

    Raises:
        ValueError: If the split is unknown, the folder of textures is missing or empty, or a number is negative.
    """
    _stream(split)
    for name, number in (("seed", seed), ("num_pairs", num_pairs)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0; got {number}")
    if options.textures is not None:
        list_images(options.textures)
    records = {"id": [f"{split}/{i:06d}" for i in range(num_pairs)], "index": list(range(num_pairs))}
    from datasets import Dataset

    return Dataset.from_dict(records).with_transform(partial(_draw_batch, options, seed, split))


def _draw_batch(options: SyntheticOptions, seed: int, split: str, batch: dict[str, list]) -> dict[str, list]:
    if "index" not in batch:  # only the ids were asked for
        return batch
    pairs = [render_pair(options, seed, index, split) for index in batch["index"]]
    return {
        "id": batch["id"],
        "image1": [Image.fromarray(pair.sample.image1) for pair in pairs],
        "image2": [Image.fromarray(pair.sample.image2) for pair in pairs],
        "flow": [{"flow": pair.sample.flow, "valid": pair.sample.valid} for pair in pairs],
        "occlusion": [Image.fromarray(pair.occlusion.astype(np.uint8) * 255) for pair in pairs],
    }


def render_pair(options: SyntheticOptions, seed: int, index: int, split: str = "training") -> SyntheticPair:
    """Draw one pair. The same arguments give the same bits in every process.

    Every pixel is valid, those with an edge in them too, whose colors are mixed: as in FlyingChairs, so that models
    learn where motion changes. Such a pixel has the flow of the frontmost layer that covers at least half of it.

    Raises:
        ValueError: If the split is unknown, or a texture cannot be read.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_stream(split), 0, index)))
    scene = draw_scene(rng, options, _texture_source(rng, options, Pool(seed, _stream(split), POOL_SIZES[split])))
    target = float(np.exp(rng.uniform(*np.log(options.displacement))))
    shutter = draw_shutter(rng, options.appearance)
    masks1 = find_masks(scene.layers, None, options.image_size)
    motions = scene.motions(match_displacement(partial(mean_flow, scene, masks1.label), target, scene.max_scale))
    masks2 = find_masks(scene.layers, motions, options.image_size)
    flow = find_flow(masks1, motions)
    images = [
        apply_appearance(paint(scene.layers, masks, motions, second, shutter), appearance)
        for masks, second, appearance in zip(
            (masks1, masks2), (False, True), draw_appearances(rng, options.appearance), strict=True
        )
    ]
    occlusion = find_occlusion(flow, masks1.label, masks2.label)
    sample = FlowSample(images[0], images[1], flow, np.ones(options.image_size, bool))
    return SyntheticPair(sample, occlusion)


def draw_scene(rng: np.random.Generator, options: SyntheticOptions, cut: Cut) -> Scene:
    """Draw layers and how they move; `cut` gives their textures."""
    draw = draw_ego_motion if rng.random() < options.ego_motion else draw_layered
    num_shapes = int(rng.integers(options.shapes[0], options.shapes[1] + 1))
    return draw(rng, options.image_size, num_shapes, cut, options.nonrigid)


def mean_flow(scene: Scene, label: np.ndarray, scale: float) -> float:
    """The mean length of the flow at a scale of the motions, pixels, over some pixels of `label` `(H, W)`."""
    step = max(1, int(np.sqrt(label.size / PROBES)))
    rows, columns = (np.arange(side // 2 % step if side > step else 0, side, step) for side in label.shape)
    points = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2).astype(float)
    owner = label[rows[:, None], columns].ravel()
    motions = scene.motions(scale)
    bent = points.copy()
    for index, motion in enumerate(motions):
        if motion.waves is not None:
            own = owner == index
            bent[own] += motion.waves.at(points[own])
    moved = project(np.stack([motion.matrix for motion in motions])[owner], bent)
    return float(np.linalg.norm(moved - points, axis=1).mean())


def _texture_source(rng: np.random.Generator, options: SyntheticOptions, pool: Pool) -> Cut:
    """What gives the textures of a pair: a few of the user's images, or the pool."""
    if options.textures is None:
        return lambda rng, size, kinds: cut_pool(rng, pool, size, kinds)
    paths = list_images(options.textures)
    images = [read_image(paths[i]) for i in rng.integers(len(paths), size=IMAGES_PER_PAIR)]
    return lambda rng, size, kinds: cut_from_image(rng, images[rng.integers(len(images))], size)


def _stream(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}; got {split!r}")
    return SPLITS[split]
