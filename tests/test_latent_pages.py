"""Neighbours and histograms of latents against loops, and the explorer's page as text: what it says is what the results
hold, and what was not measured is said."""

import functools
import json

import numpy as np
import pytest
import torch

import reward_lens as rl
from dictionaries import constant_sae, identity_sae, random_sae
from families import STRUCTURES, TEXT_PAIRS, tiny_model
from pages import Page
from planted import KEYWORD, planted_model, planted_pairs
from reward_lens.methods.latents.latent_contexts import BINS
from reward_lens.report import latents, numbers
from reward_lens.report.explorer import write_explorer
from reward_lens.sae.dictionary import SAE

HOSTILE = "</script><script>alert(1)</script> & <b>"
PAIRS = [rl.Pair(*texts, id=f"p{i} {HOSTILE}") for i, texts in enumerate(TEXT_PAIRS)]
every = pytest.mark.parametrize("family", STRUCTURES)


@functools.cache
def model(family: str = "llama") -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


def many(n: int = 12) -> list[rl.Pair]:
    texts = {t[0]: t for t in planted_pairs("length", 3 * n)}
    return [rl.Pair(*t, id=f"q{i} {HOSTILE}") for i, t in enumerate(texts.values())][:n]


@functools.cache
def results(site: str = "L2.resid_post") -> tuple[rl.Result, ...]:
    sae = random_sae(site=site)
    return tuple(rl.explorer_results(model(), sae, many(), n_latents=12, n_tested=3, contexts=4))


def of(name: str, site: str = "L2.resid_post") -> rl.Result:
    return next(r for r in results(site) if r.name == name)


# --- neighbours


@every
def test_neighbours_are_those_of_a_loop(family):
    rm, sae = model(family), random_sae()
    result = rl.latent_neighbours(rm, sae, [7, 0, 41], top=5)
    assert result.value.shape == (3, 5) and result.unit == "cosine"
    rows = sae.W_dec.double()
    h = rl.capture(rm, PAIRS, ["L2.resid_post"])["L2.resid_post"]
    for i, j in enumerate((7, 0, 41)):
        cosines = {k: float(torch.cosine_similarity(rows[j], rows[k], dim=0)) for k in range(48) if k != j}
        best = sorted(cosines, key=lambda k: -cosines[k])[:5]
        assert result.value["neighbour_index"].values[i].tolist() == best
        np.testing.assert_allclose(result.value.values[i], [cosines[k] for k in best], atol=1e-6)
        for u in rm.readout.direction(h).u.double():  # of every text the same
            along = float(torch.cosine_similarity(rows[j], u, dim=0))
            assert float(result.value["reward_cosine"][i]) == pytest.approx(along, abs=1e-5)
        assert float(result.value["norm"][i]) == pytest.approx(float(rows[j].norm()), rel=1e-6)


def test_an_opposite_row_is_the_farthest_and_there_is_no_reward_direction_inside():
    rm, sae = model(), identity_sae(site="L1.resid_post")
    result = rl.latent_neighbours(rm, sae, [3], top=100)
    assert result.value.sizes["neighbour"] == 63 and int(result.value["neighbour_index"][0, -1]) == 35
    assert float(result.value[0, -1]) == -1 and np.isnan(result.value["reward_cosine"]).all()


