"""The loop every measured system runs in its own process: one JSON request a line on stdin, one JSON answer on stdout.

A system is a class with

    load(folder)                           the model, from the folder that all systems share; never timed
    prepare(pair, sites, at) -> state      what a sweep needs once: the clean run, the other run's values
    measure(state, names) -> [effect]      r(chosen) - r(chosen with the site's value taken from the rejected run)

or, where the system has a sweep of its own, `sweep(pair, sites, at) -> {name: effect}` in place of the last two.
`sites` is "components" or "heads", `at` is "final" (the reward position) or "all". `cannot(sites, at)` gives the
reason if the system has no such thing. Sites are named "L3.attn", "L3.mlp", "L3.H5". A pair has `prompt`, `chosen`
and `rejected` as texts and their token ids under `ids`.
"""

import gc
import json
import os
import sys
import time
import traceback

import torch


class System:
    """What the systems share: model shape and names of sites."""

    layers: int
    heads: int

    def cannot(self, sites: str, at: str) -> str | None:
        return None

    def names(self, sites: str) -> list[str]:
        if sites == "heads":
            return [f"L{layer}.H{head}" for layer in range(self.layers) for head in range(self.heads)]
        return [f"L{layer}.{kind}" for layer in range(self.layers) for kind in ("attn", "mlp")]


def place(name: str) -> tuple[int, str, int]:
    """Layer, "attn", "mlp" or "head", and the head's index of a site's name."""
    layer, _, unit = name[1:].partition(".")
    return (int(layer), "head", int(unit[1:])) if unit[0] == "H" else (int(layer), unit, 0)


def spread(items: list, n: int | None) -> list:
    """`n` of the items, evenly spread and the last always among them."""
    if n is None or n >= len(items):
        return list(items)
    return [items[round((i + 1) * len(items) / n) - 1] for i in range(n)]


def effects(system: System, pair: dict, sites: str, at: str, sample: int | None) -> dict:
    """Effects and seconds. With `sample`, so many sites are run and their share of the time is scaled to all."""
    reason = system.cannot(sites, at)
    if reason:
        return {"cannot": reason}
    names = system.names(sites)
    start = time.perf_counter()
    if hasattr(system, "sweep"):
        values = system.sweep(pair, sites, at)
        return {"seconds": time.perf_counter() - start, "values": values, "measured": len(names), "sites": len(names)}
    chosen = spread(names, sample)
    state = system.prepare(pair, sites, at)
    prepared = time.perf_counter()
    values = system.measure(state, chosen)
    swept = time.perf_counter() - prepared
    seconds = prepared - start + swept * len(names) / len(chosen)
    values = dict(zip(chosen, values, strict=True))
    return {"seconds": seconds, "values": values, "measured": len(chosen), "sites": len(names)}


def score(system, pair: dict, repeat: int) -> dict:
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        rewards = system.score(pair)
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds)[len(seconds) // 2], "rewards": rewards}


def high_water() -> int:
    """Largest resident size of this process so far, in bytes (a new program starts at 0, unlike ru_maxrss)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget_high_water() -> None:
    """Let the mark fall to the present size, so that loading does not hide what comes after it (Linux only)."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")


def answer(system: System, request: dict) -> dict:
    do = request.pop("do")
    if do == "load":
        system.load(request["folder"])
        return {"layers": system.layers, "heads": system.heads}
    if do == "memory":
        loading = high_water()
        forget_high_water()
        inner = answer(system, request["request"])
        return inner if "cannot" in inner else {"running": high_water(), "peak": max(loading, high_water())}
    if do == "score":
        return score(system, request["pair"], request["repeat"])
    got = [effects(system, request["pair"], request["sites"], request["at"], request["sample"])]
    while "seconds" in got[0] and len(got) < request["repeat"]:
        got.append(effects(system, request["pair"], request["sites"], request["at"], request["sample"]))
    return sorted(got, key=lambda one: one.get("seconds", 0.0))[len(got) // 2]


def serve(system: System) -> None:
    """Answer requests until stdin ends. Whatever a system prints goes to stderr: stdout carries answers only."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        try:
            reply = answer(system, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().splitlines()
            reply = {"error": f"{type(error).__name__}: {first[0] if first else ''}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()
