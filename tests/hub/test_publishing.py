"""What a repository holds, and pushing and loading it with the real client of the Hub against a local server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from segmenter_hf import (
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    SetrConfig,
    SetrForSemanticSegmentation,
)
from segmenter_hf.data.label_sets import load_label_set
from segmenter_hf.hub.model_card import read_card_facts
from segmenter_hf.hub.publishing import (
    PublishingError,
    build_repository,
    check_push,
    measure,
    publish_model,
    read_recorded_result,
)

from ..hub_server import TOKEN, Hub, running_hub
from ..tiny_models import tiny_scenes_config


ROOT = Path(__file__).parents[2]
CODE = {
    "batch_norm.py",
    "configuration_checks.py",
    "configuration_segmenter.py",
    "configuration_vit_encoder.py",
    "image_processing_segmenter.py",
    "image_io.py",
    "image_windows.py",
    "modeling_segmenter.py",
    "modeling_vit_encoder.py",
    "resampling.py",
    "segmentation_loss.py",
    "pipeline_segmenter.py",
    "sliding_window.py",
    "patch_resizing.py",
    "token_merging.py",
    "window_geometry.py",
    "worker_threads.py",
}
REPOSITORY = CODE | {
    "README.md",
    "config.json",
    "handler.py",
    "label_set.json",
    "model.safetensors",
    "model_card.json",
    "predictions.png",
    "preprocessor_config.json",
    "sample.png",
}

# Everything that a publisher does, in one process; what came of it goes into a file.
PUBLISHER = """
import json, runpy, sys, urllib.request
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import _http

from segmenter_hf.hub.model_card import read_card_facts
from segmenter_hf.hub.publishing import publish_model
from segmenter_hf.training.run import DataArguments, ModelArguments, SegmentationTrainingArguments, train_segmenter

_http.time.sleep = lambda seconds: None  # the client waits between its attempts
checkpoint, repository, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
said = {}


def fail(**failures):
    address = huggingface_hub.constants.ENDPOINT + "/_fail"
    urllib.request.urlopen(urllib.request.Request(address, json.dumps(failures).encode())).read()


def rejected(title, *arguments, **options):
    try:
        publish_model(checkpoint, *arguments, **options)
    except RuntimeError as error:
        said[title] = str(error)


def script(*arguments):
    sys.argv = ["publish.py", *map(str, arguments)]
    sys.path.insert(0, "scripts")
    try:
        runpy.run_path(str(repository / "scripts" / "publish.py"), run_name="__main__")
    except SystemExit as error:
        said["script"] = str(error)


rejected("wrong token", "org/new", token="hf_wrong")
fail(create=403)
rejected("no right", "org/new")
fail(upload="drop")
rejected("dropped", "org/interrupted")
fail(upload=500)
rejected("server error in the upload", "org/interrupted")
fail(upload=403)
rejected("no right in the upload", "org/interrupted")
fail(commit=500)
rejected("server error in the commit", "org/interrupted")
fail(commit=412)
rejected("changed meanwhile", "org/interrupted")
fail()
rejected("dataset of that name", "org/data")
rejected("public", "org/public", private=True)

script("--checkpoint_dir", checkpoint, "--hub_model_id", "org/interrupted")  # the same again, without a failure
script("--checkpoint_dir", checkpoint, "--hub_model_id", "org/scenes", "--private", "--evaluate", "scenes",
       "--max_samples", "2", "--multi_scale_flip", "--license", "apache-2.0")
publish_model(checkpoint, "org/scenes")  # nothing is new: no commit
facts = replace(read_card_facts(checkpoint), speed={"images per second": 3})
publish_model(checkpoint, "org/scenes", facts=facts, commit_message="Tell the speed")
script("--checkpoint_dir", checkpoint, "--hub_model_id", "org/scenes", "--revision", "fp32", "--license", "mit")

