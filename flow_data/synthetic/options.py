"""What synthetic pairs are made of; command lines read it without the packages that draw them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = ("appearance", "nonrigid", "ego_motion")  # options between 0 and 1


@dataclass(frozen=True)
class SyntheticOptions:
    """What to draw.

    Attributes:
        image_size: (H, W), at least 32 px each.
        displacement: (lowest, highest) mean length of the flow vectors of a pair in pixels, drawn log-uniformly.
            Single objects move much farther: up to a fifth of the frame's diagonal. A mean that the motions of
            a scene cannot reach is lowered, above all where a camera travels through a scene.
        shapes: (fewest, most) foreground shapes.
        textures: Folder of images to cut textures from, searched recursively. None draws procedural textures.
        appearance: Strength, 0 to 1, of what differs between the frames but motion: exposure, light, blur, noise.
        nonrigid: Probability that a layer deforms smoothly on top of its motion.
        ego_motion: Share of pairs whose camera travels through a scene of planes in depth, as in KITTI.

    Raises:
        ValueError: If a range is reversed or a number out of its range.
    """

    image_size: tuple[int, int] = (384, 512)  # that of FlyingChairs
    displacement: tuple[float, float] = (1.0, 30.0)  # FlyingChairs has about 11 px on average, Middlebury 4
    shapes: tuple[int, int] = (6, 24)  # Dosovitskiy et al. 2015: 16 to 24; fewer leave calm areas
    textures: str | None = None
    appearance: float = 1.0
    nonrigid: float = 0.3
    ego_motion: float = 0.2

    def __post_init__(self) -> None:
        if not _is_pair(self.image_size, int) or min(self.image_size) < 32:
            raise ValueError(f"image_size must be (height, width) of at least 32 px each; got {self.image_size}")
        if not _is_pair(self.displacement, float) or not 0 < self.displacement[0] <= self.displacement[1] < math.inf:
            raise ValueError(
                f"displacement must be (lowest, highest) in px, above 0 and finite; got {self.displacement}"
            )
        if not _is_pair(self.shapes, int) or not 0 <= self.shapes[0] <= self.shapes[1]:
            raise ValueError(f"shapes must be (fewest, most), whole numbers of at least 0; got {self.shapes}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1; got {getattr(self, name)}")


def _is_pair(value: Any, kind: type) -> bool:
    """Whether a value is two numbers of a kind; a whole number is a float, too."""
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(number, kinds) for number in value)
