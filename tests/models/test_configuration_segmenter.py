"""Fields of the Segmenter configuration: defaults, validation, serialization."""

import pytest
from transformers import AutoConfig

from segmenter_hf import SegmenterConfig


def test_the_defaults_are_the_base_model_of_the_paper() -> None:
    config = SegmenterConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (512, 16, 3072)
    assert (config.decoder_type, config.decoder_num_hidden_layers) == ("mask_transformer", 2)
    assert (config.decoder_hidden_size, config.decoder_num_attention_heads) == (768, 12)
    assert config.semantic_loss_ignore_index == 255


def test_the_decoder_follows_the_encoder_unless_told_otherwise() -> None:
    config = SegmenterConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    assert (config.decoder_hidden_size, config.decoder_num_attention_heads) == (192, 3)
    assert config.decoder_intermediate_size == 768
    narrow = SegmenterConfig(decoder_hidden_size=96, decoder_num_attention_heads=2, decoder_intermediate_size=100)
    assert (narrow.decoder_hidden_size, narrow.decoder_num_attention_heads) == (96, 2)
    assert narrow.decoder_intermediate_size == 100


def test_image_size_may_be_a_number_or_height_and_width() -> None:
    assert SegmenterConfig(image_size=64).image_height_and_width == (64, 64)
    assert SegmenterConfig(image_size=[64, 96]).image_height_and_width == (64, 96)
    assert SegmenterConfig(image_size=(64, 96)).image_height_and_width == (64, 96)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_size": 100}, "`hidden_size` must be a multiple of `num_attention_heads`, got 100 and 12"),
        ({"decoder_hidden_size": 100}, "`decoder_hidden_size` must be a multiple of `decoder_num_attention_heads`"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"decoder_num_hidden_layers": 0}, "`decoder_num_hidden_layers` must be at least 1"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1"),
        ({"patch_size": -1}, "`patch_size` must be at least 1"),
        ({"num_channels": 0}, "`num_channels` must be at least 1"),
        ({"image_size": 100}, "`image_size` must be a positive multiple of `patch_size`, got 100 and 16"),
        ({"image_size": [64, 100]}, "`image_size` must be a positive multiple"),
        ({"image_size": [64, 0]}, "`image_size` must be a positive multiple"),
        ({"image_size": [64]}, r"`image_size` must be an int or \[height, width\]"),
        ({"image_size": [64, 64, 64]}, r"`image_size` must be an int or \[height, width\]"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate` must be at least 0 and below 1, got 1.0"),
        ({"decoder_drop_path_rate": -0.1}, "`decoder_drop_path_rate` must be at least 0 and below 1"),
        ({"hidden_dropout_prob": 2}, "`hidden_dropout_prob` must be"),
        ({"decoder_attention_probs_dropout_prob": 1}, "`decoder_attention_probs_dropout_prob` must be"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps` must be positive"),
        ({"decoder_layer_norm_eps": -1e-5}, "`decoder_layer_norm_eps` must be positive"),
        ({"hidden_act": "gelo"}, "`hidden_act` must be one of .*'gelo'"),
        ({"decoder_type": "mask"}, "decoder_type"),
        ({"position_embedding_interpolation": "nearest"}, "position_embedding_interpolation"),
        ({"hidden_size": "768"}, "hidden_size"),
        ({"qkv_bias": 1}, "qkv_bias"),
    ],
)
def test_a_wrong_value_is_a_value_error_that_names_the_field(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmenterConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id2label": {1: "x", 2: "y"}, "label2id": {"x": 1, "y": 2}}, "`id2label` must name the classes 0, 1, 2"),
        ({"layer_norm_eps": -1.0}, "`layer_norm_eps` must be positive"),
        ({"num_attention_heads": 5}, "`hidden_size` must be a multiple of `num_attention_heads`"),
        ({"drop_path_rate": 2.0}, "`drop_path_rate` must be"),
        ({"out_indices": [99], "decoder_type": "linear"}, "out_indices"),
    ],
)
def test_a_wrong_value_is_refused_while_loading_too(tmp_path, arguments: dict, message: str) -> None:
    SegmenterConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SegmenterConfig.from_pretrained(tmp_path, **arguments)


def test_save_and_load_keep_every_field(tmp_path) -> None:
    config = SegmenterConfig(
        image_size=[64, 96], decoder_type="linear", use_distillation_token=True, id2label={0: "road", 1: "sky"}
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SegmenterConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.num_labels == 2
    assert loaded.image_height_and_width == (64, 96)
