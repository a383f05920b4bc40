"""The card and the table of published models."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation
from segmenter_hf.model_card import published_models_table, write_model_card


RESULT = {
    "mean_iou": 0.51234,
    "mean_accuracy": 0.6,
    "overall_accuracy": 0.7,
    "per_category_iou": [0.5, 0.52468, float("nan")],
    "per_category_accuracy": [0.6, 0.6, float("nan")],
    "num_images": 7,
    "protocol": {"name": "multi-scale + flip"},
    "dataset": "photos/street",
    "split": "validation",
}


@pytest.fixture
def card(tmp_path) -> ModelCard:
    labels = {0: "road", 1: "sky", 2: "boat"}
    config = SegmenterConfig(
        hidden_size=16,
        num_attention_heads=1,
        intermediate_size=16,
        num_hidden_layers=1,
        image_size=32,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    model = SegmenterForSemanticSegmentation(config)
    path = write_model_card(tmp_path, model=model, results=[RESULT], training={"steps": 12}, picture="predictions.png")
    return ModelCard.load(path)


def test_the_card_has_the_numbers_with_their_protocol(card) -> None:
    assert "| street | validation | 7 | multi-scale + flip | 51.23 | 60.00 | 70.00 |" in card.text
    assert "| sky | 52.47 | 60.00 |" in card.text
    assert "| boat | - | - |" in card.text
    assert "| steps | 12 |" in card.text
    assert "predictions.png" in card.text


def test_the_card_has_the_metadata_of_the_hub(card) -> None:
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("mean_iou", 0.51234, "street")


def test_the_table_in_the_readme_is_the_one_of_the_data() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"published_models_table -->\n{published_models_table()}\n<!-- end -->" in readme
