# SPDX-License-Identifier: Apache-2.0
"""The example's loop with accelerate in two processes.

`torchrun` starts them: on CPUs `accelerate launch --num_processes 2` starts one, but for MPI. This
file is also their program; they write what they find as JSON.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, BATCH, LENGTH = 4, 4, 16


class Rows(torch.utils.data.Dataset):
    """As many as both processes take in STEPS steps; remembers which were asked for."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(256, (2 * STEPS * BATCH, LENGTH), generator=generator)
        self.seen = []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        self.seen.append(i)
        return {"input_ids": self.ids[i], "labels": self.ids[i].sum() % 2}


def main(folder):
    sys.path.insert(0, str(EXAMPLES))
    from hf_trainer import accelerate_loop, build_model

    model, rows = build_model(0), Rows()
    loss = accelerate_loop(model, rows, STEPS, BATCH)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    found = {"loss": loss, "weights": digest, "seen": rows.seen}
    (Path(folder) / os.environ["RANK"]).write_text(json.dumps(found))


def test_two_processes_share_the_data_and_keep_one_set_of_weights(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first["weights"] == second["weights"] and first["loss"] == second["loss"]
    taken = [*first["seen"], *second["seen"]]
    assert len(taken) == len(set(taken)) == 2 * STEPS * BATCH


if __name__ == "__main__":
    main(sys.argv[1])
