"""pyvene: one intervenable model for each site, built once; it runs the other text and the changed one for each."""

import pyvene
import torch
from transformers import AutoModelForSequenceClassification
from worker import System, place, serve

COMPONENT = {"attn": "attention_output", "mlp": "mlp_output", "head": "head_attention_value_output"}


class WithPyvene(System):
    packages = ("pyvene",)

    def load(self, folder):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers, self.heads = self.model.config.num_hidden_layers, self.model.config.num_attention_heads
        self.built = {}

    def intervenable(self, layer: int, kind: str):
        if (layer, kind) not in self.built:
            form = {"layer": layer, "component": COMPONENT[kind], "unit": "h.pos" if kind == "head" else "pos"}
            form |= {"intervention_type": pyvene.VanillaIntervention, "max_number_of_units": 1}
            self.built[layer, kind] = pyvene.IntervenableModel(pyvene.IntervenableConfig([form]), model=self.model)
        return self.built[layer, kind]

    def prepare(self, pair, sites, at):
        chosen, rejected = ({"input_ids": torch.tensor([ids]), "use_cache": False} for ids in pair["ids"])
        length = len(pair["ids"][0])
        where = list(range(length)) if at == "all" else [length - 1]
        for name in self.names(sites):
            self.intervenable(*place(name)[:2])
        return chosen, rejected, float(self.model(**chosen).logits), where

    def measure(self, state, names):
        chosen, rejected, clean, where = state
        effects = []
        for name in names:
            layer, kind, head = place(name)
            units = [[[[head]], [where]]] if kind == "head" else [[where]]
            _, patched = self.intervenable(layer, kind)(
                base=chosen, sources=[rejected], unit_locations={"sources->base": (units, units)}
            )
            effects.append(clean - float(patched.logits))
        return effects


if __name__ == "__main__":
    serve(WithPyvene())
