"""Adaptive local-then-global token merging (ALGM; Norouzi et al., CVPR 2024): similar patches become one token.

It takes place in chosen encoder layers, between attention and MLP. In the first of them, windows of neighboring patches whose
mean cosine similarity reaches a threshold become one token each. In the others, as in ToMe (Bolya et al., ICLR 2023), every
second token may join the most similar one of the rest, where their similarity is unusual for the image. A token is the mean of
its patches. Each step is an assignment, the new index of each old token; the tokens of an image that kept fewer of them than another
of its batch are followed by padding, which attention has to leave out.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import normalize, pad
from transformers.masking_utils import create_bidirectional_mask

from .configuration_vit_encoder import VitEncoderConfig


@dataclass(frozen=True)
class MergedTokens:
    """Which token holds each patch, for a batch of images; the prefix (class token and the like) does not count.

    Args:
        source (`torch.LongTensor` of shape `(batch_size, patches)`): Index of the token that holds each patch.
        sizes (`torch.FloatTensor` of shape `(batch_size, tokens)`): Number of patches that each token holds; 0 for padding.
    """

    source: torch.Tensor
    sizes: torch.Tensor

    @property
    def mask(self) -> torch.Tensor | None:
        """`torch.BoolTensor` of shape `(batch_size, tokens)`, false for padding; `None` where there is no padding."""
        mask = self.sizes > 0
        return None if bool(mask.all()) else mask

    def expand(self, states: torch.Tensor, num_prefix_tokens: int = 0, num_suffix_tokens: int = 0) -> torch.Tensor:
        """Tokens (batch, prefix + tokens + suffix, channels) to patches: each patch takes its token, the rest stays."""
        index = self._index(num_prefix_tokens, num_suffix_tokens)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

    def expand_attention(
        self,
        probabilities: torch.Tensor,
        num_prefix_tokens: int = 0,
        num_suffix_tokens: int = 0,
        queries: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Attention between tokens to attention between patches, whose rows still add up to 1.

        Args:
            probabilities (`torch.FloatTensor` of shape `(batch_size, heads, queries, keys)`): Queries and keys are a prefix,
                the tokens and a suffix.
            num_prefix_tokens (`int`, defaults to 0), num_suffix_tokens (`int`, defaults to 0): Their lengths.
            queries (`Sequence[int]`, *optional*): The rows to return, of those with patches; all by default.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, heads, all, all)` with patches in place of tokens: a patch asks as
            its token does, and gets an equal share of what its token gets.
        """
        index = self._index(num_prefix_tokens, num_suffix_tokens)
        rows = index if queries is None else index[:, list(queries)]
        rows = rows[:, None, :, None].expand(-1, probabilities.shape[1], -1, probabilities.shape[-1])
        columns = index[:, None, None].expand(-1, probabilities.shape[1], rows.shape[2], -1)
        shares = self.sizes.gather(1, self.source)
        shares = pad(shares, (num_prefix_tokens, num_suffix_tokens), value=1.0)
        return probabilities.gather(2, rows).gather(3, columns) / shares[:, None, None]

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """Values of patches (patches, channels) to their means over the patches of each token (batch, tokens, channels)."""
        index = self.source[..., None].expand(-1, -1, values.shape[-1])
        sums = values.new_zeros(*self.sizes.shape, values.shape[-1]).scatter_add(1, index, values.expand_as(index))
        return sums / self.sizes.clamp(min=1)[..., None]

    def _index(self, num_prefix_tokens: int, num_suffix_tokens: int) -> torch.Tensor:
        prefix, suffix = (
            torch.arange(number, device=self.source.device).expand(len(self.source), -1)
            for number in (num_prefix_tokens, num_suffix_tokens)
        )
        first = num_prefix_tokens
        return torch.cat([prefix, self.source + first, suffix + first + self.sizes.shape[1]], dim=1)


