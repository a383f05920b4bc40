"""What the common tests need to know of a semantic segmentation model with a plain ViT encoder."""

from unittest import mock

import torch
from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from segmenter_hf.models.configuration_vit_encoder import VitEncoderConfig
from segmenter_hf.models.modeling_vit_encoder import VitEncoderPatchEmbeddings, VitEncoderPreTrainedModel

from . import ConfigTester, ModelTesterMixin, TrainingTesterMixin


class SegmentationModelTester:
    """Makes the tiny configurations and the inputs; its attributes are what the common tests read."""

    batch_size = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 5
    image_size = (16, 24)
    patch_size = 8
    is_training = True

    def __init__(self, config_class: type[VitEncoderConfig], num_prefix_tokens: int = 1, **arguments: object) -> None:
        self.config_class = config_class
        self.arguments = arguments
        height, width = self.image_size
        self.seq_length = num_prefix_tokens + (height // self.patch_size) * (width // self.patch_size)

    def make_config(self) -> VitEncoderConfig:
        return self.config_class(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=48,
            num_labels=self.num_labels,
            image_size=self.image_size,
            patch_size=self.patch_size,
            **self.arguments,
        )

    def get_config(self) -> VitEncoderConfig:
        """The configuration of the overfit test, which reads the size of a vocabulary from it."""
        config = self.make_config()
        config.vocab_size = None
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[VitEncoderConfig, dict[str, torch.Tensor]]:
        config = self.make_config()
        pixel_values = torch.rand(self.batch_size, config.num_channels, *self.image_size, device=torch_device)
        return config, {"pixel_values": pixel_values}


class SegmentationModelTestMixin(ModelTesterMixin, TrainingTesterMixin):
    """The common tests; a subclass names its classes, the encoder first, and the arguments of its configuration.

    Where a test assumes text, it is given what it needs and not skipped.
    """

    config_class: type[VitEncoderConfig]
    all_model_classes: tuple[type[VitEncoderPreTrainedModel], ...]
    config_arguments: dict[str, object] = {}
    num_prefix_tokens = 1

    test_resize_embeddings = False  # there is no vocabulary
    test_can_init_all_missing_weights_before_2023 = True  # the year of a copyright line that our files do not have
    training_overfit_learning_rate = 3e-3

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = SegmentationModelTester(self.config_class, self.num_prefix_tokens, **self.config_arguments)
        # By this mapping the common tests tell the encoder, which has no loss, from the model with a head.
        names = {self.config_class.model_type: self.all_model_classes[0].__name__}
        mapping = mock.patch.dict(MODEL_MAPPING_NAMES, names)
        mapping.start()
        self.addCleanup(mapping.stop)

    def test_config(self) -> None:
        arguments = {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "image_size": [32, 48],
            "drop_path_rate": 0.2,
            **self.config_arguments,
        }
        ConfigTester(self, config_class=self.config_class, has_text_modality=False, **arguments).run_common_tests()

    def test_model_get_set_embeddings(self) -> None:
        """Images are embedded by a projection, not by a table of words."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.make_config())
            self.assertIsInstance(model.get_input_embeddings(), VitEncoderPatchEmbeddings)
            embeddings = VitEncoderPatchEmbeddings(num_channels=3, hidden_size=32, patch_size=8)
            model.set_input_embeddings(embeddings)
            self.assertIs(model.get_input_embeddings(), embeddings)
            self.assertIsNone(model.get_output_embeddings())

    def test_enable_input_require_grads_with_gradient_checkpointing(self) -> None:
        """The gradient it looks at is that of `weight` of the embeddings: of the projection, here."""
        weight = property(lambda embeddings: embeddings.projection.weight)
        with mock.patch.object(VitEncoderPatchEmbeddings, "weight", weight, create=True):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    # The overfit test of this release makes batches of text alone: these hooks give it images and masks.

    def _get_model_modality(self) -> str:
        return "text"

    def _get_trainable_model_class(self) -> type[VitEncoderPreTrainedModel]:
        return self.all_model_classes[-1]

    def _create_text_training_batch(self, batch_size: int, **kwargs: object) -> dict[str, torch.Tensor]:
        """Labels at the four pixels in the middle of each patch; upsampling mixes in neighbors at the others."""
        height, width = self.model_tester.image_size
        patch_size = self.model_tester.patch_size
        classes = torch.randint(self.model_tester.num_labels, (batch_size, height // patch_size, width // patch_size))
        labels = torch.full((batch_size, height, width), 255)
        for row in (patch_size // 2 - 1, patch_size // 2):
            for column in (patch_size // 2 - 1, patch_size // 2):
                labels[:, row::patch_size, column::patch_size] = classes
        return {"pixel_values": torch.rand(batch_size, 3, height, width), "labels": labels}