card = huggingface_hub.ModelCard.load("org/scenes")
said["card"] = card.content
(snippet,) = [text.split("```")[0] for text in card.text.split("```python")[1:] if "segmenter_hf" in text.split("```")[0]]
exec(snippet, {})
branch = huggingface_hub.ModelCard(Path(huggingface_hub.hf_hub_download("org/scenes", "README.md", revision="fp32")).read_text())
for text in branch.text.split("```python")[1:]:
    exec(text.split("```")[0], {})
said["label maps"] = sorted(str(path) for path in Path("predictions").iterdir())

train_segmenter(
    ModelArguments(config_overrides="hidden_size=16,num_attention_heads=1,intermediate_size=16,num_hidden_layers=1"),
    DataArguments(scenes_train=2, scenes_validation=2, image_size=48, crop_size=32),
    SegmentationTrainingArguments(
        output_dir=str(work / "trained"), num_train_epochs=1, per_device_train_batch_size=2, use_cpu=True,
        push_to_hub=True, hub_model_id="org/trained", disable_tqdm=True,
    ),
)
(work / "said.json").write_text(json.dumps(said))
"""

# A stranger without the package: loads, runs the examples of the card, and pushes what was loaded again.
READER = """
import sys
from pathlib import Path


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "segmenter_hf":
            raise ImportError("the package is not installed here")


sys.meta_path.insert(0, Blocked())

import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

card = ModelCard.load("org/scenes")
snippets = [text.split("```")[0] for text in card.text.split("```python")[1:]]
for snippet in snippets:
    if "segmenter_hf" not in snippet:
        exec(snippet, names := {})
torch.save(names["result"].segmentation_scores, "scores.pt")

model = AutoModelForSemanticSegmentation.from_pretrained("org/scenes", revision="fp32", trust_remote_code=True)
model.push_to_hub("org/again")
for backend in ("torchvision", "pil"):
    processor = AutoImageProcessor.from_pretrained("org/scenes", backend=backend, trust_remote_code=True)
    processor.push_to_hub("org/again")
    again = AutoImageProcessor.from_pretrained("org/again", backend=backend, trust_remote_code=True)
    assert again.to_dict() == processor.to_dict()
