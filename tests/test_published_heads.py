"""Published reward heads: the published scores, the identities, and what cannot be answered refused.

The checkpoints have the real config keys and weight names on tiny random trunks; `published_heads` transcribes the
published forwards without the library's classes.
"""

import copy

import numpy as np
import pytest
import torch

import published_heads as published
import reward_lens as rl
from every_method import METHODS, NATURAL
from families import CHAT_TEMPLATES, TEXT_PAIRS, tiny_tokenizer
from published_heads import HEADS
from reward_lens.engine import hooks
from reward_lens.engine.gradients import gradients

PAIRS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS])
KINDS = {"inf_orm": "mlp", "qwen_math": "mlp", "grm": "mlp", "armo": "prompt_gated", "qrm": "prompt_gated",
         "urm": "self_gated", "ldl": "self_gated"}  # fmt: skip
GATED = ("armo", "qrm")
LOCAL = tuple(name for name in HEADS if name not in GATED)
SLOW = ("conflict", "slopes", "dictionary", "calibration")
ONE_ROW = ("transfer", "vocabulary", "ov")
every = pytest.mark.parametrize("name", HEADS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: published.save(tmp_path_factory.mktemp(name), name) for name in HEADS}


@pytest.fixture(scope="module")
def models(folders):
    return {name: rl.load(folder) for name, folder in folders.items()}


@every
def test_scores_are_those_of_the_published_forward(folders, name):
    dtype = torch.float32 if name == "ldl" else torch.float64  # Gemma-2's mask is not made for float64
    rm = rl.load(folders[name], dtype=dtype)
    assert rm.readout.kind == KINDS[name] and rm.readout.objective == "reward"
    assert rm.load_report.value.sel(check="head in checkpoint") == 0
    for pair in PAIRS[:3]:
        ids = rm.tokenize(pair.prompt, pair.chosen).ids
        columns = published.published_columns(folders[name], name, ids, dtype)
        with torch.no_grad():
            own = rm.module(input_ids=torch.tensor([ids])).logits[0]
        assert own.numpy() == pytest.approx(columns.numpy(), abs=1e-6)
        assert rm.score(pair.prompt, pair.chosen) == pytest.approx(float(columns[0]), abs=1e-6)
        assert len(rm.objectives) == len(columns)


@pytest.mark.parametrize("name", ["armo", "qrm", "urm", "ldl"])
def test_each_objective_is_a_reward_of_its_own(folders, models, name):
    for column in (1, len(models[name].objectives) - 1):
        objective = models[name].objectives[column]
        rm = models[name].for_objective(objective)
        ids = rm.tokenize(*TEXT_PAIRS[0][:2]).ids
        expected = float(published.published_columns(folders[name], name, ids)[column])
        assert rm.score(*TEXT_PAIRS[0][:2]) == pytest.approx(expected, abs=2e-6)
        assert rm.readout.kind == ("linear" if name != "ldl" else "self_gated")
        result = rl.contributions(rm, PAIRS[:2])
        assert result.meta["objective"] == objective
        assert result.meta["exactness"] == ("exact" if name != "ldl" else "local")


