# SPDX-License-Identifier: Apache-2.0
"""ZOSignSGD: steps of one size along the sign of a gradient that forward passes estimate.

    theta <- (1 - lr weight_decay) theta - lr sign(b),    b <- momentum b + g_hat

Without momentum it is ZO-signSGD (Liu et al. 2019, ICLR); with it, the signed momentum of signum
(Bernstein et al. 2018, arXiv 1802.04434). Only the signs of the loss differences matter, so that
the unit of the loss does not.
"""

from __future__ import annotations

from zo_kernels.optim._docs import documented
from zo_kernels.optim.zosgd import Descent


@documented
class ZOSignSGD(Descent):
    """Sign descent by forward passes only; see `zo_kernels.optim.zosignsgd`.

        optimizer = ZOSignSGD(model.named_parameters(), lr=1e-6, eps=1e-3)
        loss = optimizer.step(lambda: model(inputs, labels=labels).loss)

    A parameter is trained if it requires grad at that step. Groups may set lr, eps, momentum,
    weight_decay and maximize. The global random state is neither read nor written.

    {momentum_state}
    {probes}

    Args:
        params: parameters, named parameters (their noise is then independent of their order), or
            groups of either.
        lr (float, default 1e-6): what every weight moves in a step, in theta.
        {descent}
        {common}

    Raises:
        ValueError: an argument out of its bound.
    """

    sign = True
