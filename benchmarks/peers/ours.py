"""This library: one call of `rl.effects` for a sweep."""

from worker import System, serve

import reward_lens as rl


class Ours(System):
    def load(self, folder):
        self.rm = rl.load(folder, dtype="float32")
        self.layers, self.heads = self.rm.n_layers, self.rm.n_heads

    def sweep(self, pair, sites, at):
        one = rl.Pair(pair["prompt"], pair["chosen"], pair["rejected"])
        value = rl.effects(self.rm, [one], sites=sites, mode="noise", at=at).value.isel(pair=0)
        return dict(zip(value.component.values.tolist(), value.values.tolist(), strict=True))


if __name__ == "__main__":
    serve(Ours())
