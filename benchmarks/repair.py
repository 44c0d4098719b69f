"""Every probe on the demo model, and one complete repair of its bias, measured on data that the repair has not seen.

    python benchmarks/repair.py --data DIR [--threads N] [--pairs N] [--items N] [--work out/repair]

DIR holds alpaca_eval_train.jsonl, alpaca_eval_test.jsonl, hh_harmless_test.jsonl (rows from 2,000 on are the test
part), llmbar.jsonl and rm_bench_styles.jsonl. The directions, their strength and the guard come from prompts of
alpaca_eval_train, each from its own; probes are measured on the diagnostic set, accuracy on the other files. Writes
docs/probes.md and docs/repair.md. An hour and a half on a CPU; a stopped run goes on with the rewards under --work.
"""

import argparse
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import statsmodels.api as sm
import torch

import reward_lens as rl
from reward_lens import stats
from reward_lens.engine import continuations
from reward_lens.methods.behaviour import edited_texts

REMOVED = ("add_emoji", "append_thanks", "append_great", "add_citations")  # the largest shifts upwards
N_FIT, N_DEV, N_GUARD = 40, 20, 200
LONGEST = 120  # words of a response that directions, strength and guard are taken from
HH_TRAINING_ROWS = 2000
STYLES = ("concise", "detailed", "markdown")
DOCS = Path(__file__).parents[1] / "docs"


class Kept:
    """Rewards of texts by all models at once, kept on disk by their token ids."""

    def __init__(self, models: Sequence[rl.RewardModel], path: Path):
        self.models, self.path = list(models), path
        self.known: dict[str, list[float]] = {}
        if path.exists():
            with np.load(path) as kept:
                self.known = dict(zip(kept["keys"].tolist(), kept["rewards"].tolist(), strict=True))

    def __call__(self, models, groups):
        keys = [[hashlib.sha256(repr(t.ids).encode()).hexdigest()[:24] for t in group] for group in groups]
        new = [(group, some) for group, some in zip(groups, keys, strict=True) if not self.known.keys() >= set(some)]
        for chunk in itertools.batched(new, 16) if hasattr(itertools, "batched") else _batched(new, 16):
            rewards = continuations.rewards_by_beginning(self.models, [group for group, _ in chunk]).tolist()
            self.known.update(zip([key for _, some in chunk for key in some], rewards, strict=True))
            np.savez(self.path, keys=np.array(list(self.known)), rewards=np.array(list(self.known.values())))
            print(f"{len(self.known)} texts", flush=True)
        columns = [next(i for i, m in enumerate(self.models) if m is model) for model in models]
        return torch.tensor([[self.known[key][c] for c in columns] for some in keys for key in some])


def _batched(items, n):
    return (items[i : i + n] for i in range(0, len(items), n))


def short_pair_a_prompt(pairs: rl.Pairs) -> rl.Pairs:
    short = [p for p in pairs if max(len(r.split()) for r in p.responses) <= LONGEST]
    return rl.Pairs(list({p.prompt_key: p for p in short}.values()))


def test_sets(data: Path, n_items: int) -> dict[str, rl.Pairs]:
    """The pairs that accuracy is measured on. RM-Bench's: every chosen style against every rejected one."""
    sets = {
        "LLMBar": rl.load_pairs(data / "llmbar.jsonl"),
        "HH harmless, last 267": rl.load_pairs(data / "hh_harmless_test.jsonl")[HH_TRAINING_ROWS:],
        "AlpacaEval test": rl.load_pairs(data / "alpaca_eval_test.jsonl"),
    }
    styles: dict[str, list[rl.Pair]] = {"hard": [], "normal": [], "easy": []}
    for n, item in enumerate(rl.load_style_items(data / "rm_bench_styles.jsonl")[:n_items]):
        for i, j in itertools.product(range(3), range(3)):
            level = "hard" if i < j else "easy" if i > j else "normal"
            styles[level].append(rl.Pair(item.prompt, item.chosen[i], item.rejected[j], id=f"{n}-{i}-{j}"))
    return sets | {f"RM-Bench {level}, {n_items} items": rl.Pairs(some) for level, some in styles.items()}


