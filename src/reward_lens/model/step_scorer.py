"""Process reward models: one linear readout, read at the end of every step of a solution.

    reward_t = w . N(h_t) + b        w, b: a row of the head, or the difference of two (two labels, two tokens)

The difference of two rows' scores is the log-odds that softmax over the two gives; sigmoid of it is the probability
that model cards print. A value head's single row is put through the same sigmoid. Labels behind a hidden layer of ReLUs
(Qwen2.5-Math-PRM) are read by a `LocalReadout`, whose directions are local.

`step_model` shows the network as a classifier of one score, its tokenizer being a `StepTokenizer`: every method that
takes a `RewardModel` and pairs then reads the reward of a response's last step. Rewards at all steps are in
`methods.step_rewards`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from reward_lens.arguments import checked_arguments
from reward_lens.engine import hooks
from reward_lens.errors import LoadError, StructureError
from reward_lens.model.adapters import network_in, saved_whole
from reward_lens.model.checks import PROBES
from reward_lens.model.linear_maps import is_linear, linear_bias, linear_weight
from reward_lens.model.own_output import own_output
from reward_lens.model.placement import input_device
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.step_hidden import hidden_structure, is_hidden
from reward_lens.model.step_readout import StepReadout
from reward_lens.model.step_tokens import StepTokenizer
from reward_lens.model.structure import Structure

HEADS = ("score", "classifier", "v_head.summary", "v_head")


class _FullPrecisionLinear(nn.Linear):
    """A head kept in float32 or more behind a trunk in 16 bits: the difference of two rows is not rounded."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight))


class StepScorer(nn.Module):
    """A network whose one score is the readout at a text's last token; trunk and weights are those of the module it was
    made from."""

    base_model_prefix = "trunk"

    def __init__(self, trunk: Any, score: nn.Module, steps: StepReadout):
        super().__init__()
        self.trunk, self.score = trunk, score
        self.config, self.steps = trunk.config, steps

    @property
    def base_model(self) -> Any:
        """The headless network."""
        return self.trunk

    def head_parts(self) -> nn.Module:
        """All that stands between the states and the score: a hidden layer too."""
        return self.score

    def get_input_embeddings(self) -> nn.Module:
        """The trunk's embedding."""
        return self.trunk.get_input_embeddings()

    def tokenizer_for(self, tokenizer: Any, pooled_skips: int | None, max_length: int | None) -> StepTokenizer:
        """The tokenizer that a `RewardModel` of this network uses."""
        return StepTokenizer(tokenizer, pooled_skips, max_length, self.steps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any):
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask, **settings).last_hidden_state
        scores = self.score(states)
        if attention_mask is None:
            return SequenceClassifierOutput(logits=scores[:, -1])
        places = torch.arange(attention_mask.shape[1], device=scores.device)
        last = (attention_mask.to(places) * places).argmax(1)
        return SequenceClassifierOutput(logits=scores[torch.arange(len(scores), device=scores.device), last])

    def save_pretrained(self, folder: Any) -> None:
        """No checkpoint format holds a difference of rows."""
        raise StructureError(
            "A process reward model cannot be written as a classifier",
            found="one score that is the difference of two rows, or one row of a value head",
            expected="a reward model with a classification head",
            do="keep the checkpoint it was loaded from, and the record in rm.edits",
        )


