"""From the directory of a model to a repository on the Hub: only what belongs there, in one commit."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..data.label_resolution import fit_changed_to_masks
from ..data.label_sets import LABEL_SET_FILE, LabelSet, get_model_label_set, list_label_sets, load_label_set
from ..data.loading import limited_split, load_segmentation_datasets, load_split
from ..evaluation.evaluate import EvaluationDataset, evaluate_segmentation, save_prediction_grid
from ..inference.model_files import MODEL_FILES, check_replaceable
from ..inference.model_loading import load_model_and_processor
from ..inference.predictor import Predictor
from ..inference.protocol import InferenceProtocol
from ..models.image_processing_segmenter import AnyImageProcessor
from ..utils.atomic_files import atomic_directory
from ..utils.folders import lies_within
from ..utils.json_files import check_types, read_json_object
from .model_card import SAMPLE_IMAGE, CardFacts, check_result, read_card_facts, recorded_result, write_model_card


HANDLER_FILE = "handler.py"  # what Inference Endpoints run
PREDICTIONS_IMAGE = "predictions.png"
# What a repository may hold from before and the new directory does not: it goes in the same commit.
_OUTDATED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.py", ".eval_results/*")


class PublishingError(RuntimeError):
    """A push that cannot be made, was rejected or did not get through; the message says what to do."""


def publish_model(
    checkpoint_dir: str | Path,
    hub_model_id: str,
    *,
    facts: CardFacts | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Publish the model",
) -> CommitInfo:
    """Push a model to the Hub as one commit: weights, configuration, processor, code, card and images.

    The repository is made where there is none. Weights, code and pickles that it held before and that are no longer part
    of the model go in the same commit; all other files stay.

    Args:
        checkpoint_dir (`str` or `Path`): The directory of the model: see [`build_repository`].
        hub_model_id (`str`): Where it goes, as `owner/name`.
        facts (`CardFacts`, *optional*): What the card says; by default what `model_card.json` in the directory says.
        private (`bool`, *optional*): Whether a new repository is private; by default as its owner has it set.
        revision (`str`, *optional*): Branch to push to, which is made where there is none; `main` by default.
        token (`str`, *optional*): Token with the right to write; by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, defaults to `"Publish the model"`): First line of the commit.

    Returns:
        `CommitInfo`: The commit, with its address.

    Raises:
        FileNotFoundError: If the directory lacks a part of the model.
        ValueError: If `hub_model_id` is no name, or the directory does not hold a whole model of this package.
        PublishingError: If nothing can be pushed, the Hub rejects it, or it does not get through.
    """
    check_push(hub_model_id, token)
    with tempfile.TemporaryDirectory(prefix="segmenter_hf-publish-") as folder:
        directory = build_repository(
            checkpoint_dir, Path(folder) / "model", facts=facts, hub_model_id=hub_model_id, revision=revision
        )
        with _explained(hub_model_id):
            return _push(HfApi(token=token), directory, hub_model_id, private, revision, commit_message)


def check_push(hub_model_id: str, token: str | None = None) -> None:
    """Find out without the Hub what would keep a push from it, before any long work.

    Args:
        hub_model_id (`str`), token (`str`, *optional*): As for [`publish_model`].

    Raises:
        ValueError: If `hub_model_id` is no name.
        PublishingError: If there is no token or the Hub is switched off.
    """
    validate_repo_id(hub_model_id)
    if "/" not in hub_model_id:
        raise ValueError(
            f"`hub_model_id` must be owner/name, got {hub_model_id!r}: put your name or organization first."
        )
    if constants.is_offline_mode():
        raise PublishingError("HF_HUB_OFFLINE is set: unset it to push, or only build the repository.")
    if (token or get_token()) is None:
        raise PublishingError(_login_advice("There is no token for the Hub"))


def build_repository(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    *,
    facts: CardFacts | None = None,
    hub_model_id: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the directory that would be pushed, and nothing else than what belongs there.

    It holds the weights as safetensors, configuration, image processor, label set, model files, `handler.py` for Inference
    Endpoints, the card, and `sample.png`; `predictions.png` if the model was trained here or on the embedded scenes.

    Args:
        checkpoint_dir (`str` or `Path`): Directory of a trained or converted model with its image processor.
        output_dir (`str` or `Path`): The directory to write; appears when it is complete.
        facts (`CardFacts`, *optional*): What the card says; by default what `model_card.json` in the directory says.
        hub_model_id, revision (`str`, *optional*): Name on the Hub for the card's examples, `output_dir` by default; and branch.
        overwrite (`bool`, defaults to `False`): Whether to replace a model that `output_dir` holds.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileExistsError: If `output_dir` holds anything but a model that is to be overwritten.
        FileNotFoundError: If `checkpoint_dir` lacks a part of the model.
        ValueError: If it does not hold a whole model of this package or would be overwritten, or `hub_model_id` is no name.
    """
    checkpoint_dir, output_dir = Path(checkpoint_dir), Path(output_dir)
    if hub_model_id is not None:
        validate_repo_id(hub_model_id)
    if lies_within(checkpoint_dir, output_dir):
        raise ValueError(f"{output_dir} holds the checkpoint, which would be lost: give another `output_dir`.")
    check_replaceable(output_dir, overwrite, MODEL_FILES)
    model, processor, label_set = _load_whole_model(checkpoint_dir)
    facts = facts or read_card_facts(checkpoint_dir)
    with atomic_directory(output_dir.absolute()) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        label_set.save(temporary / LABEL_SET_FILE)
        shutil.copyfile(Path(__file__).parent / HANDLER_FILE, temporary / HANDLER_FILE)
        for name in (SAMPLE_IMAGE, PREDICTIONS_IMAGE):
            if (checkpoint_dir / name).exists():
                shutil.copyfile(checkpoint_dir / name, temporary / name)
        image = temporary / PREDICTIONS_IMAGE
        if not image.exists() and label_set.name == "scenes" and model.config.num_channels == 3:
            scenes = load_segmentation_datasets("scenes", splits=["validation"], scenes_validation=4)["validation"]
            predictor = Predictor(model, processor, label_set.with_background())
            save_prediction_grid(predictor, EvaluationDataset(scenes, label_set), image)
        write_model_card(
            temporary,
            model=model,
            facts=replace(facts, picture=PREDICTIONS_IMAGE if image.exists() else None),
            hub_model_id=hub_model_id,
            revision=revision,
            location=output_dir.as_posix(),
        )
        check_replaceable(output_dir, overwrite, MODEL_FILES)  # another run may have written it meanwhile
    return output_dir


