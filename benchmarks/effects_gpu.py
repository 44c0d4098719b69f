"""Effects on a large model on one GPU: ours beside the plain loop of one forward a site, on the same card.

    python benchmarks/effects_gpu.py [--layers 32] [--d-model 4096] [--heads 32] [--kv-heads 8] [--d-mlp 14336]
                                     [--lengths 200 500] [--rounds 3] [--sampled-heads 64] [--device cuda] [--out FILE]

A Llama of the shape of an 8B model with random weights in bfloat16; times do not depend on their values. Of every
length a pair whose responses part at a quarter of the text and one at 85%. The systems take turns; the ratio is that of
a round, median with range. Of the loop over heads only `--sampled-heads` are run, and its time scaled to all. "Work"
is the same ratio of operations, counted as both run: what the loop's time over ours would be if both kept the device
equally busy. "Share of the card" is our operations over our time, as a share of what a large bfloat16 product reaches
on the card in the same process. Writes benchmarks/effects_gpu.md, or FILE.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification

import reward_lens as rl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from plain import Plain  # noqa: E402

from families import tiny_tokenizer  # noqa: E402

PROMPT = "7"
SWEEPS = (("components", "all"), ("components", "final"), ("heads", "final"))


def random_model(options) -> rl.RewardModel:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        hidden_size=options.d_model, intermediate_size=options.d_mlp, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, vocab_size=options.vocabulary,
        max_position_embeddings=8192, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            module = LlamaForSequenceClassification(config)
    finally:
        torch.set_default_dtype(default)
    return rl.RewardModel(module, tokenizer, name=f"{options.layers} layers x {options.d_model}")


def pair_of(rm: rl.RewardModel, length: int, first: int) -> rl.Pair:
    """Responses of digits, a token each: `length` tokens in all, other digits from token `first` on."""
    around = len(rm.tokenize(PROMPT, "0")) - 1
    rng = np.random.default_rng([length, first])
    digits = rng.integers(0, 10, length - around)
    other = digits.copy()
    start = first - rm.tokenize(PROMPT, "0").response.start
    other[start:] = (other[start:] + 1 + rng.integers(0, 9, len(other) - start)) % 10
    chosen, rejected = ("".join(map(str, some)) for some in (digits, other))
    a, b = rm.tokenize(PROMPT, chosen), rm.tokenize(PROMPT, rejected)
    parts = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y)
    if (len(a), parts) != (length, first):
        raise SystemExit(f"the digits gave {len(a)} tokens parting at {parts}, not {length} at {first}")
    return rl.Pair(PROMPT, chosen, rejected)


class Loop(Plain):
    """The plain loop on a module that is already there."""

    def __init__(self, rm: rl.RewardModel):
        self.model, self.layers, self.heads = rm.module, rm.n_layers, rm.n_heads

    @torch.no_grad()
    def run(self, ids: list[tuple[int, ...]], sites: str, at: str, names: list[str], device) -> list[float]:
        with torch.device(device):
            return self.measure(self.prepare({"ids": ids}, sites, at), names)


def seconds(call, device: str) -> tuple[float, object]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def matrix_rate(device: str, n: int) -> float:
    """Operations a second of a square bfloat16 product."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    took = min(seconds(lambda: [a @ b for _ in range(5)], device)[0] for _ in range(3)) / 5
    return 2 * n**3 / took


def operations(call) -> int:
    """Of every product that `call` dispatches, counted as it runs: 2 for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 32, "d-model": 4096, "heads": 32, "kv-heads": 8, "d-mlp": 14336,
                          "vocabulary": 128256, "rounds": 3, "sampled-heads": 64, "product": 8192}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 500])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    rate = matrix_rate(options.device, options.product)
    rm = random_model(options)
    loop = Loop(rm)
    card = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    lines = [
        "# Effects on a large model", "",
        f"`python benchmarks/effects_gpu.py`: {rm.n_layers} layers, width {rm.d_model}, {rm.n_heads} heads, "
        f"{sum(p.numel() for p in rm.module.parameters()) / 1e9:.2f} billion parameters, random, bfloat16, on {card} "
        f"({rate / 1e12:.0f} TFLOP/s in a product of {options.product}).", "",
        "| sites | positions | tokens | first differing | ours, s | loop, s | loop / ours | work | ours / scoring | "
        "share of the card | largest gap, in effect scales |", "| --- " * 11 + "|",
    ]  # fmt: skip
    for length in options.lengths:
        for first in (length // 4, round(0.85 * length)):
            pair = pair_of(rm, length, first)
            ids = [rm.tokenize(pair.prompt, r).ids for r in pair.responses]
            both = torch.tensor(ids, device=options.device)
            for sites, at in SWEEPS:
                row = measured(rm, loop, pair, ids, both, sites, at, options)
                share = row["operations"] / row["ours"] / rate
                lines.append(
                    f"| {sites} | {at} | {length} | {first} | {row['ours']:.3f} | {row['loop']:.2f} | {row['ratio']} | "
                    f"{row['work']:.1f} | {row['scoring']:.1f} | {share:.1%} | {row['gap']:.1e} |"
                )
                print(lines[-1], flush=True)
                options.out.write_text("\n".join(lines) + "\n")


@torch.no_grad()
def measured(rm, loop: Loop, pair: rl.Pair, ids, both, sites: str, at: str, options) -> dict:
    wanted = None if sites == "components" else sites

    def ours():
        return rl.effects(rm, [pair], *([wanted] if wanted else []), mode="noise", at=at)

    names = [str(name) for name in ours().value.component.values if name != "embed"]
    some = names if sites == "components" else names[:: max(1, len(names) // options.sampled_heads)]
    work = operations(ours)
    before, one = (operations(lambda n=n: loop.run(ids, sites, at, some[:n], options.device)) for n in (0, 1))
    loop_work = before + len(names) * (one - before)
    times: dict[str, list[float]] = {"ours": [], "loop": [], "before": [], "scoring": []}
    for number in range(options.rounds):
        calls = {
            "ours": ours, "loop": lambda: loop.run(ids, sites, at, some, options.device),
            "before": lambda: loop.run(ids, sites, at, [], options.device),
            "scoring": lambda: rm.module(input_ids=both, use_cache=False).logits.sum().item(),
        }  # fmt: skip
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            took, found = seconds(calls[name], options.device)
            times[name].append(took)
            if name == "ours":
                mine = dict(zip(found.value.component.values.tolist(), found.value.values[0].tolist(), strict=True))
            elif name == "loop":
                theirs = dict(zip(some, found, strict=True))
    # Both states are taken once, however many sites are run.
    loops = [pre + (took - pre) * len(names) / len(some)
             for pre, took in zip(times["before"], times["loop"], strict=True)]  # fmt: skip
    ratios = [theirs_s / mine_s for mine_s, theirs_s in zip(times["ours"], loops, strict=True)]
    # In bfloat16 the loop's own difference of two rewards is rounding where the effect is small.
    gap = max(abs(mine[name] - theirs[name]) for name in some) / rm.effect_scale(*map(abs, theirs.values()))
    ours_s, scoring = statistics.median(times["ours"]), statistics.median(times["scoring"])
    spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    return {"ours": ours_s, "loop": statistics.median(loops), "ratio": spread, "operations": work,
            "work": loop_work / work, "scoring": ours_s / scoring, "gap": gap}  # fmt: skip


if __name__ == "__main__":
    main()
