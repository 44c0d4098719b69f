"""Small results of every shape a chart or the report knows, with hostile text in pairs, labels and tokens."""

import numpy as np
import xarray as xr

from reward_lens.result import Check, Result

LAYERS, HEADS, PAIRS = 6, 4, 5
SIDES = ["chosen", "rejected", "margin"]
HOSTILE = "<script>alert(1)</script></script>\u2028<img src=x onerror=alert(2)> & 'quoted' \"text\""
LONG = "A sentence that goes on. " * 120


def meta(title: str, **more) -> dict:
    versions = {"reward_lens": "0.1.0", "torch": "2.13.0"}
    provenance = {"model": "tiny", "revision": "abc123", "dtype": "float32", "device": "cpu", "seed": 0}
    words = {"shows": f"What {title} shows.", "cannot_show": f"What {title} cannot show."}
    return {"title": title, "versions": versions, "n_pairs": PAIRS, **provenance, **words, **more}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.4, shape)


def with_margin(two_sides: np.ndarray) -> np.ndarray:
    """(pair, 2, ...) to (pair, 3, ...)."""
    return np.concatenate([two_sides, two_sides[:, :1] - two_sides[:, 1:]], axis=1)


def of_pairs(count: int = PAIRS) -> dict:
    prompts = [HOSTILE, LONG, *["How are you?"] * count][:count]
    subsets = [("one", "two")[i % 2] for i in range(count)]
    return {
        "pair": [HOSTILE, *(f"pair-{i}" for i in range(1, count))],
        "subset": ("pair", subsets),
        "prompt_id": ("pair", [str(i) for i in range(count)]),
        "prompt": ("pair", prompts),
    }


def summary(value: xr.DataArray, width: float = 0.2) -> dict:
    mean = value.mean("pair")
    return {"mean": mean, "low": mean - width, "high": mean + width}


def lens() -> Result:
    coords = {**of_pairs(), "side": SIDES, "depth": np.arange(LAYERS + 1)}
    value = xr.DataArray(with_margin(numbers(PAIRS, 2, LAYERS + 1)), dims=("pair", "side", "depth"), coords=coords)
    checks = [Check("last point equals the reward", 2.4e-7, 1e-5)]
    return Result("lens", value, unit="reward", checks=checks, meta=meta("Lens"), **summary(value))


def contributions() -> Result:
    names = [(f"L{layer}.{kind}", layer, kind) for layer in range(LAYERS) for kind in ("attn", "mlp")]
    names = [("embed", -1, "embed"), *names, ("norm", LAYERS, "norm"), ("bias", LAYERS, "bias")]
    return _by_component("Components", [(*name, -1) for name in names])


def heads() -> Result:
    names = [(f"L{layer}.H{h}", layer, "head", h) for layer in range(LAYERS) for h in range(HEADS)]
    names += [(f"L{layer}.mlp", layer, "mlp", -1) for layer in range(LAYERS)]
    return _by_component("Heads", [("embed", -1, "embed", -1), *names, ("bias", LAYERS, "bias", -1)])


def neurons() -> Result:
    names = [(f"L{i % LAYERS}.N{i}", i % LAYERS, "neuron", -1) for i in range(50)]
    return _by_component("Neurons", names)


def _by_component(title: str, names: list[tuple[str, int, str, int]]) -> Result:
    label, layer, kind, head = (list(column) for column in zip(*names, strict=True))
    coords = {
        **of_pairs(),
        "side": SIDES,
        "component": label,
        "layer": ("component", layer),
        "kind": ("component", kind),
        "head": ("component", head),
    }
    cells = with_margin(numbers(PAIRS, 2, len(names), seed=len(names)))
    value = xr.DataArray(cells, dims=("pair", "side", "component"), coords=coords)
    checks = [Check("contributions sum to the reward", 3e-6, 1e-5)]
    return Result("contributions", value, unit="reward", checks=checks, meta=meta(title), **summary(value, 0.05))


def effects() -> Result:
    """(pair, component, estimator): a grid of layers for each estimator."""
    margin = contributions().value.sel(side="margin", drop=True)
    value = xr.concat([margin, 0.1 * margin], "estimator").assign_coords(estimator=["exact", "gradient"])
    return Result("effects", value, unit="reward", meta=meta("Effects"))


def scores() -> Result:
    cells = with_margin(numbers(PAIRS, 2, seed=3))
    value = xr.DataArray(cells, dims=("pair", "side"), coords={**of_pairs(), "side": SIDES})
    return Result("scores", value, unit="reward", meta=meta("Margins"))


def accuracy() -> Result:
    value = xr.DataArray([0.7, 0.8, 0.6], dims="subset", coords={"subset": ["all", "one", HOSTILE]})
    return Result("accuracy", value, unit="accuracy", low=value - 0.2, high=value + 0.1, meta=meta("Accuracy"))


def calibration() -> Result:
    predicted = np.linspace(0.1, 0.9, 5)
    coords = {"predicted": ("bin", predicted), "observed": ("bin", predicted**2), "n": ("bin", [4] * 5)}
    value = xr.DataArray(predicted**2, dims="bin", coords=coords)
    return Result("calibration", value, unit="fraction", low=value - 0.1, high=value + 0.1, meta=meta("Calibration"))


def grid() -> Result:
    coords = {"probe": ["length", "flattery", "lists"], "control": ["real", "shuffled"]}
    value = xr.DataArray(numbers(3, 2), dims=("probe", "control"), coords=coords)
    return Result("probes", value, unit="reward_sd", meta=meta("Probes"))


