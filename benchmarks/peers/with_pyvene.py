"""pyvene: one intervenable model for each site, built once and given the other run's value: one forward a site.

Its own way of getting that value, a forward of the other text for each site, would take twice as long.
"""

import pyvene
import torch
from transformers import AutoModelForSequenceClassification
from worker import System, place, serve

COMPONENT = {"attn": "attention_output", "mlp": "mlp_output", "head": "head_attention_value_output"}


class WithPyvene(System):
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
        for name in self.names(sites):
            self.intervenable(*place(name)[:2])
        taken, handles = {}, []
        for layer, block in enumerate(self.model.model.layers):
            for kind, module in (("attn", block.self_attn), ("mlp", block.mlp), ("head", block.self_attn.o_proj)):
                if (kind == "head") == (sites == "heads"):

                    def keep(_module, args, output, key=(layer, kind)):
                        taken[key] = args[0] if key[1] == "head" else output[0] if key[1] == "attn" else output

                    handles.append(module.register_forward_hook(keep))
        self.model(**rejected)
        for handle in handles:
            handle.remove()
        length = len(pair["ids"][0])
        where = list(range(length)) if at == "all" else [length - 1]
        return chosen, taken, float(self.model(**chosen).logits), where

    def measure(self, state, names):
        chosen, taken, clean, where = state
        effects = []
        for name in names:
            layer, kind, head = place(name)
            units, source = [[where]], taken[layer, kind][:, where]
            if kind == "head":
                units = [[[[head]], [where]]]
                source = source.unflatten(-1, (self.heads, -1)).transpose(1, 2)[:, head : head + 1]
            changed = self.intervenable(layer, kind)
            _, patched = changed(
                base=chosen,
                source_representations={changed.sorted_keys[0]: source.contiguous()},
                unit_locations={"sources->base": (units, units)},
            )
            effects.append(clean - float(patched.logits))
        return effects


if __name__ == "__main__":
    serve(WithPyvene())
