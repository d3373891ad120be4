# SPDX-License-Identifier: Apache-2.0
"""Which directions of a token the text encoder lets through at all.

The UNet sees a token only as hidden states. With J the Jacobian of a prompt's hidden states for the
token's row, J^T J tells how far each direction moves them. J comes from forward differences of the
text encoder alone.
"""

import torch
from torch import Tensor

from persona.families import StableDiffusion
from persona.tokens import TokenHook

EPS = 1e-2  # in units of the embedding: above what int8 activations round away
PROMPTS = 2  # a pass for each dimension of the embedding and each of these
_TOGETHER = 32  # passes in a batch


@torch.inference_mode()
def encoder_moment(
    family: StableDiffusion, hook: TokenHook, prompts: Tensor, eps: float = EPS
) -> Tensor:
    """J^T J [d, d], fp64 on the CPU: mean over prompts, sum over hidden states and token rows.

    Args:
        prompts: token ids [P, T], of which the first `PROMPTS` different ones count.
        eps: of the forward differences.
    """
    rows = hook.rows  # [R, d]
    width = rows.shape[1]
    moment = torch.zeros(width, width, dtype=torch.float64)
    distinct = list({tuple(p.tolist()): p for p in prompts}.values())[:PROMPTS]
    for prompt in distinct:
        here = _hidden(family, hook, rows[None], prompt)
        for row in range(len(rows)):
            parts = []
            for directions in torch.eye(width).split(_TOGETHER):
                copies = rows.repeat(len(directions), 1, 1)
                copies[:, row] += eps * directions
                parts.append((_hidden(family, hook, copies, prompt) - here) / eps)
            jacobian = torch.cat(parts)  # [d, T * hidden]
            moment += (jacobian @ jacobian.T).double().cpu()
    return moment / len(distinct)


def _hidden(family: StableDiffusion, hook: TokenHook, copies: Tensor, prompt: Tensor) -> Tensor:
    """Hidden states [Q, T * hidden] of one prompt for copies [Q, R, d] of the token."""
    with hook.copies(copies.to(family.device)):
        return family.encode_tokens(prompt.repeat(len(copies), 1)).flatten(1).float()
