# SPDX-License-Identifier: Apache-2.0
"""The worked example of a Hugging Face Trainer: it runs, learns, accumulates and resumes."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

EXAMPLES = Path(__file__).parents[2] / "examples"

# transformers and accelerate warn of their own dependencies' future.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import hf_trainer
    finally:
        sys.path.remove(str(EXAMPLES))
    return hf_trainer


@pytest.fixture(scope="module")
def data(example):
    return torch.utils.data.Subset(example.Fragments(), range(64))


SETTINGS = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_fragments_are_of_both_kinds(example, data):
    rows = [data[i] for i in range(len(data))]
    assert all(row["input_ids"].shape == (example.LENGTH,) for row in rows)
    assert 0.2 < sum(row["labels"].item() for row in rows) / len(rows) < 0.8


def test_trainer_makes_one_step_of_all_micro_batches(example, data, tmp_path):
    """Two micro-batches of 4 are one batch of 8."""
    told = {}
    for accumulated in (1, 2):
        changes = {
            "gradient_accumulation_steps": accumulated,
            "per_device_train_batch_size": 8 // accumulated,
        }
        trainer = example.make_trainer("zo", data, 0, str(tmp_path), **(SETTINGS | changes))
        optimizer, before = trainer.optimizer, weights(trainer)
        told[accumulated], tell = [], optimizer.tell

        def record(losses, kept=told[accumulated], tell=tell):
            kept.append([float(loss) for loss in losses])
            return tell(losses)

        optimizer.tell = record
        assert trainer.train().global_step == 4
        assert optimizer.steps == 4 and optimizer.draw == 4 * optimizer.n
        assert not same_bits(before, weights(trainer))
        assert all(p.grad is None for p in trainer.model.parameters())
        assert trainer.lr_scheduler.get_last_lr() == [0.0]
    assert [len(losses) for losses in told[1]] == [2 * optimizer.n] * 4
    torch.testing.assert_close(told[1], told[2], rtol=1e-3, atol=1e-3)


def test_resume_from_a_checkpoint_has_the_same_bits(example, data, tmp_path):
    saved = SETTINGS | {"save_strategy": "steps", "save_steps": 2}
    whole = example.make_trainer("zo", data, 0, str(tmp_path), **saved)
    whole.train()
    resumed = example.make_trainer("zo", data, 0, str(tmp_path), **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(weights(whole), weights(resumed))
    assert resumed.optimizer.optimizer.draw == whole.optimizer.optimizer.draw


def test_what_is_evaluated_saved_and_left_is_without_perturbation(
    example, data, tmp_path, monkeypatch
):
    """`keep_perturbed` changes no bit of it; nor does it matter when Trainer looks."""
    looks = {"save_strategy": "steps", "save_steps": 1}
    found = []
    for keep, changes in ((False, looks), (True, looks), (True, {})):
        options = example.ZO | {"probe": "in_place", "keep_perturbed": keep}
        monkeypatch.setattr(example, "ZO", options)
        folder = tmp_path / f"{keep}{len(changes)}"
        trainer = example.make_trainer("zo", data, 0, str(folder), **(SETTINGS | changes))
        if changes:
            trainer.eval_dataset = data
            trainer.args.eval_strategy = type(trainer.args.eval_strategy).STEPS
            trainer.args.eval_steps = 1
        trainer.train()
        losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        saved = [load_file(path) for path in sorted(folder.glob("checkpoint-*/*.safetensors"))]
        found.append((weights(trainer), losses, saved))
    (plain, losses, saved), (kept, losses_kept, saved_kept), (unseen, _, _) = found
    assert same_bits(plain, kept) and same_bits(plain, unseen)
    assert losses == losses_kept and len(losses) == len(saved) == 4
    for a, b in zip(saved, saved_kept, strict=True):
        assert same_bits(a.values(), b.values())


def test_trainer_with_weights_that_are_never_written(example, data, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "ZO", example.ZO | {"probe": "virtual"})
    trainer = example.make_trainer("zo", data, 0, str(tmp_path), **SETTINGS)
    before = weights(trainer)
    compute_loss = trainer.compute_loss

    def watching(*args, **kwargs):
        if trainer.optimizer.optimizer.steps == 0:
            with torch._C.DisableTorchFunction():  # what lies there, not what a function reads
                assert same_bits(before, weights(trainer))
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = watching
    trainer.train()
    assert trainer.optimizer.optimizer.rejected == 0
    assert not same_bits(before, weights(trainer))


def test_the_plain_loop_accumulates_too(example, data):
    model = example.build_model(0)
    loss = example.accelerate_loop(model, data, steps=2, batch_size=4, accumulate=2)
    assert 0.4 < loss < 1.1


def test_the_table_is_printed(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "TEST", 16)
    curves = example.main(steps=5, seeds=(0,))
    assert [len(curve) for method in curves.values() for curve in method] == [5, 5]
    assert "accuracy, unseen text" in capsys.readouterr().out
