"""A model with one class: one logit, two named labels, in the configuration, the stock pipeline and the card."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForSemanticSegmentation, pipeline

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SetrConfig
from segmenter_hf.hub.model_card import CardFacts, write_model_card

from ..tiny_models import tiny_scenes_processor


TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
CONFIGS = {
    "linear": (SegmenterConfig, {"num_hidden_layers": 1}),
    "mask_transformer": (SegmenterConfig, {"num_hidden_layers": 1}),
    "naive": (SetrConfig, {"num_hidden_layers": 4, "decoder_hidden_size": 8}),
}


def leaf_config(decoder_type: str = "mask_transformer") -> SegmenterConfig | SetrConfig:
    config_class, sizes = CONFIGS[decoder_type]
    return config_class(**TINY, **sizes, decoder_type=decoder_type, id2label={0: "leaf"}, label2id={"leaf": 0})


def half_and_half() -> Image.Image:
    pixels = np.zeros((40, 56, 3), dtype=np.uint8)
    pixels[:, 28:] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": {0: "leaf"}},
        {"id2label": {"0": "leaf"}, "label2id": {"leaf": 0}},
        {"num_labels": 1, "id2label": {0: "background", 1: "leaf"}},
        {"use_single_logit": True, "id2label": {0: "background", 1: "leaf"}},
    ],
)
def test_both_labels_have_names(fields, tmp_path) -> None:
    SegmenterConfig(**TINY, **fields).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_labels == 1 and config.id2label == {0: "background", 1: "leaf"}


def test_a_class_called_background_has_a_foreground() -> None:
    assert SegmenterConfig(id2label={0: "background"}).id2label == {0: "foreground", 1: "background"}


def test_the_number_of_labels_alone_is_enough() -> None:
    config = SegmenterConfig(num_labels=1)
    assert config.num_labels == 1 and config.id2label == {0: "background", 1: "LABEL_0"}
    config.num_labels = 4
    assert not config.use_single_logit and len(config.id2label) == 4


def test_names_given_on_loading_decide(tmp_path) -> None:
    SegmenterForSemanticSegmentation(leaf_config()).save_pretrained(tmp_path)
    names = {0: "a", 1: "b", 2: "c"}
    several = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, id2label=names, label2id={name: index for index, name in names.items()}, ignore_mismatched_sizes=True
    )
    assert several(torch.zeros(1, 3, 32, 32)).logits.shape[1] == 3
    several.save_pretrained(tmp_path / "several")
    one = AutoConfig.from_pretrained(tmp_path / "several", id2label={0: "leaf"}, label2id={"leaf": 0})
    assert one.num_labels == 1 and one.label2id == {"background": 0, "leaf": 1}


@pytest.mark.parametrize("decoder_type", CONFIGS)
def test_the_stock_pipeline_names_background_and_class(decoder_type, tmp_path) -> None:
    model = AutoModelForSemanticSegmentation.from_config(leaf_config(decoder_type)).eval()
    processor = tiny_scenes_processor()
    image = half_and_half()
    with torch.no_grad():  # a bias that puts the threshold between the two halves
        logits = model(**processor(image)).logits
    middle = (logits.max() + logits.min()) / 2
    if decoder_type == "mask_transformer":
        model.decode_head.mask_norm.bias.data -= middle
    else:
        model.decode_head.classifier.bias.data -= middle
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    parts = pipeline("image-segmentation", model=str(tmp_path))(image)
    assert [part["label"] for part in parts] == ["background", "leaf"]
    masks = [np.asarray(part["mask"]) for part in parts]
    assert masks[0].shape == (40, 56) and np.array_equal(masks[0] == 0, masks[1] == 255)


def test_the_snippets_of_the_card_run(tmp_path) -> None:
    model = SegmenterForSemanticSegmentation(leaf_config())
    model.save_pretrained(tmp_path)
    tiny_scenes_processor().save_pretrained(tmp_path)
    card = write_model_card(tmp_path, model=model, facts=CardFacts()).read_text(encoding="utf-8")
    assert "The classes are background, leaf." in card
    snippets = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet.replace('"predictions"', repr(str(tmp_path / "predictions"))), {})
