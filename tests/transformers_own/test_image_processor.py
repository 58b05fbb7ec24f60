"""transformers' own tests of image processors, on RAFT's.

The mixin's images are single and of any size; RAFT's processor takes pairs, and all pairs of a batch have one size.
"""

import unittest

import numpy as np
import torch
from PIL import Image
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from modeling_raft import RaftImageProcessor


class RaftImageProcessingTester(ImageProcessingTester):
    """What the tests ask for: options of the processor, and pairs of images for it."""

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("height_padding", "bottom")
        kwargs.setdefault("min_size", 80)
        kwargs.setdefault("image_mean", [0.4, 0.5, 0.6])
        kwargs.setdefault("image_std", [0.3, 0.4, 0.5])
        super().__init__(parent, batch_size=3, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": RaftImageProcessor}  # the mixin's list knows transformers' own classes only

    def prepare_image_inputs(self, batch_size=None, equal_resolution=False, numpify=False, torchify=False, **kwargs):
        """Pairs; `equal_resolution` makes them squares, in the mixin's words, else they are higher than wide."""
        frames = super().prepare_image_inputs(
            batch_size=2 * (self.batch_size if batch_size is None else batch_size), equal_resolution=True, numpify=True
        )
        if not equal_resolution:
            frames = [frame[:, :-27] for frame in frames]
        if torchify:
            frames = [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]
        elif not numpify:
            frames = [Image.fromarray(frame) for frame in frames]
        return [frames[i : i + 2] for i in range(0, len(frames), 2)]

    def expected_output_image_shape(self, images):
        """400 x 373 is padded to multiples of 8."""
        return 2, self.num_channels, 400, 376


class OneImageTwice(RaftImageProcessor):
    """Takes single images, and pairs each with itself."""

    def preprocess(self, images, **kwargs):
        images = images if isinstance(images, list) else [images]
        return super().preprocess([[image, image] for image in images], **kwargs)


class RaftImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = RaftImageProcessingTester
    test_cast_dtype = True  # as the mixin wants it said

    def setUp(self):
        super().setUp()
        # Adapted: these tests give single images of all kinds, and lists of them.
        if "test_convert_to_rgb_mixed_input_batch" in self.id():
            self.image_processor_tester.image_processing_classes = {"torchvision": OneImageTwice}

    def check_call(self, kind, **options):
        """A pair, and a batch of pairs, of images of a kind."""
        for processor_class in self.image_processing_classes.values():
            processor = processor_class(**self.image_processor_dict)
            pairs = self.image_processor_tester.prepare_image_inputs(**options)
            self.assertTrue(all(isinstance(frame, kind) for pair in pairs for frame in pair))
            shape = self.image_processor_tester.expected_output_image_shape(pairs)
            one = processor(pairs[0], return_tensors="pt").pixel_values
            self.assertEqual(tuple(one.shape), (1, *shape))
            batch = processor(pairs, return_tensors="pt").pixel_values
            self.assertEqual(tuple(batch.shape), (self.image_processor_tester.batch_size, *shape))
            self.assertTrue(torch.equal(batch[:1], one))

    # Adapted: the mixin's check that each input is an image, and here it is a pair of images.

    def test_call_pil(self):
        self.check_call(Image.Image)

    def test_call_numpy(self):
        self.check_call(np.ndarray, numpify=True)

    def test_call_pytorch(self):
        self.check_call(torch.Tensor, torchify=True)
