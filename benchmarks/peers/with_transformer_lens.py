"""TransformerLens: its own `generic_activation_patch`, one forward pass for each row of the table of sites.

It has no reward head, so it gets the same network as a causal language model whose unembedding is one row, the reward
head's weight: the last position's only logit is the reward, and no time goes into a vocabulary.
"""

import pandas
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM
from worker import System, place, serve

ACTIVATION = {"attn": "attn_out", "mlp": "mlp_out", "head": "z"}


class WithTransformerLens(System):
    def load(self, folder):
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        config = classifier.config
        config.tie_word_embeddings = False
        with torch.device("meta"):
            causal = LlamaForCausalLM(config).eval()
        causal.model, causal.lm_head = classifier.model, classifier.score
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.model = TransformerBridge.boot_transformers(
            folder, hf_model=causal, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu", dtype=torch.float32
        )

    def prepare(self, pair, sites, at):
        chosen, rejected = (torch.tensor([ids]) for ids in pair["ids"])
        kinds = ("hook_z",) if sites == "heads" else ("hook_attn_out", "hook_mlp_out")
        _, taken = self.model.run_with_cache(rejected, names_filter=lambda name: name.endswith(kinds))
        return chosen, taken, float(self.reward(self.model(chosen))), at

    def measure(self, state, names):
        chosen, taken, clean, at = state
        where = slice(None) if at == "all" else slice(-1, None)

        def swap(now, index, source):
            part = (slice(None), where, *index[1:])
            now[part] = source[part]
            return now

        effects = {}
        for kind in ACTIVATION:
            rows = {name: place(name) for name in names if place(name)[1] == kind}
            if rows:
                index = pandas.DataFrame({"layer": [layer for layer, _, _ in rows.values()]})
                if kind == "head":
                    index["head"] = [head for _, _, head in rows.values()]
                rewards = patching.generic_activation_patch(
                    self.model, chosen, taken, self.reward, swap, ACTIVATION[kind], index_df=index
                )
                effects |= {name: clean - float(reward) for name, reward in zip(rows, rewards, strict=True)}
        return [effects[name] for name in names]

    @staticmethod
    def reward(logits):
        return logits[0, -1, 0]


if __name__ == "__main__":
    serve(WithTransformerLens())