def merge_tokens(
    hidden_states: torch.Tensor,
    merged: MergedTokens | None,
    *,
    num_prefix_tokens: int,
    grid: tuple[int, int],
    window_size: tuple[int, int],
    threshold: float,
    layer: int,
    batchwise: bool = False,
) -> tuple[torch.Tensor, MergedTokens]:
    """Merge the tokens of a batch: the first time neighboring patches, later similar tokens wherever they lie.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, prefix + tokens, hidden_size)`): The tokens.
        merged (`MergedTokens`, *optional*): What they are the result of; `None` the first time.
        num_prefix_tokens (`int`): How many tokens come before the patches and stay as they are.
        grid (`tuple[int, int]`): Rows and columns of patches.
        window_size (`tuple[int, int]`): Rows and columns of the windows; what is left over at the border stays.
        threshold (`float`): The least mean cosine similarity of a window that is merged, from -1 to 1.
        layer (`int`): Number of the layer from 1. The later it is, the more the second kind of step merges.
        batchwise (`bool`, defaults to `False`): Whether all images lose as many tokens as the one that loses fewest, as in
            the original. Results then depend on the rest of the batch, and there is no padding.

    Returns:
        `tuple[torch.FloatTensor, MergedTokens]`: The tokens that are left, and where each patch went.
    """
    prefix, tokens = hidden_states.split([num_prefix_tokens, hidden_states.shape[1] - num_prefix_tokens], dim=1)
    with torch.no_grad():
        if merged is None:
            batch_size, num_patches = tokens.shape[:2]
            patches = torch.arange(num_patches, device=tokens.device).expand(batch_size, -1)
            merged = MergedTokens(patches, tokens.new_ones(batch_size, num_patches, dtype=torch.float32))
            assignment = assign_windows(tokens, grid, window_size, threshold, batchwise)
        else:
            assignment = assign_similar(tokens, merged.sizes > 0, layer, batchwise)
    tokens, merged = apply_assignment(tokens, merged, assignment)
    return torch.cat([prefix, tokens], dim=1), merged


