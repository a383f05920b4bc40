"""Merging of tokens does what a plain loop over windows and tokens does."""

import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity

from segmenter_hf.models.token_merging import merge_tokens


def blocky_tokens(batch_size: int, rows: int, columns: int, prefix: int, hidden: int = 6) -> torch.Tensor:
    """Tokens of images of a few regions, so that some windows are alike and others are not."""
    regions = torch.randn(batch_size, 3, hidden)
    region = torch.randint(3, (batch_size, -(-rows // 3), -(-columns // 3)))
    region = region.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :rows, :columns].flatten(1)
    patches = regions.gather(1, region[..., None].expand(-1, -1, hidden))
    noise = torch.rand(batch_size, rows * columns, 1) * torch.randn(batch_size, rows * columns, hidden)
    return torch.cat([torch.randn(batch_size, prefix, hidden), patches + noise], dim=1)


def naive_groups_of_windows(tokens, grid, window_size, threshold) -> list[list[int]]:
    """The patches of each new token of one image."""
    rows, columns = grid
    windows = []
    for top in range(0, rows - window_size[0] + 1, window_size[0]):
        for left in range(0, columns - window_size[1] + 1, window_size[1]):
            patches = [
                (top + row) * columns + left + column
                for row in range(window_size[0])
                for column in range(window_size[1])
            ]
            pairs = [
                cosine_similarity(tokens[i], tokens[j], dim=0).item() for i, j in itertools.combinations(patches, 2)
            ]
            windows.append((sum(pairs) / len(pairs), patches))
    chosen = sorted((window for window in windows if window[0] >= threshold), key=lambda window: -window[0])
    merged = [patches for _, patches in chosen]
    return merged + [[patch] for patch in range(rows * columns) if patch not in itertools.chain(*merged)]


def naive_groups_of_similar(tokens, groups, layer) -> list[list[int]]:
    """The same for the second kind of step, from the tokens and groups of the first."""
    even, odd = list(range(0, len(groups), 2)), list(range(1, len(groups), 2))
    nearest = {i: max(even, key=lambda j: cosine_similarity(tokens[i], tokens[j], dim=0).item()) for i in odd}
    similarity = torch.stack([cosine_similarity(tokens[i], tokens[nearest[i]], dim=0) for i in odd])
    threshold = similarity.mean() + similarity.std() / layer
    stays = [i for i, value in zip(odd, similarity) if value < threshold]
    joined = {j: list(groups[j]) for j in even}
    for i in odd:
        if i not in stays:
            joined[nearest[i]] += groups[i]
    return [groups[i] for i in stays] + [joined[j] for j in even]


def average(patches: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    return torch.stack([patches[group].mean(0) for group in groups])


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("grid", "window_size"), [((6, 8), (2, 2)), ((7, 9), (2, 2)), ((6, 9), (2, 3))])
def test_each_image_is_merged_as_a_plain_loop_merges_it(grid, window_size, prefix) -> None:
    tokens = blocky_tokens(3, *grid, prefix).double()
    options = {"num_prefix_tokens": prefix, "grid": grid, "window_size": window_size, "threshold": 0.6}
    once, merged = merge_tokens(tokens, None, layer=1, **options)
    twice, merged_twice = merge_tokens(once, merged, layer=3, **options)
    assert len(set((merged.sizes > 0).sum(1).tolist())) > 1 and merged.mask is not None  # they keep different numbers
    for image in range(3):
        patches = tokens[image, prefix:]
        groups = naive_groups_of_windows(patches, grid, window_size, 0.6)
        assert 1 < len(groups) < len(patches)
        for result, state, expected in (
            (once, merged, groups),
            (twice, merged_twice, naive_groups_of_similar(average(patches, groups), groups, 3)),
        ):
            number = len(expected)
            assert state.sizes[image].tolist() == [len(group) for group in expected] + [0] * (
                state.sizes.shape[1] - number
            )
            assert all((state.source[image, group] == index).all() for index, group in enumerate(expected))
            assert torch.allclose(result[image, prefix : prefix + number], average(patches, expected), atol=1e-9)
            assert torch.equal(result[image, :prefix], tokens[image, :prefix])


def test_batchwise_all_images_keep_as_many_as_the_one_that_keeps_most() -> None:
    grid = (8, 8)
    tokens = blocky_tokens(3, *grid, 1).double()
    options = {"num_prefix_tokens": 1, "grid": grid, "window_size": (2, 2), "threshold": 0.6}
    _, apart = merge_tokens(tokens, None, layer=1, **options)
    once, merged = merge_tokens(tokens, None, layer=1, batchwise=True, **options)
    assert merged.mask is None and merged.sizes.shape[1] == (apart.sizes > 0).sum(1).max()
    twice, merged = merge_tokens(once, merged, layer=2, batchwise=True, **options)
    assert merged.mask is None and 1 < twice.shape[1] < once.shape[1]
    assert merged.sizes.sum(1).tolist() == [64.0] * 3


def test_an_image_is_merged_alike_alone_and_in_a_batch() -> None:
    grid = (7, 8)
    tokens = blocky_tokens(3, *grid, 2).double()
    options = {"num_prefix_tokens": 2, "grid": grid, "window_size": (2, 2), "threshold": 0.6}

    def run(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        merged = None
        for layer in (1, 2, 4):
            tokens, merged = merge_tokens(tokens, merged, layer=layer, **options)
        return merged.expand(tokens[:, 2:]), merged.source

    together, sources = run(tokens)
    for image in range(3):
        alone, source = run(tokens[image : image + 1])
        assert torch.equal(source[0], sources[image]) and torch.allclose(alone[0], together[image], atol=1e-12)


@pytest.mark.parametrize("threshold", [-1.0, 2.0])
def test_all_or_no_windows_may_be_merged(threshold) -> None:
    tokens = blocky_tokens(2, 4, 6, 1)
    options = {"num_prefix_tokens": 1, "grid": (4, 6), "window_size": (2, 2), "threshold": threshold}
    once, merged = merge_tokens(tokens, None, layer=1, **options)
    assert merged.sizes.unique().tolist() == ([4.0] if threshold < 0 else [1.0])
    assert torch.equal(once, tokens) or threshold < 0


def test_few_tokens_stay_as_they_are() -> None:
    options = {"num_prefix_tokens": 1, "grid": (1, 1), "window_size": (2, 2), "threshold": 0.5}
    tokens = torch.randn(2, 2, 4)
    once, merged = merge_tokens(tokens, None, layer=1, **options)
    twice, merged = merge_tokens(once, merged, layer=2, **options)
    assert torch.equal(twice, tokens) and merged.source.tolist() == [[0], [0]]


def test_attention_expands_to_patches_and_adds_up_to_one() -> None:
    tokens = blocky_tokens(2, 6, 6, 2)
    merging = {"num_prefix_tokens": 2, "grid": (6, 6), "window_size": (2, 2), "threshold": 0.6}
    once, merged = merge_tokens(tokens, None, layer=1, **merging)
    mask = torch.cat([torch.ones(2, 2, dtype=torch.bool), merged.sizes > 0], dim=1)
    scores = torch.randn(2, 3, once.shape[1], once.shape[1]).masked_fill(~mask[:, None, None], -torch.inf)
    attention = merged.expand_attention(scores.softmax(-1), 2)
    assert attention.shape == (2, 3, 38, 38)
    assert torch.allclose(attention.sum(-1), torch.ones(2, 3, 38))
    group = (merged.source[0] == 0).nonzero().flatten() + 2
    assert len(group) == 4 and torch.equal(attention[0, :, group[0]], attention[0, :, group[3]])
    assert torch.equal(attention[0, :, :, group[0]], attention[0, :, :, group[3]])


def test_gradients_reach_every_patch() -> None:
    tokens = blocky_tokens(2, 6, 6, 1).requires_grad_()
    once, merged = merge_tokens(
        tokens, None, layer=1, num_prefix_tokens=1, grid=(6, 6), window_size=(2, 2), threshold=0.6
    )
    merged.expand(once[:, 1:]).square().sum().backward()
    assert (tokens.grad[:, 1:].abs().sum(-1) > 0).all()
