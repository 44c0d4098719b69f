"""Process reward models from checkpoint folders of the published shapes and state-dict names."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reward_lens as rl
from step_models import SOLUTIONS, published, published_scores

FEW = [rl.Solution(prompt, steps) for prompt, steps in SOLUTIONS]


def saved(name: str, folder):
    """The checkpoint as its authors publish it: the language model's keys and, for a value head, `v_head.summary`."""
    module, tokenizer, readout = published(name)
    tokenizer.save_pretrained(folder)
    if name != "skywork-o1":
        module.save_pretrained(folder)
        return readout
    module.pretrained_model.save_pretrained(folder)
    head = {f"v_head.summary.{k}": v for k, v in module.v_head.summary.state_dict().items()}
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors", metadata={"format": "pt"})
    return readout


@pytest.mark.parametrize("name", ["math-shepherd", "rlhflow", "skywork-o1", "trl", "qwen2.5-math-prm"])
def test_a_folder_gives_the_authors_scores(name, tmp_path):
    rm = rl.load_step_model(tmp_path, saved(name, tmp_path))
    value = rl.step_rewards(rm, FEW).value
    for i, solution in enumerate(FEW):
        own = published_scores(name, solution.prompt, list(solution.steps))
        np.testing.assert_allclose(value.probability[i, : len(own)], own, atol=3e-6)
    assert rm.name == tmp_path.name
    assert "missing keys: none" in str(rm.load_report.value.sel(check="head in checkpoint").found.item())


def test_a_sharded_checkpoint_and_one_of_torch(tmp_path):
    readout = saved("skywork-o1", tmp_path)
    whole = rl.step_rewards(rl.load_step_model(tmp_path, readout), FEW).value
    weights = load_file(tmp_path / "model.safetensors")
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for key, tensor in weights.items():
        parts[sorted(parts)[key.startswith("v_head")]][key] = tensor
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    where = {key: file for file, tensors in parts.items() for key in tensors}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    np.testing.assert_allclose(rl.step_rewards(rl.load_step_model(tmp_path, readout), FEW).value, whole)
    for file in (*parts, "model.safetensors.index.json"):
        (tmp_path / file).unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    np.testing.assert_allclose(rl.step_rewards(rl.load_step_model(tmp_path, readout), FEW).value, whole)


def test_a_missing_head_is_refused(tmp_path):
    saved("rlhflow", tmp_path)
    for name in ("skywork-o1", "trl", "qwen2.5-math-prm"):
        with pytest.raises(rl.LoadError, match=r"the checkpoint lacks (v_head\.summary\.weight|score)"):
            rl.load_step_model(tmp_path, rl.STEP_READOUTS[name])
    with pytest.raises(rl.LoadError, match="could not be loaded"):
        rl.load_step_model(tmp_path / "nowhere", rl.STEP_READOUTS["trl"])


@pytest.mark.parametrize("name", ["trl", "math-shepherd"])
def test_an_adapter_live_and_saved_with_its_head_or_without(name, tmp_path):
    """TRL's PRMTrainer over a language model: peft wraps the trunk and saves the new head whole."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    module, tokenizer, readout = published(name)
    base = AutoModelForCausalLM.from_config(module.config).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def adapted(task: str | None):
        torch.manual_seed(1)
        kind = AutoModelForTokenClassification if name == "trl" else AutoModelForCausalLM
        settings = LoraConfig(r=2, task_type=task, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(kind.from_pretrained(tmp_path / "base"), settings).eval()

    live = adapted("TOKEN_CLS" if name == "trl" else "CAUSAL_LM")
    live.save_pretrained(tmp_path / "adapter")
    rm = rl.step_model(live, tokenizer, readout)
    ids = rm.tokenizer.solution([{"role": "user", "content": "Q"}], ["One."]).tokens.ids
    with torch.no_grad():
        logits = live(input_ids=torch.tensor([ids])).logits[0, -1]
    rows = [1, 0] if name == "trl" else [tokenizer.encode(token)[-1] for token in "+-"]
    assert rm.score("Q", "One.") == pytest.approx(float(logits[rows[0]] - logits[rows[1]]), abs=1e-4)
    loaded = rl.load_step_model(tmp_path / "adapter", readout)
    assert loaded.score("Q", "One.") == pytest.approx(rm.score("Q", "One."), abs=1e-4)
    if name == "trl":
        adapted(None).save_pretrained(tmp_path / "headless")  # a head that is drawn anew every time it is loaded
        with pytest.raises(rl.LoadError, match="no trained process reward model.*the checkpoint lacks score"):
            rl.load_step_model(tmp_path / "headless", readout)
    with pytest.raises(rl.LoadError, match="takes no such setting.*objective"):
        rl.load(tmp_path / "adapter", readout=readout, objective=0)