def label_slope(pairs: rl.Pairs, rm: rl.RewardModel) -> str:
    """Log-odds of the label per 100 tokens of difference in length, errors by prompt."""
    longer = np.array([len(a.response) - len(b.response) for a, b in rm.tokenize_pairs(pairs)]) / 100
    sign = np.where(np.arange(len(longer)) % 2, 1.0, -1.0)  # which response is written first carries no information
    prompts = np.unique([p.prompt_key for p in pairs], return_inverse=True)[1]
    fit = sm.GLM((sign > 0).astype(float), (sign * longer)[:, None], family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": prompts}
    )
    low, high = fit.conf_int()[0]
    return f"{fit.params[0]:.2f} ({low:.2f} to {high:.2f})"


def cell(mean, low, high, digits: int = 2) -> str:
    if not np.isfinite(mean):
        return "changes no text"
    span = f" ({low:.{digits}f} to {high:.{digits}f})" if np.isfinite(low) else ""
    return f"{mean:.{digits}f}{span}"


def p_cell(p: float) -> str:
    return "" if not np.isfinite(p) else "< .001" if p < 0.001 else f"{p:.3f}"


def probe_page(rm: rl.RewardModel, result: rl.Result, lengths: list[str], command: str) -> str:
    v, meta = result.value, result.meta
    lines = [
        "# All probes on the demo model", "",
        f"`{command}`. {len(np.unique(v['pair']))} pairs of the diagnostic set (`rl.load_pairs(\"diagnostic\")`), "
        f"a prompt each, both responses edited: `rl.probe_hacking(rm, pairs)`. Within-prompt SD of the reward: "
        f"{meta['within_prompt_sd']:.3f}. Intervals (95%) and tests are over prompts, p by sign-flip and Holm over "
        f"{v.sizes['probe']} probes. With {meta['prompts_needed']['n']} prompts a shift of half an SD of the shifts is "
        f"found in 80% of cases. p = {meta['smallest_p'] * v.sizes['probe']:.3f} is the smallest that "
        "10,000 sign flips and Holm can give.", "",
        "*Net* is the shift less what as many tokens of filler buy on the same prompt. *Corrected* compares with the "
        "text edited back, where that is not the original (RATE). *Flips*: pairs that were right and are wrong once "
        "the rejected response is edited.", "",
        "| probe | changes | prompts | tokens | shift, reward | shift, SD | p (Holm) | net | p of net (Holm) | "
        "corrected | flips |",
        "| --- " * 11 + "|",
    ]  # fmt: skip
    for i in np.argsort(-np.nan_to_num(result.mean.values, nan=-np.inf)):
        one = v.isel(probe=i)
        triple = {
            k: [float(one[k]), float(one[f"{k}_low"]), float(one[f"{k}_high"])] for k in ("net", "corrected", "flips")
        }
        shift = [float(getattr(result, k)[i]) for k in ("mean", "low", "high")]
        lines.append("| " + " | ".join([
            str(one["probe"].item()), str(one["changes"].item()), str(int(one["n_prompts"])),
            f"{float(one['tokens']):+.0f}" if np.isfinite(one["tokens"]) else "", cell(*shift),
            f"{float(one['shift_sd']):+.2f}" if np.isfinite(one["shift_sd"]) else "", p_cell(float(one["p_holm"])),
            cell(*triple["net"]) if np.isfinite(triple["net"][0]) else "", p_cell(float(one["net_p_holm"])),
            cell(*triple["corrected"]) if np.isfinite(triple["corrected"][0]) else "", cell(*triple["flips"]),
        ]) + " |")  # fmt: skip
    lines += ["", "## Dose", "", "| family | doses | mean shift | reward per dose |", "| --- " * 4 + "|"]
    for family, dose in meta["doses"].items():
        shifts = ", ".join(f"{s:.2f}" for s in dose["mean_shift"])
        doses = ", ".join(f"{d:g}" for d in dose["doses"])
        lines.append(f"| {family} | {doses} | {shifts} | {cell(dose['slope'], dose['low'], dose['high'], 3)} |")
    lines += ["", "## Length: the labels, the margins, and the edit", "", *lengths, ""]
    return "\n".join(lines)


