"""Measure the demo model with the library's own functions and write the figures into its card.

    python training/measure_demo.py --data DIR [--items N] [--threads N] [--dtype float32]

DIR holds alpaca_eval_test.jsonl, hh_harmless_test.jsonl (rows from 2,000 on are the test part), llmbar.jsonl and
rm_bench_styles.jsonl. None of these pairs was trained on. Scores are kept beside --out, so that a stopped run goes on.
"""

import argparse
from pathlib import Path

import torch

import reward_lens as rl

HH_TRAINING_ROWS = 2000
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def scored(rm: rl.RewardModel, name: str, pairs: rl.Pairs, out: Path) -> rl.Result:
    """Scores of the pairs, read back if an earlier run of the same model kept them."""
    path = out / f"{name}.nc"
    if path.exists():
        kept = rl.load_result(path)
        if kept.meta["revision"] == rm.revision and kept.meta["dtype"] == rm.surroundings()["dtype"]:
            return kept
    result = rm.score_pairs(pairs)
    result.save(path)
    return result


def accuracy_rows(name: str, rm: rl.RewardModel, pairs: rl.Pairs, scores: rl.Result) -> list[str]:
    """One line of the table a length class, with the two length rules beside the model."""
    result = rl.accuracy(rm, pairs, scores=scores)
    rows = []
    for subset in ("all", "balanced", "chosen longer", "chosen shorter"):
        cell = result.sel(subset=subset)
        cells = [_interval(cell.sel(rule=rule)) for rule in ("reward model", "longer wins", "shorter wins")]
        counts = f"{int(cell.value.n_pairs)} / {int(cell.value.n_prompts)}"
        rows.append(f"| {name} | {subset} | {counts} | " + " | ".join(cells) + " |")
    return rows


def partial_row(name: str, rm: rl.RewardModel, pairs: rl.Pairs, scores: rl.Result) -> str:
    """Weights of margin and length in one logistic regression on the labels."""
    result = rl.length_partial(rm, pairs, scores=scores)
    cells = [_interval(result.sel(term=term)) for term in ("margin_per_sd", "length_per_sd")]
    return f"| {name} | {len(pairs)} | " + " | ".join(cells) + " |"


def style_rows(rm: rl.RewardModel, items: list[rl.StyleItem]) -> list[str]:
    matrix = rl.style_matrix(rm, items)
    styles = [str(s) for s in matrix.value["chosen_style"].values]
    rows = [f"| chosen \\ rejected | {' | '.join(styles)} |", "| --- " * (len(styles) + 1) + "|"]
    for chosen in styles:
        cells = [f"{float(matrix.summary().sel(chosen_style=chosen, rejected_style=r)):.3f}" for r in styles]
        rows.append(f"| {chosen} | {' | '.join(cells)} |")
    summary = rl.style_summary(matrix)
    named = [f"{d} {_interval(summary.sel(difficulty=d))}" for d in summary.value["difficulty"].values]
    return [*rows, "", f"{len(items)} items; " + "; ".join(named) + "."]


def _interval(result: rl.Result) -> str:
    value, low, high = (float(x) for x in (result.summary(), result.low, result.high))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/measure_demo"))
    parser.add_argument("--card", type=Path, default=Path("src/reward_lens/assets/demo/MODEL_CARD.md"))
    parser.add_argument("--items", type=int, help="use the first N style items")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rm = rl.load("demo", dtype=getattr(torch, args.dtype), truncation="left")
    sets = {
        "AlpacaEval test": rl.load_pairs(args.data / "alpaca_eval_test.jsonl"),
        "HH harmless, last 267": rl.load_pairs(args.data / "hh_harmless_test.jsonl")[HH_TRAINING_ROWS:],
        "LLMBar": rl.load_pairs(args.data / "llmbar.jsonl"),
    }
    lines = [
        f"Measured by `training/measure_demo.py` with the library's own `accuracy`, {args.dtype}; 95% intervals over "
        "prompts. \"Longer wins\" and \"shorter wins\" count response tokens; \"balanced\" is the mean over the pairs "
        "whose chosen response is the longer and those whose chosen is the shorter.", "",
        "| set | pairs | n pairs / prompts | reward model | longer wins | shorter wins |", "| --- " * 6 + "|",
    ]  # fmt: skip
    partial = ["", "Log-odds of the label per SD, margin and length in one regression (errors by prompt):", "",
               "| set | n | margin, length held fixed | length, margin held fixed |", "| --- " * 4 + "|"]  # fmt: skip
    for name, pairs in sets.items():
        scores = scored(rm, name.split(",")[0].replace(" ", "_"), pairs, args.out)
        lines += accuracy_rows(name, rm, pairs, scores)
        partial.append(partial_row(name, rm, pairs, scores))
        print("\n".join(lines[-4:]), flush=True)
    items = rl.load_style_items(args.data / "rm_bench_styles.jsonl")[: args.items]
    style = ["", "RM-Bench style matrix (share of items whose chosen response beats the rejected one):", ""]
    text = "\n".join([*lines, *partial, *style, *style_rows(rm, items)])
    print(text)
    card = args.card.read_text()
    before, after = card.split(START)[0], card.split(END)[1]
    args.card.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
