"""Cost of attribution by cutting and removing: rows that go on from the text's own keys, against whole texts.

    python benchmarks/removals.py [--pairs FILE] [--n 4] [--rounds 3] [--threads N]

Both run in one process in turn, the order switching every round, in the same batches of `rl.token_attribution`; the
table gives the median over rounds of the paired ratio and its range, and the largest difference of a value. Writes
benchmarks/removals.md.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import reward_lens as rl

ASKED = {
    "truncate, by token": {"method": "truncate"},
    "leave_one_out, by word, deleted": {"method": "leave_one_out", "by": "word"},
    "leave_one_out, by word, masked": {"method": "leave_one_out", "by": "word", "removal": "mask"},
}


def whole_texts():
    """What a model runs that reuses no prefix: every variant from its first token on."""
    return mock.patch.object(rl.RewardModel, "reuses_prefix", lambda self, *texts: False)


def timed(rm: rl.RewardModel, pairs: rl.Pairs, settings: dict, whole: bool) -> tuple[float, rl.Result]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    if whole:
        with whole_texts():
            result = rl.token_attribution(rm, pairs, **settings)
    else:
        result = rl.token_attribution(rm, pairs, **settings)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="demo")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rm, pairs = rl.load("demo"), rl.load_pairs(args.pairs)[: args.n]
    lengths = [len(t) for both in rm.tokenize_pairs(pairs) for t in both]
    rows = []
    for name, settings in ASKED.items():
        ratios, ours, gap, n_rows = [], [], 0.0, 0
        for i in range(args.rounds):
            seconds = {}
            results = {}
            for whole in (False, True) if i % 2 else (True, False):
                seconds[whole], results[whole] = timed(rm, pairs, settings, whole)
            gap = max(gap, float(np.nanmax(np.abs(results[True].value - results[False].value))))
            ratios.append(seconds[True] / seconds[False])
            ours.append(seconds[False])
            n_rows = results[True].meta["forward_rows"]
            print(name, f"round {i}: whole texts {seconds[True]:.1f} s, ours {seconds[False]:.1f} s", flush=True)
        rows.append(
            f"| {name} | {n_rows} | {statistics.median(ours):.1f} s | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {gap:.1e} |"
        )
    source = args.pairs if args.pairs == "demo" else Path(args.pairs).name
    table = f"""# Cost of attribution by cutting and removing

`benchmarks/removals.py`: {len(pairs)} pairs of `{source}`, texts of {min(lengths)} to {max(lengths)} tokens (median
{statistics.median(lengths):g}). Demo model, float32, {args.threads} CPU thread(s), {platform.machine()},
torch {torch.__version__}, {args.rounds} paired rounds in one process. Ratio: time of whole texts over ours, median
and range.

| method | rows | ours | ratio | largest difference of a value |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
    Path(__file__).with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
