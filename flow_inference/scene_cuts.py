"""Scene cuts, found by how badly flow explains a frame by the one before."""

from torch import Tensor

from flow_inference.consistency import warp

# Grey levels. Pairs of Sintel and Middlebury have errors of 2 to 4, made-up ones with much occlusion up to 19,
# and cuts between any of them 45 to 80.
LIMIT = 40.0  # of a scene's first pair, with which there is nothing to compare
LOWEST = 12.0  # below, whatever the jump, no cut
JUMP = 3.0  # times the usual error of the scene
MEMORY = 0.8  # share that the usual error keeps from pair to pair


def photometric_error(thumbnail1: Tensor, thumbnail2: Tensor, low_res_flow: Tensor) -> float:
    """Mean difference of frame 1 and the frame 2 that flow fetches, in grey levels of 255.

    On the grid of the flow, where neither noise nor sub-pixel errors matter; pixels that leave the frame are left out.

    Args:
        thumbnail1, thumbnail2: `(1, 3, h, w)` in 0..255.
        low_res_flow: `(1, 2, h, w)`, grid pixels.
    """
    warped, inside = warp(thumbnail2, low_res_flow)
    difference = (thumbnail1 - warped).abs().mean(1)[inside]
    return float(difference.mean()) if len(difference) else float("inf")


class SceneWatch:
    """Remembers the usual photometric error of a scene, and says where it jumps."""

    def __init__(self) -> None:
        self._usual: float | None = None

    def jumps(self, error: float) -> bool:
        """Whether an error is far above what the scene had so far; of its first pair, above what scenes have."""
        return error > (LIMIT if self._usual is None else max(LOWEST, JUMP * self._usual))

    def remember(self, error: float) -> None:
        """Add the error of a pair within the scene."""
        self._usual = error if self._usual is None else MEMORY * self._usual + (1 - MEMORY) * error

    def forget(self) -> None:
        """A new scene begins."""
        self._usual = None
