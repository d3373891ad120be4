# SPDX-License-Identifier: Apache-2.0
"""The token hook: rows of a new word beside an embedding table that stays as it is."""

import pytest
import torch

from persona.errors import UserError
from persona.tokens import TokenHook, add_placeholder, expand, initial_rows, placeholder_names


def ids_of(pipe, *prompts):
    return pipe.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids


def random_rows(*shape, width=32):
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pipe(fresh_pipeline):
    return fresh_pipeline()


def hooked(pipe, rows):
    embedding = pipe.text_encoder.get_input_embeddings()
    ids = add_placeholder(pipe.tokenizer, "<x>", rows.shape[-2])
    return embedding, TokenHook(embedding, ids, rows if rows.dim() == 2 else rows[0])


@pytest.mark.parametrize("vectors", [1, 3])
def test_only_the_new_ids_are_served_from_the_rows(pipe, vectors):
    rows = random_rows(vectors)
    embedding, hook = hooked(pipe, rows)
    table = embedding.weight.clone()
    ids = ids_of(pipe, f"a photo of a {expand('<x>', '<x>', vectors)} on a sofa", "a <x>")
    out = embedding(ids)
    new = ids >= len(table)
    assert new.sum() == vectors + 1
    assert torch.equal(out[~new], table[ids[~new]])
    assert torch.equal(out[0][new[0]], rows)
    assert torch.equal(out[1][new[1]], rows[:1])
    assert torch.equal(embedding.weight, table)
    hook.remove()
    with pytest.raises(IndexError):
        embedding(ids)


def test_each_copy_sees_its_slice_of_the_batch(pipe):
    copies = random_rows(3, 2)
    embedding, hook = hooked(pipe, copies)
    ids = ids_of(pipe, "a <x> <x>_1", "my <x>_1 on a <x>").repeat(3, 1)  # [3 copies * 2, T]
    with hook.copies(copies):
        out = embedding(ids)
    for row in range(6):
        for index, new in enumerate(hook.ids):
            (at,) = (ids[row] == new).nonzero()
            assert torch.equal(out[row, at[0]], copies[row // 2, index])
    assert torch.equal(embedding(ids)[5], embedding(ids)[1])  # the master again


def test_an_error_inside_the_block_gives_the_master_back(pipe):
    rows = random_rows(1)
    embedding, hook = hooked(pipe, rows)
    with pytest.raises(ZeroDivisionError), hook.copies(random_rows(2, 1) + 1):
        raise ZeroDivisionError
    ids = ids_of(pipe, "<x>")
    assert torch.equal(embedding(ids)[ids == hook.ids[0]], rows)


def test_rows_take_the_dtype_of_the_model(pipe):
    rows = random_rows(1)
    pipe.text_encoder.to(torch.bfloat16)
    embedding, hook = hooked(pipe, rows)
    ids = ids_of(pipe, "a <x>")
    out = embedding(ids)
    assert out.dtype == torch.bfloat16 and hook.rows.dtype == torch.float32
    assert torch.equal(out[ids == hook.ids[0]], rows.bfloat16())


def test_a_token_with_capitals_is_found(pipe):
    (new,) = add_placeholder(pipe.tokenizer, "<My-Dog>", 1)
    assert (ids_of(pipe, "a photo of <My-Dog>") == new).sum() == 1


def test_names_of_several_vectors_are_those_of_diffusers():
    assert placeholder_names("<x>", 3) == ["<x>", "<x>_1", "<x>_2"]
    assert expand("a <x>!", "<x>", 2) == "a <x> <x>_1!"


def test_rows_start_at_the_initializer(pipe):
    table = pipe.text_encoder.get_input_embeddings().weight
    rows = initial_rows(pipe.tokenizer, table, "dog", 2)
    (dog,) = pipe.tokenizer.encode("dog", add_special_tokens=False)
    assert torch.equal(rows, table[[dog, dog]]) and rows.dtype == torch.float32
    rows += 1
    assert not torch.equal(rows[0], table[dog])


@pytest.mark.parametrize("word", ["zebra", "toy dog", " "])
def test_an_initializer_that_is_not_one_token(pipe, word):
    table = pipe.text_encoder.get_input_embeddings().weight
    with pytest.raises(UserError, match=r"initializer_token: must be one token.*more common word"):
        initial_rows(pipe.tokenizer, table, word, 1)


@pytest.mark.parametrize("word", ["dog", "Dog", "<|endoftext|>", "<old>"])
def test_a_placeholder_that_the_tokenizer_knows(pipe, word):
    pipe.tokenizer.add_tokens("<old>")
    size = len(pipe.tokenizer)
    with pytest.raises(UserError, match=r"placeholder_token: must be new.*angle brackets"):
        add_placeholder(pipe.tokenizer, word, 1)
    assert len(pipe.tokenizer) == size


@pytest.mark.parametrize("word", ["", "my dog", " <x>"])
def test_a_placeholder_that_is_not_one_word(pipe, word):
    with pytest.raises(UserError, match="placeholder_token: must be one word without spaces"):
        add_placeholder(pipe.tokenizer, word, 1)


def test_more_vectors_than_a_prompt_holds(pipe):
    most = pipe.tokenizer.model_max_length - 2
    add_placeholder(pipe.tokenizer, "<y>", most)
    with pytest.raises(UserError, match=f"num_vectors: must be at most {most}.*got {most + 1}"):
        add_placeholder(pipe.tokenizer, "<x>", most + 1)
