"""nnsight: one trace of the reward model for each site; the other run's values come from one trace."""

import nnsight
import torch
from transformers import AutoModelForSequenceClassification
from worker import System, place, serve


class WithNNsight(System):
    def load(self, folder):
        module = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.width = module.config.head_dim
        self.layers, self.heads = module.config.num_hidden_layers, module.config.num_attention_heads
        self.model = nnsight.NNsight(module)

    def prepare(self, pair, sites, at):
        chosen, rejected = (torch.tensor([ids]) for ids in pair["ids"])
        model = self.model
        with model.trace(input_ids=rejected, use_cache=False):
            taken = nnsight.save({})
            for layer in range(self.layers):
                block = model.model.layers[layer]
                if sites == "heads":
                    taken[layer, "head"] = block.self_attn.o_proj.input.clone()
                else:
                    taken[layer, "attn"] = block.self_attn.output[0].clone()
                    taken[layer, "mlp"] = block.mlp.output.clone()
        with model.trace(input_ids=chosen, use_cache=False):
            clean = model.output.logits.save()
        return chosen, taken, float(clean), slice(None) if at == "all" else slice(-1, None)

    def measure(self, state, names):
        chosen, taken, clean, where = state
        model, effects = self.model, []
        for name in names:
            layer, kind, head = place(name)
            source, part = taken[layer, kind], slice(head * self.width, (head + 1) * self.width)
            with model.trace(input_ids=chosen, use_cache=False):
                block = model.model.layers[layer]
                if kind == "head":
                    block.self_attn.o_proj.input[:, where, part] = source[:, where, part]
                elif kind == "attn":
                    block.self_attn.output[0][:, where] = source[:, where]
                else:
                    block.mlp.output[:, where] = source[:, where]
                patched = model.output.logits.save()
            effects.append(clean - float(patched))
        return effects


if __name__ == "__main__":
    serve(WithNNsight())
