"""How well estimated effects rank sites, against the exact sweep, and what they cost.

    python benchmarks/estimators.py [--pairs demo FILE ...] [--n 32] [--threads 1]

All components and all heads, noise, at all positions, over `n` pairs of equal token counts, taken from the sources in
turn. For every estimator: Spearman of its values, and of their sizes, with the exact effects over the sites of a pair;
Pearson; recall of the ten largest; median over pairs with a bootstrap interval over pairs; time over that of one whole
forward a site (a loop over 8 sites, scaled), in one process. Writes benchmarks/estimators.md.
"""

import argparse
import itertools
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap, pearsonr, spearmanr

import reward_lens as rl
from reward_lens.engine.editing import Edit
from reward_lens.engine.intervention import zeros
from reward_lens.engine.patching import patch_rows

AIM, SHARE = 0.95, 0.1
ESTIMATORS = {
    "gradient": {}, "gradient with grad_drop": {"grad_drop": True}, "relevance": {},
    "integrated_joint, 5 steps": {"steps": 5}, "integrated_block, 1 step": {"steps": 1},
    "integrated_block, 2 steps": {"steps": 2}, "integrated, 1 step": {"steps": 1}, "integrated, 2 steps": {"steps": 2},
}  # fmt: skip
SLOW = {"integrated, 2 steps": 6}
"""Pairs on which an estimator that costs more than the exact sweep is run."""
LONGEST = 130  # tokens of a text


def equal_pairs(rm: rl.RewardModel, sources: list[str], n: int) -> tuple[rl.Pairs, str]:
    """Pairs of equal token counts, from the sources in turn, and how many came from which."""

    def of(source: str):
        pairs = rl.load_pairs(source)
        for pair, (a, b) in zip(pairs, rm.tokenize_pairs(pairs), strict=True):
            if len(a) == len(b) <= LONGEST and a.ids != b.ids:
                yield Path(source).name, pair

    rounds = itertools.zip_longest(*map(of, sources))
    some = list(itertools.islice((one for turn in rounds for one in turn if one is not None), n))
    counts = Counter(name for name, _ in some)
    return rl.Pairs([pair for _, pair in some]), ", ".join(f"{count} of {name}" for name, count in counts.items())


def naive_seconds(rm: rl.RewardModel, pair: rl.Pair, n_sites: int) -> float:
    """One whole forward a site; what is put there does not matter to the time."""
    tokens = rm.tokenize(pair.prompt, pair.chosen)
    start = time.perf_counter()
    for layer in np.linspace(0, rm.n_layers - 1, 8).astype(int):
        patch_rows(rm, tokens, [(Edit(rl.Site("attn", int(layer)), range(len(tokens)), zeros()),)], reuse=False)
    whole = time.perf_counter() - start
    return whole / 16 * n_sites  # each call runs the text twice: recorded once, then the changed row


def median(values: list[float]) -> str:
    values_ = np.array(values)
    if len(values_) < 6:
        return f"{np.median(values_):.3f}"
    found = bootstrap((values_,), np.median, rng=np.random.default_rng(0), method="percentile").confidence_interval
    return f"{np.median(values_):.3f} ({found.low:.3f} to {found.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=["demo"])
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rm = rl.load("demo")
    pairs, counts = equal_pairs(rm, args.pairs, args.n)
    layers = range(rm.n_layers)
    components = ["embed", *(f"L{layer}.{kind}" for layer in layers for kind in ("attn", "mlp"))]
    sites = [*components, *(f"L{layer}.H{head}" for layer in layers for head in range(rm.n_heads))]
    groups = {"all": slice(None), "components": slice(len(components)), "heads": slice(len(components), None)}
    kinds = ("rho", "size", "r", "recall")
    found: dict = {name: {g: {k: [] for k in kinds} for g in groups} for name in ESTIMATORS}
    seconds: dict = {name: [] for name in ("exact", *ESTIMATORS)}
    for i, pair in enumerate(pairs):
        naive = naive_seconds(rm, pair, len(sites))
        start = time.perf_counter()
        exact = rl.effects(rm, [pair], sites, at="all").value.values[0]
        seconds["exact"].append((time.perf_counter() - start) / naive)
        for name, options in ESTIMATORS.items():
            if i >= SLOW.get(name, len(pairs)):
                continue
            start = time.perf_counter()
            estimator = name.split(",")[0].split(" ")[0]
            guess = rl.effects(rm, [pair], sites, at="all", estimator=estimator, **options).value
            seconds[name].append((time.perf_counter() - start) / naive)
            # GradDrop gives sizes only.
            value = guess["grad_drop"].values[0] if "grad_drop" in options else guess.values[0]
            for group, part in groups.items():
                compare(found[name][group], exact[part], value[part])
        print(pair.id, {n: round(f["all"]["size"][-1], 3) for n, f in found.items()}, flush=True)
    Path(__file__).with_suffix(".md").write_text(page(rm, args, counts, found, seconds, len(components), len(sites)))


def compare(row: dict[str, list[float]], x: np.ndarray, y: np.ndarray) -> None:
    """Append what one pair's exact effects and estimates have in common."""
    top = [set(np.argsort(-np.abs(v))[:10].tolist()) for v in (x, y)]
    row["rho"].append(float(spearmanr(x, y)[0]))
    row["size"].append(float(spearmanr(np.abs(x), np.abs(y))[0]))
    row["r"].append(float(pearsonr(x, y)[0]))
    row["recall"].append(len(top[0] & top[1]) / 10)


def page(rm: rl.RewardModel, args, counts: str, found: dict, seconds: dict, n_components: int, n_sites: int) -> str:
    lines = [
        "# Estimated effects against exact ones", "",
        f"`benchmarks/estimators.py`: {n_components} components and {n_sites - n_components} heads of the demo model, "
        f"noise, all positions, pairs of equal token counts ({counts}),",
        f"float32, {args.threads} CPU thread(s), {platform.machine()}. Medians over pairs with 95% bootstrap intervals "
        "over pairs. Cost: median over pairs of the time over one whole forward",
        f"a site (a loop over 8 sites, scaled). Exact effects by the wavefront sweep cost "
        f"{np.median(seconds['exact']):.3f} of it. GradDrop gives sizes without a sign.", "",
        f"Aimed at: Spearman {AIM} over all sites at {SHARE} of the loop's cost.", "",
        "| estimator | pairs | Spearman, all sites | components | heads | of sizes, all | Pearson, all | recall of the "
        "10 largest | cost |",
        "| --- " * 9 + "|",
    ]  # fmt: skip
    for name, groups in found.items():
        signed = "grad_drop" not in ESTIMATORS[name]
        cells = [median(groups[g]["rho"]) if signed else "" for g in groups]
        cells += [median(groups["all"]["size"]), median(groups["all"]["r"]) if signed else "",
                  median(groups["all"]["recall"]), f"{np.median(seconds[name]):.3f}"]  # fmt: skip
        lines.append(f"| {name} | {len(seconds[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
