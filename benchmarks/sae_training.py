"""Our trainer of dictionaries beside those of SAELens and sparsify: error, dead latents, time a step, files.

    python benchmarks/sae_training.py --work DIR --activations FILE [--peer sae-lens=PYTHON]
                                      [--peer eai-sparsify=PYTHON] [--d-sae N] [--k 32] [--n-train N] [--batch 2048]
                                      [--rounds 5] [--threads 1] [--seeds 3] [--device cpu] [--jobs 1] [--quick]

FILE: safetensors with "activations" [n, d_model], or the folder of an activation store. The last tenth is held out. A
peer is named with the interpreter of the environment it is installed in; each needs one of its own, made with
`pip install -c constraints.txt torch==2.13.0 NAME`. Every run is a process of its own with the same rows, width, k,
number of samples, batch, threads and device; `--jobs` of them at a time, but those that are timed one by one.
Dictionaries are measured here, all by the same code, on the held-out rows. `--only-times` leaves out everything but
the times, and writes them to DIR.

A peer is trained with its documented settings and with a second set that favours it; the better one counts. Time a
step comes from short runs in which the systems take turns, the order switching every round: the median over rounds of
the paired ratio, with its range. Runs are kept in DIR as they finish; benchmarks/sae_training.md has the table.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from reward_lens.sae.dictionary import SAE
from reward_lens.sae.recipe import usual_rate

ERROR_LIMIT, TIME_LIMIT, SAME = 1.05, 1.2, 1e-5
UNTIMED_STEPS, TIMED_STEPS, ROWS = 20, 100, 512
SCRIPTS = {name: Path(__file__).parent / "peers" / f"sae_with_{name.replace('-', '_')}.py"
           for name in ("reward-lens", "sae-lens", "eai-sparsify")}  # fmt: skip
# What each system trains: variant and, for the peers, which rate ("adam": see the script).
RUNS = {
    "reward-lens": [("batchtopk", None), ("topk", None)],
    "sae-lens": [("batchtopk", None), ("batchtopk", "ours"), ("topk", None), ("topk", "ours")],
    "eai-sparsify": [("topk", None), ("topk", "adam")],
}


def main() -> None:
    options = parsed()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    file, x = activations(Path(options.activations), work)
    n = len(x) - max(ROWS, len(x) // 10)
    common = {"activations": str(file), "n": n, "d_sae": options.d_sae or 8 * x.shape[1], "k": options.k,
              "batch": options.batch, "n_train": options.n_train or 4 * n, "threads": options.threads,
              "device": options.device}  # fmt: skip
    if options.quick:
        common |= {"d_sae": 2 * x.shape[1], "n_train": 50 * options.batch}
    systems = {"reward-lens": sys.executable, **dict(peer.split("=", 1) for peer in options.peer)}
    if options.only_times:
        lines = time_lines(timed(work, systems, common, options.rounds), options.device)
        (work / "sae_times.md").write_text("\n".join(lines), encoding="utf-8")
        return print("\n".join(lines))
    runs = [(seed, system, variant, rate) for seed in range(1 if options.quick else options.seeds)
            for system in systems for variant, rate in RUNS[system]]  # fmt: skip

    def train(run) -> str:
        seed, system, variant, rate = run
        request = {**common, "task": "train", "variant": variant, "seed": seed, "lr": lr_of(rate, common)}
        return ask(work, system, systems[system], request)[1]

    trained = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for (seed, system, variant, rate), folder in zip(runs, pool.map(train, runs), strict=True):
            trained.append({"system": system, "variant": variant, "settings": rate or "own", "seed": seed,
                            "folder": folder, **measured(SAE.load(folder), x[n:])})  # fmt: skip
            print(trained[-1], flush=True)
    times = timed(work, systems, common, 2 if options.quick else options.rounds)
    exchanged = exchange(work, systems, common, trained, x[n:][:ROWS])
    page = report(common, x, trained, times, exchanged, options.quick)
    target = work / "sae_training.md" if options.quick else Path(__file__).with_suffix(".md")
    target.write_text(page, encoding="utf-8")
    print(page)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON")
    for name, default in {"d-sae": None, "k": 32, "n-train": None, "batch": 2048, "rounds": 5, "threads": 1,
                          "seeds": 3, "jobs": 1}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only-times", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    unknown = [peer for peer in options.peer if peer.split("=")[0] not in SCRIPTS or "=" not in peer]
    if unknown:
        parser.error(f"--peer {', '.join(unknown)}: expected sae-lens=PYTHON or eai-sparsify=PYTHON")
    return options


def activations(source: Path, work: Path) -> tuple[Path, torch.Tensor]:
    """One file that all systems read, its rows in a fixed random order (the last ones are held out)."""
    if source.is_dir():
        from reward_lens.engine.activation_store import ActivationStore

        x = ActivationStore.open(source).tensor()
    else:
        x = load_file(source)["activations"].float()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].contiguous()
    file = work / "activations.safetensors"
    save_file({"activations": x}, file)
    return file, x


def lr_of(rate: str | None, common: dict) -> float | str | None:
    return usual_rate(common["d_sae"], common["n_train"] // common["batch"]) if rate == "ours" else rate


def ask(work: Path, system: str, python: str, request: dict) -> tuple[dict, str]:
    """The answer of a system to a request, and its folder; a run that was finished before is not repeated."""
    tag = hashlib.sha256(json.dumps([system, request], sort_keys=True).encode()).hexdigest()[:12]
    path = work / f"{system}-{request['task']}-{tag}.json"
    folder = request.get("folder", str(path.with_suffix("")))
    answer = path.with_suffix(".answer.json")
    if not answer.exists():
        path.write_text(json.dumps({**request, "folder": folder}))
        environment = {**os.environ, "OMP_NUM_THREADS": str(request["threads"]), "WANDB_MODE": "disabled"}
        subprocess.run([python, str(SCRIPTS[system]), str(path)], env=environment, check=True)
    return json.loads(answer.read_text()), folder


@torch.no_grad()
def measured(sae: SAE, x: torch.Tensor) -> dict[str, float]:
    """On held-out rows: share of the variance that is not reconstructed, active latents a row, latents never active."""
    error, active, ever = 0.0, 0, torch.zeros(sae.d_sae, dtype=torch.bool)
    for rows in x.split(1024):
        z = sae.encode(rows)
        error += float((sae.decode(z) - rows).double().square().sum())
        active += int((z > 0).sum())
        ever |= (z > 0).any(0)
    total = float((x.double() - x.double().mean(0)).square().sum())
    return {"fvu": error / total, "l0": active / len(x), "dead": float((~ever).double().mean())}


def timed(work: Path, systems: dict[str, str], common: dict, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a step of TopK in every round: a long run less a short one, so that what comes before the first step
    (scales, compilation) is in neither."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        for system in list(systems)[:: 1 if number % 2 == 0 else -1]:
            short, long = (
                ask(work, system, systems[system], {
                    **common, "task": "train", "variant": "topk", "seed": 1000 + number, "lr": None,
                    "n_train": steps * common["batch"],
                })[0]["seconds"]
                for steps in (UNTIMED_STEPS, UNTIMED_STEPS + TIMED_STEPS)
            )  # fmt: skip
            seconds[system].append((long - short) / TIMED_STEPS * 1000)
    return seconds


def exchange(work: Path, systems: dict[str, str], common: dict, trained: list[dict], x: torch.Tensor) -> list[str]:
    """Encodings of the same file by two libraries: the largest gap over the largest latent."""
    lines = []
    for one in trained:
        readers = [one["system"]] if one["system"] != "reward-lens" else [s for s in systems if s != "reward-lens"]
        for system in readers if one["seed"] == 0 else []:
            folder = one["folder"]
            if system == "eai-sparsify" and one["system"] == "reward-lens":
                if one["variant"] != "topk":
                    continue
                folder += "-sparsify"
            out = f"{folder}-{system}-z.safetensors"
            request = {**common, "task": "encode", "folder": folder, "rows": ROWS, "out": out}
            ask(work, system, systems[system], request)
            theirs, ours = load_file(out)["z"], SAE.load(folder).encode(x)
            gap = float((theirs - ours).abs().max() / ours.abs().max())
            verdict = "within" if gap <= SAME else "over"
            lines.append(f"| {one['system']} ({one['variant']}) | {system} | {gap:.1e} | {verdict} {SAME:.0e} |")
    return lines


def time_lines(times: dict[str, list[float]], device: str) -> list[str]:
    lines = [
        f"Time a step of TopK on {device}; ours over theirs, at most {TIME_LIMIT} of the fastest is asked for.",
        "",
    ]
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times["reward-lens"], values, strict=True)]
        lines.append(f"- {name}: {statistics.median(values):.1f} ms; ours over it {statistics.median(ratios):.2f} "
                     f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return lines


def report(common: dict, x: torch.Tensor, trained: list[dict], times: dict, exchanged: list[str], quick: bool) -> str:
    lines = [
        "# Training of dictionaries",
        "",
        f"{common['n']:,} activations of width {x.shape[1]}, {len(x) - common['n']:,} held out; {common['d_sae']:,} "
        f"latents, k = {common['k']}, {common['n_train']:,} samples in batches of {common['batch']:,}, "
        f"{common['threads']} thread(s), {common['device']}, float32."
        f"{' A quick run: no figure to quote.' if quick else ''}",
        "",
        "Held-out figures, mean over seeds (range).",
        "",
        "| system | variant | settings | FVU | L0 | never active |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    best: dict[str, float] = {}
    for key in dict.fromkeys((t["system"], t["variant"], t["settings"]) for t in trained):
        runs = [t for t in trained if (t["system"], t["variant"], t["settings"]) == key]
        cells = [f"{statistics.mean(v):.4g} ({min(v):.4g} to {max(v):.4g})" for v in
                 ([run[name] for run in runs] for name in ("fvu", "l0", "dead"))]  # fmt: skip
        lines.append(f"| {' | '.join((*key, *cells))} |")
        best[key[0]] = min(best.get(key[0], float("inf")), statistics.mean(run["fvu"] for run in runs))
    lines += ["", f"FVU of our best over a system's best; at most {ERROR_LIMIT} is asked for.", ""]
    lines += [f"- {name}: {best['reward-lens'] / value:.3f}" for name, value in best.items() if name != "reward-lens"]
    lines += ["", *time_lines(times, common["device"])]
    lines += ["", "Encodings of one file by its maker and by another library: largest gap over the largest latent.", "",
              "| written by | read by | gap | |", "| --- | --- | --- | --- |", *exchanged, ""]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