def test_rows_without_length_have_no_neighbours_and_are_none():
    sae = random_sae()
    weights = {n: getattr(sae, n).detach().clone() for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    weights["W_dec"][[5, 6]] = 0
    empty = SAE(**weights, activation="topk", k=6, site=sae.site)
    result = rl.latent_neighbours(model(), empty, [5, 0], top=47)
    assert np.isnan(result.value[0]).all() and (result.value["neighbour_index"][0] == -1).all()
    assert int((result.value["neighbour_index"][1] == -1).sum()) == 2
    assert not {5, 6} & set(result.value["neighbour_index"].values[1].tolist())
    assert np.isnan(result.value["reward_cosine"].values[0]) and "length zero" in result.checks[-1].note


@pytest.mark.parametrize(("chosen", "top"), [([48], 3), ([-1], 3), ([], 3), ([1, 1], 3), ([1], 0)])
def test_neighbours_of_nothing_are_refused(chosen, top):
    with pytest.raises(rl.DataError):
        rl.latent_neighbours(model(), random_sae(), chosen, top=top)


def test_a_dictionary_of_one_latent_has_no_neighbours():
    with pytest.raises(rl.DataError, match="1 latents"):
        rl.latent_neighbours(model(), constant_sae(torch.zeros(32), d_sae=1), [0])


# --- histograms


def test_histograms_count_every_active_position_once():
    rm, sae = model(), random_sae(site="L1.resid_post")
    found = rl.latent_contexts(rm, sae, PAIRS, range(48), top=1).meta["histogram"]
    held = rl.capture(rm, PAIRS, ["L1.resid_post"], "response")
    texts = {t.ids: x for t, x in zip(held.tokens, held["L1.resid_post"], strict=True)}
    z = torch.cat([sae.encode(x) for x in texts.values()]).double().numpy()
    assert set(found) == {f"F{j}" for j in np.flatnonzero(z.any(0))}
    for label, bins in found.items():
        values = z[:, int(label[1:])]
        values, width, n = values[values > 0], bins["width"], len(bins["counts"])
        assert np.log2(width) == round(np.log2(width)) and BINS / 2 < n <= BINS and bins["counts"][-1] > 0
        edges = width * np.arange(n + 1)
        counts = [int(((values > low) & (values <= high)).sum()) for low, high in zip(edges, edges[1:], strict=False)]
        assert bins["counts"] == counts and sum(counts) == len(values)


def test_histograms_do_not_depend_on_the_order_of_texts():
    rm, sae = model(), random_sae(site="L1.resid_post")
    one, other = (rl.latent_contexts(rm, sae, some, range(48), top=1).meta for some in (PAIRS, PAIRS[::-1]))
    assert one["histogram"] == other["histogram"] and one["n_tokens"] == other["n_tokens"]


# --- the page


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_explorer(results(), tmp_path_factory.mktemp("explorer") / "latents.html")


@pytest.fixture(scope="module")
def page(path) -> Page:
    found = Page(path.read_text(encoding="utf-8"))
    assert found.stack == []
    return found


def data(page: Page) -> dict:
    (text,) = [text for _, attrs, text in page.raw if attrs.get("id") == "data"]
    assert text.isascii() and not set("<>&") & set(text)
    return {latent["label"]: latent for latent in json.loads(text)["latents"]}


def test_the_page_is_one_safe_file(path, page):
    links = [attrs[name] for _, attrs in page.elements for name in ("src", "href") if name in attrs]
    assert links and all(link.startswith("#") for link in links)
    assert len(page.all("script")) == 2 and not page.all("link") and not page.all("img")
    assert "<script>alert" not in path.read_text(encoding="utf-8")
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert any(HOSTILE in c["where"] for latent in data(page).values() for c in latent["contexts"])


def test_the_list_is_sorted_by_the_size_of_the_contribution_and_says_each(page):
    rows = [attrs for attrs in page.all("tr") if "data-label" in attrs]
    margin = of("latent_contributions").mean.sel(side="margin")
    own = margin[margin["kind"].values == "latent"]
    tested = of("reward_latents")
    order = own["index"].values[np.argsort(-np.abs(own.values), kind="stable")].tolist()
    listed = [int(row["data-index"]) for row in rows]
    assert listed[: len(order)] == order
    assert set(listed) == set(order) | set(tested.value["index"].values.tolist())
    for row in rows[: len(order)]:
        assert float(row["data-contribution"]) == float(own.sel(latent=row["data-label"]))
        assert numbers.number(float(row["data-contribution"]), signed=True) in page.words
    measured = {row["data-label"]: float(row["data-effect"]) for row in rows if "data-effect" in row}
    expected = tested.mean.sel(side="margin").to_series()
    assert measured == pytest.approx(expected.to_dict())


def test_the_detail_is_what_the_results_hold(page):
    found, contexts, near = data(page), of("latent_contexts").value, of("latent_neighbours").value
    assert set(found) == set(contexts["latent"].values)
    for label, latent in found.items():
        facts = {name: (value, remark) for name, value, remark in latent["facts"]}
        one = contexts.sel(latent=label)
        assert latent["histogram"] == of("latent_contexts").meta["histogram"].get(label)
        assert numbers.share(float(one["density"])) in facts["density"][0]
        cosine = float(near.sel(latent=label)["reward_cosine"])
        assert facts["cosine with the reward direction"][0] == numbers.number(cosine, signed=True)
        named = [f"F{j}" for j in near.sel(latent=label)["neighbour_index"].values]
        assert [n for n, _, _ in latent["neighbours"]] == named
        assert [listed for *_, listed in latent["neighbours"]] == [n in found for n in named]
        assert len(latent["contexts"]) == int((one["text"] != "").sum())
        for c, context in enumerate(latent["contexts"]):
            (peak,) = [t for t in context["tokens"] if t[3]]
            assert peak[1] in {f"p{i}" for i in range(1, 11)}
            assert context["peak"] == numbers.number(float(one.isel(context=c).sel(offset=0)))
            assert peak[2] == "+" + context["peak"]
        assert latent["contexts"][0]["tokens"][[t[3] for t in latent["contexts"][0]["tokens"]].index(1)][1] == "p10"


def test_effects_come_with_interval_and_adjusted_p_or_are_said_to_be_missing(page):
    effects = of("reward_latents").dataset.sel(side="margin")
    name = "margin that goes when it is set to 0"
    for label, latent in data(page).items():
        ((value, remark),) = [(v, r) for n, v, r in latent["facts"] if n == name]
        if label in effects["latent"].values:
            one = effects.sel(latent=label)
            assert value == numbers.number(float(one["mean"]), signed=True)
            assert f"p {numbers.number(float(one['p_adjusted']))} after Holm over 3 latents" in remark
            assert numbers.ends(float(one["low"]), float(one["high"])) in remark
        else:
            assert value == "not measured" and "the 3 latents of the largest first-order effect were" in remark


def test_the_head_and_the_checks(page):
    share = of("latent_contributions").meta["error_share"]["margin"]
    assert f"{numbers.share(share['mean'])} ({numbers.share(share['low'])} to" in page.words
    (whole,) = [c for c in of("latent_contributions").checks if c.name == "completeness"]
    assert f"completeness gap {numbers.gap(whole.gap)} (tolerance 1e\u22125)" in page.words
    report = of("sae_report").value
    for measure in ("fvu", "reward_recovered"):
        assert numbers.number(float(report.sel(measure=measure, at="final"))) in page.words
    meta = of("latent_contexts").meta
    assert f"{meta['n_texts']} different responses to {meta['n_prompts']} prompts" in page.words
    assert "48 latents, topk, k 6" in page.words and "L2.resid_post" in page.words
    for result in results():
        for check in result.checks:
            written = numbers.gap if np.isfinite(check.tolerance) else numbers.fact
            assert check.name in page.words and written(check.gap) in page.words
        assert result.meta["cannot_show"] in page.words


def test_the_margin_is_the_sum_of_its_rows():
    given = latents.Given(of("latent_contributions"), of("latent_contexts"), None, None, None)
    table = latents.margin_table(given)
    means = [float(mean.replace("\u2212", "-")) for _, mean, _, _ in table.rows]
    assert sum(means[:-1]) == pytest.approx(means[-1], abs=2e-3 * max(map(abs, means)))
    rewards = model().score_pairs(many()).value.sel(side="margin")
    assert means[-1] == pytest.approx(float(rewards.mean()), rel=1e-3)
    own = of("latent_contributions").dataset.sel(side="margin", latent="error")
    line = next(row for row in table.rows if row[0].startswith("error term"))
    assert line[1:] == [numbers.number(float(own[k]), signed=True) for k in ("mean", "low", "high")]


def test_kept_results_make_the_same_page(path, tmp_path):
    kept = [rl.load_result(r.save(tmp_path / f"{r.name}.nc")) for r in results()]
    assert write_explorer(kept, tmp_path / "again.html").read_bytes() == path.read_bytes()
    shuffled = {r.name: r for r in kept[::-1]}
    listed = Page(write_explorer(shuffled, tmp_path / "other.html").read_text(encoding="utf-8"))
    assert data(listed) == data(Page(path.read_text(encoding="utf-8")))


def test_two_results_are_enough_and_the_rest_is_said_to_be_missing(tmp_path):
    given = [of("latent_contributions"), of("latent_contexts")]
    page = Page(write_explorer(given, tmp_path / "few.html", title="Few & <far>").read_text(encoding="utf-8"))
    assert "Few & <far>" in page.words and "FVU, reward recovered not measured" in page.words
    assert not any("effect" in attrs.get("value", "") for attrs in page.all("option"))
    for latent in data(page).values():
        facts = {name: value for name, value, _ in latent["facts"]}
        assert facts["margin that goes when it is set to 0"] == "not measured" and not latent["neighbours"]


def test_another_site_has_no_reward_direction(tmp_path):
    page = Page(write_explorer(results("L1.resid_post"), tmp_path / "inside.html").read_text(encoding="utf-8"))
    for latent in data(page).values():
        facts = {name: (value, remark) for name, value, remark in latent["facts"]}
        assert facts["cosine with the reward direction"] == ("\u2013", "there is a fixed one at the last site only")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: [], "no latent_contributions, no latent_contexts"),
        (lambda: [of("latent_contributions")], "no latent_contexts"),
        (lambda: [*results(), of("sae_report")], "2 of sae_report"),
        (lambda: [*results(), model().score_pairs(PAIRS)], "score_pairs"),
        (lambda: [of("latent_contributions"), of("latent_contexts", "L1.resid_post")], "2 different dictionaries"),
        (
            lambda: [of("latent_contributions"), rl.latent_contexts(model(), random_sae(), PAIRS, [1])],
            "2 different texts",
        ),
        (
            lambda: [
                of("latent_contributions"),
                rl.latent_contexts(model("gpt2"), random_sae(), many(), [1]),
            ],
            "2 different models",
        ),
    ],
)
def test_what_does_not_belong_on_one_page_is_refused(given, words, tmp_path):
    with pytest.raises(rl.DataError, match=words):
        write_explorer(given(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_few_prompts_have_no_intervals_and_the_page_says_so(tmp_path):
    page = Page(
        rl.latent_explorer(model(), random_sae(), many(3), tmp_path / "few.html", n_latents=4, n_tested=2, contexts=1)
        .read_text(encoding="utf-8")
    )  # fmt: skip
    facts = [fact for latent in data(page).values() for fact in latent["facts"]]
    assert any("no interval: too few prompts" in remark for *_, remark in facts)
    assert any("no p: too few prompts" in remark for *_, remark in facts)
    assert "nan" not in page.words.lower().split() and not any("nan" in part.split() for fact in facts for part in fact)


def test_latents_that_are_never_active_are_no_crash(tmp_path):
    sae = constant_sae(torch.zeros(32))
    contributions = rl.latent_contributions(model(), sae, PAIRS)
    contexts = rl.latent_contexts(model(), sae, PAIRS, [2], top=2)
    page = Page(write_explorer([contributions, contexts], tmp_path / "dead.html").read_text(encoding="utf-8"))
    latent = data(page)["F2"]
    assert latent["contexts"] == [] and latent["histogram"] is None
    assert latent["facts"][0][1] == "no row of its own"


def test_a_planted_keyword_is_found_on_the_page(tmp_path):
    """The direction in which texts with the keyword differ from those without is one latent of this dictionary."""
    rm = rl.RewardModel(*planted_model("keyword"), name="keyword")
    pairs = [rl.Pair(*t, id=f"k{i}") for i, t in enumerate({t[0]: t for t in planted_pairs("keyword", 30)}.values())]
    h = rl.capture(rm, pairs, ["L1.resid_post"])["L1.resid_post"]
    direction = torch.nn.functional.normalize((h[::2] - h[1::2]).mean(0), dim=0)
    noise = torch.randn(7, rm.d_model, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.normalize(noise - (noise @ direction)[:, None] * direction, dim=1)
    rows = torch.cat([noise[:3], direction[None], noise[3:]])
    sae = SAE(rows.T, -rows @ h[1::2].mean(0), rows, h[1::2].mean(0), activation="relu", apply_b_dec_to_input=False,
              site="L1.resid_post")  # fmt: skip
    path = rl.latent_explorer(rm, sae, pairs, tmp_path / "keyword.html", n_tested=4)
    page = Page(path.read_text(encoding="utf-8"))
    first = next(attrs for attrs in page.all("tr") if "data-label" in attrs)
    assert first["data-label"] == "F3" and float(first["data-effect"]) > 0.5
    texts = ["".join(t[0] for t in c["tokens"]) for c in data(page)["F3"]["contexts"]]
    assert texts and all(KEYWORD in text or " chosen" in c["where"] for text, c in
                         zip(texts, data(page)["F3"]["contexts"], strict=True))  # fmt: skip