@checked_arguments
@torch.no_grad()
def step_model(
    module: Any, tokenizer: Any, steps: StepReadout, *, structure: Structure | None = None, name: str | None = None,
    revision: str | None = None, loading: Mapping[str, Any] | None = None,
) -> RewardModel:  # fmt: skip
    """A `RewardModel` of a loaded process reward model with a linear readout.

    Parameters
    ----------
    module: a causal language model, a token classifier, or a network that holds one with a head beside it.
    tokenizer: its fast tokenizer. steps: which rows are read and how solutions are written (`STEP_READOUTS`).

    Returns a `RewardModel` (its `steps` is `rm.module.steps`): `rm.score(prompt, response)` is the log-odds of the
    response's last step, a response being its steps joined by `steps.separator`; the whole load report holds.

    Raises `StructureError` for a head that is not linear, for logits that the rows do not give (a cap on them), and for
    a network whose reward of a step is changed by later steps; `LoadError` for rows that do not exist.
    """
    head, texts = _head(module, steps), isinstance(steps.positive, str)
    rows = [_row(tokenizer, row, texts) for row in (steps.positive, steps.negative) if row is not None]
    scorer = StepScorer(_backbone(module), _score(head, rows), steps).eval()
    _match_own_scores(module, head, scorer, rows)
    if structure is None and is_hidden(head):
        structure = hidden_structure(scorer, scorer.score)
    rm = RewardModel(
        scorer, tokenizer, structure=structure, revision=revision, loading=loading,
        name=name or getattr(module, "name_or_path", "") or None,
    )  # fmt: skip
    _require_causal(rm)
    return rm


def steps_of(rm: RewardModel) -> StepTokenizer:
    """The tokenizer of a process reward model; `StructureError` for any other reward model."""
    if isinstance(rm.tokenizer, StepTokenizer):
        return rm.tokenizer
    raise StructureError(
        f"{rm.name} does not say how it rewards steps",
        found=f"a reward of kind {rm.readout.kind!r}, read once at the end of a text",
        expected="a process reward model",
        do="build it with rl.step_model(module, tokenizer, rl.StepReadout(...))",
    )


def _backbone(module: Any) -> Any:
    whole = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    if whole is None:
        raise StructureError(f"{type(module).__name__} holds no network of transformers", found="no PreTrainedModel",
                             expected="a transformers model, by itself or inside the module",
                             do="pass the loaded transformers model")  # fmt: skip
    return whole.base_model


def _head(module: Any, steps: StepReadout) -> nn.Module:
    if steps.head:
        paths = [steps.head]
    else:
        paths = [] if isinstance(steps.positive, str) else list(HEADS)
    named = dict(module.named_modules()) | dict(network_in(module).named_modules())
    head = next((saved_whole(named[path]) for path in paths if path in named), None)
    if head is None and not steps.head and isinstance(steps.positive, str):
        head = saved_whole(module.get_output_embeddings())
    if head is None or not (is_linear(head) or is_hidden(head)):
        raise StructureError(
            f"The head of {type(module).__name__} is not one that steps can be read from exactly",
            found=f"a {type(head).__name__}"
            if head is not None
            else f"no module at {', '.join(paths) or 'the output'}",
            expected="a linear map with a row for each label or token, or Linear, ReLU, Linear",
            do="name its path in StepReadout(head=...)",
        )
    return head


