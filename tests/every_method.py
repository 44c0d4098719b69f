"""One call of every method that returns a `Result`, small enough for a tiny model on one thread."""

import torch

import reward_lens as rl
from dictionaries import random_crosscoder, random_sae
from planted import planted_pairs
from step_models import SOLUTIONS


def sae(rm: rl.RewardModel, site: str = "L2.resid_post") -> rl.SAE:
    return random_sae(rm.d_model, site=site)


MANY = [rl.Pair(*texts) for texts in {t[0]: t for t in planted_pairs("length", 40)}.values()][:24]
NATURAL = MANY[:16]
SAID = {"joy": ("a delight", "a bore"), "haste": ("at once", "in time"), "doubt": ("maybe", "no")}
CONCEPTS = rl.ConceptTexts(
    rl.ConceptText(concept, topic, f"Of {topic}: {text}.", polarity)
    for concept, said in SAID.items()
    for topic in ("bread", "trains", "chess", "rain", "paint", "cats", "tea", "maps")
    for text, polarity in zip(said, ("positive", "negative"), strict=True)
)
FEW = {"n_neighbours": 10, "min_evaluation": 10, "n_permutations": 49}
METHODS = {
    "lens": lambda rm, pairs: rl.reward_lens(rm, pairs),
    "lens, all": lambda rm, pairs: rl.reward_lens(rm, pairs, at="all"),
    "contributions": lambda rm, pairs: rl.contributions(rm, pairs),
    "by head": lambda rm, pairs: rl.contributions(rm, pairs, by="head"),
    "by neuron": lambda rm, pairs: rl.contributions(rm, pairs, by="neuron", top=5),
    "integrated contributions": lambda rm, pairs: rl.integrated_contributions(rm, pairs),
    "by token": lambda rm, pairs: rl.contributions(rm, pairs, by="token"),
    "crystallization": lambda rm, pairs: rl.crystallization_depth(rm, pairs),
    "accuracy": lambda rm, pairs: rl.accuracy(rm, pairs),
    "calibration": lambda rm, pairs: rl.calibration(rm, pairs),
    "gradient lens": lambda rm, pairs: rl.gradient_lens(rm, pairs),
    "prefix": lambda rm, pairs: rl.token_attribution(rm, pairs, method="prefix"),
    "truncate": lambda rm, pairs: rl.token_attribution(rm, pairs, method="truncate"),
    "gradient": lambda rm, pairs: rl.token_attribution(rm, pairs, method="gradient"),
    "integrated": lambda rm, pairs: rl.token_attribution(rm, pairs, method="integrated"),
    "leave one out": lambda rm, pairs: rl.token_attribution(rm, pairs, method="leave_one_out"),
    "by word": lambda rm, pairs: rl.token_attribution(rm, pairs, method="truncate", by="word"),
    "intervene": lambda rm, pairs: rl.intervene(rm, pairs, {"L1.attn": rl.zeros()}),
    "effects": lambda rm, pairs: rl.effects(rm, pairs),
    "effects, heads, tail": lambda rm, pairs: rl.effects(rm, pairs, "heads", mode="denoise", at="all", align="tail"),
    "effects, positions": lambda rm, pairs: rl.effects(rm, pairs, at="all", align="diff", spans="position"),
    "effects, direct": lambda rm, pairs: rl.effects(rm, pairs, path="direct"),
    "effects, mean": lambda rm, pairs: rl.effects(rm, pairs, ["L1.attn", "L2.resid_pre"], mode="mean", at="response"),
    "effects, resample": lambda rm, pairs: rl.effects(rm, pairs, ["L1.mlp", "L1.V0"], mode="resample"),
    "path effects": lambda rm, pairs: rl.path_effects(rm, pairs, ["embed", "L0.mlp"], ["reward", "L1.attn", "L2.Q1"]),
    "knock-out": lambda rm, pairs: rl.attention_knockout(rm, pairs, "word"),
    "divergence": lambda rm, pairs: rl.divergence(rm, pairs, ["L1.attn"], NATURAL, **FEW),
    "counterfactual": lambda rm, pairs: rl.counterfactual_patch(rm, pairs, ["L1.attn"], NATURAL, n_natural=5),
    "estimates": lambda rm, pairs: rl.effects(rm, pairs, estimator="gradient", grad_drop=True),
    "edges": lambda rm, pairs: rl.edge_effects(rm, pairs),
    "probes": lambda rm, pairs: rl.probe_hacking(rm, pairs, ["pad_1", "hedge", "bulletise"]),
    "margin features": lambda rm, pairs: rl.margin_features(rm, pairs),
    "direction": lambda rm, pairs: rl.bias_direction(rm, rl.edited_pairs(NATURAL, rl.edits_of(["add_emoji"])[0])),
    "evaluation": lambda rm, pairs: rl.evaluate_edit(rm, rm, pairs, {"own": pairs}, ["hedge"]),
    "linear probes": lambda rm, pairs: rl.linear_probes(rm, MANY, "words", depths=[0, rm.n_layers], n_control=5),
    "slopes": lambda rm, pairs: rl.sensitivity_slopes(rm, {"words": ["pad"]}, NATURAL[:7]),
    "concepts": lambda rm, pairs: rl.concept_vectors(rm, CONCEPTS, denoise_var=0),
    "valuation": lambda rm, pairs: rl.valuation(
        rm, rl.concept_vectors(rm, CONCEPTS, denoise_var=0), CONCEPTS, n_null=2, n_texts=2, n_shuffle=20
    ),
    "conflict": lambda rm, pairs: rl.term_conflict(
        rm, {name: rl.edited_pairs(NATURAL, rl.edits_of([name])[0]) for name in ("add_emoji", "hedge")}, ["direction"]
    ),
    "transfer": lambda rm, pairs: rl.transfer_matrix(
        rm, {"emoji": torch.eye(rm.d_model)[0]}, {"emoji": rl.edited_pairs(NATURAL, rl.edits_of(["add_emoji"])[0])}
    ),
    "compare": lambda rm, pairs: rl.compare({"one": rm, "other": rm}, pairs, n_permutations=9),
    "ensemble": lambda rm, pairs: rl.ensemble_rewards({"one": rm, "other": rm}, pairs),
    "score": lambda rm, pairs: rm.score_pairs(pairs),
    "latent contributions": lambda rm, pairs: rl.latent_contributions(rm, sae(rm), pairs),
    "latents, ablated": lambda rm, pairs: rl.latent_contributions(
        rm, sae(rm, "L1.resid_post"), pairs, "ablation", top=4
    ),
    "latents, integrated": lambda rm, pairs: rl.latent_contributions(rm, sae(rm, "L1.resid_post"), pairs, "integrated"),
    "reward latents": lambda rm, pairs: rl.reward_latents(rm, sae(rm, "L1.resid_post"), NATURAL, top=3),
    "probe latents": lambda rm, pairs: rl.probe_latents(
        rm, sae(rm), rl.edited_pairs(NATURAL, rl.edits_of(["add_emoji"])[0]), top=3
    ),
    "clamp": lambda rm, pairs: rl.clamp_latent(rm, sae(rm), pairs, 3, 0.5),
    "latent contexts": lambda rm, pairs: rl.latent_contexts(rm, sae(rm), pairs, [0, 3], top=2),
    "latent neighbours": lambda rm, pairs: rl.latent_neighbours(rm, sae(rm), [0, 3], top=4),
    "latent tokens": lambda rm, pairs: rl.latent_tokens(rm, sae(rm), pairs, 3),
    "spliced": lambda rm, pairs: rl.spliced_rewards(rm, sae(rm, "L1.resid_post"), pairs),
    "dictionary": lambda rm, pairs: rl.sae_report(rm, sae(rm), pairs),
    "crosscoder latents": lambda rm, pairs: rl.crosscoder_latents(
        {"one": rm, "other": rm}, random_crosscoder(rm.d_model), pairs, top=5
    ),
    "vocabulary": lambda rm, pairs: rl.vocab_alignment(rm),
    "ov": lambda rm, pairs: rl.ov_pull(rm),
}

# What only some kinds of reward answer; the others refuse in words.
STEPS = [rl.Solution(prompt, steps) for prompt, steps in SOLUTIONS]
READOUT_METHODS = {
    "gate weights": lambda rm, pairs: rl.gate_weights(rm, pairs),
    "gate attribution": lambda rm, pairs: rl.gate_attribution(rm, pairs),
    "gate routes": lambda rm, pairs: rl.gate_routes(rm, pairs, ["L0.attn", "L1.mlp"], mode="zero"),
    "objective effects": lambda rm, pairs: rl.objective_effects(rm, pairs, ["L0.attn", "L1.mlp"]),
    "objective contributions": lambda rm, pairs: rl.objective_contributions(rm, pairs),
    "pair judge": lambda rm, pairs: rl.pair_judge(rm, pairs),
    "step rewards": lambda rm, pairs: rl.step_rewards(rm, STEPS),
    "step lens": lambda rm, pairs: rl.step_lens(rm, STEPS),
    "step contributions": lambda rm, pairs: rl.step_contributions(rm, STEPS),
}
