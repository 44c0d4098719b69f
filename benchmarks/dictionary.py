"""A dictionary of the demo model: trained, measured, its latents ranked by what they do to the reward, and their page.

    python benchmarks/dictionary.py --data DIR [--site L20.resid_post] [--d-sae 4608] [--k 32] [--passes 4]
                                    [--device cpu] [--work out/dictionary] [--threads N]

DIR holds alpaca_eval_train.jsonl and hh_harmless_test.jsonl (its first 2,000 rows), on whose responses the dictionary
is trained; what is measured is measured on the bundled diagnostic set. Minutes on a GPU, hours on a CPU; activations,
dictionaries and results are kept under --work. Writes docs/demo_dictionary.md, and latents.html under --work.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import reward_lens as rl

PAGE = Path(__file__).parents[1] / "docs" / "demo_dictionary.md"
HH_TRAINING_ROWS = 2000
EDITS = ("add_emoji", "append_thanks", "pad_2")
AROUND = 4


def texts(data: Path) -> rl.Pairs:
    both = [*rl.load_pairs(data / "alpaca_eval_train.jsonl")]
    both += rl.load_pairs(data / "hh_harmless_test.jsonl")[:HH_TRAINING_ROWS]
    return rl.Pairs([both[i] for i in np.random.default_rng(0).permutation(len(both))])


def trained(options, rm: rl.RewardModel, seed: int) -> rl.SAE:
    folder = options.work / f"{options.site}-{seed}"
    if not folder.exists():
        store = rl.store_activations(rm, texts(options.data), options.site, folder=options.work / "activations")
        rl.train_sae(
            store.tensor().to(options.device), options.d_sae, options.k, seed=seed, n_train=options.passes * len(store),
            batch_size=2048, device=options.device, site=options.site, checkpoint=options.work / f"training-{seed}",
            meta={"model": "demo", "store": dict(store.meta)},
        ).save(folder)  # fmt: skip
    return rl.SAE.load(folder).to(options.device)


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if np.isfinite(low) else "")


def measures(report: rl.Result) -> list[str]:
    lines = ["| measure | at the reward position | over the response |", "| --- " * 3 + "|"]
    for name in report.value["measure"].values:
        cells = [interval(*(float(part.sel(measure=name, at=at)) for part in (report.value, report.low, report.high)))
                 for at in ("final", "response")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for stable in report.meta["stability"]:
        lines += ["", f"Of the {stable['n']} latents that margins rest on, another seed has a match (cosine over .7) "
                      f"for {interval(stable['matched'], stable['low'], stable['high'], 2)}."]  # fmt: skip
    return lines


def words(contexts: rl.Result, latent: int) -> str:
    """The largest contexts, the token of the peak in bold."""
    shown = []
    one = contexts.value.isel(latent=list(contexts.value["index"].values).index(latent))
    for context in range(min(3, one.sizes["context"])):
        pieces = one["piece"].isel(context=context)
        some = []
        for offset in range(-AROUND, AROUND + 1):
            raw = str(pieces.sel(offset=offset).item())
            piece = " ".join(raw.split()).replace("|", "\\|").replace("*", "\\*")
            blank = "(newline)" if "\n" in raw else "(space)"
            some.append(f"**{piece or blank}**" if offset == 0 else piece)
        if any(some):
            shown.append(" ".join(filter(None, some)).replace("<", "&lt;"))
    return " / ".join(shown)


def ranked(effects: rl.Result, contexts: rl.Result, n: int = 10) -> list[str]:
    lines = ["| latent | margin that goes with it | p (Holm) | active in chosen | in rejected | largest at |",
             "| --- " * 6 + "|"]  # fmt: skip
    v = effects.value.sel(side="margin")
    mean, low, high = (getattr(effects, part).sel(side="margin").values for part in ("mean", "low", "high"))
    for i in np.argsort(-np.abs(mean))[:n]:
        one = v.isel(latent=int(i))
        p = float(one["p_adjusted"])
        lines.append(
            f"| {one['latent'].item()} | {interval(mean[i], low[i], high[i])} | "
            f"{'< .001' if p < 1e-3 else f'{p:.3f}'} | "
            f"{float(one['frequency_chosen']):.0%} | {float(one['frequency_rejected']):.0%} | "
            f"{words(contexts, int(one['index']))} |"
        )
    return lines


def carried(name: str, result: rl.Result, contexts: rl.Result) -> list[str]:
    shift, share = result.meta["shift"], result.meta["together_share"]
    lines = [f"### {name}", "", f"Shift {interval(shift['mean'], shift['low'], shift['high'])} reward; the "
             f"{result.value.sizes['latent']} latents that were tested carry "
             f"{interval(share['value'], share['low'], share['high'], 2)} of it together.", "",
             "| latent | share of the shift | p (Holm) | largest at |", "| --- " * 4 + "|"]  # fmt: skip
    v = result.value
    for i in np.argsort(-np.abs(v["share"].values))[:5]:
        one = v.isel(latent=int(i))
        ends = [float(one[key]) for key in ("share", "share_low", "share_high")]
        lines.append(f"| {one['latent'].item()} | {interval(*ends, 2)} | {float(one['p_adjusted']):.3f} | "
                     f"{words(contexts, int(one['index']))} |")  # fmt: skip
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/dictionary"))
    parser.add_argument("--site", default="L20.resid_post")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--every", type=int, default=4, help="use every N-th diagnostic pair")
    parser.add_argument("--seeds", type=int, default=2, help="the first is looked at, the others say how stable it is")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--docs", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    rm = rl.load("demo", device=options.device, truncation="left")
    sae, *others = [trained(options, rm, seed) for seed in range(options.seeds)]
    pairs = rl.load_pairs("diagnostic")[:: options.every]

    def kept(name: str, run: Callable[[], rl.Result]) -> rl.Result:
        path = options.work / f"{name}.nc"
        if not path.exists():
            print(name, flush=True)
            run().save(path)
        return rl.load_result(path)

    report = kept("sae_report", lambda: rl.sae_report(rm, sae, pairs, others))
    split = kept("latent_contributions", lambda: rl.latent_contributions(rm, sae, pairs, top=200))
    effects = kept("reward_latents", lambda: rl.reward_latents(rm, sae, pairs, top=20))
    edits = {edit.name: edit for edit in rl.edits_of(EDITS)}
    probes = {name: kept(f"probe_{name}", lambda edit=edit: rl.probe_latents(rm, sae, rl.edited_pairs(pairs, edit)))
              for name, edit in edits.items()}  # fmt: skip
    tested = [effects, *probes.values()]
    wanted = {int(j) for r in [split, *tested] for j in r.value["index"].values if j >= 0}
    contexts = kept("latent_contexts", lambda: rl.latent_contexts(rm, sae, pairs, sorted(wanted), top=8, around=8))
    neighbours = kept("latent_neighbours", lambda: rl.latent_neighbours(rm, sae, sorted(wanted)))
    rl.write_explorer([split, effects, contexts, neighbours, report], options.work / "latents.html")
    error = np.abs(split.value.sel(side="margin", latent="error").values)
    rest = np.abs(split.value.sel(side="margin", latent="rest").values)
    meta = sae.meta
    lines = [
        "# A dictionary of the demo model", "",
        f"`python benchmarks/dictionary.py --data DIR --seeds {options.seeds} --every {options.every}`: "
        f"{sae.d_sae:,} latents, k = {options.k}, at {sae.site}, trained on {meta['n_samples']:,} response tokens, "
        f"{meta['passes']:g} passes; measured on {len(pairs)} pairs of the diagnostic set, {pairs.n_prompts} prompts. "
        "Intervals are over prompts.", "",
        *measures(report), "",
        "fvu is the share of the activations' variance that the dictionary misses, l0 the number of active latents at "
        "a position, dead the share of latents that are active nowhere in these texts, error_norm the size of the "
        "error over that of the activation. The other rows put the reconstruction in the activation's place: "
        "how much of the reward comes back (1 is all, 0 what the mean activation gives), how often the margin keeps "
        "its sign, and the accuracy with it (spliced).", "",
        f"In the split of the margins over latents ({split.meta['settings']['estimator']}) the error term is "
        f"{np.mean(error):.3f} on average in absolute size, what the split leaves to the row rest {np.mean(rest):.3f}.",
        "",
        "The reward position is one of many in the texts that this dictionary was trained on, and its states are "
        "unlike the others: what is missing there (fvu) limits every row below. "
        '`store_activations(positions="reward")` gives a dictionary of that position alone.', "",
        "## Latents by their effect on margins", "",
        f"Chosen by first order on one half of the prompts, set to 0 on the other ({len(effects.value['pair'])} pairs)."
        " In bold the token of the largest activation.", "", *ranked(effects, contexts), "",
        "## Latents that carry an edit", "",
        "The latents of the edited response set to what they are without the edit.", "",
    ]  # fmt: skip
    for name, result in probes.items():
        lines += carried(name, result, contexts)
    options.docs.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
