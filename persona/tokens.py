# SPDX-License-Identifier: Apache-2.0
"""New tokens by hook: fp32 master rows beside the embedding table, which is never touched.

The tokenizer learns the names; ids from the end of the table on are looked up in the rows instead.
Rows may differ between the members of a batch: that is how all perturbed copies of a token are
evaluated in one forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from persona.errors import UserError


def placeholder_names(token: str, num_vectors: int) -> list[str]:
    """``<x>`` -> ``["<x>", "<x>_1", ...]``, the names that diffusers gives a multi-vector token."""
    return [token, *(f"{token}_{i}" for i in range(1, num_vectors))]


def add_placeholder(tokenizer: Any, token: str, num_vectors: int) -> list[int]:
    """Add the token to ``tokenizer``; returns its ids, one a vector.

    Raises:
        UserError: the token is not one word, the tokenizer knows one of the names already, or a
            prompt cannot hold so many.
    """
    names = placeholder_names(token, num_vectors)
    most = tokenizer.model_max_length - 2  # a prompt less its two ends
    if num_vectors > most:
        raise UserError(
            f"num_vectors: must be at most {most}, the length of the model's prompts, got "
            f"{num_vectors}; use fewer"
        )
    if not token or token != token.strip() or any(c.isspace() for c in token):
        raise UserError(
            f"placeholder_token: must be one word without spaces, got {token!r}; try <my-dog>"
        )
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name in vocabulary or name.lower() + "</w>" in vocabulary:
            raise UserError(
                f"placeholder_token: must be new to the tokenizer, got {token!r}, which it knows "
                f"({name!r}); put it in angle brackets, as in <my-{token.strip('<>')}>"
            )
    tokenizer.add_tokens(names)
    return tokenizer.convert_tokens_to_ids(names)


def initial_id(tokenizer: Any, initializer: str) -> int:
    """The token that a new word starts from.

    Raises:
        UserError: the word is not exactly one token of the vocabulary.
    """
    ids: list[int] = tokenizer.encode(initializer, add_special_tokens=False)
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise UserError(
            f"initializer_token: must be one token of the vocabulary, got {initializer!r}, which "
            f"is {len(ids)} ({' '.join(pieces)}); take a more common word for the class"
        )
    return ids[0]


def initial_rows(tokenizer: Any, table: Tensor, initializer: str, num_vectors: int) -> Tensor:
    """fp32 [num_vectors, d] on the CPU: the row of the one-token word ``initializer``, repeated.

    Raises:
        UserError: see `initial_id`.
    """
    row = table[initial_id(tokenizer, initializer)]
    return row.detach().to("cpu", torch.float32).repeat(num_vectors, 1)


def expand(prompt: str, token: str, num_vectors: int) -> str:
    """``prompt`` with the token written out as its ``num_vectors`` names."""
    return prompt.replace(token, " ".join(placeholder_names(token, num_vectors)))


class TokenHook:
    """Serve rows for the ids of new tokens in an ``nn.Embedding``.

    Args:
        embedding: the text encoder's table, [vocabulary, d].
        ids: ids of the new tokens, as the tokenizer gave them.
        rows: fp32 [len(ids), d], kept as ``rows``; the master, in fp32 whatever the model's dtype.
    """

    def __init__(self, embedding: nn.Embedding, ids: list[int], rows: Tensor) -> None:
        self.ids, self.rows = ids, rows
        self._copies: Tensor | None = None
        self._handles = [
            embedding.register_forward_pre_hook(self._hide_new_ids),
            embedding.register_forward_hook(self._insert_rows),
        ]

    @contextmanager
    def copies(self, copies: Tensor) -> Iterator[None]:
        """Within the block, slice q of a batch [Q * B, T] sees ``copies[q]`` ([Q, len(ids), d])."""
        self._copies = copies
        try:
            yield
        finally:
            self._copies = None

    def remove(self) -> None:
        """Leave the embedding as it was before."""
        for handle in self._handles:
            handle.remove()

    def _hide_new_ids(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._input = args[0]
        for new in self.ids:
            args = (args[0].masked_fill(args[0] == new, 0), *args[1:])
        return args

    def _insert_rows(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = self._input  # [Q * B, T]
        copies = self.rows[None] if self._copies is None else self._copies
        per_copy = ids.shape[0] // copies.shape[0]
        for index, new in enumerate(self.ids):
            rows = copies[:, index].to(output).repeat_interleave(per_copy, 0)  # [Q * B, d]
            output = torch.where((ids == new)[..., None], rows[:, None, :], output)
        return output
