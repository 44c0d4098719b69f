"""Counts of simulated training runs in which what happens is known: for the tests and the calibration of cascades."""

import numpy as np

BEFORE = (0.003, 0.015, 0.010, 0.012, 0.020, 0.035)
AFTER = (0.048, 0.171, 0.090, 0.246, 0.020, 0.374)


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p))


def wandering(rng, n_series: int, n_steps: int, phi: float, sd: float) -> np.ndarray:
    """Stationary AR(1) noise [series, step] with standard deviation `sd`."""
    out = rng.normal(0, sd, (n_series, n_steps))
    for t in range(1, n_steps):
        out[:, t] = phi * out[:, t - 1] + np.sqrt(1 - phi**2) * out[:, t]
    return out


def run(
    seed: int, hacking: str = "flat", dims: str = "flat", n_steps: int = 20, n: int = 200, phi: float = 0.0,
    sd: float = 0.0, width: float = 1.0,
) -> dict:  # fmt: skip
    """Arguments of `detect_cascade`. hacking: "flat" (.003), "edge" (.02) or "rises" (to .8 in the middle of the run).

    dims: "flat", "rise" (with hacking, five of six) or "trend" (logit-linear over the run, whatever hacking does).
    phi, sd: of noise in the logits, half of its variance shared by all dimensions.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(n_steps)
    middle = 1 / (1 + np.exp(-(t - (n_steps - 1) / 2) / width))
    rates = {"flat": np.full(n_steps, 0.003), "edge": np.full(n_steps, 0.02), "rises": 0.003 + 0.8 * middle}
    way = {"flat": np.zeros(n_steps), "rise": middle, "trend": t / (n_steps - 1)}[dims]
    low, high = logit(BEFORE)[:, None], logit(AFTER)[:, None]
    noise = wandering(rng, len(BEFORE) + 1, n_steps, phi, sd / np.sqrt(2))
    p = 1 / (1 + np.exp(-(low + (high - low) * way + noise[:-1] + noise[-1])))
    return {
        "steps": 100 * t,
        "hack_counts": rng.binomial(n, rates[hacking]),
        "n_episodes": n,
        "dims": {f"d{j}": (rng.binomial(n, p[j]), n) for j in range(len(p))},
    }
