"""reward-lens 1.0.0: its component sweep patches whole outputs at all positions; it has no other sweep."""

import torch
from worker import System, serve

from reward_lens import ActivationPatcher, RewardModel


class RewardLens1(System):
    def load(self, folder):
        self.rm = RewardModel.from_pretrained(folder, device="cpu", torch_dtype=torch.float32, trust_remote_code=False)
        self.layers, self.heads = self.rm.n_layers, self.rm.n_heads

    def cannot(self, sites, at):
        if sites == "heads":
            return "no patching of heads"
        return None if at == "all" else "no patching of one position: only whole outputs, at all positions"

    def sweep(self, pair, sites, at):
        found = ActivationPatcher(self.rm).patch_all_components(
            pair["prompt"], pair["chosen"], pair["rejected"], mode="noising", show_progress=False
        )
        names = (f"L{layer}.{kind}" for layer, kind in zip(found.layer_indices, found.component_types, strict=True))
        return dict(zip(names, found.patch_effects.tolist(), strict=True))


if __name__ == "__main__":
    serve(RewardLens1())
