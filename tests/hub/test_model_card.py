"""The cards: numbers with their protocol and source, metadata of the Hub, examples that run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.evaluation.evaluate import per_class_table
from segmenter_hf.hub.model_card import (
    CardFacts,
    hub_name,
    read_card_facts,
    results_table,
    write_model_card,
    write_published_model_cards,
)
from segmenter_hf.hub.published_models import load_published_models
from segmenter_hf.hub.publishing import read_recorded_result


ROOT = Path(__file__).parents[2]
RESULT = {
    "mean_iou": 0.51234,
    "mean_accuracy": 0.6,
    "overall_accuracy": 0.7,
    "per_category_iou": [0.5, 0.52468, float("nan")],
    "per_category_accuracy": [0.6, 0.6, float("nan")],
    "num_images": 7,
    "protocol": {"name": "multi-scale + flip", "window_size": 32},
    "dataset": "photos/street",
    "split": "validation",
}


def tiny_model(labels: tuple[str, ...]) -> SegmenterForSemanticSegmentation:
    config = SegmenterConfig(
        hidden_size=16,
        num_attention_heads=1,
        intermediate_size=16,
        num_hidden_layers=1,
        image_size=32,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    return SegmenterForSemanticSegmentation(config)


@pytest.fixture
def model() -> SegmenterForSemanticSegmentation:
    return tiny_model(("road", "sky", "boat"))


@pytest.fixture
def facts() -> CardFacts:
    single = {**RESULT, "mean_iou": 0.5, "protocol": {"name": "single scale"}, "hub_dataset": "org/street"}
    return CardFacts(results=(RESULT, single), training={"steps": 12}, picture="predictions.png")


@pytest.fixture
def card(tmp_path, model, facts) -> ModelCard:
    return ModelCard.load(write_model_card(tmp_path, model=model, facts=facts))


def test_the_card_has_the_numbers_with_their_protocol(card) -> None:
    assert "| street | validation | multi-scale + flip | 51.23 | 7 | 60.00 | 70.00 |" in card.text
    assert "Measured, multi-scale + flip: window size 32." in card.text
    assert "| sky | 52.47 | 60.00 |" in card.text
    assert "| boat | - | - |" in card.text
    assert card.text.count("<summary>Each class") == 2
    assert "| steps | 12 |" in card.text
    assert "predictions.png" in card.text


def test_the_card_says_nothing_that_is_not_known(card) -> None:
    assert "published" not in card.text.lower().replace("whoever published them", "")
    assert "## Speed" not in card.text
    assert (card.data.license, card.data.license_name) == ("other", "not-stated")
    assert card.data.get("base_model") is None


def test_the_card_has_the_metadata_of_the_hub(card) -> None:
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.library_name == "transformers"
    assert {"semantic-segmentation", "segmenter"} <= set(card.data.tags)
    assert card.data.widget == [{"src": "sample.png", "example_title": "Street scene"}]
    assert [(result.metric_type, result.metric_name, result.metric_value) for result in card.data.eval_results] == [
        ("mean_iou", "mean IoU, multi-scale + flip", 0.51234),
        ("mean_iou", "mean IoU, single scale", 0.5),
    ]


def test_results_on_data_sets_of_the_hub_are_entries_of_their_own(card, tmp_path) -> None:
    written = yaml.safe_load((tmp_path / ".eval_results" / "semantic_segmentation.yaml").read_text())
    (entry,) = parse_eval_result_entries(written)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/street", "semantic-segmentation", 0.5)
    assert "single scale, validation split, 7 images" in entry.notes


def test_facts_are_read_as_they_were_written(tmp_path, model, facts) -> None:
    assert read_card_facts(tmp_path) == CardFacts()
    facts = facts.with_results([{**RESULT, "per_category_iou": [0.5] * 3, "per_category_accuracy": [0.5] * 3}])
    write_model_card(tmp_path, model=model, facts=replace(facts, results=facts.results[:1]))
    assert read_card_facts(tmp_path) == replace(facts, results=facts.results[:1])
    (tmp_path / "model_card.json").write_text('{"color": "green"}')
    with pytest.raises(ValueError, match="color.*Delete the file"):
        read_card_facts(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"results": [1]}',
        '{"results": [{}]}',
        '{"training": 5}',
        '{"speed": [[1]]}',
        '{"license": ["a"]}',
        "[" * 100_000,
    ],
)
def test_facts_of_another_form_are_refused(text, tmp_path) -> None:
    (tmp_path / "model_card.json").write_text(text)
    with pytest.raises(ValueError, match="model_card.json: expected"):
        read_card_facts(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({name: ...} for name in ("labels", *RESULT)),  # without it
        *({name: 5} for name in ("labels", "protocol", "per_category_iou", "dataset", "hub_dataset")),
        *({name: "much"} for name in ("num_images", "mean_iou", "mean_accuracy", "overall_accuracy")),
        {"protocol": {}},
    ],
)
def test_results_of_another_form_are_refused(change, tmp_path) -> None:
    path = tmp_path / "results.json"
    whole = {**RESULT, "labels": ["a"]}
    path.write_text(json.dumps(whole))
    assert read_recorded_result(path)["mean_iou"] == RESULT["mean_iou"]
    path.write_text(json.dumps({name: value for name, value in {**whole, **change}.items() if value is not ...}))
    with pytest.raises(ValueError, match=f"results.json: expected .*{next(iter(change))}"):
        read_recorded_result(path)


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos/street").mkdir(parents=True)
    assert hub_name("photos/street") is None
    assert hub_name("org/street") == "org/street"
    assert hub_name("scenes") is hub_name("../data/street") is hub_name("") is None


def test_published_and_measured_numbers_stand_side_by_side() -> None:
    published = load_published_models()["seg-b-mask-16-ade20k"]
    measured = {**RESULT, "protocol": {"name": "single scale"}, "dataset": "data/ade", "label_set": "ade20k"}
    assert results_table([measured], published).splitlines()[2:] == [
        "| ade20k | validation | single scale | 48.50 | 51.23 | 7 | 60.00 | 70.00 |",
        "| ade20k | validation | multi-scale + flip | 50.00 |  |  |  |  |",
    ]
    elsewhere = results_table([measured, {**measured, "dataset": "data/bdd100k", "mean_iou": 0.4}], published)
    assert "| ade20k | validation | single scale | 48.50 | 51.23 |" in elsewhere
    assert "| bdd100k | validation | single scale |  | 40.00 |" in elsewhere
    approximate = {
        **measured,
        "dtype": "bfloat16",
        "patch_size": 32,
        "token_merging": True,
        "token_merging_threshold": 0.9,
        "mean_iou": 0.3,
    }
    both = results_table([measured, approximate], published)
    assert (
        "48.50 | 51.23" in both
        and "| single scale, bfloat16, patches of 32, tokens merged above 0.9 |  | 30.00 |" in both
    )
    other = {**measured, "label_set": "scenes"}
    assert (
        results_table([other], published).splitlines()[-1].startswith("| ade | validation | single scale |  | 51.23")
    )


def test_a_result_of_other_classes_is_refused(tmp_path, model) -> None:
    result = {**RESULT, "per_category_iou": [0.5] * (model.config.num_labels + 1)}
    with pytest.raises(ValueError, match=r"on .* has 4 classes, and the model 3"):
        write_model_card(tmp_path, model=model, facts=CardFacts(results=(result,)))


def test_a_model_that_cannot_be_the_published_one_is_refused(tmp_path, model) -> None:
    with pytest.raises(ValueError, match="3 classes"):
        write_model_card(tmp_path, model=model, facts=CardFacts(published_model="seg-b-mask-16-ade20k"))
    with pytest.raises(ValueError, match="called 'seg-x'"):
        write_model_card(tmp_path, model=model, facts=CardFacts(published_model="seg-x"))
    assert not (tmp_path / "README.md").exists()


@pytest.fixture(scope="module")
def published_cards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    write_published_model_cards(folder)
    return folder


def test_the_cards_that_are_checked_in_are_those_of_the_data(published_cards) -> None:
    made, kept = (
        {
            path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (published_cards, ROOT / "model_cards")
    )
    assert made == kept, "run: python scripts/make_model_cards.py --output_dir model_cards"
    assert {name.split("/")[0] for name in made} == set(load_published_models())


@pytest.mark.parametrize("name", load_published_models())
def test_a_published_number_is_never_a_measured_one(published_cards, name) -> None:
    model = load_published_models()[name]
    card = ModelCard.load(published_cards / name / "README.md")
    rows = [line.split("|")[1:-1] for line in card.text.splitlines() if line.startswith(f"| {model.dataset} |")]
    scores = [score for score in (model.miou_single_scale, model.miou_multi_scale_flip) if score is not None]
    assert [row[3].strip() for row in rows] == [f"{score:.2f}" for score in scores]
    assert not any(cell.strip() for row in rows for cell in row[4:])
    for result, score in zip(card.data.eval_results or [], scores, strict=True):
        assert result.metric_value == pytest.approx(score / 100)
        assert result.source_url.startswith("https://github.com/")
        assert "as reported by the source" in result.metric_name


def test_the_paper_is_that_of_the_family(published_cards) -> None:
    for name, model in load_published_models().items():
        text = (published_cards / name / "README.md").read_text(encoding="utf-8")
        assert ("2012.15840" in text and "zheng2021setr" in text) == (model.family == "setr")
        assert ("2105.05633" in text and "strudel2021segmenter" in text) == (model.family == "segmenter")


def test_the_examples_of_a_published_card_run(published_cards, tmp_path, monkeypatch) -> None:
    name = "seg-b-mask-16-ade20k"
    monkeypatch.chdir(tmp_path)
    model = tiny_model(load_label_set("ade20k").labels)
    directory = Path("outputs") / name
    model.save_pretrained(directory)
    SegmenterImageProcessor(size={"shortest_edge": 32}, window_size=32, window_stride=32).save_pretrained(directory)
    card = ModelCard.load(write_model_card(directory, model=model, facts=CardFacts(published_model=name)))

    def snippets(text: str) -> list[str]:
        return [part.split("```")[0] for part in text.split("```python\n")[1:]]

    assert snippets(card.text) == snippets((published_cards / name / "README.md").read_text(encoding="utf-8"))
    assert len(snippets(card.text)) == 3
    for snippet in snippets(card.text):
        exec(snippet, names := {})
        if "result" in names:
            assert torch.equal(names["result"].segmentation_scores.argmax(0), names["result"].segmentation)
    assert Path("predictions/sample_overlay.png").exists()


def test_names_of_classes_and_datasets_do_not_break_tables(tmp_path, facts) -> None:
    names = ("a|b", "two\nlines", "<b>", "back\\slash", *(f"class {index}" for index in range(4)))
    model = tiny_model(names)
    result = {**RESULT, "per_category_iou": [0.5] * 8, "per_category_accuracy": [0.5] * 8}
    write_model_card(
        tmp_path, model=model, facts=replace(facts, results=(result,), training={"name | of\nall": "x|y"})
    )
    text = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    assert "| name \\| of all | x\\|y |" in text
    assert "a\\|b, two lines, &lt;b>, back\\\\slash, class 0" in text
    assert "two\nlines" not in text
    results = {"per_category_iou": [0.5, 0.5], "per_category_accuracy": [1.0, 1.0]}
    table = per_class_table(results | {"mean_iou": 0.5, "mean_accuracy": 1.0}, names[:2])
    assert table.splitlines()[2:4] == ["| a\\|b | 50.00 | 100.00 |", "| two lines | 50.00 | 100.00 |"]
