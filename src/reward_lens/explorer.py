"""What the latent explorer asks of a model and a dictionary, in which order; the page itself is `report.explorer`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import reward_lens as rl
from reward_lens.arguments import checked_arguments


@checked_arguments
def latent_explorer(
    rm: "rl.RewardModel",
    sae: "rl.SAE",
    pairs,
    path: str | Path,
    n_latents: int = 200,
    n_tested: int = 20,
    contexts: int = 8,
    at: Literal["final", "response"] = "final",
    site: "rl.Site | str | None" = None,
    seed: int = 0,
) -> Path:
    """One self-contained HTML page of the latents that give most to the margins of some pairs.

    Parameters
    ----------
    path: the file to write.
    n_latents: latents with a row, the largest in mean absolute contribution to the margin; those that were tested join.
    n_tested: latents that are set to 0 and tested, as in `reward_latents`; 0 leaves that out.
    contexts: texts shown of each, by its largest activation.
    at: where latents count: "final" (the reward position) or "response" (through the reward position).
    site: where the dictionary is read, if it does not say so itself.

    Returns the path. The page shows `explorer_results` and no more; `write_explorer` makes it again from kept results.
    Raises what the methods raise: `DataError` for a dictionary of another width or site, and for fewer than two prompts
    where latents are to be tested. What the page cannot show is what its results cannot: see each.
    """
    results = explorer_results(rm, sae, pairs, n_latents, n_tested, contexts, at, site, seed)
    return rl.write_explorer(results, path)


@checked_arguments
def explorer_results(
    rm: "rl.RewardModel",
    sae: "rl.SAE",
    pairs,
    n_latents: int = 200,
    n_tested: int = 20,
    contexts: int = 8,
    at: Literal["final", "response"] = "final",
    site: "rl.Site | str | None" = None,
    seed: int = 0,
) -> "Iterator[rl.Result]":
    """The results that the explorer's page is made of, each computed as the iterator is drawn.

    Parameters as `latent_explorer`. Returns `latent_contributions`, `reward_latents` (unless `n_tested` is 0),
    `latent_contexts`, `latent_neighbours` and `sae_report`, in this order. Raises what these raise.
    """
    contributions = rl.latent_contributions(rm, sae, pairs, at=at, top=n_latents, site=site, seed=seed)
    yield contributions
    shown = [int(j) for j in contributions.value["index"].values if j >= 0]
    if n_tested:
        effects = rl.reward_latents(rm, sae, pairs, top=n_tested, at=at, site=site, seed=seed)
        yield effects
        shown = sorted({*shown, *(int(j) for j in effects.value["index"].values)})
    yield rl.latent_contexts(rm, sae, pairs, shown, top=contexts, site=site, seed=seed)
    yield rl.latent_neighbours(rm, sae, shown, site=site)
    yield rl.sae_report(rm, sae, pairs, site=site, seed=seed)