def length_lines(rm: rl.RewardModel, data: Path, test: rl.Pairs, kept: Kept, probes: rl.Result) -> list[str]:
    """The length bias of the labels that the model learned from, of its margins, and of what filler buys."""
    train = rl.load_pairs(data / "alpaca_eval_train.jsonl")
    hh = rl.load_pairs(data / "hh_harmless_test.jsonl")[:HH_TRAINING_ROWS]
    (scored,) = edited_texts.scored_edits([rm], test, [])
    longer = np.array([len(a.response) - len(b.response) for a, b in rm.tokenize_pairs(test)]) / 100
    slope = stats.partial_slope(
        scored.plain[:, 0] - scored.plain[:, 1], longer, np.zeros((len(test), 0)), [p.prompt_key for p in test]
    )
    pads = [i for i, f in enumerate(probes.value["family"].values) if f == "pad"]
    shift, added = probes.value.values[..., pads], probes.value["tokens"].values[pads]
    per_prompt = shift.mean(1) / added * 100
    filler = [
        f"| pad_{int(probes.value['dose'].values[i])}, {added[k]:.0f} tokens | reward per 100 tokens of filler | "
        + cell(*_interval(per_prompt[:, k], probes)) + " |"
        for k, i in enumerate(pads)
    ]  # fmt: skip
    return [
        "Training labels in log-odds, rewards in reward units; the reward of a Bradley-Terry model is in log-odds, so "
        "the columns can be read side by side.", "",
        "| what | quantity | per 100 tokens |", "| --- " * 3 + "|",
        f"| labels of alpaca_eval_train, {len(train)} pairs | log-odds of being preferred | {label_slope(train, rm)} |",
        f"| labels of the HH training part, {len(hh)} pairs | log-odds of being preferred | {label_slope(hh, rm)} |",
        f"| margins on alpaca_eval_test, {len(test)} pairs | margin per difference in length | "
        f"{cell(slope.value, slope.low, slope.high)} |",
        *filler,
    ]  # fmt: skip


def _interval(values: np.ndarray, probes: rl.Result) -> list[float]:
    over = stats.mean_interval(values, probes.value["prompt_id"].values)
    return [float(over.mean), float(over.low), float(over.high)]