again = AutoModelForSemanticSegmentation.from_pretrained("org/again", trust_remote_code=True)
assert type(again).__module__ != type(model).__module__, type(again)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
print(snapshot_download("org/again"))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model as training leaves it, with what does not belong on the Hub."""
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    torch.manual_seed(0)
    SegmenterForSemanticSegmentation(tiny_scenes_config()).save_pretrained(directory)
    SegmenterImageProcessor(
        size={"shortest_edge": 40}, window_size=32, window_stride=16, patch_size=8
    ).save_pretrained(directory)
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", "checkpoint-5/model.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"not for the Hub")
    return directory


@pytest.fixture(scope="module")
def repository(checkpoint, tmp_path_factory) -> Path:
    return build_repository(checkpoint, tmp_path_factory.mktemp("built") / "model")


def files_of(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_a_repository_holds_what_belongs_there_and_nothing_else(repository) -> None:
    assert files_of(repository) == REPOSITORY


def test_weights_are_the_same_to_the_bit(checkpoint, repository) -> None:
    before, after = (load_file(directory / "model.safetensors") for directory in (checkpoint, repository))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_building_from_a_built_repository_gives_it_again(repository, tmp_path) -> None:
    again = build_repository(repository, tmp_path / "again", hub_model_id="org/name")
    assert files_of(again) == REPOSITORY
    for name in REPOSITORY - {"README.md"}:
        assert (again / name).read_bytes() == (repository / name).read_bytes(), name
    assert 'hf_hub_download("org/name", "sample.png")' in (again / "README.md").read_text()
    with pytest.raises(ValueError, match="a/b/c"):
        build_repository(repository, tmp_path / "unnamed", hub_model_id="a/b/c")


def test_a_directory_that_holds_something_is_kept(checkpoint, repository, tmp_path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="`overwrite`"):
        build_repository(repository, tmp_path)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        build_repository(checkpoint, checkpoint.parent, overwrite=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_directory_that_another_run_has_written_meanwhile_stays(repository, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "segmenter_hf.hub.publishing.write_model_card", lambda *_, **__: (tmp_path / "out" / "x").mkdir(parents=True)
    )
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        build_repository(repository, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "trained or converted model"),
        ("model.safetensors", "convert_checkpoint"),
        ("preprocessor_config.json", "image processor"),
    ],
)
def test_a_missing_file_is_named_with_its_remedy(repository, tmp_path, name, message) -> None:
    copy = build_repository(repository, tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*{message}"):
        build_repository(copy, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_setr_comes_with_its_own_code(tmp_path) -> None:
    config = SetrConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=4,
        decoder_hidden_size=8,
        image_size=32,
        patch_size=8,
    )
    SetrForSemanticSegmentation(config).save_pretrained(tmp_path / "setr")
    SegmenterImageProcessor(window_size=32, window_stride=32, patch_size=8).save_pretrained(tmp_path / "setr")
    built = build_repository(tmp_path / "setr", tmp_path / "built")
    code = {
        name.replace("_segmenter", "_setr") if "processing" not in name and "pipeline" not in name else name
        for name in CODE
    }
    assert files_of(built) == (REPOSITORY - CODE - {"predictions.png"}) | code
    assert "zheng2021setr" in (built / "README.md").read_text()


def test_weights_that_are_not_whole_are_not_published(repository, tmp_path) -> None:
    copy = build_repository(repository, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    lost = sorted(weights)[0]
    save_file({name: weights[name] for name in weights if name != lost}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(lost)):
        build_repository(copy, tmp_path / "built")


def test_recorded_runs_come_into_the_card(repository, tmp_path) -> None:
    (result,) = measure(repository, "scenes", max_samples=2)
    labels = list(load_label_set("scenes").labels)
    (tmp_path / "results.json").write_text(json.dumps({**result, "labels": labels, "mean_iou": 0.25}))
    read = read_recorded_result(tmp_path / "results.json")
    assert (read["label_set"], read["hub_dataset"]) == ("scenes", None)
    facts = read_card_facts(repository).with_results([result, read])
    assert facts.results == (read,)
    built = build_repository(repository, tmp_path / "built", facts=replace(facts, speed={"images per second": 3}))
    card = ModelCard.load(built / "README.md")
    assert "| scenes | validation[:2] | single scale | 25.00 | 2 |" in card.text
    assert "| images per second | 3 |" in card.text
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="the results.json of an evaluation"):
        read_recorded_result(tmp_path / "results.json")


def test_what_keeps_a_push_from_the_hub_is_said_first(checkpoint, monkeypatch) -> None:
    with pytest.raises(PublishingError, match="HF_HUB_OFFLINE"):
        publish_model(checkpoint, "org/name")
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("segmenter_hf.hub.publishing.get_token", lambda: None)
    with pytest.raises(PublishingError, match="hf auth login"):
        check_push("org/name")
    with pytest.raises(ValueError, match="owner/name"):
        check_push("name")


def run(program: str, hub: Hub, work: Path, *arguments: object) -> str:
    """Run a program in a fresh process, with empty caches, that knows this Hub only."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work)}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    finished = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    return finished.stdout


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def said(hub, checkpoint, tmp_path_factory) -> dict[str, str]:
    """What the publisher was told; afterwards the Hub holds what it pushed."""
    work = tmp_path_factory.mktemp("publisher")
    hub.add_model("org/public")
    stale = {"model-00001-of-00002.safetensors": b"old", "training_args.bin": b"old", "photo.jpg": b"kept"}
    hub.add_model("org/scenes", private=True, files=stale)
    hub.taken.add("org/data")
    run(PUBLISHER, hub, work, checkpoint, ROOT, work)
    return json.loads((work / "said.json").read_text())