def assign_windows(
    tokens: torch.Tensor, grid: tuple[int, int], window_size: tuple[int, int], threshold: float, batchwise: bool
) -> torch.Tensor:
    """New indices of patches: first the merged windows in the order of falling similarity, then all other patches.

    Args:
        tokens (`torch.FloatTensor` of shape `(batch_size, patches, hidden_size)`): One token for each patch.
        grid, window_size, threshold, batchwise: As for [`merge_tokens`].

    Returns:
        `torch.LongTensor` of shape `(batch_size, patches)`: The assignment.
    """
    (rows, columns), (height, width) = grid, window_size
    batch_size, num_patches = tokens.shape[:2]
    index = torch.arange(num_patches, device=tokens.device).view(rows, columns)
    index = index[: rows - rows % height, : columns - columns % width]
    windows = index.reshape(rows // height, height, columns // width, width)
    windows = windows.transpose(1, 2).reshape(-1, height * width)
    if not windows.numel():
        return torch.arange(num_patches, device=tokens.device).expand(batch_size, -1)
    directions = normalize(tokens.float(), dim=-1)[:, windows]  # (batch, windows, patches of a window, hidden)
    total = directions.sum(dim=2)
    pairs = height * width * (height * width - 1)
    similarity = (total.square().sum(-1) - directions.square().sum((-1, -2))) / pairs
    is_merged = _choose(similarity, torch.full_like(similarity[:, :1], threshold), batchwise)
    ranks = _ranks(similarity.masked_fill(~is_merged, -torch.inf))
    stays = is_merged.new_ones(batch_size, num_patches)
    stays[:, windows.flatten()] = ~is_merged.repeat_interleave(height * width, dim=1)
    assignment = is_merged.sum(1, keepdim=True) + stays.cumsum(1) - 1
    window_of_patch = assignment.new_zeros(num_patches)
    window_of_patch[windows] = torch.arange(len(windows), device=tokens.device)[:, None]
    return torch.where(stays, assignment, ranks[:, window_of_patch])


def assign_similar(tokens: torch.Tensor, is_token: torch.Tensor, layer: int, batchwise: bool) -> torch.Tensor:
    """New indices of tokens, of which those at odd places may join those at even places.

    Each odd token has a nearest even one. It joins that where their cosine similarity is at least the mean of all such
    similarities of its image plus their standard deviation divided by `layer`.

    Args:
        tokens (`torch.FloatTensor` of shape `(batch_size, tokens, hidden_size)`): The tokens without the prefix.
        is_token (`torch.BoolTensor` of shape `(batch_size, tokens)`): False for padding.
        layer, batchwise: As for [`merge_tokens`].

    Returns:
        `torch.LongTensor` of shape `(batch_size, tokens)`: The assignment, whose order is: odd tokens that stay, even tokens.
    """
    directions = normalize(tokens.float(), dim=-1)
    odd, even = directions[:, 1::2], directions[:, ::2]
    is_odd, is_even = is_token[:, 1::2], is_token[:, ::2]
    if odd.shape[1] < 2:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    scores = (odd @ even.transpose(1, 2)).masked_fill(~is_even[:, None], -torch.inf)
    similarity, nearest = scores.max(dim=-1)
    similarity = similarity.masked_fill(~is_odd, 0)
    count = is_odd.sum(1, keepdim=True)
    mean = similarity.sum(1, keepdim=True) / count
    deviations = (similarity - mean).masked_fill(~is_odd, 0)
    deviation = (deviations.square().sum(1, keepdim=True) / (count - 1)).sqrt()  # NaN for a single one: it stays
    if batchwise:
        mean, deviation = mean.mean(), deviation.mean()
    joins = _choose(similarity.masked_fill(~is_odd, -torch.inf), mean + deviation / layer, batchwise)
    stays = is_odd & ~joins
    num_stays = stays.sum(1, keepdim=True)
    assignment = nearest.new_zeros(tokens.shape[:2])
    assignment[:, ::2] = num_stays + torch.arange(even.shape[1], device=tokens.device)
    assignment[:, 1::2] = torch.where(joins, num_stays + nearest, stays.cumsum(1) - 1)
    return assignment


def apply_assignment(
    tokens: torch.Tensor, merged: MergedTokens, assignment: torch.Tensor
) -> tuple[torch.Tensor, MergedTokens]:
    """Average the tokens that have the same new index, each weighted by the number of its patches."""
    is_token = merged.sizes > 0
    num_tokens = int(assignment.masked_fill(~is_token, 0).max()) + 1
    assignment = assignment.masked_fill(~is_token, 0)  # padding has no weight, wherever it goes
    sizes = merged.sizes.new_zeros(len(tokens), num_tokens).scatter_add(1, assignment, merged.sizes)
    weights = (merged.sizes / sizes.gather(1, assignment)).to(tokens.dtype)
    index = assignment[..., None].expand_as(tokens)
    summed = tokens.new_zeros(len(tokens), num_tokens, tokens.shape[-1])
    summed = summed.scatter_add(1, index, tokens * weights[..., None])
    return summed, replace(merged, source=assignment.gather(1, merged.source), sizes=sizes)


def _choose(similarity: torch.Tensor, threshold: torch.Tensor, batchwise: bool) -> torch.Tensor:
    """Which entries (batch, entries) reach the threshold; `batchwise` the same number for all, the most similar ones."""
    reaches = similarity >= threshold
    if not batchwise:
        return reaches
    return _ranks(similarity) < reaches.sum(1).min()


def _ranks(similarity: torch.Tensor) -> torch.Tensor:
    """The place of each entry (batch, entries) when they are sorted from the most similar on."""
    return similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def token_attention_mask(
    config: VitEncoderConfig,
    hidden_states: torch.Tensor,
    merged: MergedTokens | None,
    num_prefix_tokens: int = 0,
    num_suffix_tokens: int = 0,
) -> torch.Tensor | None:
    """What keeps attention from the padding of merged tokens (batch, prefix + tokens + suffix, hidden), if there is any."""
    if merged is None or merged.mask is None:
        return None
    mask = pad(merged.mask, (num_prefix_tokens, num_suffix_tokens), value=True)
    return create_bidirectional_mask(config, hidden_states, mask)


def expand_merged_tokens(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `forward` of the encoder: with token merging, the states and attentions that it returns are of patches."""

    @wraps(forward)
    def expanded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.config.token_merging_layers:
            return forward(self, *args, **kwargs)
        return_dict = kwargs.pop("return_dict", None)
        outputs = forward(self, *args, **kwargs, return_dict=True)
        prefix, layers = self.embeddings.num_prefix_tokens, list(self.config.token_merging_layers)

        def states_after(states: torch.Tensor | None, num_merges: int) -> torch.Tensor | None:
            if states is None or not num_merges:
                return states
            return outputs.merged_tokens[num_merges - 1].expand(states, prefix)

        outputs.merged_hidden_state = outputs.last_hidden_state
        outputs.last_hidden_state = states_after(outputs.last_hidden_state, len(layers))
        if outputs.hidden_states is not None:  # the embeddings, then the output of each layer
            outputs.hidden_states = tuple(
                states_after(states, bisect_left(layers, index)) for index, states in enumerate(outputs.hidden_states)
            )
        if outputs.attentions is not None:  # a layer attends before it merges
            merged = [None, *outputs.merged_tokens]
            before = [merged[bisect_left(layers, index)] for index in range(len(outputs.attentions))]
            outputs.attentions = tuple(
                attention if state is None else state.expand_attention(attention, prefix)
                for attention, state in zip(outputs.attentions, before)
            )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    return expanded
