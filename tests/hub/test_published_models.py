"""The published models: what is known of each, and the tables of them."""

from pathlib import Path

import pytest

from segmenter_hf.cli.models import list_published_models, published_models_table
from segmenter_hf.data.label_sets import list_label_sets
from segmenter_hf.hub.published_models import get_published_model, load_published_models


ROOT = Path(__file__).parents[2]
MODELS = load_published_models()


def test_the_table_of_the_zoo_is_the_one_of_the_data() -> None:
    page = (ROOT / "docs" / "model_zoo.md").read_text(encoding="utf-8")
    assert f"published_models_table -->\n{published_models_table()}\n<!-- end -->" in page


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_where_it_is_and_how_it_was_measured(name) -> None:
    model = MODELS[name]
    assert model.dataset in list_label_sets()
    assert not (model.checkpoint_url and model.share_url)
    assert all(url is None or url.startswith("https://") for url in (model.checkpoint_url, model.config_url))
    if model.checkpoint_url and model.sha256_prefix:
        assert model.checkpoint_url.endswith(f"-{model.sha256_prefix}.pth")
    if model.source == "rstrudel/segmenter":
        assert model.config_url.endswith("/variant.yml")
    if model.checkpoint_url or model.share_url:
        assert model.window_size == model.crop_size
        assert model.report_url.startswith(f"https://github.com/{model.source}")


@pytest.mark.parametrize("name", MODELS)
def test_both_tables_have_the_numbers_of_a_model(name) -> None:
    model = MODELS[name]
    (row,) = [line for line in published_models_table().splitlines() if name in line.split("|")[1]]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    (line,) = [line.split() for line in list_published_models().splitlines() if line.split()[0] == name]
    scores = [
        "-" if score is None else f"{score:.2f}" for score in (model.miou_single_scale, model.miou_multi_scale_flip)
    ]
    assert cells[7:9] == scores
    assert any(line[index : index + 2] == scores for index in range(len(line)))
    assert (f"`--model {name}`" in cells[9]) == bool(model.checkpoint_url or model.share_url)
    assert model.share_url is None or model.share_url in cells[9]


def test_the_list_fits_a_terminal() -> None:
    assert max(map(len, list_published_models().splitlines())) <= 100


def test_protocols_are_those_of_the_sources() -> None:
    def protocol(name: str) -> tuple[int | None, int | None]:
        return MODELS[name].window_size, MODELS[name].window_stride

    assert protocol("seg-l-mask-16-pascal-context") == (480, 320)
    assert protocol("seg-l-mask-16-cityscapes") == (768, 512)
    assert protocol("mmseg-segmenter-vit-l-mask-ade20k") == (640, 608)
    assert protocol("openmmlab-reproduction-deit-b-mask-ade20k") == (512, 341)
    assert protocol("setr-pup-ade20k") == (512, 341)
    assert protocol("mmseg-0.21-segmenter-vit-b-mask-ade20k") == (None, None)


def test_an_unknown_name_is_answered_with_those_that_look_like_it() -> None:
    assert get_published_model("setr-pup-ade20k").decoder == "pup"
    with pytest.raises(ValueError, match="'seg-b-mask-ade20k'. Did you mean seg-b-mask-16-ade20k"):
        get_published_model("seg-b-mask-ade20k")
    with pytest.raises(ValueError, match="Did you mean seg-l-mask-16-ade20k or seg-l-"):
        get_published_model("seg-l")
    with pytest.raises(ValueError, match="No published model is called 'resnet'.$"):
        get_published_model("resnet")
