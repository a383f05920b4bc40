"""A decoder made from a linear probe: what it should start as, found in seconds on features of the frozen encoder.

A linear classifier of the tokens has one optimum and reaches it fast. The mask transformer, started at random, first has to
find what the classifier knows: its logits are cosines of learned directions that begin at random, normalized over the
classes. Here its classes start as the rows of the classifier, its projections as the identity, and its layers close to the
identity, so that its first masks are those of the probe and training continues from there. Only the start of the training
differs; what a model computes does not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..models.modeling_segmenter import SegmenterLinearDecoder, SegmenterMaskTransformerDecoder
from ..models.modeling_vit_encoder import VitEncoderPreTrainedModel, pad_to_patches
from ..models.sliding_window import with_background


MAX_TOKENS = 2**18  # that the probe is fitted to
PROBE_STEPS, PROBE_BATCH, PROBE_RATE, PROBE_DECAY = 1000, 4096, 5e-3, 1e-4
BRANCH_SCALE = 0.1  # of the output projections of attention and MLP in the mask transformer
MASK_SCALE = 3.0  # of the LayerNorm over the classes


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardized tokens: logits are `(tokens - mean) / deviation @ weight.T + bias`.

    Args:
        weight (`torch.FloatTensor` of shape `(num_labels, width)`): Rows of the classes.
        bias (`torch.FloatTensor` of shape `(num_labels,)`): Their offsets.
        mean (`torch.FloatTensor` of shape `(width,)`): Mean of each channel of the tokens.
        deviation (`torch.FloatTensor` of shape `(width,)`): Standard deviation of each channel; 1 where it is 0.
        accuracy (`float`): Share of the pixels of the fitted tokens whose class has the highest logit.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    accuracy: float


def warm_start_decoder(
    model: VitEncoderPreTrainedModel, dataset: Dataset, *, num_crops: int = 256, batch_size: int = 8, seed: int = 0
) -> LinearProbe:
    """Fit a linear probe to tokens of the encoder, and make the decoder of it.

    Args:
        model (`VitEncoderPreTrainedModel`): A Segmenter with either decoder, which is changed.
        dataset (`Dataset`): A [`TrainDataset`] or a stream of its crops.
        num_crops (`int`, defaults to 256): Crops whose tokens the probe is fitted to.
        batch_size (`int`, defaults to 8): Crops at once through the model.
        seed (`int`, defaults to 0): Seed of the choice of crops and of the probe.

    Returns:
        [`LinearProbe`]: The probe.

    Raises:
        ValueError: If the model has another decoder, or no token of the crops has a class.
    """
    head = getattr(model, "decode_head", None)
    if not isinstance(head, (SegmenterLinearDecoder, SegmenterMaskTransformerDecoder)):
        raise ValueError(
            "`decoder_warm_start` makes the linear decoder or the mask transformer of Segmenter from a linear probe, got "
            f"{type(head).__name__}, which has convolutions. Set it to none."
        )
    generator = torch.Generator().manual_seed(seed)
    tokens, counts = collect_tokens(model, dataset, num_crops, batch_size, generator)
    weights = model.config.semantic_loss_class_weights
    class_weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    probe = fit_probe(tokens, counts, model.config.num_labels, generator, class_weights)
    if isinstance(head, SegmenterLinearDecoder):
        fill_linear_decoder(head, probe)
    else:
        fill_mask_transformer(head, probe)
    return probe


def choose_crops(dataset: Dataset, num_crops: int, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Crops of random rows; rows come again, with other draws, only after all the others."""
    if isinstance(dataset, IterableDataset):
        for number, example in enumerate(dataset):
            if number == num_crops:
                return
            yield example
        return
    num_rows = len(dataset)  # type: ignore[arg-type]  # a dataset that is no stream has a length
    for number in range(num_crops):
        epoch, place = divmod(number, num_rows)
        if place == 0:
            order = torch.randperm(num_rows, generator=generator).tolist()
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
        yield dataset[order[place]]
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)


