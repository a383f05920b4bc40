"""Models of other revisions, and several compiled models in one process."""

import errno
import functools

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import SemanticSegmenterOutput

from segmenter_hf import SegmenterConfig, SegmenterForSemanticSegmentation
from segmenter_hf.inference import model_loading
from segmenter_hf.inference.model_loading import compile_network, load_model, translate_loading_errors
from segmenter_hf.utils.http import http_client

from ..tiny_models import save_tiny_scenes_model, tiny_scenes_config
from ..versions import needs_compile


def test_the_weights_of_the_revision_are_checked_and_not_those_of_main(tmp_path, monkeypatch) -> None:
    """As a cache of the Hub has two branches, one of them with weights that were cut to integers."""
    repository = tmp_path / "models--org--tiny"
    for branch, commit in (("main", "a" * 40), ("whole", "b" * 40)):
        save_tiny_scenes_model(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    damaged = repository / "snapshots" / ("a" * 40) / "model.safetensors"
    weights = load_file(damaged)
    weights["segmenter.layernorm.weight"] = weights["segmenter.layernorm.weight"].long()
    save_file(weights, damaged, metadata={"format": "pt"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="1 no floating-point numbers"):
        load_model("org/tiny", device="cpu")
    model, _, _ = load_model("org/tiny", device="cpu", revision="whole")
    assert model.config.num_labels == 8


@needs_compile
def test_any_number_of_models_is_compiled_in_one_process(monkeypatch) -> None:
    monkeypatch.setattr(
        model_loading.torch, "compile", functools.partial(torch.compile, backend="eager")
    )  # the limit is that of the front end
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for num_labels in range(2, 6):
            fields = tiny_scenes_config().to_dict() | {"num_labels": num_labels, "num_hidden_layers": 1}
            fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
            model = SegmenterForSemanticSegmentation(SegmenterConfig(**fields)).eval()
            pixel_values = torch.randn(2, 3, 32, 40)
            expected = model(pixel_values=pixel_values, return_dict=True).logits
            compile_network(model)
            torch.testing.assert_close(model(pixel_values=pixel_values, return_dict=True).logits, expected)


def test_a_gpu_has_options_of_its_own_and_results_outlive_the_next_run() -> None:
    assert model_loading.compile_options(torch.device("cpu")) == {}
    assert model_loading.compile_options(torch.device("cuda", 0)) == {"mode": "max-autotune"}
    memory = torch.zeros(2)  # as that of a CUDA graph

    def forward(value: int) -> SemanticSegmenterOutput:
        return SemanticSegmenterOutput(logits=memory.fill_(value))

    copied = model_loading.copy_results(forward)
    first, second = copied(1), copied(value=2)
    assert isinstance(first, SemanticSegmenterOutput)
    assert first.logits.tolist() == [1, 1] and second.logits.tolist() == [2, 2]


def test_a_model_without_its_image_processor_is_told_by_the_file(tmp_path) -> None:
    save_tiny_scenes_model(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json: no such file, .* with `save_pretrained`"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["nope", "org/nope"])
def test_a_model_that_is_nowhere_is_named_in_one_line_with_how_to_get_one(name, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"^{name}: no such directory, and the Hub, where it may be, cannot") as caught:
        load_model(name, device="cpu")
    assert str(caught.value).endswith(f"cannot be reached. {model_loading.WHERE_FROM}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (GatedRepoError, "who accepted its terms"),
        (RepositoryNotFoundError, "the Hub has no such model, or not for this account"),
        (RevisionNotFoundError, "v9 is not a valid git identifier. See the page for the others."),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(cause, said) -> None:
    response = http_client.Response(404, request=http_client.Request("GET", "http://127.0.0.1/"))
    with pytest.raises(OSError, match=f"^org/nope: .*{said}") as caught, translate_loading_errors("org/nope"):
        raise OSError("v9 is not a valid git identifier.\n\nSee the page for the others.") from cause(
            "404", response=response
        )
    assert "\n" not in str(caught.value)


def test_errors_of_the_system_stay_what_they_are() -> None:
    with pytest.raises(PermissionError, match="no\nway"), translate_loading_errors("org/nope"):
        raise PermissionError("no\nway")
    with pytest.raises(OSError, match="No space left"), translate_loading_errors("org/nope"):
        raise OSError(errno.ENOSPC, "No space left")
