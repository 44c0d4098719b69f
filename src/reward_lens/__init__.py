"""Look inside reward models: lens, attribution and intervention that add up to the reward, on every run.

    import reward_lens as rl

    rm = rl.load("demo")
    pairs = rl.load_pairs("demo")
    rl.contributions(rm, pairs).top(5)

Names are loaded when first used, so that importing the package stays fast.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers see; a test holds it against _HOME
    from reward_lens.charts import save_chart as save_chart
    from reward_lens.data import Group as Group
    from reward_lens.data import Pair as Pair
    from reward_lens.data import Pairs as Pairs
    from reward_lens.data import StyleItem as StyleItem
    from reward_lens.data import load_groups as load_groups
    from reward_lens.data import load_pairs as load_pairs
    from reward_lens.data import load_solutions as load_solutions
    from reward_lens.data import load_style_items as load_style_items
    from reward_lens.data.concepts import ConceptText as ConceptText
    from reward_lens.data.concepts import ConceptTexts as ConceptTexts
    from reward_lens.data.concepts import load_concepts as load_concepts
    from reward_lens.data.counts import load_counts as load_counts
    from reward_lens.data.solutions import Solution as Solution
    from reward_lens.data.solutions import step_pairs as step_pairs
    from reward_lens.edits import TextEdit as TextEdit
    from reward_lens.edits import edited_pairs as edited_pairs
    from reward_lens.edits import edits_of as edits_of
    from reward_lens.edits import judged_edits as judged_edits
    from reward_lens.engine.activations import Activations as Activations
    from reward_lens.engine.activations import capture as capture
    from reward_lens.engine.editing import Source as Source
    from reward_lens.engine.intervention import add as add
    from reward_lens.engine.intervention import constant as constant
    from reward_lens.engine.intervention import from_run as from_run
    from reward_lens.engine.intervention import intervene as intervene
    from reward_lens.engine.intervention import mean_of as mean_of
    from reward_lens.engine.intervention import project_out as project_out
    from reward_lens.engine.intervention import zeros as zeros
    from reward_lens.engine.store import ActivationStore as ActivationStore
    from reward_lens.engine.store import estimate_store as estimate_store
    from reward_lens.engine.store import store_activations as store_activations
    from reward_lens.errors import AlignmentError as AlignmentError
    from reward_lens.errors import CheckFailed as CheckFailed
    from reward_lens.errors import DataError as DataError
    from reward_lens.errors import LoadError as LoadError
    from reward_lens.errors import RewardLensError as RewardLensError
    from reward_lens.errors import StructureError as StructureError
    from reward_lens.explorer import explorer_results as explorer_results
    from reward_lens.explorer import latent_explorer as latent_explorer
    from reward_lens.features import text_features as text_features
    from reward_lens.joining import join_results as join_results
    from reward_lens.methods.behaviour.accuracy import accuracy as accuracy
    from reward_lens.methods.behaviour.accuracy import calibration as calibration
    from reward_lens.methods.behaviour.accuracy import length_partial as length_partial
    from reward_lens.methods.behaviour.accuracy import ranking as ranking
    from reward_lens.methods.behaviour.exploits import find_exploits as find_exploits
    from reward_lens.methods.behaviour.golden import golden_scores as golden_scores
    from reward_lens.methods.behaviour.margin_features import margin_debug as margin_debug
    from reward_lens.methods.behaviour.margin_features import margin_features as margin_features
    from reward_lens.methods.behaviour.pressure import optimisation_pressure as optimisation_pressure
    from reward_lens.methods.behaviour.probes import probe_hacking as probe_hacking
    from reward_lens.methods.behaviour.style import style_matrix as style_matrix
    from reward_lens.methods.behaviour.style import style_summary as style_summary
    from reward_lens.methods.behaviour.vocabulary_sweep import vocab_sweep as vocab_sweep
    from reward_lens.methods.causation.agreement import agreement as agreement
    from reward_lens.methods.causation.agreement import agreement_by_length as agreement_by_length
    from reward_lens.methods.causation.circuits import ablation_curve as ablation_curve
    from reward_lens.methods.causation.circuits import minimal_circuit as minimal_circuit
    from reward_lens.methods.causation.counterfactual import counterfactual_patch as counterfactual_patch
    from reward_lens.methods.causation.divergence import divergence as divergence
    from reward_lens.methods.causation.edges import edge_effects as edge_effects
    from reward_lens.methods.causation.effects import effects as effects
    from reward_lens.methods.causation.knockout import attention_knockout as attention_knockout
    from reward_lens.methods.causation.path_patching import path_effects as path_effects
    from reward_lens.methods.causation.screening import screen_then_verify as screen_then_verify
    from reward_lens.methods.causation.steering import steer as steer
    from reward_lens.methods.comparison.compare import compare as compare
    from reward_lens.methods.comparison.compare import compare_checkpoints as compare_checkpoints
    from reward_lens.methods.comparison.compare import disagreements as disagreements
    from reward_lens.methods.comparison.compared_curves import compared_curves as compared_curves
    from reward_lens.methods.comparison.ensemble import ensemble_rewards as ensemble_rewards
    from reward_lens.methods.comparison.ensemble import ensemble_summary as ensemble_summary
    from reward_lens.methods.concepts.concept_vectors import concept_vectors as concept_vectors
    from reward_lens.methods.concepts.linear_probes import linear_probes as linear_probes
    from reward_lens.methods.concepts.valuation import valuation as valuation
    from reward_lens.methods.latents.crosscoder_latents import crosscoder_latents as crosscoder_latents
    from reward_lens.methods.latents.latent_clamping import clamp_latent as clamp_latent
    from reward_lens.methods.latents.latent_contexts import latent_contexts as latent_contexts
    from reward_lens.methods.latents.latent_contributions import latent_contributions as latent_contributions
    from reward_lens.methods.latents.latent_neighbours import latent_neighbours as latent_neighbours
    from reward_lens.methods.latents.latent_tokens import latent_tokens as latent_tokens
    from reward_lens.methods.latents.reward_latents import probe_latents as probe_latents
    from reward_lens.methods.latents.reward_latents import reward_latents as reward_latents
    from reward_lens.methods.latents.sae_report import sae_report as sae_report
    from reward_lens.methods.latents.splicing import spliced_rewards as spliced_rewards
    from reward_lens.methods.observation.contributions import contributions as contributions
    from reward_lens.methods.observation.contributions import objective_contributions as objective_contributions
    from reward_lens.methods.observation.integrated_contributions import (
        integrated_contributions as integrated_contributions,
    )
    from reward_lens.methods.observation.lens import crystallization_depth as crystallization_depth
    from reward_lens.methods.observation.lens import random_weight_copy as random_weight_copy
    from reward_lens.methods.observation.lens import reward_lens as reward_lens
    from reward_lens.methods.observation.token_attribution import token_attribution as token_attribution
    from reward_lens.methods.observation.trained_lens import gradient_lens as gradient_lens
    from reward_lens.methods.observation.trained_lens import tuned_lens as tuned_lens
    from reward_lens.methods.observation.weights import ov_pull as ov_pull
    from reward_lens.methods.observation.weights import vocab_alignment as vocab_alignment
    from reward_lens.methods.readouts.gate_routes import gate_routes as gate_routes
    from reward_lens.methods.readouts.gates import gate_attribution as gate_attribution
    from reward_lens.methods.readouts.gates import gate_weights as gate_weights
    from reward_lens.methods.readouts.implicit_parts import implicit_contributions as implicit_contributions
    from reward_lens.methods.readouts.implicit_parts import implicit_lens as implicit_lens
    from reward_lens.methods.readouts.implicit_reward import implicit_reward as implicit_reward
    from reward_lens.methods.readouts.implicit_reward import implicit_tokens as implicit_tokens
    from reward_lens.methods.readouts.objective_effects import objective_effects as objective_effects
    from reward_lens.methods.readouts.pair_judge import pair_judge as pair_judge
    from reward_lens.methods.readouts.step_rewards import step_contributions as step_contributions
    from reward_lens.methods.readouts.step_rewards import step_lens as step_lens
    from reward_lens.methods.readouts.step_rewards import step_rewards as step_rewards
    from reward_lens.methods.repair.alpha_selection import select_alpha as select_alpha
    from reward_lens.methods.repair.bias_direction import bias_direction as bias_direction
    from reward_lens.methods.repair.edit_evaluation import evaluate_edit as evaluate_edit
    from reward_lens.methods.repair.erasure import erase_concept as erase_concept
    from reward_lens.methods.repair.head_editing import edit_head as edit_head
    from reward_lens.methods.repair.head_editing import edit_report as edit_report
    from reward_lens.methods.repair.transfer import transfer_matrix as transfer_matrix
    from reward_lens.methods.terms.conflict import term_conflict as term_conflict
    from reward_lens.methods.terms.distortion import distortion_index as distortion_index
    from reward_lens.methods.terms.fitted_weights import fitted_weights as fitted_weights
    from reward_lens.methods.terms.sensitivity import DEFAULT_EDITS as DEFAULT_EDITS
    from reward_lens.methods.terms.sensitivity import sensitivity_slopes as sensitivity_slopes
    from reward_lens.methods.training.cascade import detect_cascade as detect_cascade
    from reward_lens.methods.training.susceptibility import susceptibility_correlation as susceptibility_correlation
    from reward_lens.model.base import base_under_head as base_under_head
    from reward_lens.model.language_model import LanguageModel as LanguageModel
    from reward_lens.model.language_model import load_language_model as load_language_model
    from reward_lens.model.loading import load as load
    from reward_lens.model.reward_model import RewardModel as RewardModel
    from reward_lens.model.sites import Site as Site
    from reward_lens.model.step_loading import load_step_model as load_step_model
    from reward_lens.model.step_readout import STEP_READOUTS as STEP_READOUTS
    from reward_lens.model.step_readout import StepReadout as StepReadout
    from reward_lens.model.step_scorer import step_model as step_model
    from reward_lens.model.structure import Structure as Structure
    from reward_lens.model.tokens import Tokens as Tokens
    from reward_lens.model.vocab_readout import VocabReadout as VocabReadout
    from reward_lens.report.explorer import write_explorer as write_explorer
    from reward_lens.report.html import write_report as write_report
    from reward_lens.result import Check as Check
    from reward_lens.result import Result as Result
    from reward_lens.result import load_result as load_result
    from reward_lens.sae.crosscoder import Crosscoder as Crosscoder
    from reward_lens.sae.crosscoder_training import train_crosscoder as train_crosscoder
    from reward_lens.sae.dictionary import SAE as SAE
    from reward_lens.sae.training import train_sae as train_sae
    from reward_lens.sae.transcoder import Transcoder as Transcoder
    from reward_lens.sae.transcoder import train_transcoder as train_transcoder

_HOME = {
    "errors": ("RewardLensError", "LoadError", "StructureError", "AlignmentError", "DataError", "CheckFailed"),
    "result": ("Check", "Result", "load_result"),
    "joining": ("join_results",),
    "charts": ("save_chart",),
    "data": ("Group", "Pair", "Pairs", "StyleItem", "load_groups", "load_pairs", "load_solutions", "load_style_items"),
    "model.base": ("base_under_head",),
    "model.loading": ("load",),
    "model.reward_model": ("RewardModel",),
    "model.sites": ("Site",),
    "model.structure": ("Structure",),
    "model.tokens": ("Tokens",),
    "model.vocab_readout": ("VocabReadout",),
    "engine.activations": ("Activations", "capture"),
    "engine.editing": ("Source",),
    "engine.intervention": ("add", "constant", "from_run", "intervene", "mean_of", "project_out", "zeros"),
    "methods.behaviour.accuracy": ("accuracy", "calibration", "length_partial", "ranking"),
    "methods.causation.agreement": ("agreement", "agreement_by_length"),
    "methods.causation.circuits": ("ablation_curve", "minimal_circuit"),
    "methods.observation.contributions": ("contributions", "objective_contributions"),
    "methods.causation.counterfactual": ("counterfactual_patch",),
    "methods.causation.divergence": ("divergence",),
    "methods.causation.edges": ("edge_effects",),
    "methods.causation.effects": ("effects",),
    "methods.readouts.gate_routes": ("gate_routes",),
    "methods.readouts.gates": ("gate_attribution", "gate_weights"),
    "methods.observation.integrated_contributions": ("integrated_contributions",),
    "methods.readouts.objective_effects": ("objective_effects",),
    "methods.causation.knockout": ("attention_knockout",),
    "methods.observation.lens": ("crystallization_depth", "random_weight_copy", "reward_lens"),
    "methods.readouts.pair_judge": ("pair_judge",),
    "methods.causation.path_patching": ("path_effects",),
    "methods.behaviour.margin_features": ("margin_debug", "margin_features"),
    "methods.behaviour.pressure": ("optimisation_pressure",),
    "methods.behaviour.probes": ("probe_hacking",),
    "methods.repair.edit_evaluation": ("evaluate_edit",),
    "methods.repair.alpha_selection": ("select_alpha",),
    "methods.repair.bias_direction": ("bias_direction",),
    "methods.repair.erasure": ("erase_concept",),
    "methods.behaviour.exploits": ("find_exploits",),
    "methods.behaviour.golden": ("golden_scores",),
    "methods.repair.head_editing": ("edit_head", "edit_report"),
    "methods.behaviour.vocabulary_sweep": ("vocab_sweep",),
    "edits": ("TextEdit", "edited_pairs", "edits_of", "judged_edits"),
    "features": ("text_features",),
    "methods.causation.screening": ("screen_then_verify",),
    "methods.causation.steering": ("steer",),
    "methods.behaviour.style": ("style_matrix", "style_summary"),
    "methods.observation.token_attribution": ("token_attribution",),
    "methods.observation.trained_lens": ("gradient_lens", "tuned_lens"),
    "methods.observation.weights": ("ov_pull", "vocab_alignment"),
    "methods.comparison.compare": ("compare", "compare_checkpoints", "disagreements"),
    "methods.comparison.compared_curves": ("compared_curves",),
    "methods.comparison.ensemble": ("ensemble_rewards", "ensemble_summary"),
    "methods.concepts.concept_vectors": ("concept_vectors",),
    "methods.concepts.valuation": ("valuation",),
    "methods.concepts.linear_probes": ("linear_probes",),
    "methods.training.cascade": ("detect_cascade",),
    "methods.training.susceptibility": ("susceptibility_correlation",),
    "methods.repair.transfer": ("transfer_matrix",),
    "methods.terms.conflict": ("term_conflict",),
    "methods.terms.distortion": ("distortion_index",),
    "methods.terms.sensitivity": ("DEFAULT_EDITS", "sensitivity_slopes"),
    "methods.terms.fitted_weights": ("fitted_weights",),
    "data.concepts": ("ConceptText", "ConceptTexts", "load_concepts"),
    "data.counts": ("load_counts",),
    "engine.store": ("ActivationStore", "estimate_store", "store_activations"),
    "sae.crosscoder": ("Crosscoder",),
    "sae.crosscoder_training": ("train_crosscoder",),
    "sae.dictionary": ("SAE",),
    "sae.training": ("train_sae",),
    "sae.transcoder": ("Transcoder", "train_transcoder"),
    "data.solutions": ("Solution", "step_pairs"),
    "model.step_readout": ("STEP_READOUTS", "StepReadout"),
    "model.step_loading": ("load_step_model",),
    "model.step_scorer": ("step_model",),
    "model.language_model": ("LanguageModel", "load_language_model"),
    "methods.readouts.implicit_reward": ("implicit_reward", "implicit_tokens"),
    "methods.readouts.implicit_parts": ("implicit_contributions", "implicit_lens"),
    "methods.readouts.step_rewards": ("step_contributions", "step_lens", "step_rewards"),
    "methods.latents.latent_contributions": ("latent_contributions",),
    "methods.latents.crosscoder_latents": ("crosscoder_latents",),
    "methods.latents.latent_clamping": ("clamp_latent",),
    "methods.latents.reward_latents": ("probe_latents", "reward_latents"),
    "methods.latents.latent_contexts": ("latent_contexts",),
    "methods.latents.latent_tokens": ("latent_tokens",),
    "methods.latents.latent_neighbours": ("latent_neighbours",),
    "methods.latents.splicing": ("spliced_rewards",),
    "methods.latents.sae_report": ("sae_report",),
    "report.html": ("write_report",),
    "report.explorer": ("write_explorer",),
    "explorer": ("explorer_results", "latent_explorer"),
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
