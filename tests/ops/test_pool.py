# SPDX-License-Identifier: Apache-2.0
"""Large outputs have blocks of a pool (`csrc/cpu/pool.h`): what it holds, what tensors see."""

import copy
import io
import random
import threading

import pytest
import torch
from quantized_twins import Weight

from zo_kernels import _C
from zo_kernels.ops import empty_cache, qlinear, quantize_rows

LARGE, REGION = 1 << 18, 64 << 20  # bytes, as in csrc/cpu/pool.h


def taken():
    return _C.pool_use()["taken"]


def codes(size, value=1.0):
    """`size` bytes, all 127 or all -127, in rows of 64."""
    return quantize_rows(torch.full((size // 64, 64), value))[0]


def test_large_outputs_alone_have_blocks():
    before = taken()
    small = codes(LARGE - 64)
    assert taken() == before
    large = codes(LARGE)
    assert taken() == before + LARGE
    view = large[5:, 3:]
    del large
    assert taken() == before + LARGE  # the view has it
    assert (view == 127).all() and (small == 127).all()
    del view
    assert taken() == before


def test_the_next_output_has_the_pages_of_the_last():
    first = codes(4 * LARGE)
    at = first.data_ptr()
    del first
    assert codes(4 * LARGE).data_ptr() == at


def test_regions_that_are_free_go_back():
    held = [codes(REGION // 2) for _ in range(6)] + [codes(REGION + 64)]
    assert _C.pool_use()["mapped"] >= 4 * REGION
    random.Random(0).shuffle(held)
    while held:
        held.pop()
    use = _C.pool_use()
    assert use["mapped"] - use["taken"] <= 3 * REGION  # two kept, and holes beside what others hold


def test_what_is_free_goes_back_when_told():
    empty_cache()
    large, small = codes(REGION), codes(LARGE)  # of two regions
    before = _C.pool_use()["mapped"]
    del large
    assert _C.pool_use()["mapped"] == before
    assert empty_cache() == before - _C.pool_use()["mapped"] >= REGION
    assert (small == 127).all() and empty_cache() == 0


def test_free_regions_do_not_lie_beside_a_block_that_they_are_too_small_for():
    empty_cache()
    before = _C.pool_use()["mapped"]
    small = [codes(REGION), codes(REGION)]
    small.clear()
    large = codes(REGION + LARGE)
    assert _C.pool_use()["mapped"] - before < 2 * REGION
    del large


def test_nothing_of_a_block_s_past_shows():
    weight, x = Weight((512, 64)), torch.randn(300, 64)
    expected = qlinear(x, **weight.arguments, act_bits=8).clone()
    for _ in range(3):
        y = qlinear(x, **weight.arguments, act_bits=8)
        assert torch.equal(y, expected)
        y.fill_(float("nan"))
        del y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_tensors_like_others(dtype):
    weight, x = Weight((1024, 64)), torch.randn(300, 64).to(dtype)
    y = qlinear(x, **weight.arguments, act_bits=8)
    assert y.dtype == dtype and y.is_contiguous() and y.shape == (300, 1024)
    assert torch.equal(copy.deepcopy(y), y)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    assert torch.equal(y.mul_(2), 2 * qlinear(x, **weight.arguments, act_bits=8))
    assert y.untyped_storage().nbytes() == y.nbytes


def test_gradients_go_through_outputs_of_the_pool():
    weight, x = Weight((1024, 64)), torch.randn(300, 64)
    grads = []
    for rows in (300, 50):  # 1.2 MB, and below the limit
        part = x[:rows].clone().requires_grad_()
        qlinear(part, **weight.arguments, act_bits=8)[:50].square().sum().backward()
        grads.append(part.grad[:50])
    assert torch.equal(*grads)


def test_in_inference_mode():
    with torch.inference_mode():
        y = codes(LARGE)
        assert y.is_inference() == codes(64).is_inference()
        assert (y.float() + 1 == 128).all()


def test_many_threads_take_and_give():
    before, wrong = taken(), []

    def work(seed):
        draw, held = random.Random(seed), []
        for _ in range(60):
            value = draw.choice([1.0, -1.0])
            held.append((codes(LARGE * draw.randint(1, 9), value), round(127 * value)))
            if len(held) > 5:
                tensor, expected = held.pop(draw.randrange(5))
                wrong.extend([] if (tensor == expected).all() else [seed])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and taken() == before
