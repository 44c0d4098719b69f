"""Cost of patching sweeps against the obvious loop and other systems: one process each, same model folder, same pairs.

    python benchmarks/effects.py --work DIR [--peer reward-lens=PYTHON] [--peer transformer-lens=PYTHON]
                                 [--peer nnsight=PYTHON] [--peer pyvene=PYTHON] [--rounds 3] [--quick] [--only a,b]

A peer is named with the interpreter of the environment it is installed in; one that is not named is not measured.
All processes stay alive and take turns, the order switching every round; the tables give the median over rounds of
paired ratios and their range. Everything is float32. Where a loop over sites is long, a sample of sites is run and
scaled to all, and the table says so; effects are compared on the sites that both systems ran. Writes
benchmarks/effects.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))
from inputs import Pairs, demo_folder, random_folder, responses  # noqa: E402

SCRIPTS = {
    "ours": "ours.py", "plain": "plain.py", "reward-lens": "with_reward_lens_1.py",
    "transformer-lens": "with_transformer_lens.py", "nnsight": "with_nnsight.py", "pyvene": "with_pyvene.py",
}  # fmt: skip


class Worker:
    """One system in a process of its own, with the model loaded."""

    def __init__(self, name: str, python: str, folder: Path, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [python, "-W", "ignore", str(HERE / "peers" / SCRIPTS[name])]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.loaded = self.ask(do="load", folder=str(folder))

    def ask(self, **request) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # some packages print when they are imported
                return json.loads(line)
        return {"error": "the process ended"}

    def effects(self, pair: dict, sites: str, at: str, sample: int | None = None, repeat: int = 1) -> dict:
        return self.ask(do="effects", pair=pair, sites=sites, at=at, sample=sample, repeat=repeat)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


def in_turn(calls: dict, rounds: int) -> list[dict]:
    """Answers of every call, round by round, the order switching; a first round warms up and is dropped."""
    out = []
    for i in range(rounds + 1):
        names = list(calls) if i % 2 else list(calls)[::-1]
        out.append({name: calls[name]() for name in names})
    return out[1:]


def ratio(answers: list[dict], over: str, under: str) -> str:
    """Median and range of the paired ratio of seconds, or why there is none."""
    bad = next((a[s] for a in answers for s in (over, under) if "seconds" not in a[s]), None)
    if bad is not None:
        return bad.get("cannot") or bad["error"]
    values = sorted(a[over]["seconds"] / a[under]["seconds"] for a in answers)
    return f"{statistics.median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})"


def apart(answers: list[dict], a: str, b: str) -> str:
    """Largest difference of the effects of two systems, over the largest effect, on the sites both ran."""
    first, second = answers[-1][a].get("values"), answers[-1][b].get("values")
    if not first or not second:
        return ""
    common = first.keys() & second.keys()
    size = max(abs(v) for v in first.values())
    return f"{max(abs(first[k] - second[k]) for k in common) / size:.0e}"


class Bench:
    def __init__(self, args):
        self.args = args
        self.folder = demo_folder(args.work)
        from transformers import AutoTokenizer

        self.pairs = Pairs(AutoTokenizer.from_pretrained(self.folder), responses(args.data))
        self.pythons = {"ours": sys.executable, "plain": sys.executable} | dict(p.split("=", 1) for p in args.peer)
        self.workers = {n: self.start(n, self.folder) for n in self.pythons}
        self.peers = [n for n in self.pythons if n not in ("ours", "plain")]
        self.lines: list[str] = []

    def start(self, name: str, folder: Path) -> Worker:
        return Worker(name, self.pythons[name], folder, self.args.threads)

    def say(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)

    def calls(self, names, pair, sites, at, sample) -> dict:
        return {
            n: lambda n=n: self.workers[n].effects(pair, sites, at, None if n in ("ours", "reward-lens") else sample)
            for n in names
        }

    def components_everywhere(self) -> None:
        """(a)"""
        self.say("## (a) All attention and MLP components at all positions", "",
                 "Each system's time over ours, equal lengths. Work ratio: 2 T / T_suffix, T tokens, T_suffix from the "
                 "first differing one. Share: measured ratio to reward-lens 1.0.0 over the work ratio (at least 70% "
                 "asked for). Systems without a sweep and the plain loop are run on 6 sites and scaled.", "",
                 f"| T | first differing token | work ratio | {' | '.join(self.peers)} | plain loop | "
                 "share of work ratio | effects, ours and the loop apart |",
                 "| --- " * (6 + len(self.peers)) + "|")  # fmt: skip
        for length in (60,) if self.args.quick else (100, 200):
            for part in (0.5,) if self.args.quick else (0.25, 0.5, 0.85):
                pair = self.pairs.make(length, self.nearest(length, part))
                suffix = length - pair["first"]
                answers = in_turn(self.calls(self.workers, pair, "components", "all", 6), self.args.rounds)
                cells = [ratio(answers, n, "ours") for n in (*self.peers, "plain")]
                work, share = 2 * length / suffix, ""
                if "reward-lens" in self.peers and "seconds" in answers[0]["reward-lens"]:
                    got = statistics.median(a["reward-lens"]["seconds"] / a["ours"]["seconds"] for a in answers)
                    share = f"{got / work:.0%}"
                first = f"{pair['first']} ({pair['first'] / length:.0%})"
                cells += [share, apart(answers, "ours", "plain")]
                self.say(f"| {length} | {first} | {work:.1f} | {' | '.join(cells)} |")

    def nearest(self, length: int, part: float) -> int:
        """The first place from `part` of the length on at which a pair can be made."""
        for first in range(round(length * part), length - 4):
            try:
                self.pairs.make(length, first)
                return first
            except ValueError:
                continue
        raise SystemExit(f"no pair of {length} tokens can be made")

    def components_at_the_end(self) -> None:
        """(b)"""
        self.say("", "## (b) All attention and MLP components at the reward position", "",
                 "Our time over plain scoring of the pair in one batch (at most 1.5 asked for at 200 tokens or more), "
                 "and each system's time over ours. reward-lens 1.0.0 has no such sweep; its sweep at all positions "
                 "stands in, the same number of forwards.", "",
                 f"| T | ours / scoring | {' | '.join(f'{n} / ours' for n in self.peers)} | plain loop / ours | "
                 "effects, ours and the loop apart |", "| --- " * (4 + len(self.peers)) + "|")  # fmt: skip
        for length in (60,) if self.args.quick else (50, 100, 200, 500):
            pair = self.pairs.make(length, self.nearest(length, 0.6))
            calls = self.calls(self.workers, pair, "components", "final", 6)
            if "reward-lens" in calls:
                calls["reward-lens"] = lambda p=pair: self.workers["reward-lens"].effects(p, "components", "all")
            calls["scoring"] = lambda p=pair: self.workers["plain"].ask(do="score", pair=p, repeat=1)
            answers = in_turn(calls, self.args.rounds)
            cells = [ratio(answers, n, "ours") for n in (*self.peers, "plain")]
            scoring = ratio(answers, "ours", "scoring")
            self.say(f"| {length} | {scoring} | {' | '.join(cells)} | {apart(answers, 'ours', 'plain')} |")

    def heads(self) -> None:
        """(c)"""
        self.say("", "## (c) All heads exactly", "",
                 "Each system's time over ours; one forward a head is the plain loop (6 heads, scaled). At the reward "
                 "position at least 50 is asked for.", "",
                 "| at | T | first differing token | plain loop / ours | "
                 f"{' | '.join(f'{n} / ours' for n in self.peers)} | apart |",
                 "| --- " * (5 + len(self.peers)) + "|")  # fmt: skip
        for at, length in (("final", 60),) if self.args.quick else (("final", 100), ("final", 200), ("all", 200)):
            pair = self.pairs.make(length, self.nearest(length, 0.6))
            answers = in_turn(self.calls(self.workers, pair, "heads", at, 6), self.args.rounds)
            cells = [ratio(answers, n, "ours") for n in ("plain", *self.peers)]
            self.say(f"| {at} | {length} | {pair['first']} | {' | '.join(cells)} | {apart(answers, 'ours', 'plain')} |")

    def curves(self) -> None:
        """(d)"""
        self.say("", "## (d) Against depth and length", "",
                 "Random weights, the demo's width. Our sweep of all components over plain scoring of the pair.", "",
                 "| layers | T | reward position / scoring | all positions (first difference at 60%) / scoring |",
                 "| --- " * 4 + "|")  # fmt: skip
        for layers in (4,) if self.args.quick else (4, 8, 16, 32):
            folder = random_folder(self.args.work, layers)
            ours, plain = (self.start(n, folder) for n in ("ours", "plain"))
            for length in (60,) if self.args.quick else (100, 200) if layers != 16 else (50, 100, 200, 400):
                pair = self.pairs.make(length, self.nearest(length, 0.6))
                calls = {
                    "scoring": lambda plain=plain, pair=pair: plain.ask(do="score", pair=pair, repeat=1),
                    "final": lambda ours=ours, pair=pair: ours.effects(pair, "components", "final"),
                    "all": lambda ours=ours, pair=pair: ours.effects(pair, "components", "all"),
                }
                answers = in_turn(calls, self.args.rounds)
                cells = [ratio(answers, at, "scoring") for at in ("final", "all")]
                self.say(f"| {layers} | {length} | {' | '.join(cells)} |")
            ours.close()
            plain.close()

    def memory(self) -> None:
        """(e)"""
        self.say("", "## (e) Peak memory", "",
                 "Largest resident size of a fresh process, loading left out, in MB, for a pair of 200 tokens; in "
                 "brackets over plain scoring (ours: at most 2 asked for).", "",
                 "| system | components, reward position | components, all positions | heads, all positions |",
                 "| --- " * 4 + "|")  # fmt: skip
        length = 60 if self.args.quick else 200
        pair = self.pairs.make(length, self.nearest(length, 0.6))
        worker = self.start("plain", self.folder)
        scored = worker.ask(do="memory", request={"do": "score", "pair": pair, "repeat": 1})["running"] / 2**20
        worker.close()
        self.say(f"| plain scoring | {scored:.0f} | | |")
        for name in ("ours", *self.peers):
            cells = []
            for sites, at in (("components", "final"), ("components", "all"), ("heads", "all")):
                worker = self.start(name, self.folder)
                request = {"do": "effects", "pair": pair, "sites": sites, "at": at, "repeat": 1}
                got = worker.ask(do="memory", request=request | {"sample": None if name == "ours" else 2})
                worker.close()
                found = got.get("running")
                cells.append(
                    got.get("cannot") or got.get("error") or f"{found / 2**20:.0f} ({found / 2**20 / scored:.2f})"
                )
            self.say(f"| {name} | {' | '.join(cells)} |")

    def head(self) -> str:
        versions = {k: v for w in self.workers.values() for k, v in w.loaded.get("versions", {}).items()
                    if k not in ("torch", "transformers", "reward-lens")}  # fmt: skip
        ours = self.workers["ours"].loaded
        failed = [f"{n} ({w.loaded['error']})" for n, w in self.workers.items() if "error" in w.loaded]
        return f"""# Cost of patching sweeps