@torch.no_grad()
def collect_tokens(
    model: VitEncoderPreTrainedModel, dataset: Dataset, num_crops: int, batch_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder sees of some crops, and the classes of the pixels of each patch.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Tokens (tokens, width) in float32 and counts (tokens, classes) of pixels, both on
        the CPU; at most `MAX_TOKENS`, and only those with a pixel of a class.
    """
    seen: list[torch.Tensor] = []

    def see(module: nn.Module, arguments: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        merged = options.get("merged")  # tokens that hold several patches each
        seen.append(arguments[0] if merged is None else merged.expand(arguments[0]))

    hook = model.get_submodule("decode_head").register_forward_pre_hook(see, with_kwargs=True)
    was_training, config = model.training, model.config
    num_classes = max(config.num_labels, 2)
    model.eval()
    tokens_of_batches: list[torch.Tensor] = []
    counts_of_batches: list[torch.Tensor] = []
    crops = list(choose_crops(dataset, num_crops, generator))
    try:
        for batch in DataLoader(cast("Dataset[dict[str, torch.Tensor]]", crops), batch_size, generator=generator):
            model(pixel_values=batch["pixel_values"].to(model.device))
            of_patches = count_classes(
                batch["labels"],
                config.patch_size,
                num_classes,
                config.semantic_loss_ignore_index,
                config.padding,
            )
            features = seen.pop().float().cpu().flatten(0, 1)
            kept = of_patches.sum(1) > 0
            tokens_of_batches.append(features[kept])
            counts_of_batches.append(of_patches[kept])
    finally:
        hook.remove()
        model.train(was_training)
    tokens, counts = torch.cat(tokens_of_batches), torch.cat(counts_of_batches)
    if not len(tokens):
        raise ValueError(f"No pixel of {len(crops)} crops has a class: the decoder cannot start from a linear probe.")
    if len(tokens) > MAX_TOKENS:
        chosen = torch.randperm(len(tokens), generator=generator)[:MAX_TOKENS]
        tokens, counts = tokens[chosen], counts[chosen]
    return tokens, counts


def count_classes(
    labels: torch.Tensor, patch_size: int, num_classes: int, ignore_index: int, padding: str = "end"
) -> torch.Tensor:
    """Labels (batch, height, width) to the number of pixels of each class in each patch, (batch * patches, classes)."""
    labels = pad_to_patches(labels.long(), patch_size, padding, value=ignore_index)
    patches = labels.unflatten(2, (-1, patch_size)).unflatten(
        1, (-1, patch_size)
    )  # (batch, rows, side, columns, side)
    patches = patches.transpose(2, 3).flatten(3).flatten(0, 2)  # (batch * patches, pixels)
    wrong = patches[(patches != ignore_index) & ((patches < 0) | (patches >= num_classes))]
    if len(wrong):
        raise ValueError(
            f"Labels must be from 0 to {num_classes - 1} or the ignored {ignore_index}, got {wrong.unique().tolist()[:5]}. "
            "Check all masks before training (`max_scanned_masks`)."
        )
    valid = (patches != ignore_index).float()
    counts = torch.zeros(len(patches), num_classes)
    return counts.scatter_add_(1, patches.where(valid > 0, 0), valid)


def fit_probe(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    num_labels: int,
    generator: torch.Generator,
    class_weights: torch.Tensor | None = None,
) -> LinearProbe:
    """Fit a linear classifier of standardized tokens by cross-entropy with the classes of their pixels.

    Args:
        tokens (`torch.FloatTensor` of shape `(tokens, width)`): The tokens.
        counts (`torch.FloatTensor` of shape `(tokens, classes)`): Pixels of each class; with one label, of two classes.
        num_labels (`int`): Logits of a token; one is that of class 1 beside a background of 0.
        generator (`torch.Generator`): Source of the batches.
        class_weights (`torch.FloatTensor` of shape `(classes,)`, *optional*): Weights of the classes.

    Returns:
        [`LinearProbe`]: The classifier.
    """
    mean, deviation = tokens.mean(0), tokens.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    tokens = (tokens - mean) / deviation
    targets = counts if class_weights is None else counts * class_weights
    targets = targets / targets.sum(1).mean()
    weight = torch.zeros(num_labels, tokens.shape[1], requires_grad=True)
    bias = torch.zeros(num_labels, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=PROBE_RATE, weight_decay=PROBE_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROBE_STEPS)
    for _ in range(PROBE_STEPS):
        chosen = torch.randint(len(tokens), (min(PROBE_BATCH, len(tokens)),), generator=generator)
        logits = nn.functional.linear(tokens[chosen], weight, bias)
        scores = with_background(logits[..., None])[..., 0].log_softmax(1)
        loss = -(targets[chosen] * scores).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = nn.functional.linear(tokens, weight, bias)
        predictions = with_background(logits[..., None])[..., 0].argmax(1, keepdim=True)
        accuracy = counts.gather(1, predictions).sum() / counts.sum()
    return LinearProbe(weight.detach(), bias.detach(), mean, deviation, float(accuracy))


@torch.no_grad()
def fill_linear_decoder(head: SegmenterLinearDecoder, probe: LinearProbe) -> None:
    """Make the linear decoder compute the probe, with the standardization in its batch norm where it has one."""
    batch_norm = getattr(head, "batch_norm", None)
    if batch_norm is not None:
        batch_norm.running_mean.copy_(probe.mean)
        batch_norm.running_var.copy_(probe.deviation.square())
        batch_norm.weight.fill_(1.0)
        batch_norm.bias.fill_(0.0)
        head.classifier.weight.copy_(probe.weight)
        head.classifier.bias.copy_(probe.bias)
        return
    weight = probe.weight / probe.deviation
    head.classifier.weight.copy_(weight)
    head.classifier.bias.copy_(probe.bias - weight @ probe.mean)


@torch.no_grad()
def fill_mask_transformer(head: SegmenterMaskTransformerDecoder, probe: LinearProbe) -> None:
    """Make the mask transformer begin as the probe: its classes are the rows of the classifier.

    The projection standardizes the tokens; it is the identity, or, where the decoder is not as wide as the encoder,
    a rotation to a space that holds the rows. The layers begin close to the identity.
    """
    width = head.projection.out_features
    basis = row_space_basis(probe.weight, width)  # (width, encoder width)
    weight = basis / probe.deviation
    head.projection.weight.copy_(weight)
    head.projection.bias.copy_(-weight @ probe.mean)
    rows = probe.weight @ basis.T
    rows = rows * (width**0.5 / rows.norm(dim=1).mean().clamp(min=1e-12))
    head.class_embeddings.copy_(rows[None])
    for layer in head.layers:
        for path in ("attention.o_proj", "mlp.fc2"):
            projection = cast(nn.Linear, layer.get_submodule(path))
            projection.weight.mul_(BRANCH_SCALE)
            projection.bias.zero_()
    head.layernorm.weight.fill_(1.0)
    head.layernorm.bias.fill_(0.0)
    for projection in (head.patch_projection, head.class_projection):
        nn.init.eye_(projection.weight)
    if isinstance(head.mask_norm, nn.LayerNorm):
        head.mask_norm.weight.fill_(MASK_SCALE)
        head.mask_norm.bias.fill_(0.0)
    else:  # one class: its logit is a scaled cosine; tokens that are standardized have about this length
        head.mask_norm.weight.fill_(float(probe.weight.norm()) * width**0.5)
        head.mask_norm.bias.copy_(probe.bias)


def row_space_basis(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Orthonormal directions (width, columns) that hold as much of some rows as they can; the identity where it fits.

    Args:
        rows (`torch.FloatTensor` of shape `(num_rows, columns)`): The rows.
        width (`int`): Number of directions. Those beyond `columns` are zeros.

    Returns:
        `torch.FloatTensor` of shape `(width, columns)`: The directions.
    """
    columns = rows.shape[1]
    if width >= columns:
        return torch.eye(width, columns)
    _, _, directions = torch.linalg.svd(rows, full_matrices=True)  # (columns, columns), the row space first
    return directions[:width]
