"""How well estimated effects rank sites, against the exact sweep, and what they cost.

    python benchmarks/estimators.py [--pairs FILE] [--n 32] [--threads 1]

All components and all heads, noise, at all positions, over the first `n` pairs of equal token counts. For every
estimator: Spearman and Pearson with the exact effects over the sites of a pair, recall of the ten largest, median over
pairs with a bootstrap interval over pairs; time over that of one whole forward a site (a loop over 8 sites, scaled), in
one process. Writes benchmarks/estimators.md.
"""

import argparse
import platform
import time
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
    "gradient": {}, "relevance": {}, "integrated_joint, 5 steps": {"steps": 5}, "integrated, 2 steps": {"steps": 2},
    "integrated, 4 steps": {"steps": 4},
}  # fmt: skip


def equal_pairs(rm: rl.RewardModel, source: str, n: int) -> rl.Pairs:
    pairs = rl.load_pairs(source)
    same = [p for p, (a, b) in zip(pairs, rm.tokenize_pairs(pairs), strict=True) if len(a) == len(b) and a.ids != b.ids]
    return rl.Pairs(same[:n])


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
    parser.add_argument("--pairs", default="demo")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rm = rl.load("demo")
    pairs = equal_pairs(rm, args.pairs, args.n)
    layers = range(rm.n_layers)
    components = ["embed", *(f"L{layer}.{kind}" for layer in layers for kind in ("attn", "mlp"))]
    sites = [*components, *(f"L{layer}.H{head}" for layer in layers for head in range(rm.n_heads))]
    groups = {"all": slice(None), "components": slice(len(components)), "heads": slice(len(components), None)}
    found: dict = {name: {g: {"rho": [], "r": [], "recall": []} for g in groups} for name in ESTIMATORS}
    seconds: dict = {name: [] for name in ("exact", *ESTIMATORS)}
    for pair in pairs:
        naive = naive_seconds(rm, pair, len(sites))
        start = time.perf_counter()
        exact = rl.effects(rm, [pair], sites, at="all").value.values[0]
        seconds["exact"].append((time.perf_counter() - start) / naive)
        for name, options in ESTIMATORS.items():
            start = time.perf_counter()
            estimator = name.split(",")[0]
            guess = rl.effects(rm, [pair], sites, at="all", estimator=estimator, **options).value.values[0]
            seconds[name].append((time.perf_counter() - start) / naive)
            for group, part in groups.items():
                x, y = exact[part], guess[part]
                top = [set(np.argsort(-np.abs(v))[:10].tolist()) for v in (x, y)]
                row = found[name][group]
                row["rho"].append(float(spearmanr(x, y)[0]))
                row["r"].append(float(pearsonr(x, y)[0]))
                row["recall"].append(len(top[0] & top[1]) / 10)
        print(pair.id, {n: round(found[n]["all"]["rho"][-1], 3) for n in found}, flush=True)
    lines = [
        "# Estimated effects against exact ones", "",
        f"`benchmarks/estimators.py`: {len(components)} components and {len(sites) - len(components)} heads of the "
        f"demo model, noise, all positions, {len(pairs)} pairs of equal token counts of",
        f"`{args.pairs if args.pairs == 'demo' else Path(args.pairs).name}`, float32, {args.threads} CPU thread(s), "
        f"{platform.machine()}. Medians over pairs with 95% bootstrap intervals. Cost: median",
        "over pairs of the time over one whole forward a site (a loop over 8 sites, scaled). Exact effects by the "
        f"wavefront sweep cost {np.median(seconds['exact']):.3f} of it.", "",
        f"Aimed at: Spearman {AIM} over all sites at {SHARE} of the loop's cost.", "",
        "| estimator | Spearman, all sites | components | heads | Pearson, all | recall of the 10 largest | cost |",
        "| --- " * 7 + "|",
    ]  # fmt: skip
    for name, groups_ in found.items():
        rho = [median(groups_[g]["rho"]) for g in groups]
        rest = [median(groups_["all"]["r"]), median(groups_["all"]["recall"]), f"{np.median(seconds[name]):.3f}"]
        lines.append(f"| {name} | " + " | ".join([*rho, *rest]) + " |")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
