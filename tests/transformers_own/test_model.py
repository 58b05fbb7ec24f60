"""transformers' own tests of models and configurations, on RAFT."""

import tempfile
import unittest

import torch
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from modeling_raft import RaftConfig, RaftForOpticalFlow


class RaftModelTester:
    """What the tests ask for: a small configuration, and inputs for it."""

    batch_size = 3
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> RaftConfig:
        return RaftConfig(
            feature_dim=16,
            hidden_dim=16,
            context_dim=16,
            encoder_widths=[8, 8, 12, 16],
            corr_radius=2,
            motion_corr_widths=[16, 16],
            motion_flow_widths=[16, 16],
            motion_dim=18,
            flow_head_dim=16,
            num_flow_updates=2,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = torch.rand(self.batch_size, 2, 3, 64, 72) * 2 - 1
        return self.get_config(), {"pixel_values": pixel_values}


class TakesOutputHiddenStates(RaftForOpticalFlow):
    """RAFT where `output_hidden_states` is no error: it has no layers whose states one could return."""

    def forward(self, *args, output_hidden_states=None, **kwargs):
        return super().forward(*args, **kwargs)


class RaftModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (RaftForOpticalFlow,)
    has_attentions = False
    test_resize_embeddings = False
    model_split_percents = [0.9, 0.9, 0.95]  # of the weights on a GPU: one block, that stays whole, has most of them
    test_can_init_all_missing_weights_before_2023 = True  # our files name no year, and so are taken for old ones

    def setUp(self):
        self.model_tester = RaftModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=RaftConfig, has_text_modality=False, common_properties=["hidden_size"]
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:  # the mixin makes those of the tasks that it knows
            batch, _, _, height, width = inputs["pixel_values"].shape
            inputs["labels"] = torch.ones(batch, 2, height, width, device=inputs["pixel_values"].device)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_outputs_equivalence(self):
        self.all_model_classes = (TakesOutputHiddenStates,)
        super().test_model_outputs_equivalence()

    @unittest.skip("RAFT has no layers whose hidden states it could return")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("RAFT has no layers whose hidden states it could return")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("RAFT looks at images: it has no nn.Embedding")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("RaftForOpticalFlow.from_pretrained reads no pickles, such as pytorch_model.bin")
    def test_disk_offload_bin(self):
        pass

    def test_offload_on_cpu(self):
        """What the mixin's tests of offloading do where there is an accelerator."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = RaftForOpticalFlow(config).eval()
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            expected = model(**inputs).flow
            model.save_pretrained(folder)
            places = {name: "disk" for name, _ in model.named_children()}
            for on_cpu in ([], ["feature_encoder"], ["update_block"]):
                device_map = places | dict.fromkeys(on_cpu, "cpu")
                offloaded = RaftForOpticalFlow.from_pretrained(folder, device_map=device_map, offload_folder=folder)
                self.assertTrue(any(weight.is_meta for weight in offloaded.parameters()))
                torch.testing.assert_close(offloaded(**inputs).flow, expected)


class SmallRaftModelTester(RaftModelTester):
    """The parts of the small model: bottlenecks, one GRU, no BatchNorm, bilinear upsampling."""

    def get_config(self) -> RaftConfig:
        config = super().get_config().to_dict()
        small = {
            "encoder_block": "bottleneck",
            "encoder_widths": [16, 16, 64, 128],  # about as many weights as the update block, as offloading wants it
            "context_norm": "none",
            "motion_corr_widths": [16],
            "gru_kernels": [[3, 3]],
            "convex_upsampling": False,
        }
        return RaftConfig(**(config | small))


class SmallRaftModelTest(RaftModelTest):
    def setUp(self):
        super().setUp()
        self.model_tester = SmallRaftModelTester(self)