def rules() -> Result:
    """Two sets of labels with intervals, and names too long for one row of a legend on a phone."""
    names = ["the reward model itself", "the longer response wins", "the shorter response wins"]
    coords = {"subset": [f"subset {i}" for i in range(6)], "rule": names, "n": ("subset", [8] * 6)}
    value = xr.DataArray(0.5 + 0.2 * numbers(6, 3), dims=("subset", "rule"), coords=coords)
    return Result("rules", value, unit="fraction", low=value - 0.1, high=value + 0.1, meta=meta("Rules"))


def graded() -> Result:
    """Labels of which some differ in dose alone, with intervals."""
    names = ["hedge", "pad_4", "pad_1", "pad_2", "cut_1", "cut_3", "once_1"]
    coords = {
        "probe": names,
        "family": ("probe", ["", "pad", "pad", "pad", "cut", "cut", "once"]),
        "dose": ("probe", [np.nan, 4.0, 1.0, 2.0, 1.0, 3.0, 1.0]),
    }
    value = xr.DataArray(numbers(PAIRS, len(names)), dims=("pair", "probe"), coords={**of_pairs(), **coords})
    return Result("graded", value, unit="reward", meta=meta("Graded"), **summary(value))


def before_after() -> Result:
    """Labels of two kinds and units, before, after and the change; one row is undefined."""
    names = [HOSTILE, "probe: b", "probe: c", "accuracy: one", "accuracy: two"]
    first = np.array([0.5, -0.2, np.nan, 0.8, 0.7])
    second = np.array([0.1, 0.3, np.nan, 0.6, 0.9])
    coords = {
        "measure": names,
        "state": ["before", "after", "change"],
        "kind": ("measure", ["probe"] * 3 + ["accuracy"] * 2),
        "unit_of": ("measure", ["within-prompt SD"] * 3 + ["fraction"] * 2),
    }
    value = xr.DataArray(np.stack([first, second, second - first], 1), dims=("measure", "state"), coords=coords)
    return Result("before_after", value, unit="SD or fraction", low=value - 0.1, high=value + 0.1,
                  undefined="the probe changes no text here", meta=meta("Before and after"))  # fmt: skip


def listing(count: int = 70) -> Result:
    value = xr.DataArray(np.linspace(-1, 1, count), dims="token", coords={"token": [f"t{i}" for i in range(count)]})
    return Result("vocabulary", value, unit="cosine", meta=meta("Vocabulary"))


def scalar() -> Result:
    checks = [Check("pairs under the noise floor", 2.0, float("inf"), "their margin is undefined")]
    return Result("depth", xr.DataArray(0.74), unit="fraction", checks=checks, meta=meta("Crystallization"))


def load_report() -> Result:
    coords = {
        "check": ["head keys", HOSTILE],
        "tolerance": ("check", [0.0, 1e-5]),
        "found": ("check", ["2 of 2 keys", "-1.8342"]),
        "note": ("check", ["", "two texts"]),
    }
    value = xr.DataArray([0.0, 3.1e-7], dims="check", coords=coords)
    return Result("load_report", value, unit="gap", meta=meta("Load report"))


def texts() -> dict[tuple[int, str], list[tuple[str, str]]]:
    """(pair, side) to its tokens as (piece, role); of different lengths, one of them long."""
    prompt = [("<|user|>", "prompt"), ("\n", "prompt"), *((w, "prompt") for w in ("How", " are", " you?"))]
    words = {
        "chosen": ["Fine", ",", " thanks", ".\n\n", "1.", " And", " you?"],
        "rejected": [HOSTILE, "", " no"],
    }
    out = {}
    for pair in range(PAIRS):
        for side, pieces in words.items():
            body = pieces * (200 if (pair, side) == (1, "chosen") else 1)
            out[pair, side] = [*prompt, *((w, "response") for w in body), ("<|end|>", "tail"), ("\n", "tail")]
    return out


def strips(pairs: int = PAIRS) -> Result:
    """Token strips; margin holds no token."""
    rows = texts()
    longest = max(map(len, rows.values()))
    value = np.full((pairs, 3, longest), np.nan)
    piece, role = (np.full(value.shape, "", dtype=object) for _ in range(2))
    lengths = np.zeros(value.shape[:2], dtype=int)
    for p in range(pairs):
        for s, side in enumerate(SIDES[:2]):
            tokens = rows[p % PAIRS, side]
            lengths[p, s] = len(tokens)
            piece[p, s, : len(tokens)] = [text for text, _ in tokens]
            role[p, s, : len(tokens)] = [name for _, name in tokens]
            value[p, s, : len(tokens)] = numbers(len(tokens), seed=10 * p + s)
    everywhere = ("pair", "side", "position")
    coords = {**of_pairs(pairs), "side": SIDES, "piece": (everywhere, piece), "role": (everywhere, role)}
    coords["n_positions"] = (everywhere[:2], lengths)
    checks = [Check("sums to the difference from its baseline", 8e-4, 1e-3, "32 steps")]
    return Result(
        "tokens",
        xr.DataArray(value, dims=everywhere, coords=coords),
        unit="reward",
        checks=checks,
        meta=meta("Tokens", settings={"method": "integrated", "baseline": LONG}),
    )


def all_shapes() -> list[Result]:
    return [
        load_report(),
        accuracy(),
        scores(),
        calibration(),
        lens(),
        contributions(),
        heads(),
        neurons(),
        effects(),
        strips(),
        grid(),
        rules(),
        graded(),
        before_after(),
        listing(),
        scalar(),
    ]
