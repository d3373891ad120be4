# SPDX-License-Identifier: Apache-2.0
"""The UNet of a run by replays of CUDA graphs: `--cuda_graph`."""

from persona.errors import UserError
from persona.families import Predict, StableDiffusion
from zo_kernels.nn import Graphed


def graphed(family: StableDiffusion) -> Predict:
    """`family.predict` as `zo_kernels.nn.Graphed`: the same bits, without the host's work for each
    layer. On the CPU plain calls take the place of a graph.

    Raises:
        UserError: the model is on a device that has no CUDA graphs.
    """
    if family.device.type not in ("cuda", "cpu"):
        raise UserError(
            f"cuda_graph: must be left out where the model is on a device that has no CUDA graphs, "
            f"got {family.device}; move the model to a CUDA device"
        )
    return Graphed(family.unet, family.predict)
