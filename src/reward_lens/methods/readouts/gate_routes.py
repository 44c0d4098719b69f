"""A change of the prompt under a head whose weights depend on the prompt: by which route does it reach the reward?

    r(h, p) = w(p) . N(h)        h: residual at the reward position,  p: what the gate reads of the prompt

    value         r(h', p)  - r(h, p)      the weights held: what the response makes of the changed prompt
    gate          r(h, p')  - r(h, p)      the response's state held: other weights on the same objectives
    interaction   (w(p') - w(p)) . (N(h') - N(h))       what both do together
    total         r(h', p') - r(h, p)      the effect, everything live (`effects`)

h' and p' are of one changed run, in which all that follows the change is recomputed. The three sum to the total
exactly. The gate reads one position, so a change behind it leaves p as it is, to the bit: its gate and interaction are
exactly 0. Chosen and rejected share the prompt (unless `truncation` cut it to different lengths), hence patches from
one to the other (noise, denoise) do not take the gate's route; ablations of prompt positions, and sources that bring
another prompt's values, do.

What set the weights in the first place is `gate_attribution`; the same routes of one write alone, later components
held, are the parts of `effects(path="direct")`.

Reference: Wang et al. 2024, arXiv 2406.12845 (the gate).
"""

from collections.abc import Sequence
from typing import Literal

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import positions_of
from reward_lens.engine.editing import Source
from reward_lens.errors import DataError
from reward_lens.methods.causation.ablations import Ablation, prepare_ablation
from reward_lens.methods.causation.effect_cells import Spans
from reward_lens.methods.causation.effect_readings import Routes
from reward_lens.methods.causation.effect_sweeps import (
    ABLATIONS,
    EXCHANGES,
    ablated,
    asked_sites,
    effects_result,
    exchanged,
    sweep_settings,
)
from reward_lens.model.heads.gated import require_gated
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.scored import Progress
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result

OF_PROMPT = ("prompt", "gate")


@checked_arguments
def gate_routes(
    rm: RewardModel,
    pairs,
    sites: str | Sequence["Site | str"] = "components",
    mode: Literal["zero", "mean", "resample", "noise", "denoise"] | Source = "mean",
    at: Literal["prompt", "gate", "final", "response", "all"] | range = "prompt",
    align: Literal["tail", "diff"] | None = None,
    spans: Spans = None,
    reference=None,
    n_draws: int = 20,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Effect of each site on a prompt-gated reward, by the route it takes: past the gate, through it, both together.

    Parameters
    ----------
    rm: a model whose readout is prompt-gated (ArmoRM, QRM), loaded for its reward.
    sites: as in `effects`.
    mode: as in `effects`; or a `Source` (`zeros()`, `add(vector)`, `from_run(acts)`: see `intervene`) that each site by
        itself takes; text 2i is pair i's chosen response, 2i + 1 its rejected one. A capture of the same responses
        under other prompts of the same token count makes a prompt edit of it.
    at: "prompt" (the first position through the gate's), "gate" (the position the gate reads), "final", "response",
        "all", or a range of positions. noise and denoise have the last three names: the prompt is the same in both.
    align, spans, reference, n_draws, layers, max_rows, progress: as in `effects`; with `spans="position"` each prompt
        token by itself.

    Returns value (pair, side, component, route), without `side` for noise and denoise and with `position` or `span`
    after it, in reward units and with the signs of `effects` (a loss is positive); route = value, gate, interaction,
    total. Mean and interval as in `effects`. Checks: "clean row" as in `effects`; "interaction" (what is left of the
    total is the product of both changes, above: 1e-5 of the scale of effects, 2e-2 in 16 bits). Raises
    `StructureError` for a head without a prompt gate, `DataError` for positions that a mode does not have, and what
    `effects` raises.
    What it cannot show: which objectives' weights moved (`gate_weights` of both prompts says), nor that the changed
    prompt is one that the network ever reads.
    """
    require_gated(rm.readout)
    pairs = data.as_pairs(pairs)
    wanted = asked_sites(rm, sites, layers)
    given = mode if isinstance(mode, Source) else None
    name = given.name if given is not None else str(mode)
    _require(given is not None, name, at)
    told = at if isinstance(at, str) else [at.start, at.stop]
    settings = sweep_settings(rm, pairs, sites, wanted, name, told, align, layers, spans)
    reading = Routes(rm)
    if given is None and mode in EXCHANGES:
        found = exchanged(rm, pairs, wanted, settings, reading, spans, max_rows, progress)
    else:
        where = "all" if isinstance(at, range) or at in OF_PROMPT else at
        ablation = (
            Ablation("given", name, given=given) if given is not None
            else prepare_ablation(rm, pairs, wanted, name, where, reference, n_draws, seed)
        )  # fmt: skip
        found = ablated(rm, pairs, wanted, settings, reading, ablation, spans, max_rows, progress,
                        lambda text: _positions(reading, text, at))  # fmt: skip
    check = Check("interaction", reading.interaction_gap, 2e-2 if rm.sixteen_bit else 1e-5)
    return effects_result(
        rm, pairs, wanted, found, settings, seed, name="gate_routes", more_checks=[check],
        title=f"Routes through and past the gate ({name}, {at if isinstance(at, str) else 'a range'})",
        shows="How much of the reward is lost or won when one site is changed: with the weights held, with the "
        "response's state held, by both together, and in all.",
        cannot_show="Which objectives' weights moved, and whether the changed prompt is one that the network reads.",
    )  # fmt: skip


def _positions(reading: Routes, text: Tokens, at: str | range) -> range:
    gate = reading.readout.gate_position(text)
    return {"prompt": range(gate + 1), "gate": range(gate, gate + 1)}[at] if at in OF_PROMPT else positions_of(text, at)


def _require(given: bool, mode: str, at: str | range) -> None:
    if given or mode in ABLATIONS:
        return
    if mode not in EXCHANGES:
        raise DataError("gate_routes was asked for a mode it does not have", found=f"mode={mode!r}",
                        expected=", ".join(map(repr, (*ABLATIONS, *EXCHANGES))) + " or a Source",
                        do="pass one of these as mode=")  # fmt: skip
    if isinstance(at, range) or at in OF_PROMPT:
        raise DataError(
            f"{mode} has nothing to patch in the prompt",
            found=f"at={at!r}: chosen and rejected share the prompt, so both runs are equal there",
            expected="at='final', 'response' or 'all'; or a mode that changes the prompt",
            do="use mode='mean', 'resample' or 'zero', or a Source with values of another prompt",
        )
