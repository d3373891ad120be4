# SPDX-License-Identifier: Apache-2.0
"""Optimizers that need forward passes only, as `torch.optim.Optimizer`s: `step(closure)`."""

from zo_kernels.optim.graphed import GraphedStep
from zo_kernels.optim.zoadam import ZOAdam, adam_update_
from zo_kernels.optim.zosgd import ZOSGD, sgd_update_
from zo_kernels.optim.zosignsgd import ZOSignSGD

__all__ = ["ZOSGD", "GraphedStep", "ZOAdam", "ZOSignSGD", "adam_update_", "sgd_update_"]