def measure(
    checkpoint_dir: str | Path,
    dataset_name: str,
    *,
    split: str = "validation",
    label_set: str | None = None,
    protocols: Sequence[InferenceProtocol] = (InferenceProtocol(),),
    device: str | None = None,
    label_changes: Mapping[str, Any] | None = None,
    **data_arguments: Any,
) -> list[dict[str, Any]]:
    """Evaluate a model for its card, by one or more protocols.

    Args:
        checkpoint_dir (`str` or `Path`): The directory of the model.
        dataset_name (`str`), split (`str`), data_arguments (`Any`): The data: see `load_split`.
        label_set (`str`, *optional*): Name or file of a label set; by default the one that belongs to the model.
        protocols (`Sequence[InferenceProtocol]`, defaults to single scale): The protocols.
        device (`str`, *optional*): Where the model goes; by default a GPU where there is one.
        label_changes (`Mapping`, *optional*): Fields of the label set that are otherwise, such as `ignore_index`.

    Returns:
        `list[dict]`: Results for [`CardFacts.with_results`].

    Raises:
        ValueError: If the label set does not fit the model, or a mask is impossible.
    """
    predictor = Predictor.from_pretrained(checkpoint_dir, device=device, label_set=label_set)
    dataset = load_split(dataset_name, split, **data_arguments)
    predictor.label_set = fit_changed_to_masks(predictor.label_set, dataset, label_changes or {})
    return [
        recorded_result(
            evaluate_segmentation(predictor.with_protocol(protocol), dataset),
            dataset_name,
            limited_split(split, data_arguments.get("max_samples")),
            predictor.label_set.name,
        )
        for protocol in protocols
    ]


