"""What the server of forked processes has ready: a program's imports, and the textures of the tiny run's pairs.

Drawing these takes two thirds of a tiny run. They depend on nothing but seed, split and number of a texture.
"""

from pathlib import Path

import cv2
from tiny_run import flags

import train_flow  # noqa: F401  imports all that training and evaluation need
from flow_data.synthetic import render_pair
from flow_training.config import parse_config

config = parse_config(flags(Path("unused")))
threads = cv2.getNumThreads()
cv2.setNumThreads(0)  # threads that were started here would be missing in the forked processes
for split, num_pairs in (("training", config.synthetic_num_pairs), ("validation", config.synthetic_validation_pairs)):
    for index in range(num_pairs):
        render_pair(config.synthetic_options(), 0, index, split)
cv2.setNumThreads(threads)
