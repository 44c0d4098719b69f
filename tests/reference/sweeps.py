"""The slow, obvious sweep: one whole forward a changed run, plain PyTorch hooks, no prefix, no batch."""

import contextlib

import torch

import reward_lens as rl


@torch.no_grad()
def values_at(rm: rl.RewardModel, tokens, sites, changes=()) -> dict[str, torch.Tensor]:
    """What stands at each site in a run with `changes`, [pos, ...]; heads [pos, head_dim], neurons [pos, 1]."""
    seen: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        _change(rm, stack, tokens, changes)
        for name in sites:
            site = rl.Site.parse(name)
            module, where = _place(rm, site)

            def read(x, name=name, site=site):
                seen[name] = _part(rm, site, x.reshape(len(tokens), -1))[...].clone()

            _hook(stack, module, where, read)
        _run(rm, tokens)
    return seen


@torch.no_grad()
def patched_reward(rm: rl.RewardModel, tokens, changes) -> float:
    """Reward of one run with `changes` = [(site name, positions, value [n_positions, ...])] made in it."""
    with contextlib.ExitStack() as stack:
        _change(rm, stack, tokens, changes)
        return _run(rm, tokens)


def _change(rm, stack, tokens, changes) -> None:
    for name, positions, value in changes:
        site = rl.Site.parse(name)
        module, where = _place(rm, site)

        def write(x, site=site, positions=positions, value=value):
            out = x.clone()
            flat = out.reshape(len(tokens), -1)
            _part(rm, site, flat)[list(positions)] = value.to(flat)
            return flat.reshape(x.shape)

        _hook(stack, module, where, write)


def _run(rm, tokens) -> float:
    inputs = {"input_ids": torch.tensor([tokens.ids])}
    if tokens.reads_first and getattr(rm.config, "type_vocab_size", 0) > 1:  # the second text of a pair
        inputs["token_type_ids"] = torch.tensor([[int(tokens.role(p) != "prompt") for p in range(len(tokens))]])
    return float(rm.module(**inputs).logits[0, rm.row])


def _place(rm, site):
    blocks = list(rm.module.get_submodule(rm.structure.blocks))
    if site.kind in ("embed", "resid_pre"):
        return blocks[site.layer or 0], "in"
    block = blocks[site.layer]
    if site.kind == "resid_post":
        return block, "out"
    if site.kind == "resid_mid":  # only where a module gives it: behind the first norm of a post-norm block
        return block.get_submodule(rm.structure.norms[0]), "out"
    part = {"attn": "attn", "mlp": "mlp", "head": "attn_out"}.get(site.kind, "mlp_out")
    path = rm.structure.path(part, site.layer)
    return block.get_submodule(path), "out" if site.kind in ("attn", "mlp") else "in"


def _part(rm, site, flat):
    """The columns of [pos, width] that are the site's: a view."""
    if site.kind == "head":
        width = flat.shape[-1] // rm.n_heads
        return flat[:, site.index * width : (site.index + 1) * width]
    return flat[:, site.index : site.index + 1] if site.kind == "neuron" else flat


def _hook(stack, module, where, act):
    if where == "in":

        def before(m, args, kwargs):
            if args:
                new = act(args[0])
                return ((args[0] if new is None else new, *args[1:]), kwargs)
            new = act(kwargs["hidden_states"])
            return (args, kwargs if new is None else {**kwargs, "hidden_states": new})

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:

        def after(m, args, output):
            first = output if isinstance(output, torch.Tensor) else output[0]
            new = act(first)
            if new is None:
                return None
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        handle = module.register_forward_hook(after)
    stack.callback(handle.remove)