def read_recorded_result(path: str | Path) -> dict[str, Any]:
    """A `results.json` that training or an evaluation wrote, for [`CardFacts.with_results`].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not one of those.
    """
    content = read_json_object(path)
    check_result(path, content)
    check_types(path, {"labels": content.get("labels")}, {"labels": list[str]})
    names = tuple(content.pop("labels"))
    label_set = next((name for name in list_label_sets() if load_label_set(name).labels == names), None)
    found = recorded_result(content, content["dataset"], content["split"], content.get("label_set", label_set))
    return found | {"hub_dataset": content.get("hub_dataset")}  # where it was measured, that name was a folder or not


def _load_whole_model(directory: Path) -> tuple[PreTrainedModel, AnyImageProcessor, LabelSet]:
    """The model, processor and label set of a directory that lacks nothing."""
    for names, remedy in (
        (["config.json"], "give the directory of a trained or converted model"),
        (
            ["model.safetensors", "model.safetensors.index.json"],
            "save it with `save_pretrained`, or convert the checkpoint with `convert_checkpoint`",
        ),
        (["preprocessor_config.json"], "save the image processor there with `save_pretrained`"),
    ):
        if not any((directory / name).is_file() for name in names):
            raise FileNotFoundError(f"{directory}: expected {' or '.join(names)} there, found none; {remedy}.")
    model, processor = load_model_and_processor(directory)
    return model, processor, get_model_label_set(directory, model.config.id2label or {})


def _push(
    api: HfApi, directory: Path, hub_model_id: str, private: bool | None, revision: str | None, commit_message: str
) -> CommitInfo:
    """Make the repository and the branch where they are missing, and commit once.

    `HfApi.upload_folder` would cut a push into several commits.
    """
    api.create_repo(hub_model_id, private=private, exist_ok=True)
    if private and not api.model_info(hub_model_id).private:
        raise PublishingError(
            f"{hub_model_id} exists and is public, nothing was pushed: make it private in its settings on the Hub, or "
            "give another name."
        )
    if revision is not None:
        api.create_branch(hub_model_id, branch=revision, exist_ok=True)
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    outdated = [
        path
        for path in api.list_repo_files(hub_model_id, revision=revision)
        if path not in files and any(fnmatch(path, pattern) for pattern in _OUTDATED)
    ]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path_in_repo=path) for path in outdated
    ]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    return api.create_commit(hub_model_id, operations, commit_message=commit_message, revision=revision)


@contextmanager
def _explained(hub_model_id: str) -> Iterator[None]:
    """Turn what the client of the Hub raises into a message that says what to do."""
    # HTTPError is that of the client's own library: connections that fail, and answers that are errors.
    try:
        yield
    except PublishingError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        answer = _answer_of(error)
        status = None if answer is None else answer.response.status_code
        detail = getattr(answer, "server_message", None) or str(error).strip().split("\n")[0] or type(error).__name__
        owner = hub_model_id.split("/")[0]
        if status == 401:
            advice = _login_advice("The Hub does not accept the token")
        elif status == 403:
            advice = (
                f"The token may not write to {owner}: make one with the right to write at "
                f"{constants.ENDPOINT}/settings/tokens, and be a member of {owner} who may write."
            )
        elif status == 404:
            advice = (
                f"There is no model repository {hub_model_id} that the token may see. If a dataset or Space has that "
                "name, or it belongs to others, give another name."
            )
        elif status in (409, 412):
            advice = f"{hub_model_id} was changed at the same time: look at it, and run the same command again."
        elif status is not None and status < 500 or isinstance(error, ValueError):
            advice = "The Hub rejected it: fix what it says, and run the same command again."
        else:
            advice = "The connection or the Hub failed: run the same command again when it is back."
        raise PublishingError(
            f"Publishing {hub_model_id} failed. {advice} The push is one commit, so the repository has all of it or "
            f"nothing. The Hub's answer: {detail}"
        ) from error


def _answer_of(error: BaseException | None) -> HfHubHTTPError | None:
    """The answer of the Hub that an error comes from: the client wraps those of uploads."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _login_advice(problem: str) -> str:
    return f"{problem}: log in with `hf auth login`, or set HF_TOKEN, with a token that has the right to write."


__all__ = [
    "PublishingError",
    "build_repository",
    "check_push",
    "measure",
    "publish_model",
    "read_recorded_result",
]
