"""The exactness contract in numbers, on every architecture family and every kind of readout of the tests.

    python benchmarks/conformance.py --workers 2 [--only llama,gemma2]

For each model the largest gap of every identity, in float32 and bfloat16, and the outcome of every method: its checks
held, or it refused in words. Anything else is an error: named at the end, and no page is written. `--only` runs some
models and keeps the rows of the others. Writes conformance_identities.csv and conformance_methods.csv beside this file,
and from them conformance.md and docs/models.md. A gap is divided by the scale that its identity names; E5 is in reward
units.
"""

import argparse
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch

import reward_lens as rl

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from conformance_pages import write_pages  # noqa: E402
from every_method import METHODS, READOUT_METHODS  # noqa: E402
from identities import DTYPES, MODELS, gaps, model_of, precisions, readable  # noqa: E402
from workers import add_workers, in_order  # noqa: E402

HERE = Path(__file__).parent
EVERY = METHODS | READOUT_METHODS


def described(name: str, rm: rl.RewardModel) -> dict[str, object]:
    """What the tables say of a model besides its numbers."""
    s = rm.structure
    return {
        "model": name, "class": type(rm.module).__name__, "readout": rm.readout.kind,
        "directions": rm.readout.exactness, "blocks": "parallel" if s.parallel else "sequential",
        "heads": "split" if s.attn_out else "not split", "neurons": "split" if s.mlp_out else "not split",
        "reuse": "reused" if rm.reuses_prefix() else "whole texts",
    }  # fmt: skip


def outcome(rm: rl.RewardModel, method: str) -> str:
    """ "holds", with the largest share of a tolerance that a check used, or "refused" and why."""
    try:
        result = EVERY[method](rm, readable(rm))
    except rl.RewardLensError as error:
        return f"refused: {error.what}"
    except Exception as error:  # what no user may see
        return f"error: {type(error).__name__}: {error}"
    used = [c.gap / c.tolerance for c in result.checks if 0 < c.tolerance < float("inf")]
    return f"holds {max(used, default=0.0):.2g}"


def measured(name: str) -> tuple[dict, list[dict]]:
    """The row of the methods and the rows of the identities of one model."""
    warnings.simplefilter("ignore")
    rm = model_of(name, torch.float32)
    about = described(name, rm)
    methods = about | {method: outcome(rm, method) for method in EVERY}
    rows = [
        {"model": name, "precision": precision} | gaps(rm if dtype == torch.float32 else model_of(name, dtype))
        for precision, dtype in DTYPES.items()
        if precision in precisions(name)
    ]
    return methods, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workers(parser)
    parser.add_argument("--only", default="", help="models by commas, or semicolons where a name has commas")
    parser.add_argument("--pages", action="store_true", help="only write the pages again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    only = [name.strip() for name in options.only.split(";" if ";" in options.only else ",") if name.strip()]
    files = HERE / "conformance_methods.csv", HERE / "conformance_identities.csv"
    run = [] if options.pages else only or MODELS
    kept = [pd.read_csv(f) if f.exists() and (only or options.pages) else pd.DataFrame() for f in files]
    for methods, identities in in_order(measured, [(name,) for name in run], options.workers):
        print(methods["model"], flush=True)
        for i, rows in enumerate(([methods], identities)):
            others = kept[i][kept[i]["model"] != methods["model"]] if len(kept[i]) else kept[i]
            kept[i] = pd.concat([others, pd.DataFrame(rows)])
            order = kept[i]["model"].map({name: place for place, name in enumerate(MODELS)})
            kept[i] = kept[i].assign(order=order).sort_values("order", kind="stable").drop(columns="order")
            kept[i].to_csv(files[i], index=False, float_format="%.1e")
    methods = pd.read_csv(files[0])
    errors = [f"{row['model']}, {name}: {text}" for row in methods.to_dict("records") for name, text in row.items()
              if str(text).startswith("error: ")]  # fmt: skip
    if errors:
        raise SystemExit("\n".join(errors))
    write_pages(methods, pd.read_csv(files[1]))


if __name__ == "__main__":
    main()