def _row(tokenizer: Any, row: int | str, text: bool) -> int:
    if not text:
        return int(row)
    ids = tokenizer(row, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise LoadError(
            f"The text {row!r} names no row of the vocabulary",
            found=f"{len(ids)} tokens, {tokenizer.convert_ids_to_tokens(ids)}",
            expected="one token",
            do="write it as the tokenizer has it (a leading space may be part of the token), or pass ids as integers "
            "with head=",
        )
    return ids[0]


def _score(head: nn.Module, rows: list[int]) -> nn.Module:
    """The head with one row: the one that is read, or the difference of the two."""
    parts: Any = head
    last = parts[2] if is_hidden(head) else head
    weight, bias = linear_weight(last), linear_bias(last)
    if not all(0 <= row < len(weight) for row in rows):
        raise LoadError("The head has no such row", found=f"{len(weight)} rows, {rows} asked for",
                        expected="rows from 0", do="correct positive= and negative=")  # fmt: skip
    dtype = torch.promote_types(weight.dtype, torch.float32)
    picked = weight[rows].detach().to(dtype)
    offsets = picked.new_zeros(len(rows)) if bias is None else bias[rows].detach().to(dtype)
    signs = picked.new_tensor([1.0, -1.0][: len(rows)])
    row = _full_precision((signs @ picked)[None], (signs @ offsets)[None])
    if not is_hidden(head):
        return row
    first = linear_bias(parts[0])
    hidden = parts[0].weight.detach().to(dtype)
    offset = hidden.new_zeros(len(hidden)) if first is None else first.detach().to(dtype)
    return nn.Sequential(_full_precision(hidden, offset), nn.ReLU(), row)


def _full_precision(weight: Tensor, bias: Tensor) -> _FullPrecisionLinear:
    linear = _FullPrecisionLinear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
    return linear


def _match_own_scores(module: Any, head: nn.Module, scorer: StepScorer, rows: list[int]) -> None:
    """Hold the scorer against the module's own scores at every position of random texts; a constant factor that the
    module puts on its logits is taken into the head."""
    embedding: Any = scorer.get_input_embeddings()
    vocabulary = len(embedding.weight)
    generator = torch.Generator().manual_seed(0)
    device = input_device(scorer)
    ids = torch.randint(min(8, vocabulary // 2), vocabulary, (1, 12), generator=generator).to(device)
    seen: list[Tensor] = []
    with hooks.attached([hooks.read_output(head, lambda x: seen.append(x.detach()))]):
        output = own_output(module, input_ids=ids, attention_mask=torch.ones_like(ids))
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape != seen[0].shape:
        logits = seen[0]
    own, size = logits[0][:, rows].double(), max(float(logits.abs().max()), 1e-12)
    own = own[:, 0] - own[:, 1] if len(rows) == 2 else own[:, 0]
    ours = scorer.score(scorer.trunk(input_ids=ids).last_hidden_state)[0, :, 0].double()
    # A head whose output is the logits needs no factor. Where it is not, one number must explain all of them.
    left_alone = logits.shape == seen[0].shape and torch.equal(logits.to(seen[0]), seen[0])
    factor = 1.0 if left_alone else float((logits.double() * seen[0].double()).sum() / seen[0].double().square().sum())
    score: Any = scorer.score
    for tensor in (score[2] if is_hidden(score) else score).parameters():
        tensor.mul_(factor)
    capped = not left_alone and getattr(scorer.config.get_text_config(), "final_logit_softcapping", None) is not None
    allowed = 2e-2 if next(scorer.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-4
    gap = float("inf") if capped else float((own - factor * ours).abs().max()) / size
    if not gap <= allowed:
        raise StructureError(
            f"The scores of {type(module).__name__} are not its rows on its last states",
            found="a cap on its logits" if capped else f"a distance of {gap:.1%} of its logits",
            expected="a linear readout behind the final norm (a cap on the logits is none)",
            do="switch a cap on the logits off if the model was scored without, or name the head in StepReadout(head=)",
        )


def _require_causal(rm: RewardModel) -> None:
    """The reward of a first step must be the same with a second step behind it."""
    tokenizer = steps_of(rm)
    prompt, response = PROBES[0]
    both = tokenizer.solution([{"role": "user", "content": prompt}], [response, PROBES[4][1]])
    alone = rm.rewards([both.tokens.first(both.positions[0] + 1)])[0]
    batch = next(iter(rm.batches([both.tokens])))
    kept: list[Tensor] = []
    rm.trunk.run(batch, rm.trunk.read_residual(rm.n_layers, lambda x: kept.append(x[0, both.positions[0]].clone())))
    gap = abs(float(rm.readout.reward(kept[0][None].to(rm.like))[0]) - float(alone))
    allowed = 1e2 * rm.noise_floor
    if not gap <= allowed:
        raise StructureError(
            f"{rm.name} rewards a step by what follows it",
            found=f"a reward of the first step that moves by {gap:.3g} when a second one follows",
            expected=f"a causal network (at most {allowed:.1e})",
            do="score such a model with its authors' code: its steps cannot be analysed one by one",
        )
