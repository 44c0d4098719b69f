"""Rewards read from a language model's logits: against the model's own, under the identities, and what is refused."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from every_method import METHODS
from families import FAMILIES, TEXT_PAIRS, tiny_model, tiny_tokenizer
from language_models import EXTRA, JUDGE, LANGUAGE_FAMILIES, TIED, plain_log_odds, tiny_language_model
from reward_lens.model.checks import PROBES

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
every = pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
TOKENS = ("the", " the")


@functools.cache
def model(family: str, template: str | None = None, dtype: torch.dtype = torch.float32) -> rl.RewardModel:
    module, tokenizer = tiny_language_model(family, seed=1, dtype=dtype)
    return rl.RewardModel(module, tokenizer, readout=readout(family, template=template), name=family)


def readout(family: str, positive=TOKENS[0], negative=TOKENS[1], **options) -> rl.VocabReadout:
    return rl.VocabReadout(positive, negative, before_cap=family == "gemma2", **options)


def cap_of(family: str) -> float | None:
    return EXTRA.get(family, {}).get("final_logit_softcapping")


def rows_of(tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in TOKENS)


def rendered(tokenizer, prompt, response) -> list[int]:
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    turns = [*turns, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, return_dict=False)


# --- the reward is the model's own ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize("kind", ["log-odds", "row 0", "judge"])
def test_the_reward_is_the_models_own(family, kind):
    module, tokenizer = tiny_language_model(family, seed=1)
    spec = {
        "log-odds": readout(family), "row 0": readout(family, 0, None), "judge": readout(family, template=JUDGE),
    }[kind]  # fmt: skip
    rm = rl.RewardModel(module, tokenizer, readout=spec)
    rows = (0,) if kind == "row 0" else rows_of(tokenizer)
    for prompt, response in PROBES[:3]:
        ids = rendered(tokenizer, prompt, response)
        if kind == "judge":
            text = f'Question: {prompt}\nAnswer: {response}\nIs that {{"json": 1}} right?'
            asked = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        expected = plain_log_odds(module, ids, rows, cap_of(family))
        assert abs(rm.score(prompt, response) - expected) <= 1e-6 * max(1, abs(expected))
        assert abs(rm.hf_score(prompt, response) - expected) <= 1e-6 * max(1, abs(expected))


others = [f for f in FAMILIES if f not in LANGUAGE_FAMILIES]
others = [pytest.param(f, marks=[] if f in ("mixtral", "falcon", "opt") else pytest.mark.full) for f in others]


@pytest.mark.parametrize("family", others)
def test_the_reward_is_the_models_own_on_every_other_backbone(family):
    rm = model(family)
    for prompt, response in PROBES[:3]:
        ids = rendered(rm.tokenizer.hf, prompt, response)
        expected = plain_log_odds(rm.module, ids, rows_of(rm.tokenizer.hf))
        assert abs(rm.score(prompt, response) - expected) <= 1e-6 * max(1, abs(expected))


@every
def test_bfloat16_passes_its_load_report(family):
    rm = model(family, dtype=torch.bfloat16)
    logits, exact = rm.vocabulary.logits, model(family).vocabulary.logits
    assert logits.factor == pytest.approx(exact.factor, rel=2e-3) and logits.cap == exact.cap
    parts = rl.contributions(rm, PAIRS).value.sel(side="chosen")
    np.testing.assert_allclose(parts.sum("component"), rm.score_pairs(PAIRS).value.sel(side="chosen"), atol=2e-2)


@every
def test_what_the_load_report_and_the_readout_say(family):
    rm = model(family)
    found = str(rm.load_report.value.sel(check="logits").found.item())
    factor = {"granite": "0.166667 z", "cohere": "0.3 z", "gemma2": "3 tanh(1 z / 3)"}.get(family, "1 z")
    assert found.startswith(f"logit = {factor}, ")
    assert rm.readout.kind == "vocabulary" and rm.objectives == ("'the' - ' the'",)
    assert rm.readout.direction(torch.ones(1, rm.d_model)).exactness == "exact"
    weight = rm.head.weight.detach()
    plus, minus = rows_of(rm.tokenizer.hf)
    scale = {"granite": 1 / 6, "cohere": 0.3}.get(family, 1.0)
    torch.testing.assert_close(rm.readout.weight, scale * (weight[plus] - weight[minus]), rtol=1e-6, atol=1e-7)
    reads = rl.contributions(rm, PAIRS[:1]).meta["reads"]
    assert reads["rows"] == [plus, minus] and reads["pieces"] == ["the", "\u0120the"]


@every
def test_padding_and_batching_change_nothing(family):
    rm = model(family)
    tokens = [t for both in rm.tokenize_pairs(PAIRS) for t in both]
    alone = torch.stack([rm.rewards([t])[0] for t in tokens])
    torch.testing.assert_close(rm.rewards(tokens, batch_size=len(tokens)), alone, rtol=1e-5, atol=1e-5)


def test_the_last_token_is_read_even_if_it_is_the_padding_token():
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer = tiny_tokenizer(pad="eos", add_bos=False, chat_template=template)
    module, _ = tiny_language_model("llama", tokenizer=tokenizer)
    rm = rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(0))
    tokens = rm.tokenize("Hi", "You")
    assert tokens.ids[-1] == tokenizer.pad_token_id and tokens.reward_pos == len(tokens) - 1
    assert rm.score("Hi", "You") == pytest.approx(plain_log_odds(module, list(tokens.ids), (0,)), abs=1e-6)


def test_a_planted_difference_of_rows_is_what_is_read():
    """The two rows differ in one coordinate, by 2: the reward is twice that coordinate of the normed residual."""
    module, tokenizer = tiny_language_model("llama")
    plus, minus = rows_of(tokenizer)
    with torch.no_grad():
        module.lm_head.weight[plus] = module.lm_head.weight[minus]
        module.lm_head.weight[plus, 5] += 2.0
    rm = rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(*TOKENS))
    with torch.no_grad():
        normed = module.model(input_ids=torch.tensor([rm.tokenize(*PROBES[0]).ids])).last_hidden_state[0, -1]
    assert rm.score(*PROBES[0]) == pytest.approx(2 * float(normed[5]), abs=1e-5)


# --- the identities -------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("template", [None, JUDGE], ids=["row", "judge"])
def test_e2_e3_e4_lens_and_contributions_add_up(family, template):
    rm = model(family, template)
    rewards = rm.score_pairs(PAIRS).value
    size = float(np.abs(rewards).max())
    lens = rl.reward_lens(rm, PAIRS).value
    np.testing.assert_allclose(lens.isel(depth=-1), rewards, atol=2e-5 * max(1, size))
    for by in ("component", "head", "neuron", "token"):
        value = rl.contributions(rm, PAIRS, by=by).value
        value = value.sum("position") if by == "token" else value
        sides = ["chosen", "rejected"] if by == "token" else ["chosen", "rejected", "margin"]
        gap = np.abs(value.sel(side=sides).sum("component") - rewards.sel(side=sides))
        assert float(gap.max()) <= 1e-5 * float(np.abs(value).sum("component").max())


@every
@pytest.mark.parametrize("template", [None, JUDGE], ids=["row", "judge"])
def test_e5_e6_patching(family, template):
    rm = model(family, template)
    pairs = [p for p, (a, b) in zip(PAIRS, rm.tokenize_pairs(PAIRS), strict=True) if len(a) == len(b)]
    sites = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    for at in ("final", "response", "all"):
        acts = rl.capture(rm, pairs, sites, at=at)
        own = rl.intervene(rm, pairs, dict.fromkeys(sites, rl.from_run(acts)), at=at).value
        assert float(np.abs(own.sel(state="change")).max()) == 0.0
        value = rl.intervene(rm, pairs, dict.fromkeys(sites, rl.from_run(acts.swapped())), at=at).value
        target = value.sel(side="rejected", state="clean")
        assert float(np.abs(target - value.sel(side="chosen", state="clean")).max()) > 3e-4  # the test could fail
        np.testing.assert_allclose(value.sel(side="chosen", state="intervened"), target, atol=1e-5)


FEW = ("lens", "by head", "effects, heads, tail", "path effects", "edges", "knock-out", "truncate")
some = [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in METHODS]


@pytest.mark.parametrize("name", some)
@pytest.mark.parametrize("template", [None, JUDGE], ids=["row", "judge"])
def test_every_method_takes_a_vocabulary_readout(name, template):
    result = METHODS[name](model("llama", template), PAIRS)
    assert isinstance(result, rl.Result) and result.unit


# --- soft caps and other maps of the logits -------------------------------------------------------------------


def test_a_soft_cap_is_refused_unless_asked_for():
    module, tokenizer = tiny_language_model("gemma2")
    with pytest.raises(rl.StructureError, match=r"soft-capped.*3 tanh\(1 z / 3\).*before_cap=True"):
        rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(*TOKENS))


def test_before_the_cap_signs_and_the_order_of_one_token_are_the_models_own():
    texts = [(p.prompt, r) for p in PAIRS for r in (p.chosen, p.rejected)]
    odds = model("gemma2")
    one = rl.RewardModel(odds.module, odds.tokenizer.hf, readout=rl.VocabReadout("the", before_cap=True))
    plus, minus = rows_of(odds.tokenizer.hf)
    with torch.no_grad():
        last = [odds.module(input_ids=torch.tensor([odds.tokenize(*t).ids])).logits[0, -1].double() for t in texts]
    capped = np.array([[float(x[plus]), float(x[minus])] for x in last])
    read = np.array([odds.score(*t) for t in texts])
    assert (np.sign(read) == np.sign(capped[:, 0] - capped[:, 1])).all()
    assert np.abs(read - (capped[:, 0] - capped[:, 1])).max() > 1e-2  # the cap bends what the tests see
    assert (np.argsort([one.score(*t) for t in texts]) == np.argsort(capped[:, 0])).all()


def test_a_model_without_a_cap_is_read_alike_before_it():
    rm = model("llama")
    before = rl.RewardModel(rm.module, rm.tokenizer.hf, readout=rl.VocabReadout(*TOKENS, before_cap=True))
    assert before.score(*PROBES[0]) == rm.score(*PROBES[0])
    assert before.vocabulary.describe()["before_cap"] is False


@pytest.mark.parametrize("bend", [lambda z: z + 0.01 * z**2, torch.relu, lambda z: 0 * z, lambda z: z / 0.0])
def test_logits_that_are_no_multiple_are_refused(bend):
    module, tokenizer = tiny_language_model("llama")
    plain = module.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = bend(out.logits)
        return out

    module.forward = forward
    with pytest.raises(rl.StructureError, match="does to its logits was not understood"):
        rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(*TOKENS))


# --- judges ---------------------------------------------------------------------------------------------------


def test_spans_of_a_judges_text():
    rm = model("llama", JUDGE)
    tokens = rm.tokenize("What does {response} mean, {a}?", "It is {prompt}")
    text = "".join(tokens.pieces)
    assert "Question: What does {response} mean, {a}?\nAnswer: It is {prompt}\n" in text and '{"json": 1}' in text
    assert "".join(tokens.pieces[i] for i in tokens.response).strip() == "It is {prompt}"
    assert text.endswith("<|assistant|>\n") and tokens.reward_pos == len(tokens) - 1
    turns = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"},
             {"role": "user", "content": "Three"}]  # fmt: skip
    assert "Question: user: One\n\nassistant: Two\n\nuser: Three\n" in "".join(rm.tokenize(turns, "x").pieces)


def test_a_raw_template_gets_the_tokenizers_own_special_tokens_only():
    module, tokenizer = tiny_language_model("llama", tokenizer=tiny_tokenizer(chat_template=None))
    spec = rl.VocabReadout(*TOKENS, template="{prompt} {response} Right?", chat=False)
    rm = rl.RewardModel(module, tokenizer, readout=spec)
    ids = list(tokenizer("Who are you Right?")["input_ids"])
    assert rm.tokenize("Who", "are you").ids == tuple(ids) and ids[0] == tokenizer.bos_token_id
    assert rm.score("Who", "are you") == pytest.approx(plain_log_odds(module, ids, rows_of(tokenizer)), abs=1e-6)
    doubled = rl.VocabReadout(*TOKENS, template="<bos>{prompt} {response} Right?", chat=False)
    with pytest.raises(rl.LoadError, match="no doubled BOS"):
        rl.RewardModel(module, tokenizer, readout=doubled)


def test_two_templates_are_two_rewards(tmp_path):
    one, other = model("llama", JUDGE), model("llama", JUDGE + " Truly?")
    scores = one.score_pairs(PAIRS)
    rl.accuracy(one, PAIRS, scores=scores)
    with pytest.raises(rl.DataError, match="not of these inputs and this model"):
        rl.accuracy(other, PAIRS, scores=scores)
    rl.store_activations(one, [("Who?", "You."), ("What?", "It.")], "L1.resid_post", folder=tmp_path)
    with pytest.raises(rl.DataError, match="asked"):
        rl.store_activations(other, [("Who?", "You."), ("What?", "It.")], "L1.resid_post", folder=tmp_path)


def test_single_tokens_are_swept_inside_a_judges_template():
    rm = model("llama", "Question: {prompt}\nAnswer:\n{response}\nIs that right?")
    swept = rl.vocab_sweep(rm, ["Who?"])
    assert swept.meta["n_scored"] > 100
    for text, value in list(zip(swept.value["token"].values, swept.value.values[:, 0], strict=True))[::20]:
        assert rm.score("Who?", text) == pytest.approx(float(value), abs=1e-5)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positive", "negative", "match"),
    [
        (" Yes", "the", r"' Yes' is not one token.*4 tokens: '\u0120', 'Y', 'e', 's'"),
        ("", "the", "'' is not one token.*0 tokens: nothing"),
        ("the", "the", "The two tokens are one"),
        ("the", True, "A token was not understood.*True"),
        (100_000, None, "no such row.*row 100000.*0 to 287"),
        (-1, None, "no such row"),
    ],
)
def test_tokens_that_name_no_row(positive, negative, match):
    module, tokenizer = tiny_language_model("llama")
    with pytest.raises(rl.DataError, match=match):
        rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(positive, negative))


@pytest.mark.parametrize("template", ["{prompt}", "{response} {response}", "{a} of {prompt}", "{response} {a} {b}", ""])
def test_templates_without_their_placeholders(template):
    with pytest.raises(rl.DataError, match="no place for what is judged.*{response} once, or {a} once and {b} once"):
        rl.VocabReadout("the", template=template)
    with pytest.raises(rl.DataError, match="needs a template of its own"):
        rl.VocabReadout("the", chat=False)


def test_a_placeholder_that_nothing_fills():
    with pytest.raises(
        rl.DataError, match=r"does not ask about the prompt.*\{question\}.*write \{prompt\} in its place"
    ):
        rl.VocabReadout("the", template="Is this a good answer to {question}? {response}")
    rl.VocabReadout("the", template='Is this polite? Answer as {"polite": true}. {response}')  # judges responses alone
    rl.VocabReadout("the", template="{prompt} {response} {score}")


def test_a_reward_model_has_no_vocabulary_to_read():
    module, tokenizer = tiny_model("llama")
    with pytest.raises(rl.StructureError, match="LlamaForSequenceClassification has no vocabulary.*ForCausalLM"):
        rl.RewardModel(module, tokenizer, readout=rl.VocabReadout("the"))
    module, tokenizer = tiny_language_model("llama")
    module.lm_head = torch.nn.Embedding.from_pretrained(module.lm_head.weight)
    with pytest.raises(rl.LoadError, match="unembedding of LlamaForCausalLM is quantised"):
        rl.RewardModel(module, tokenizer, readout=rl.VocabReadout("the"))


def test_what_would_change_the_language_model_is_refused(tmp_path):
    rm = model("llama")
    words = "not for a reward read from a vocabulary.*rl.project_out.*sequence classifier"
    pairs = [rl.Pair(f"prompt {i}", "the one " * (i + 1), "another") for i in range(8)]
    for change in (
        lambda: rl.edit_head(rm, torch.ones(rm.d_model)), lambda: rm.save_pretrained(tmp_path / "x"),
        lambda: rl.erase_concept(rm, pairs), lambda: rm.for_objective(0), lambda: rm.row,
    ):  # fmt: skip
        with pytest.raises(rl.StructureError, match=words):
            change()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_of_the_network_are_read_alike(family):
    rm = model(family, JUDGE)
    random = rl.random_weight_copy(rm, seed=0)
    assert random.objectives == rm.objectives and random.score(*PROBES[0]) != rm.score(*PROBES[0])
    assert torch.equal(random.readout.weight, rm.readout.weight)
    base, _ = tiny_language_model(family, seed=5)
    if family in TIED:
        with pytest.raises(rl.DataError, match="its weights are also those of transformer.wte"):
            rl.base_under_head(rm, base)
        return
    other = rl.base_under_head(rm, base)
    assert torch.equal(other.readout.weight, rm.readout.weight) and other.score(*PROBES[0]) != rm.score(*PROBES[0])


# --- loading --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    def save(family="llama", build=tiny_language_model, **options):
        module, tokenizer = build(family, **options)
        module.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_a_saved_language_model_loads(saved, family):
    folder = saved(family)
    rm = rl.load(folder, readout=rl.VocabReadout(*TOKENS, template=JUDGE))
    assert rm.load_report.value.sel(check="head in checkpoint") == 0
    module, tokenizer = tiny_language_model(family)
    direct = rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(*TOKENS, template=JUDGE))
    assert rm.score(*PROBES[0]) == pytest.approx(direct.score(*PROBES[0]), abs=1e-6)
    with pytest.raises(rl.LoadError, match=r"readout=rl.VocabReadout\(' Yes', ' No'\)"):
        rl.load(folder)


def test_what_is_no_language_model_is_refused(saved, tmp_path):
    with pytest.raises(rl.StructureError, match="no vocabulary"):
        rl.load("demo", readout=rl.VocabReadout("the"))
    folder = saved("llama", tiny_model)
    with pytest.raises(rl.LoadError, match="not a language model.*a reward head in the checkpoint .score.weight"):
        rl.load(folder, readout=rl.VocabReadout("the"))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(rl.LoadError, match="not a language model.*no weights for lm_head.weight"):
        rl.load(folder, readout=rl.VocabReadout("the"))


def test_an_adapter_of_a_language_model_is_merged(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = saved("llama")
    for task in ("CAUSAL_LM", "SEQ_CLS"):
        module, _ = (tiny_language_model if task == "CAUSAL_LM" else tiny_model)("llama")
        module.config._name_or_path = module.name_or_path = str(base)
        torch.manual_seed(0)
        wrapped = get_peft_model(
            module, LoraConfig(r=2, task_type=task, target_modules=["q_proj"], init_lora_weights=False)
        )
        wrapped.save_pretrained(tmp_path / task)
        if task == "CAUSAL_LM":
            expected = wrapped.eval()
    rm = rl.load(tmp_path / "CAUSAL_LM", readout=rl.VocabReadout(*TOKENS))
    ids = list(rm.tokenize(*PROBES[0]).ids)
    read = rm.score(*PROBES[0])
    assert read == pytest.approx(plain_log_odds(expected, ids, rows_of(rm.tokenizer.hf)), abs=1e-5)
    assert read != pytest.approx(rl.load(base, readout=rl.VocabReadout(*TOKENS)).score(*PROBES[0]), abs=1e-3)
    with pytest.raises(rl.LoadError, match="not a language model.*task type SEQ_CLS"):
        rl.load(tmp_path / "SEQ_CLS", readout=rl.VocabReadout("the"))
