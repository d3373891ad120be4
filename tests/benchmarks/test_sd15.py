# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from benchmarks import module_profile, sd15

pytest.importorskip("diffusers")


def test_true_size():
    linears, convs = sd15.shapes("sd15")
    assert sum(s.layers for s in linears) == 184
    assert sum(s.layers for s in convs) == 98
    assert sum(p.numel() for p in sd15.meta_unet("sd15").parameters()) == 859_520_964
    assert sd15.LinearShape(4096, 2560, 320, 5) in linears
    assert sd15.ConvShape(8, 1280, 1280, 3, 1, 11) in convs


def test_weights_are_a_function_of_the_seed_alone():
    state, other = (sd15.unet("tiny", seed=seed).state_dict() for seed in (3, 4))
    torch.manual_seed(0)
    again = sd15.unet("tiny", torch.bfloat16, seed=3)
    assert not again.training
    for name, p in again.state_dict().items():
        assert torch.equal(p, state[name].bfloat16())
        assert not torch.equal(p, other[name].bfloat16())
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=torch.channels_last)


def test_output_keeps_its_size():
    latents, timesteps, text = sd15.inputs("tiny", 2)
    assert not torch.equal(latents[0], latents[1])
    with torch.no_grad():
        y = sd15.unet("tiny")(latents, timesteps, text).sample
    assert y.shape == latents.shape
    assert 0.1 < float(y.std()) < 10


def test_profile_accounts_for_all_time():
    model, given = sd15.unet("tiny"), sd15.inputs("tiny", 1)
    with torch.no_grad():
        rows = module_profile.profile(lambda: model(*given), model, 2)
    by_kind = {row["kind"]: row for row in rows}
    linears, convs = sd15.shapes("tiny")
    assert by_kind["Linear"]["calls"] == sum(s.layers for s in linears)
    assert by_kind["Conv2d"]["calls"] == sum(s.layers for s in convs)
    assert {"attention", "GroupNorm", "LayerNorm", "SiLU, GELU", "cat", "upsample"} <= set(by_kind)
    assert rows[-1]["kind"] == module_profile.REST
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.3)
    assert "| Linear |" in module_profile.table(rows)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