`make bench-effects`: this library against a plain loop of one whole forward a site and against other systems, each in
its own process, same folder (the demo model, {ours["layers"]} layers x {ours["heads"]} heads), same pairs, float32,
{self.args.threads} CPU thread(s), {platform.machine()}. Medians of {self.args.rounds} paired rounds, ranges in
brackets. Ours: torch {ours["versions"]["torch"]}, transformers {ours["versions"]["transformers"]}. Peers: reward-lens
1.0.0, {", ".join(f"{k} {v}" for k, v in versions.items()) or "none other"}.
{"Not loaded: " + ", ".join(failed) + "." if failed else ""}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model folders")
    parser.add_argument("--data", help="folder of preference pairs; default: the bundled ones")
    parser.add_argument("--peer", action="append", default=[], help="name=interpreter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="a,b,c,d,e")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it; writes nothing")
    args = parser.parse_args()
    args.work = args.work.resolve()
    bench = Bench(args)
    steps = {"a": bench.components_everywhere, "b": bench.components_at_the_end, "c": bench.heads, "d": bench.curves,
             "e": bench.memory}  # fmt: skip
    for letter in args.only.split(","):
        steps[letter]()
    if not args.quick:
        Path(__file__).with_suffix(".md").write_text(bench.head() + "\n".join(bench.lines) + "\n")


if __name__ == "__main__":
    main()
