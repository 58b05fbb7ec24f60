"""Image pairs with exactly known flow, drawn on the fly; `generator` is the place to begin reading."""

from flow_data.synthetic.generator import SyntheticOptions, SyntheticPair, render_pair, synthetic

__all__ = ["SyntheticOptions", "SyntheticPair", "render_pair", "synthetic"]
