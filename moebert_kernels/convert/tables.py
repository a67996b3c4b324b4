"""Hash tables, token id -> expert: drawn at random, or balanced by how often each token occurs."""

import heapq
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from moebert_kernels.errors import UserError


def random_hash_table(vocab_size: int, num_experts: int, seed: int | torch.Generator) -> Tensor:
    """Draw an expert for every token: (V,) int64.

    Equal to `torch.manual_seed(seed); torch.randint(0, num_experts, (vocab_size,))` on the CPU, without touching
    torch's own generator. Give a `torch.Generator` instead of a seed to draw several tables in a row.
    """
    _check_sizes(vocab_size, num_experts)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    return torch.randint(0, num_experts, (vocab_size,), generator=generator)


def balanced_hash_table(counts: Tensor, num_experts: int, visit_order: Tensor | None = None, seed: int = 0) -> Tensor:
    """Give every expert about the same number of token occurrences: (V,) int64.

    The most frequent token first, each goes to the expert with the least so far (the lowest number among equals);
    tokens that never occur go to random experts.

    Args:
        counts: (V,) integer >= 0, how often each token occurs; see `count_tokens`.
        num_experts: E >= 1.
        visit_order: (V,) a permutation, the order in which to visit the tokens. Default: by descending count, equal
            counts by token id.
        seed: of the draw for tokens that never occur.

    Raises:
        UserError: counts are not integers >= 0, or `visit_order` is no permutation of the tokens.
    """
    if counts.ndim != 1 or counts.is_floating_point() or (counts.numel() and int(counts.min()) < 0):
        raise UserError(f"counts: expected (V,) integers >= 0, got {counts.dtype} of shape {tuple(counts.shape)}")
    _check_sizes(len(counts), num_experts)
    if visit_order is None:
        visit_order = counts.argsort(descending=True, stable=True)
    elif not torch.equal(visit_order.sort().values.cpu().long(), torch.arange(len(counts))):
        raise UserError(f"visit_order: expected a permutation of 0 to {len(counts) - 1}, got something else")

    order, frequency = visit_order.tolist(), counts.tolist()
    experts = np.random.RandomState(seed)  # numpy's, as the authors' tables were drawn with it
    loads = [(0, e) for e in range(num_experts)]
    table = [0] * len(order)
    for token in order:
        if frequency[token] == 0:
            table[token] = int(experts.randint(0, num_experts))
        else:
            load, table[token] = loads[0]
            heapq.heapreplace(loads, (load + frequency[token], table[token]))
    return torch.tensor(table)


def count_tokens(batches: Iterable[Mapping[str, Any] | ArrayLike], vocab_size: int) -> Tensor:
    """Count how often each token id occurs: (V,) int64, for `balanced_hash_table`.

    Args:
        batches: mappings with `input_ids` and, where there is padding, `attention_mask` (padding is not counted); lists
            of tokens or tensors of any shape, such as the rows of a tokenised data set.
        vocab_size: V.

    Raises:
        UserError: batches that are none or a single mapping, one without `input_ids` or whose ids are not whole numbers
            (of lists: all of one length), a mask of another shape, a token id outside the vocabulary, or nothing to
            count.
    """
    _check_sizes(vocab_size, 1)
    if isinstance(batches, (Mapping, str)) or not isinstance(batches, Iterable):
        raise UserError(f"batches: expected several in an iterable, such as a list, got {type(batches).__name__}")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in batches:
        given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        if "input_ids" not in given:
            raise UserError(f"batches: expected input_ids in each, got {', '.join(map(str, given)) or 'an empty one'}")
        ids, mask = _tensor("input_ids", given["input_ids"]), given.get("attention_mask")
        if mask is not None:
            mask = _tensor("attention_mask", mask)
            if mask.shape != ids.shape:
                raise UserError(
                    f"batches: expected an attention_mask of the input_ids' shape {tuple(ids.shape)}, got"
                    f" {tuple(mask.shape)}"
                )
            ids = ids[mask != 0]
        if ids.numel() == 0:
            continue
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UserError(f"batches: expected input_ids as whole numbers, got {ids.dtype}")
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise UserError(f"input_ids: expected 0 to {vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}")
        counts += torch.bincount(ids.flatten().long(), minlength=vocab_size)
    if not counts.any():
        raise UserError("batches: expected tokens to count, got none")
    return counts


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        got = " ".join(str(error).split())
        raise UserError(f"batches: expected {name} as a tensor or lists of one length, got others ({got})") from error


def stacked_tables(tables: Any, num_layers: int, vocab_size: int, num_experts: int) -> Tensor:
    """Check one table (V,) for all layers, or one per layer (L, V), and return (L, V) int64.

    Raises:
        UserError: another shape (a table for another vocabulary), not integers, or an expert that does not exist.
    """
    try:
        table = torch.as_tensor(tables)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"tables: expected integers of shape (V,) or (L, V), got {type(tables).__name__}") from error
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise UserError(f"tables: expected integers, got {table.dtype}")
    if table.shape not in ((vocab_size,), (num_layers, vocab_size)):
        wanted = f"({vocab_size},) or ({num_layers}, {vocab_size})"
        raise UserError(f"tables: expected shape {wanted}, for a vocabulary of {vocab_size}, got {tuple(table.shape)}")
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= num_experts:
        raise UserError(f"tables: expected experts 0 to {num_experts - 1}, got {low} to {high}")
    return table.long().expand(num_layers, vocab_size).contiguous()


def _check_sizes(vocab_size: int, num_experts: int) -> None:
    if vocab_size < 1:
        raise UserError(f"vocab_size: expected at least 1, got {vocab_size}")
    if num_experts < 1:
        raise UserError(f"num_experts: expected at least 1, got {num_experts}")