def test_every_rejection_says_what_to_do(said) -> None:
    expected = {
        "wrong token": "hf auth login",
        "no right": "may not write to org",
        "dropped": "run the same command again",
        "server error in the upload": "run the same command again",
        "no right in the upload": "may not write to org",
        "server error in the commit": "run the same command again",
        "changed meanwhile": "changed at the same time",
        "dataset of that name": "give another name",
        "public": "exists and is public",
    }
    for title, remedy in expected.items():
        assert remedy in said[title], said[title]
    assert "script" not in said


def test_a_push_is_one_commit_and_a_failed_one_is_none(hub, said) -> None:
    assert "org/new" not in hub.models
    assert [commit.message for commit in hub.models["org/public"].branches["main"]] == ["initial commit"]
    commits = hub.models["org/interrupted"].branches["main"]
    assert [commit.message for commit in commits] == ["initial commit", "Publish the model"]
    assert commits[-1].files.keys() == REPOSITORY | {".gitattributes"}


def test_pushing_again_replaces_what_is_outdated_and_keeps_the_rest(hub, said) -> None:
    _, first, second = hub.models["org/scenes"].branches["main"]  # pushing the same once more made no commit
    for commit in (first, second):
        assert commit.files.keys() == REPOSITORY | {".gitattributes", "photo.jpg"}
    changed = {name for name in first.files if first.files[name] != second.files[name]}
    assert changed == {"README.md", "model_card.json"}
    assert hub.models["org/scenes"].private


def test_a_revision_is_a_branch_of_its_own(hub, said) -> None:
    branches = hub.models["org/scenes"].branches
    assert branches.keys() == {"main", "fp32"}
    assert branches["fp32"][:-1] == branches["main"]
    card = branches["fp32"][-1].files["README.md"].decode()
    assert "license: mit" in card and card.count('revision="fp32"') == 7
    assert "revision=" not in branches["main"][-1].files["README.md"].decode()


def test_the_measured_numbers_are_in_the_card(hub, said) -> None:
    for commit in hub.models["org/scenes"].branches["main"][1:]:  # the second push needed no evaluation
        card = commit.files["README.md"].decode()
        assert re.search(r"\| scenes \| validation\[:2\] \| single scale \| \d+\.\d\d \| 2 \|", card)
        assert re.search(r"\| scenes \| validation\[:2\] \| multi-scale \+ flip \| \d+\.\d\d \| 2 \|", card)
        assert "license: apache-2.0" in card
    assert [Path(name).name for name in said["label maps"]] == ["sample.png", "sample_overlay.png"]


def test_trainer_pushes_the_same_repository(hub, said) -> None:
    commits = hub.models["org/trained"].branches["main"]
    assert [commit.message for commit in commits] == ["initial commit", "End of training"]
    assert commits[-1].files.keys() == REPOSITORY | {".gitattributes"}
    assert "| scenes | validation | single scale |" in commits[-1].files["README.md"].decode()


def test_a_stranger_without_the_package_loads_runs_and_pushes_again(hub, said, checkpoint, tmp_path) -> None:
    run(READER, hub, tmp_path)
    again = hub.models["org/again"].find("main").files
    assert again.keys() >= CODE | {"config.json", "model.safetensors", "preprocessor_config.json"}
    scores = torch.load(tmp_path / "scores.pt")
    model = SegmenterForSemanticSegmentation.from_pretrained(checkpoint)
    processor = SegmenterImageProcessor.from_pretrained(checkpoint)
    (tmp_path / "sample.png").write_bytes(hub.models["org/scenes"].find("main").files["sample.png"])
    inputs = processor(Image.open(tmp_path / "sample.png"), scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], do_flip=True)
    with torch.no_grad():
        outputs = model(**inputs)
    (result,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    assert torch.equal(scores, result.segmentation_scores)


def test_ctrl_c_while_pushing_stays_one(checkpoint, monkeypatch) -> None:
    def interrupt(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("segmenter_hf.hub.publishing.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("segmenter_hf.hub.publishing._push", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish_model(checkpoint, "owner/name", token="hf_token")
