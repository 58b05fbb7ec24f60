"""Image pairs with exactly known flow, drawn on the fly; `generator` is the place to begin reading."""

from typing import TYPE_CHECKING, Any

from flow_data.synthetic.options import SyntheticOptions

if TYPE_CHECKING:
    from flow_data.synthetic.generator import SyntheticPair, render_pair, synthetic

__all__ = ["SyntheticOptions", "SyntheticPair", "render_pair", "synthetic"]


def __getattr__(name: str) -> Any:
    """Import what draws at its first use, since it needs OpenCV, which the command lines do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flow_data.synthetic import generator

    return getattr(generator, name)
