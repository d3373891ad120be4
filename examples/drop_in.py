# SPDX-License-Identifier: Apache-2.0
"""Trains a small classifier with forward passes only. Run it: python examples/drop_in.py"""

import torch
from torch import nn

from zo_kernels.optim import ZOAdam


def main(steps: int = 400) -> float:
    """Returns the accuracy on points that training did not see."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(600, 2, generator=generator)
    inside = (points.square().sum(1) < 1.4).long()  # a disc: no line separates it
    train, test = slice(0, 400), slice(400, 600)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = ZOAdam(model.named_parameters(), lr=0.02, n=4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def closure() -> torch.Tensor:
        return nn.functional.cross_entropy(model(points[train]), inside[train])

    for step in range(steps):
        loss = optimizer.step(closure)  # 2n forward passes, no backward pass
        scheduler.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}")
    with torch.no_grad():
        accuracy = (model(points[test]).argmax(1) == inside[test]).float().mean().item()
    print(f"accuracy on unseen points: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
