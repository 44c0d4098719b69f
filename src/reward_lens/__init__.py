"""Look inside reward models: lens, attribution and intervention that add up to the reward, on every run.

    import reward_lens as rl

    rm = rl.load("demo")
    pairs = rl.load_pairs("demo")
    rl.contributions(rm, pairs).top(5)

Names are loaded when first used, so that importing the package stays fast.
"""

import importlib

_HOME = {
    "errors": ("RewardLensError", "LoadError", "StructureError", "AlignmentError", "DataError", "CheckFailed"),
    "result": ("Check", "Result", "load_result"),
    "charts": ("save_chart",),
    "data": ("Group", "Pair", "Pairs", "StyleItem", "load_groups", "load_pairs", "load_style_items"),
    "model.loading": ("load",),
    "model.reward_model": ("RewardModel",),
    "model.sites": ("Site",),
    "model.structure": ("Structure",),
    "model.tokens": ("Tokens",),
    "engine.activations": ("Activations", "capture"),
    "engine.intervention": ("Source", "add", "constant", "from_run", "intervene", "mean_of", "project_out", "zeros"),
    "methods.accuracy": ("accuracy", "calibration", "length_partial", "ranking"),
    "methods.contributions": ("contributions",),
    "methods.lens": ("crystallization_depth", "random_weight_copy", "reward_lens"),
    "methods.style": ("style_matrix", "style_summary"),
    "methods.token_attribution": ("token_attribution",),
    "methods.trained_lens": ("gradient_lens", "tuned_lens"),
    "methods.weights": ("ov_pull", "vocab_alignment"),
    "report.html": ("write_report",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'reward_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"reward_lens.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
