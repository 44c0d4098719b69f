"""Systems in live processes that take turns, and what their answers say about time and about sameness."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = {
    "ours": "ours.py", "plain": "plain.py", "reward-lens": "with_reward_lens_1.py",
    "transformer-lens": "with_transformer_lens.py", "nnsight": "with_nnsight.py", "pyvene": "with_pyvene.py",
}  # fmt: skip
PEERS = [name for name in SCRIPTS if name not in ("ours", "plain")]
SAME = 1e-4
"""Two systems computed the same effects: largest difference over S = max(|r+|, |r-|, |margin|) of the pair."""


class Worker:
    """One system in a process of its own, with the model loaded."""

    def __init__(self, name: str, python: str, folder: Path, threads: int, log: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)  # or reward-lens 1.0.0 would import this library
        with open(log, "a") as errors:
            self.process = subprocess.Popen(
                [python, "-W", "ignore", str(HERE / SCRIPTS[name])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        loaded = self.ask(do="load", folder=str(folder))
        self.broken = f"not loaded: {loaded['error']}" if "error" in loaded else None

    def ask(self, **request) -> dict:
        assert self.process.stdin and self.process.stdout
        if getattr(self, "broken", None):
            return {"error": self.broken}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "its process ended"}
        for line in self.process.stdout:
            if line.startswith("{"):  # some packages print when they are imported
                return json.loads(line)
        return {"error": "its process ended"}

    def close(self) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()


def in_turn(calls: dict[str, Callable[[], dict]], rounds: int, slow: int | None = None) -> list[dict[str, dict]]:
    """Answers of every call, round by round, the order switching; a first round warms up and is dropped.

    After `slow` rounds only ours and the scoring go on, whose ratio is near 1 and wants more of them.
    """
    out = []
    for i in range(rounds + 1):
        names = [n for n in calls if slow is None or i <= slow or n.startswith(("ours", "scoring"))]
        out.append({name: calls[name]() for name in (names if i % 2 else names[::-1])})
    return out[1:]


def failure(answers: list[dict], name: str) -> str | None:
    """Why a system has no time: it was not asked, it cannot do this, or it failed."""
    if not any(name in a for a in answers):
        return ""
    found = [a[name] for a in answers if name in a and "seconds" not in a[name]]
    return None if not found else found[0].get("cannot") or f"failed: {found[0].get('error')}"


def ratios(answers: list[dict], over: str, under: str) -> list[float]:
    return sorted(a[over]["seconds"] / a[under]["seconds"] for a in answers if over in a and under in a)


def ratio(answers: list[dict], over: str, under: str) -> float:
    return statistics.median(ratios(answers, over, under))


def seconds(answers: list[dict], name: str) -> float:
    reason = failure(answers, name)
    if reason is not None:
        raise SystemExit(f"{name}: {reason}")
    return statistics.median(a[name]["seconds"] for a in answers if name in a)


def gap(answers: list[dict], a: str, b: str) -> float:
    """Largest difference of the effects of two systems in any round, on the sites both ran; infinite without any."""
    worst = 0.0
    for answer in answers:
        if a in answer and b in answer:
            first, second = answer[a]["values"], answer[b]["values"]
            apart = [abs(first[k] - second[k]) for k in first.keys() & second.keys()]
            worst = max([worst, *apart]) if apart and all(map(math.isfinite, apart)) else math.inf
    return worst


def unfair(answers: list[dict], name: str, scale: float | None, ours: str = "ours") -> str | None:
    """Why a system's time must not be set against ours; without `scale` the effects are not compared."""
    reason = failure(answers, name)
    if reason is not None or scale is None:
        return reason
    apart = gap(answers, ours, name) / scale
    return f"other effects than ours, {apart:.0e} S apart" if apart > SAME else None


def over_ours(answers: list[dict], name: str, scale: float | None) -> str:
    """A system's time over ours, or why there is none."""
    reason = unfair(answers, name, scale)
    return shown(ratios(answers, name, "ours")) if reason is None else reason


def required(answers: list[dict], scale: float, ours: str = "ours") -> str:
    """Distance of our effects from the plain loop's; without both, or with other effects, there is no benchmark."""
    for name in (ours, "plain"):
        reason = unfair(answers, name, scale, ours)
        if reason is not None:
            raise SystemExit(f"{name}: {reason}; its log in the work folder may say more")
    return f"{gap(answers, ours, 'plain') / scale:.0e} S"


def shown(values: list[float]) -> str:
    """Median and range."""
    middle = statistics.median(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Growth exponent: slope of log y on log x."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def megabytes(got: dict, scored: dict | None = None) -> str:
    """Peak while working and, in brackets, of the whole process; then both over plain scoring's."""
    reason = got.get("cannot") or got.get("error")
    if reason:
        return reason
    text = f"{got['running'] / 2**20:.0f} ({got['peak'] / 2**20:.0f})"
    if scored:
        text += f", {got['running'] / scored['running']:.2f} ({got['peak'] / scored['peak']:.2f})"
    return text


def table(*heads: str) -> list[str]:
    return [row(*heads), row(*["---"] * len(heads))]


def row(*cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"