@pytest.mark.parametrize("name", ["inf_orm", "grm"])
def test_a_padding_token_that_ends_every_answer(tmp_path, name):
    """The published INF-ORM reads before the first padding token, the published GRM at the last token of all."""
    end = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    template = CHAT_TEMPLATES["markers"].replace("{% endfor %}", end)
    tokenizer = tiny_tokenizer(chat_template=template, pad="eos")
    folder = published.save(tmp_path, name, pad_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    rm = rl.load(folder)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    ids = rm.tokenize(turns[:1], "Yo").ids
    assert rm.score(turns[:1], "Yo") == pytest.approx(rm.hf_score(turns[:1], "Yo"), abs=1e-5)
    assert ids.count(tokenizer.eos_token_id) == 1
    if name == "grm":
        assert rm.score(turns, "No") == pytest.approx(rm.hf_score(turns, "No"), abs=1e-5)
    else:
        with pytest.raises(rl.DataError, match="padding token stands inside a text.*'<eos>' at position"):
            rm.score(turns, "No")


@every
def test_batches_and_padding_leave_the_rewards(models, name):
    rm = models[name]
    scores = rm.score_pairs(PAIRS).value.sel(side="rejected").values
    alone = [rm.score(p.prompt, p.rejected) for p in PAIRS]
    assert scores == pytest.approx(alone, abs=2e-5)


@every
@pytest.mark.parametrize("by", ["component", "head", "neuron", "token"])
def test_e2_e3_e4_contributions_sum_to_the_reward(models, name, by):
    rm = models[name]
    result = rl.contributions(rm, PAIRS[:3], by=by)
    rewards = rm.score_pairs(PAIRS[:3]).value.sel(side=["chosen", "rejected"])
    parts = result.value.sel(side=["chosen", "rejected"])
    total = parts.sum([d for d in parts.dims if d not in ("pair", "side")])
    assert total.values == pytest.approx(rewards.values, abs=1e-4)
    assert result.meta["exactness"] == ("exact" if name in GATED else "local")
    assert ("its gradient at each run's own state" in result.meta["cannot_show"]) == (name in LOCAL)


@every
@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_e2_the_lens_ends_at_the_reward(models, name, norm):
    rm = models[name]
    rewards = rm.score_pairs(PAIRS[:3]).value
    final = rl.reward_lens(rm, PAIRS[:3], norm=norm).value.isel(depth=-1)
    assert final.values == pytest.approx(rewards.values, abs=1e-4)
    everywhere = rl.reward_lens(rm, PAIRS[:3], norm=norm, at="all").value
    at = [rm.tokenize(p.prompt, p.chosen).reward_pos for p in PAIRS[:3]]
    ends = [float(everywhere.isel(pair=i, depth=-1, position=p).sel(side="chosen")) for i, p in enumerate(at)]
    assert ends == pytest.approx(rewards.sel(side="chosen").values, abs=1e-4)
    frozen = rl.reward_lens(rm, PAIRS[:3], norm="frozen").value
    parts = rl.contributions(rm, PAIRS[:3]).value.sel(side="chosen")
    first = parts.sel(component=["embed", "bias"]).sum("component")
    assert frozen.sel(side="chosen", depth=0).values == pytest.approx(first.values, abs=1e-4)


@every
def test_e5_e6_own_values_change_nothing_and_all_of_the_others_give_its_reward(models, name):
    rm = models[name]
    writes = ["embed", *(f"L{i}.{kind}" for i in range(rm.n_layers) for kind in ("attn", "mlp"))]
    acts = rl.capture(rm, PAIRS[:2], writes)
    own = rl.intervene(rm, PAIRS[:2], {"L1.attn": rl.from_run(acts)}).value.sel(state="change")
    assert np.abs(own.values).max() < 1e-5
    other = rl.intervene(rm, PAIRS[:2], {site: rl.from_run(acts.swapped()) for site in writes}).value
    rewards = rm.score_pairs(PAIRS[:2]).value
    expected = rewards.sel(side="rejected").values
    assert other.sel(state="intervened", side="chosen").values == pytest.approx(expected, abs=1e-4)


@every
def test_e7_direct_effects_average_to_the_shared_split(models, name):
    rm = models[name]
    noise, denoise = (
        rl.effects(rm, PAIRS[:3], ["embed", "L1.attn", "L2.mlp"], mode, path="direct").value
        for mode in ("noise", "denoise")
    )
    parts = rl.contributions(rm, PAIRS[:3]).value.sel(side="margin", component=["embed", "L1.attn", "L2.mlp"])
    assert ((noise + denoise) / 2).sel(part="direct").values == pytest.approx(parts.values, abs=1e-4)


@every
def test_effects_and_their_gradients_agree_with_a_forward_of_the_whole_model(models, name):
    """A write moved a little at the response's last token: by the sweep, by the gradient and by the module itself."""
    rm = models[name]
    tokens = rm.tokenize(*TEXT_PAIRS[0][:2])
    site, at = rl.Site("resid_post", 0), tokens.reward_pos
    torch.manual_seed(0)
    step = 1e-2 * torch.randn(rm.d_model)
    moved = rl.intervene(rm, [tokens], {site: rl.add(step)}).value.sel(state="change").item()

    def push(x):
        x = x.clone()
        x[:, at] += step
        return x

    ids = torch.tensor([tokens.ids])
    with torch.no_grad():
        clean = rm.module(input_ids=ids).logits[0, 0]
        with hooks.attached([rm.trunk.edit_residual(1, push)]):
            pushed = rm.module(input_ids=ids).logits[0, 0]
    assert moved == pytest.approx(float(pushed - clean), abs=1e-5)
    slope = gradients(rm, tokens, [site]).slopes[site][at]
    assert float(slope @ step) == pytest.approx(moved, abs=0.05 * abs(moved) + 1e-3)


@pytest.mark.parametrize("name", [name for name in LOCAL if name != "ldl"])
def test_local_directions_are_the_slope_of_the_head_behind_the_norm(folders, name):
    rm = rl.load(folders[name], dtype=torch.float64)
    readout, norm = rm.readout, rm.readout.norm
    torch.manual_seed(0)
    h = torch.randn(5, rm.d_model, dtype=torch.float64)
    direction = readout.direction(h)
    assert direction.exactness == readout.exactness == "local"
    assert ((direction.u * h).sum(-1) + direction.constant).tolist() == pytest.approx(readout.reward(h).tolist())
    step = 1e-6 * torch.randn(rm.d_model, dtype=torch.float64)
    held = norm.frozen(h + step, norm.scale(h))
    moved = readout.head(held)[:, readout.row] - readout.head(norm.frozen(h, norm.scale(h)))[:, readout.row]
    assert moved.tolist() == pytest.approx((direction.u @ step).tolist(), rel=1e-3, abs=1e-12)


@every
@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_integrated_contributions_close_from_their_baseline(models, name, baseline):
    rm = models[name]
    result = rl.integrated_contributions(rm, PAIRS, baseline, steps=128)
    rewards = rm.score_pairs(PAIRS).value
    gap = np.abs(result.value.sum("component") - rewards)
    assert float(gap.max()) < 0.02 * float(np.abs(result.value).sum("component").max())
    start = result.value.sel(component="baseline", side="chosen").values
    if baseline == "mean" and name in LOCAL:
        acts = rl.capture(rm, PAIRS, ["L2.resid_post"])["L2.resid_post"]
        assert start == pytest.approx([float(rm.readout.reward(acts.mean(0)))] * len(PAIRS), abs=1e-4)
    if baseline == "zero" and name in GATED:
        plain = rl.contributions(rm, PAIRS, scale="own").value.sel(side="chosen")
        assert result.value.sel(side="chosen").values == pytest.approx(plain.values, abs=1e-5)


def test_integrated_contributions_refuse_what_they_do_not_have(models):
    with pytest.raises(rl.DataError, match="steps=0"):
        rl.integrated_contributions(models["grm"], PAIRS, steps=0)
    with pytest.raises(rl.CheckFailed, match="1 steps; take more of them"):
        rl.integrated_contributions(models["urm"], PAIRS, "zero", steps=1)


@every
def test_what_asks_for_one_row_is_refused(models, name):
    rm = models[name]
    for ask in (rl.vocab_alignment, rl.ov_pull):
        with pytest.raises(rl.StructureError, match="What the weights alone say has no answer"):
            ask(rm)
    for one in (rm, *([rm.for_objective(1)] if len(rm.objectives) > 1 else [])):  # others are made of its row too
        with pytest.raises(rl.DataError, match="no head row to edit.*rl.project_out"):
            rl.edit_head(one, torch.ones(1, rm.d_model))


def test_what_reads_states_and_no_row_is_answered(models):
    """Terms of edited pairs are compared in the residual; a steered state is read by the head as it is."""
    edited = {name: rl.edited_pairs(NATURAL, name) for name in ("add_emoji", "hedge")}
    one_trunk = [models["armo"].for_objective(1), models["armo"], models["urm"], models["inf_orm"]]
    linear, *others = (rl.term_conflict(rm, edited, ["direction"]).value.values for rm in one_trunk)
    assert all(np.array_equal(linear, found, equal_nan=True) for found in others) and np.nanmax(np.abs(linear)) > 0.1
    rm, pair, last = models["urm"], edited["hedge"][0], "L2.resid_post"
    v = torch.eye(rm.d_model)[3]
    steered = rl.transfer_matrix(rm, {"hedge": v}, {"hedge": edited["hedge"]}, op="steer").value[0, 0]
    acts = rl.capture(rm, [pair], [last])[rl.Site.parse(last)]
    moved = []
    for response, h in zip((pair.chosen, pair.rejected), acts, strict=True):
        change = rl.intervene(rm, [(pair.prompt, response)], {last: rl.add(v, 0.1 * float(h.norm()))}).value
        moved.append(float(change.sel(state="change")[0]))
    assert float(steered) == pytest.approx(moved[0] - moved[1], abs=1e-4)
    with pytest.raises(rl.StructureError, match="weights of this reward depend on the prompt"):
        rl.transfer_matrix(models["armo"], {"hedge": v}, {"hedge": edited["hedge"]}, op="steer")


@pytest.mark.parametrize("name", ["armo", "urm"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in SLOW])
def test_every_method_answers_or_refuses(models, name, method):
    """Every result's own checks hold (a check out of tolerance raises), and what needs one row says so."""
    if method in ONE_ROW:
        with pytest.raises((rl.StructureError, rl.DataError), match="no answer for this reward|no head row to edit"):
            METHODS[method](models[name], PAIRS)
    else:
        meta = METHODS[method](models[name], PAIRS).meta
        assert (meta["models"]["one"] if method == "crosscoder latents" else meta).get("readout", KINDS[name]) == KINDS[
            name
        ]


def test_what_needs_no_row_is_answered_and_what_does_is_left_out_with_the_reason(models):
    edited = rl.edited_pairs(NATURAL, rl.edits_of(["add_emoji"])[0])
    found = rl.bias_direction(models["armo"], edited)
    assert found.meta["cosine_with_u"] is None and found.meta["reliability"]["value"] is not None
    one = models["armo"].for_objective(models["armo"].objectives[1])
    compared = rl.compare({"gated": models["armo"], "one row": one}, PAIRS, n_permutations=0)
    angle = compared.value.sel(measure="reward angle")
    assert np.isnan(angle).all() and "an angle of its own at every text" in angle.reason.item()
    assert float(compared.value.sel(measure="cka differences")[0]) == pytest.approx(1.0)  # one trunk


@every
def test_the_base_under_every_part_of_the_head(folders, models, name):
    rm = models[name]
    trunk = copy.deepcopy(rm.module.base_model)
    trunk.norm.weight.data.mul_(1.5)
    found = rl.base_under_head(rm, trunk)
    ids = rm.tokenize(*TEXT_PAIRS[0][:2]).ids
    expected = published.published_columns(folders[name], name, ids, trunk=trunk)[0]
    assert found.score(*TEXT_PAIRS[0][:2]) == pytest.approx(float(expected), abs=1e-5)


@every
def test_token_attribution_telescopes(models, name):
    for method in ("prefix", "truncate"):
        rl.token_attribution(models[name], PAIRS[:2], method=method)


@every
def test_in_sixteen_bits(folders, name):
    rm = rl.load(folders[name], dtype=torch.bfloat16)
    rl.contributions(rm, PAIRS[:2])


@pytest.mark.parametrize("name", ["inf_orm", "armo"])
def test_rounding_of_the_head_hides_no_other_head(folders, name):
    """Heads of several maps are allowed their own rounding in 16 bits; another head of their size is not theirs."""
    made = rl.load(folders[name], dtype=torch.bfloat16)
    head = made.module.score[0] if name == "inf_orm" else made.module.gating.layers[2]
    readout = copy.deepcopy(made.readout)
    with torch.no_grad():
        head.weight.mul_(1.3)
    with pytest.raises(rl.LoadError, match="failed the test 'own reward'"):
        rl.RewardModel(made.module, made.tokenizer.hf, readout=readout)


@every
def test_a_saved_model_loads_with_the_same_score(models, name, tmp_path):
    rm = models[name]
    folder = rm.save_pretrained(tmp_path / "again")
    assert 'rl.load("this folder")' in (folder / "README.md").read_text()
    assert rl.load(folder).score(*TEXT_PAIRS[0][:2]) == rm.score(*TEXT_PAIRS[0][:2])


def test_no_mean_over_rows_is_called_a_reward(folders, models, tmp_path):
    assert models["armo"].objectives == ("reward", *(f"helpsteer-{x}" for x in (
        "helpfulness", "correctness", "coherence", "complexity", "verbosity")))  # fmt: skip
    with pytest.raises(rl.LoadError, match="has no row 'mean'"):
        rl.load(folders["armo"], objective="mean")
    folder = published.save(tmp_path, "qwen_math", num_labels=2)
    published.edit_weights(folder, lambda s: s | {k: torch.cat([s[k]] * 2) for k in ("score.2.weight", "score.2.bias")})
    with pytest.raises(rl.LoadError, match="has 2 rows and none was chosen.*a mean over rows is no reward"):
        rl.load(folder)


def without(*names):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(names)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("armo", without("gating."), "has no trained reward head.*lacks gating.layers.0.bias"),
        ("armo", without("reward_transform_matrix"), "lacks reward_transform_matrix"),
        ("qrm", without("gating.layers.2"), "lacks gating.layers.2"),
        ("inf_orm", without("score.2"), "lacks score.2.bias, score.2.weight"),
        ("grm", without("v_head"), "lacks v_head.summary.0.bias"),
        ("urm", without("weights.fc.4"), "lacks weights.fc.4.bias"),
        ("inf_orm", without("model.layers.1.mlp"), "lacks weights of its trunk"),
        ("inf_orm", lambda s: s | {"score.4.weight": torch.ones(1, 1)}, "weights without a place: score.4.weight"),
        (
            "armo", lambda s: s | {"regression_layer.weight": torch.ones(7, 32)},
            r"regression_layer.weight of shape \(7, 32\).*\(5, 32\), by its config",
        ),
        ("qwen_math", lambda s: s | {"score.0.weight": s["score.0.weight"] * torch.nan}, "not finite"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_not_whole_are_refused(tmp_path, name, change, message):
    folder = published.save(tmp_path, name)
    published.edit_weights(folder, change)
    with pytest.raises(rl.LoadError, match=message):
        rl.load(folder)


def test_heads_in_files_of_their_own_must_be_there_and_fit(tmp_path, capfd):
    folder = published.save(tmp_path, "ldl")
    rl.load(folder)
    assert "MISSING" not in capfd.readouterr().err  # transformers would call the head newly initialised
    whole = torch.load(folder / "gating_layer.pt")
    torch.save({k: v for k, v in whole.items() if "6" not in k}, folder / "gating_layer.pt")
    with pytest.raises(rl.LoadError, match="gating_layer.pt: .*network.6.weight"):
        rl.load(folder)
    (folder / "gating_layer.pt").unlink()
    with pytest.raises(rl.LoadError, match="has no trained reward head.*gating_layer.pt"):
        rl.load(folder)
