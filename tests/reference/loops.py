"""Slow, obvious versions of the fast paths: one text at a time, plain hooks, written to be checked by eye."""

import torch

import reward_lens as rl


@torch.no_grad()
def plain_lens(rm: rl.RewardModel, prompt, response) -> list[float]:
    """The model's own norm and head on the input of every block and on the last block's output."""
    tokens = rm.tokenize(prompt, response)
    norm, head = _norm(rm), rm.module.get_submodule(rm.structure.head)
    inputs: list[torch.Tensor] = []
    blocks = list(rm.module.get_submodule(rm.structure.blocks))
    handles = [b.register_forward_pre_hook(_first_argument(inputs), with_kwargs=True) for b in blocks]
    if rm.structure.final_norm is None:
        handles.append(blocks[-1].register_forward_hook(lambda m, a, out: inputs.append(_tensor(out).clone())))
    else:
        handles.append(norm.register_forward_pre_hook(_first_argument(inputs), with_kwargs=True))
    rm.module(input_ids=torch.tensor([tokens.ids]))
    for handle in handles:
        handle.remove()
    return [float(head(norm(x))[0, tokens.reward_pos, rm.row]) for x in inputs]


@torch.no_grad()
def plain_contributions(rm: rl.RewardModel, prompt, response) -> dict[str, float]:
    """Each write times the gradient of the head through the norm with its scale held constant.

    With N(h) homogeneous of degree 0 up to epsilon, the frozen scale makes N linear in h, so a write's contribution is
    head(N_frozen(write)) - head(N_frozen(0)); N_frozen is written out here for RMSNorm and LayerNorm.
    """
    tokens = rm.tokenize(prompt, response)
    at = tokens.reward_pos
    norm, head = _norm(rm), rm.module.get_submodule(rm.structure.head)
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(rm.module.get_submodule(rm.structure.blocks)):
        for kind in ("attn", "mlp"):
            writer = block.get_submodule(rm.structure.path(kind, layer))
            handles.append(writer.register_forward_hook(_keep(seen, f"L{layer}.{kind}", len(tokens))))
        if layer == 0:
            first: list[torch.Tensor] = []
            handles.append(block.register_forward_pre_hook(_first_argument(first), with_kwargs=True))
    last: list[torch.Tensor] = []
    handles.append(norm.register_forward_pre_hook(_first_argument(last), with_kwargs=True))
    rm.module(input_ids=torch.tensor([tokens.ids]))
    for handle in handles:
        handle.remove()
    h = last[0][0, at]
    centred = float(norm(h + 5.0).sub(norm(h)).abs().max()) < 1e-3  # LayerNorm does not notice a constant
    direction = h - h.mean() if centred else h
    zero = norm(torch.zeros_like(h))  # the norm's bias, if it has one
    gain_times_scale = (norm(h) - zero) / direction
    weight = head.weight[rm.row]
    seen["embed"] = first[0][0] / rm.structure.write_scale
    out = {}
    for name, x in seen.items():
        x = x[at] * rm.structure.write_scale
        x = x - x.mean() if centred else x
        out[name] = float((gain_times_scale * x * weight).sum())
    return out


def _norm(rm: rl.RewardModel):
    path = rm.structure.final_norm
    return torch.nn.Identity() if path is None else rm.module.get_submodule(path)


def _tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def _first_argument(into: list):
    def hook(module, args, kwargs):
        into.append((args[0] if args else kwargs["hidden_states"]).clone())

    return hook


def _keep(into: dict, name: str, length: int):
    def hook(module, args, output):
        into[name] = _tensor(output).clone().reshape(length, -1)

    return hook
