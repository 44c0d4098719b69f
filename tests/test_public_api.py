"""The public names, as a list that a change has to touch, and what each of them promises to document."""

import importlib
import inspect
import pkgutil
import re

import pytest

import reward_lens

PUBLIC = [
    "ActivationStore",
    "Activations",
    "AlignmentError",
    "Check",
    "CheckFailed",
    "ConceptText",
    "ConceptTexts",
    "Crosscoder",
    "DEFAULT_EDITS",
    "DataError",
    "Group",
    "LanguageModel",
    "LoadError",
    "Pair",
    "Pairs",
    "Result",
    "RewardLensError",
    "RewardModel",
    "SAE",
    "STEP_READOUTS",
    "Site",
    "Solution",
    "Source",
    "StepReadout",
    "Structure",
    "StructureError",
    "StyleItem",
    "TextEdit",
    "Tokens",
    "Transcoder",
    "VocabReadout",
    "ablation_curve",
    "accuracy",
    "add",
    "agreement",
    "agreement_by_length",
    "attention_knockout",
    "base_under_head",
    "bias_direction",
    "calibration",
    "capture",
    "clamp_latent",
    "compare",
    "compare_checkpoints",
    "compared_curves",
    "concept_vectors",
    "constant",
    "contributions",
    "counterfactual_patch",
    "crosscoder_latents",
    "crystallization_depth",
    "detect_cascade",
    "disagreements",
    "distortion_index",
    "divergence",
    "edge_effects",
    "edit_head",
    "edit_report",
    "edited_pairs",
    "edits_of",
    "effects",
    "ensemble_rewards",
    "ensemble_summary",
    "erase_concept",
    "estimate_store",
    "evaluate_edit",
    "explorer_results",
    "find_exploits",
    "fitted_weights",
    "from_run",
    "gate_attribution",
    "gate_routes",
    "gate_weights",
    "golden_scores",
    "gradient_lens",
    "implicit_contributions",
    "implicit_lens",
    "implicit_reward",
    "implicit_tokens",
    "integrated_contributions",
    "intervene",
    "join_results",
    "judged_edits",
    "latent_contexts",
    "latent_contributions",
    "latent_explorer",
    "latent_neighbours",
    "latent_tokens",
    "length_partial",
    "linear_probes",
    "load",
    "load_concepts",
    "load_counts",
    "load_groups",
    "load_language_model",
    "load_pairs",
    "load_result",
    "load_solutions",
    "load_step_model",
    "load_style_items",
    "margin_debug",
    "margin_features",
    "mean_of",
    "minimal_circuit",
    "objective_contributions",
    "objective_effects",
    "optimisation_pressure",
    "ov_pull",
    "pair_judge",
    "path_effects",
    "probe_hacking",
    "probe_latents",
    "project_out",
    "random_weight_copy",
    "ranking",
    "reward_latents",
    "reward_lens",
    "sae_report",
    "save_chart",
    "screen_then_verify",
    "select_alpha",
    "sensitivity_slopes",
    "spliced_rewards",
    "steer",
    "step_contributions",
    "step_lens",
    "step_model",
    "step_pairs",
    "step_rewards",
    "store_activations",
    "style_matrix",
    "style_summary",
    "susceptibility_correlation",
    "term_conflict",
    "text_features",
    "token_attribution",
    "train_crosscoder",
    "train_sae",
    "train_transcoder",
    "transfer_matrix",
    "tuned_lens",
    "valuation",
    "vocab_alignment",
    "vocab_sweep",
    "write_explorer",
    "write_report",
    "zeros",
]


def test_the_list_of_public_names():
    assert list(reward_lens.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_can_be_imported(name):
    assert hasattr(reward_lens, name)
    assert name in dir(reward_lens)


def test_no_name_is_shadowed_by_a_submodule():
    """Importing `reward_lens.x.y` puts the module `x` on the package, over a function of that name."""
    for module in pkgutil.walk_packages(reward_lens.__path__, "reward_lens."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert [name for name in PUBLIC if inspect.ismodule(getattr(reward_lens, name))] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        reward_lens.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_documented_and_every_function_says_what_it_returns(name):
    value = getattr(reward_lens, name)
    text = inspect.getdoc(value) or ""
    assert text, "no docstring"
    if inspect.isfunction(value):
        # "Returns ...", "dims (pair, side)", or a shape: (pair, side, depth), [k, d]
        words = r"\b([Rr]eturns?|[Dd]im(s|ensions)?|[Ss]hapes?)\b|[(\[]\w+(, ?\w+)+[)\]]"
        assert re.search(words, text), "the docstring has no word on the result or its shape"


def test_type_checkers_see_the_same_names():
    """The `TYPE_CHECKING` imports of the front door are those it loads when they are used."""
    import ast

    tree = ast.parse(inspect.getsource(reward_lens))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"reward_lens.{module}" for name, module in reward_lens._MODULE_OF.items()}
