"""Plain Hugging Face: scoring the pair in one batch, and the obvious loop of one whole forward pass for each site."""

import torch
from transformers import AutoModelForSequenceClassification
from worker import System, place, serve


class Plain(System):
    def load(self, folder):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers, self.heads = self.model.config.num_hidden_layers, self.model.config.num_attention_heads

    def score(self, pair):
        """Both texts in one batch; they have the same length, so nothing is padded."""
        return self.model(input_ids=torch.tensor(pair["ids"]), use_cache=False).logits[:, 0].tolist()

    def reward(self, ids) -> float:
        return float(self.model(input_ids=ids, use_cache=False).logits[0, 0])

    def module(self, layer: int, kind: str) -> torch.nn.Module:
        block = self.model.model.layers[layer]
        return {"attn": block.self_attn, "mlp": block.mlp, "head": block.self_attn.o_proj}[kind]

    def prepare(self, pair, sites, at):
        chosen, rejected = (torch.tensor([ids]) for ids in pair["ids"])
        taken, handles = {}, []
        for layer in range(self.layers):
            for kind in ("head",) if sites == "heads" else ("attn", "mlp"):

                def keep(_module, args, output, key=(layer, kind)):
                    got = args[0] if key[1] == "head" else output[0] if isinstance(output, tuple) else output
                    taken[key] = got.clone()

                handles.append(self.module(layer, kind).register_forward_hook(keep))
        self.reward(rejected)
        for handle in handles:
            handle.remove()
        return chosen, taken, self.reward(chosen), slice(None) if at == "all" else slice(-1, None)

    def measure(self, state, names):
        chosen, taken, clean, where = state
        width = self.model.config.head_dim
        effects = []
        for name in names:
            layer, kind, head = place(name)
            source = taken[layer, kind]
            if kind == "head":

                def swap(_module, args, source=source, part=slice(head * width, (head + 1) * width)):
                    new = args[0].clone()
                    new[:, where, part] = source[:, where, part]
                    return (new, *args[1:])

                handle = self.module(layer, kind).register_forward_pre_hook(swap)
            else:

                def swap(_module, _args, output, source=source):
                    now = output[0] if isinstance(output, tuple) else output
                    new = now.clone()
                    new[:, where] = source[:, where]
                    return (new, *output[1:]) if isinstance(output, tuple) else new

                handle = self.module(layer, kind).register_forward_hook(swap)
            effects.append(clean - self.reward(chosen))
            handle.remove()
        return effects


if __name__ == "__main__":
    serve(Plain())
