"""Cost of looking: lens and component contributions against plain batched Hugging Face scoring of the same batches.

    python benchmarks/spine.py [--pairs FILE] [--n 64] [--rounds 7] [--threads N]

Time: both sides run in one process in turn, the order switching every round; the table gives the median over rounds of
the paired ratio, and its range. Memory: each side alone in a fresh process, largest resident size. Writes
benchmarks/spine.md.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import reward_lens as rl

TIME_LIMIT, MEMORY_LIMIT = 1.10, 1.15


def first_pairs(source: str, n: int) -> rl.Pairs:
    """The first `n` pairs; a shorter set is gone through again (timing does not depend on the texts being new)."""
    pairs = list(rl.load_pairs(source))
    again = [pairs[i % len(pairs)] for i in range(n)]
    return rl.Pairs([rl.Pair(p.prompt, p.chosen, p.rejected, id=str(i)) for i, p in enumerate(again)])


@torch.no_grad()
def plain(rm: rl.RewardModel, pairs: rl.Pairs) -> list[float]:
    """Hugging Face's own forward on the batches that the library makes."""
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    rewards = [0.0] * len(tokens)
    for batch in rm.batches(tokens):
        logits = rm.module(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        for row, value in zip(batch.rows, logits[:, rm.row].tolist(), strict=True):
            rewards[row] = value
    return rewards


def ours(rm: rl.RewardModel, pairs: rl.Pairs) -> tuple[rl.Result, rl.Result]:
    """Lens and contributions from one pass."""
    acts = rl.capture(rm, pairs)
    return rl.reward_lens(rm, acts), rl.contributions(rm, acts)


SIDES = {"plain": plain, "ours": ours}


def peak(side: str, args) -> float:
    """Largest resident memory of one side in a fresh process, in MB."""
    command = [sys.executable, __file__, "--measure", side, "--pairs", args.pairs, "--n", str(args.n)]
    done = subprocess.run([*command, "--threads", str(args.threads)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def measure(rm, pairs, rounds: int) -> list[dict[str, float]]:
    """Seconds of each side, in turn; the first round warms up and is dropped."""
    out = []
    for i in range(rounds + 1):
        seconds = {}
        for side in ("plain", "ours") if i % 2 else ("ours", "plain"):
            start = time.perf_counter()
            SIDES[side](rm, pairs)
            seconds[side] = time.perf_counter() - start
        out.append(seconds)
        print(f"round {i}: plain {seconds['plain']:.2f} s, ours {seconds['ours']:.2f} s", flush=True)
    return out[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="demo")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rm, pairs = rl.load("demo"), first_pairs(args.pairs, args.n)
    if args.measure:
        SIDES[args.measure](rm, pairs)
        print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    rounds = measure(rm, pairs, args.rounds)
    ratios = sorted(r["ours"] / r["plain"] for r in rounds)
    memory = {side: peak(side, args) for side in SIDES}
    lens, parts = ours(rm, pairs)
    tokens = sum(len(t) for both in rm.tokenize_pairs(pairs) for t in both)
    table = f"""# Cost of the spine

`make bench`: reward lens and component contributions over {args.n} pairs ({2 * args.n} texts, {tokens} tokens) of
`{args.pairs if args.pairs == "demo" else Path(args.pairs).name}`, against plain Hugging Face scoring in the same
batches. Demo model, float32, {args.threads} CPU thread(s), {platform.machine()}, torch {torch.__version__},
{len(rounds)} paired rounds in one process.

| | plain scoring | lens + contributions | ratio | limit |
| --- | --- | --- | --- | --- |
| time, median of paired rounds | {statistics.median(r["plain"] for r in rounds):.2f} s | \
{statistics.median(r["ours"] for r in rounds):.2f} s | {statistics.median(ratios):.3f} \
({ratios[0]:.3f} to {ratios[-1]:.3f}) | {TIME_LIMIT} |
| peak resident memory, own process | {memory["plain"]:.0f} MB | {memory["ours"]:.0f} MB | \
{memory["ours"] / memory["plain"]:.3f} | {MEMORY_LIMIT} |

Checks of the measured results: {"; ".join(str(c) for c in (*lens.checks, *parts.checks))}.
"""
    Path(__file__).with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
