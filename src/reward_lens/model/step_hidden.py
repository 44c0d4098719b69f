"""Process rewards behind one hidden layer of ReLUs: Linear, ReLU, Linear on the normed residual (Qwen2.5-Math-PRM).

The readout is local (`model.heads.local`): with the norm's scale and the units that are on held at h the head is affine
in h, and that is its value there, so contributions sum to the reward; the direction is that of this input alone.
"""

import dataclasses
from typing import Any

from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.model.heads.local import LocalReadout, local_readout
from reward_lens.model.linear_maps import is_linear
from reward_lens.model.norm import measure_norm
from reward_lens.model.placement import input_device
from reward_lens.model.structure import Structure, find_structure
from reward_lens.model.usable_module import run_probe


def is_hidden(head: nn.Module) -> bool:
    """Whether a head is Linear, ReLU, Linear."""
    parts = list(head.children()) if isinstance(head, nn.Sequential) else []
    return len(parts) == 3 and is_linear(parts[0]) and isinstance(parts[1], nn.ReLU) and is_linear(parts[2])


def hidden_structure(scorer: Any, score: Any) -> Structure:
    """The structure of a network whose `score` is such a head: what its first map reads is what a linear head would."""
    device = input_device(scorer)
    seen: list[Tensor] = []

    def probe() -> Tensor:
        with hooks.attached([hooks.read_output(score[0], seen.append)]):
            run_probe(scorer, device)
        return seen.pop()[:, -1]

    config = scorer.config.get_text_config()
    found = find_structure(scorer, probe, config.num_hidden_layers, config.num_attention_heads)
    return dataclasses.replace(found, head="score.2")


def hidden_readout(score: Any, final_norm: nn.Module | None, objective: str) -> LocalReadout:
    """The readout of such a head behind this norm."""
    norm = measure_norm(final_norm, score[0].in_features, score[0].weight)
    return local_readout(norm, score, 0, objective)
