"""Capturing: what is handed back stands by itself."""

import torch

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from reward_lens.engine import activations


def test_nothing_of_a_pass_is_held_once_it_is_read(monkeypatch):
    """Pieces of every pass, kept between the large temporaries of the next ones, take several times the result."""
    rm = rl.RewardModel(*tiny_model("llama"))
    pairs = [rl.Pair(*texts) for texts in TEXT_PAIRS]
    sites = ["embed", "L0.attn", "L1.mlp", "L2.resid_post", "L1.head", "L0.neuron", "L0.q"]
    expected = rl.capture(rm, pairs, sites)

    def spoiled(*args, **kwargs):
        for batch, tensors in passes(*args, **kwargs):
            yield batch, tensors
            for tensor in tensors.values():
                tensor.fill_(torch.nan)

    passes = activations.passes
    monkeypatch.setattr(activations, "passes", spoiled)
    found = rl.capture(rm, pairs, sites, batch_size=3)
    for site in sites:
        torch.testing.assert_close(found[site], expected[site])
