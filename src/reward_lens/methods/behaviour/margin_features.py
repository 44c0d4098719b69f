"""What do existing margins go with: length, format, hedging? And which pairs does that explain away?

    margin_features   margin = a + b (f_chosen - f_rejected) / s + c (tokens_chosen - tokens_rejected): b, one feature
                      at a time, s the SD of the differences, errors clustered by prompt
    margin_debug      margin = explained + rest, explained = sum over features of b_j (f_chosen - f_rejected)_j, with b
                      fitted by least squares on other prompts (folds)

What these cannot show: that a feature causes the margin. Features go with content; a probe (`probe_hacking`) changes
one and keeps the other.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import xarray as xr

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.errors import DataError
from reward_lens.features import text_features
from reward_lens.methods.shared.paired import given_scores
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import pair_coords
from reward_lens.result import Result

LENGTH = "tokens"
PROMPTS_PER_FEATURE = 10
PARTS = ("margin", "explained", "rest")
FEW = f"the feature differs in fewer than {stats.FEWEST} prompts: no interval"


@checked_arguments
def margin_features(
    rm: RewardModel, pairs, features: Sequence[str] | None = None, scores: Result | None = None
) -> Result:
    """Change of the margin with each feature of the texts, the difference in tokens held fixed.

    `features`: names of `features.text_features`; by default all. `scores`: the Result of `rm.score_pairs(pairs)`,
    where there is one already.

    Returns value (feature,) in reward per SD of the feature's difference, low and high from errors clustered by prompt
    (none under 6 prompts in which the feature differs: a slope that hangs on fewer has no error to go by); NaN for
    features that never differ or that go exactly with length. Coordinates `p`,
    `p_holm`, `alone` (without tokens held fixed), `sd` (of the difference, the feature's unit), `n_differ` (pairs).
    "tokens" itself is there without a control.
    """
    pairs = data.as_pairs(pairs)
    margin, difference, names = _differences(rm, pairs, features, scores)
    prompts = np.array([p.prompt_key for p in pairs])
    tokens = difference[:, names.index(LENGTH)]
    none = np.zeros((len(pairs), 0))
    sd = difference.std(0, ddof=1) if len(pairs) > 1 else np.zeros(len(names))
    rows, alone = [], []
    for name, x, size in zip(names, difference.T, sd, strict=True):
        unit = x / size if size > 0 else x
        alone.append(stats.partial_slope(margin, unit, none, prompts))
        row = alone[-1] if name == LENGTH else stats.partial_slope(margin, unit, tokens[:, None], prompts)
        if len(set(prompts[x != 0])) < stats.FEWEST:
            row = dataclasses.replace(row, low=np.nan, high=np.nan, p=np.nan, reason=row.reason or FEW)
        rows.append(row)
    p = np.array([row.p for row in rows])
    coords = {
        "feature": np.array(names, dtype=object),
        "p": ("feature", p),
        "p_holm": ("feature", stats.adjust(p)),
        "alone": ("feature", np.array([row.value for row in alone])),
        "sd": ("feature", sd),
        "n_differ": ("feature", (difference != 0).sum(0)),
    }
    value, low, high = (
        xr.DataArray(np.array([getattr(row, key) for row in rows]), dims=("feature",), coords=coords)
        for key in ("value", "low", "high")
    )
    return Result(
        "margin_features", value, unit="reward per SD", low=low, high=high,
        undefined="; ".join(dict.fromkeys(row.reason for row in rows if row.reason)) or None,
        meta=rm.describe(
            "margin_features", pairs, title="What margins go with", interval={"level": 0.95, "unit": "prompt"},
            shows="How the margin goes with length, format and hedging, each with the difference in tokens held fixed.",
            cannot_show="That a feature causes the margin: features go with content. Probes change one and keep it.",
        ),
    )  # fmt: skip


@checked_arguments
def margin_debug(
    rm: RewardModel, pairs, features: Sequence[str] | None = None, scores: Result | None = None, folds: int = 5,
    seed: int = 0,
) -> Result:  # fmt: skip
    """Every pair's margin, split into what named features predict and the rest.

    The weights of a pair's features come from other prompts: prompts are dealt into `folds`, and each fold is predicted
    by a least squares fit on the others. `features`: by default those that differ in at least a tenth of the pairs, and
    length in tokens.

    Returns value (pair, part), part = margin, explained, rest (margin - explained), in reward. Coordinates: `flips` (1
    where margin and rest differ in sign: taking the features' part away turns the pair round), `against_label` (rank
    of pairs by rest, the most negative first: pairs that the model, without these features, speaks against most;
    labels to look at), `share` (|explained| / (|explained| + |rest|)). meta["r_squared"]: of held-out margins.
    `result.to_frame().to_parquet(path)` writes it. Raises `DataError` under 10 prompts a feature.

    Cannot show that a label is wrong, nor that what a feature predicts is the feature's doing.
    """
    pairs = data.as_pairs(pairs)
    margin, difference, names = _differences(rm, pairs, features, scores)
    if features is None:
        keep = (difference != 0).mean(0) >= 0.1
        difference, names = difference[:, keep], [n for n, k in zip(names, keep, strict=True) if k]
    prompts = np.array([p.prompt_key for p in pairs])
    units = np.array(list(dict.fromkeys(prompts)))
    needed = PROMPTS_PER_FEATURE * max(1, len(names))
    if len(units) < needed or not 2 <= folds <= len(units):
        raise DataError("There are too few prompts to fit what features explain",
                        found=f"{len(units)} prompts, {len(names)} features, folds={folds}",
                        expected=f"at least {needed} prompts ({PROMPTS_PER_FEATURE} a feature) and 2 folds or more",
                        do="pass more pairs or name fewer features")  # fmt: skip
    dealt = dict(zip(np.random.default_rng(seed).permutation(units), np.arange(len(units)) % folds, strict=True))
    fold = np.array([dealt[key] for key in prompts])
    explained = np.zeros(len(pairs))
    for one in range(folds):
        train = fold != one
        design = np.column_stack([np.ones(train.sum()), difference[train]])
        weights = np.linalg.lstsq(design, margin[train], rcond=None)[0]
        explained[~train] = difference[~train] @ weights[1:]
    rest = margin - explained
    size = np.abs(explained) + np.abs(rest)
    coords = {
        **pair_coords(pairs),
        "part": np.array(PARTS, dtype=object),
        "flips": ("pair", (np.sign(margin) != np.sign(rest)).astype(int)),
        "against_label": ("pair", np.argsort(np.argsort(rest, kind="stable"), kind="stable")),
        "share": ("pair", np.where(size > 0, np.abs(explained) / np.where(size > 0, size, 1), 0.0)),
    }
    spread = float(((margin - margin.mean()) ** 2).sum())
    missed = float(((rest - rest.mean()) ** 2).sum())
    value = xr.DataArray(np.column_stack([margin, explained, rest]), dims=("pair", "part"), coords=coords)
    return Result(
        "margin_debug", value, unit="reward",
        meta=rm.describe(
            "margin_debug", pairs, title="Margins and what named features explain of them", seed=seed,
            settings={"features": names, "folds": folds}, r_squared=1 - missed / spread if spread > 0 else None,
            n_flips=int(coords["flips"][1].sum()),
            shows="Which margins are mostly what length, format and hedging predict, and which pairs turn round "
            "without it.",
            cannot_show="That a label is wrong, or that the features cause what they predict.",
        ),
    )  # fmt: skip


def _differences(
    rm: RewardModel, pairs: data.Pairs, features: Sequence[str] | None, scores: Result | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Margins [pair], feature differences [pair, feature] with tokens first, and the features' names."""
    scores = given_scores(rm, pairs, scores, rm.score_pairs, "score_pairs")
    margin = scores.value.sel(side="margin").values
    tokens = scores.value["chosen_tokens"].values - scores.value["rejected_tokens"].values
    of_text = [[text_features(p.messages[-1]["content"], r) for r in p.responses] for p in pairs]
    known = list(of_text[0][0])
    unknown = [n for n in features or () if n not in known and n != LENGTH]
    if unknown:
        raise DataError("A feature is not known", found=", ".join(unknown), expected=", ".join([LENGTH, *known]),
                        do="name features of this list")  # fmt: skip
    names = [n for n in known if features is None or n in features]
    columns = [[chosen[n] - rejected[n] for chosen, rejected in of_text] for n in names]
    return margin, np.column_stack([tokens.astype(float), *columns]), [LENGTH, *names]