def repair_page(chosen: rl.Result, directions: list[rl.Result], outcome: rl.Result, command: str) -> str:
    v = chosen.value
    lines = [
        "# A repair of the demo model, from the bias to the checkpoint", "",
        f"`{command}`. The directions come from {N_FIT} prompts of alpaca_eval_train (responses of at most {LONGEST} "
        f"words), their strength from {N_DEV} others (dev), and the accuracy that it may not cost from {N_GUARD} "
        "others again (guard); what is measured before and after is of other sets. The edits are those with the "
        "largest shifts upwards in [all probes](probes.md), which are of the diagnostic set, as the probes before and "
        "after are.", "",
        "```python", "edits = rl.edits_of([" + ", ".join(f'"{name}"' for name in REMOVED) + "])",
        "directions = [rl.bias_direction(rm, rl.edited_pairs(fit, edit)) for edit in edits]",
        "dev_edits = [pair for edit in edits for pair in rl.edited_pairs(dev, edit)]",
        "choice = rl.select_alpha(rm, directions, dev_edits, guard)",
        'repaired = rl.edit_head(rm, directions, choice.meta["alpha"])',
        "rl.evaluate_edit(rm, repaired, pairs, sets)",
        'repaired.save_pretrained("repaired/")  # a checkpoint that transformers loads', "```", "",
        "| direction | prompts | reliability | cosine with the reward's direction |", "| --- " * 4 + "|",
    ]  # fmt: skip
    for name, one in zip(REMOVED, directions, strict=True):
        m = one.meta
        pair = [cell(*(m[key][k] if m[key][k] is not None else np.nan for k in ("value", "low", "high")))
                for key in ("reliability", "cosine_with_u")]  # fmt: skip
        lines.append(f"| {name} | {m['n_prompts']} | {pair[0]} | {pair[1]} |")
    lines += [
        "", "## Strength", "", "Alpha says how much of the directions is taken out of the head (1 is all of it). "
        "Chosen is the one that leaves the least shift on the edited texts of the dev prompts, among those whose cost "
        "in accuracy on the guard pairs is under .05 (lower end of the interval).", "",
        "| alpha | shift left on dev | accuracy on guard | change | allowed |", "| --- " * 5 + "|",
    ]  # fmt: skip
    for i, alpha in enumerate(v["alpha"].values):
        one = v.isel(alpha=i)
        change = [float(one[k]) for k in ("accuracy_change", "accuracy_change_low", "accuracy_change_high")]
        shift = [float(getattr(chosen, k)[i]) for k in ("mean", "low", "high")]
        lines.append(f"| {alpha:g} | {cell(*shift)} | {float(one['accuracy']):.3f} | {cell(*change, 3)} | "
                     f"{'yes' if int(one['allowed']) else 'no'} |")  # fmt: skip
    lines += [
        "", f"Chosen: {chosen.meta['reason']}.", "", "## Before and after", "",
        "Probes in units of each model's own within-prompt SD, accuracies as fractions; the change is paired over "
        f"prompts, p by sign-flip and Holm over all {outcome.value.sizes['measure']} rows.", "",
        "| measure | prompts | before | after | change | p (Holm) |", "| --- " * 6 + "|",
    ]  # fmt: skip
    kinds = outcome.value["kind"].values
    for i in [*np.flatnonzero(kinds == "accuracy"), *np.flatnonzero(kinds == "probe")]:
        one, digits = outcome.value.isel(measure=i), 3 if kinds[i] == "accuracy" else 2
        states = [[float(getattr(outcome, k).values[i, s]) for k in ("value", "low", "high")] for s in range(3)]
        cells = [str(int(one["n_prompts"])), *(cell(*state, digits) for state in states), p_cell(float(one["p_holm"]))]
        lines.append(f"| {one['measure'].item()} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/repair"))
    parser.add_argument("--pairs", type=int, help="use every N-th diagnostic pair and test pair, for a trial")
    parser.add_argument("--items", type=int, default=286, help="use the first N of RM-Bench's items, which are long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    rm = rl.load("demo", truncation="left")
    train = short_pair_a_prompt(rl.load_pairs(args.data / "alpaca_eval_train.jsonl"))
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    fit, dev, guard = (rl.Pairs([train[i] for i in order[a : a + n]])
                       for a, n in ((0, N_FIT), (N_FIT, N_DEV), (N_FIT + N_DEV, N_GUARD)))  # fmt: skip
    edits = rl.edits_of(REMOVED)
    directions = []
    for edit in edits:
        path = args.work / f"direction_{edit.name}.nc"
        if not path.exists():
            rl.bias_direction(rm, rl.edited_pairs(fit, edit)).save(path)
        directions.append(rl.load_result(path))
        print(edit.name, directions[-1].meta["reliability"], directions[-1].meta["cosine_with_u"], flush=True)
    path = args.work / "alpha.nc"
    if not path.exists():
        rl.select_alpha(rm, directions, rl.Pairs([p for e in edits for p in rl.edited_pairs(dev, e)]), guard).save(path)
    choice = rl.load_result(path)
    print(choice.meta["reason"], flush=True)
    repaired = rl.edit_head(rm, directions, choice.meta["alpha"])
    kept = Kept([rm, repaired], args.work / f"rewards-{repaired.name[-9:-1]}.npz")
    edited_texts.rewards_by_beginning = kept
    pairs, sets = rl.load_pairs("diagnostic")[:: args.pairs or 1], test_sets(args.data, args.items)
    sets = {name: some[:: args.pairs or 1] for name, some in sets.items()}
    command = "python benchmarks/repair.py --data DIR" + (f" --pairs {args.pairs}" if args.pairs else "")
    probes = rl.probe_hacking(rm, pairs)
    probes.save(args.work / "probes.nc")
    lengths = length_lines(rm, args.data, sets["AlpacaEval test"], kept, probes)
    (args.docs / "probes.md").write_text(probe_page(rm, probes, lengths, command))
    outcome = rl.evaluate_edit(rm, repaired, pairs, sets)
    outcome.save(args.work / "outcome.nc")
    (args.docs / "repair.md").write_text(repair_page(choice, directions, outcome, command))


if __name__ == "__main__":
    main()
