"""Cost of patching sweeps against the obvious loop and other systems: one process each, same model folder, same pairs.

    python benchmarks/effects.py --work DIR [--peer reward-lens=PYTHON] [--peer transformer-lens=PYTHON]
                                 [--peer nnsight=PYTHON] [--peer pyvene=PYTHON] [--only a,b,c,d,e] [--quick]

A peer is named with the interpreter of the environment it is installed in; each needs one of its own, made with
`pip install -c constraints.txt torch==2.13.0 NAME` (reward-lens==1.0.0 has this library's import name). The processes
of a section stay alive and take turns, the order switching every round, a first round being dropped; a cell is the
median over rounds of the paired ratio, with its range. Everything is float32; loading is never timed.

Systems that loop over sites (all but ours and reward-lens 1.0.0) run a spread sample of them, and the time of the loop
is scaled to all: every site costs them one whole forward pass. No time is reported for another quantity: a system's
effects are held against ours, and ours against the plain loop, on the sites both ran.

Sections are kept in DIR as they finish; benchmarks/effects.md has those measured with the same settings.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import turns  # noqa: E402
from inputs import Pairs, demo_folder, random_folder, responses  # noqa: E402
from turns import row, seconds, shown, table  # noqa: E402

WORK_SHARE, SCORING_LIMIT, HEADS_LIMIT, MEMORY_LIMIT = 0.7, 1.5, 50, 2.0
SAMPLE = 6
"""Sites that a looping system runs."""


HOW = f"""Each system runs in its own process, with the same model folder and pairs of equal length: a stretch of real
text, and a copy in which words are replaced from the first differing token on. Processes take turns; cells are medians
of paired ratios, with ranges. TransformerLens has no reward head and gets the network as a causal language model whose
unembedding is the reward head's one row. The plain loop, TransformerLens, nnsight and pyvene spend one forward pass on
a site: they run {SAMPLE} sites, and the loop is scaled to all. A time counts only if the effects are ours to
{turns.SAME:.0e} S, S = max(|r+|, |r-|, |margin|), and ours are the plain loop's to the same, on the sites both ran.
"""
ABOUT = {
    "a": f"""## (a) All attention and MLP components at all positions

Each system's time over ours. Work ratio: 2 T / T_suffix, T tokens, T_suffix from the first differing one on. Share:
the ratio to reward-lens 1.0.0 over the work ratio; at least {WORK_SHARE:.0%} is asked for. What a loop costs does not
depend on where the texts part, so the other systems are measured at one place.
""",
    "b": f"""## (b) All attention and MLP components at the reward position

Ours over plain scoring: our sweep's time over that of plain Hugging Face scoring of both texts in one batch; at most
{SCORING_LIMIT} is asked for at 200 tokens and more. Then each system's time over ours. reward-lens 1.0.0 cannot patch
one position: its only sweep, at all positions, stands in. That is as many forwards, but another quantity;
0.75 x (layers + 1) times is expected.
""",
    "c": f"""## (c) All heads exactly

Each system's time over ours. The plain loop is one forward a head; {SAMPLE} heads are run and scaled to all, for the
other systems too. At the reward position at least {HEADS_LIMIT} is asked for against the plain loop.
""",
    "d": """## (d) Against depth and length

Seconds of scoring the pair and of the sweeps of all components (that of reward-lens 1.0.0 is at all positions); texts
part at half. Depth: random weights at the demo's width. Growth: slope of log seconds on log depth or length.
""",
    "e": f"""## (e) Peak memory

Largest resident size of a fresh process in MB while it works, in brackets that of its whole life with loading; then
both over plain scoring's. Ours: at most {MEMORY_LIMIT:.0f} is asked for. Texts part at half; looping systems run
{SAMPLE} sites.
""",
}


class Bench:
    def __init__(self, args):
        from transformers import AutoTokenizer

        self.args, self.quick, self.rounds = args, args.quick, args.rounds
        self.folder = random_folder(args.work, 4) if args.quick else demo_folder(args.work)
        self.layers = json.loads((self.folder / "config.json").read_text())["num_hidden_layers"]
        self.pairs = Pairs(AutoTokenizer.from_pretrained(self.folder), responses(args.data))
        self.pythons = {"ours": sys.executable, "plain": sys.executable} | args.peers
        self.peers = list(args.peers)
        self.others = [p for p in self.peers if p != "reward-lens"]
        self.workers: dict[str, turns.Worker] = {}

    def start(self, names: Iterable[str], folder: Path | None = None) -> None:
        for name in names:
            log = self.args.work / f"{name}.log"
            self.workers[name] = turns.Worker(name, self.pythons[name], folder or self.folder, self.args.threads, log)

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def call(self, name: str, pair: dict, sites: str, at: str, repeat: int = 1) -> Callable[[], dict]:
        request = {"do": "effects", "pair": pair, "sites": sites, "at": at, "sample": SAMPLE, "repeat": repeat}
        return lambda: self.workers[name].ask(**request)

    def scoring(self, pair: dict, repeat: int = 3) -> Callable[[], dict]:
        return lambda: self.workers["plain"].ask(do="score", pair=pair, repeat=repeat)

    def pair(self, length: int, part: float) -> tuple[dict, float, str]:
        """A pair that parts at the first possible token from `part` of its length on, the scale S of its effects, and
        how the place is written."""
        for first in range(round(length * part), length - 3):
            try:
                pair = self.pairs.make(length, first)
            except ValueError:
                continue
            chosen, rejected = self.scoring(pair, 1)()["rewards"]
            scale = max(abs(chosen), abs(rejected), abs(chosen - rejected))
            return pair, scale, f"{first} ({first / length:.0%})"
        raise SystemExit(f"no pair of {length} tokens parts after {part:.0%} of them: give more text with --data")

    def components_everywhere(self) -> list[str]:
        heads = ["T", "first differing token", "ours, s", "reward-lens 1.0.0", "work ratio", "share", "plain loop"]
        out = [ABOUT["a"], *table(*heads, *self.others, "ours and the loop apart")]
        self.start(self.pythons)
        for length in (60,) if self.quick else (100, 200):
            for part in (0.5,) if self.quick else (0.2, 0.5, 0.85):
                pair, scale, place = self.pair(length, part)
                names = [n for n in self.pythons if n not in self.others or part == 0.5]
                calls = {n: self.call(n, pair, "components", "all") for n in names}
                answers = turns.in_turn(calls, self.rounds)
                apart = turns.required(answers, scale)
                work, share = 2 * length / (length - pair["first"]), ""
                if "reward-lens" in names and turns.unfair(answers, "reward-lens", scale) is None:
                    share = f"{turns.ratio(answers, 'reward-lens', 'ours') / work:.0%}"
                cells = {n: turns.over_ours(answers, n, scale) for n in ("reward-lens", "plain", *self.others)}
                out += [row(length, place, f"{seconds(answers, 'ours'):.2f}", cells.pop("reward-lens"), f"{work:.2f}",
                            share, *cells.values(), apart)]  # fmt: skip
        return out

    def components_at_the_end(self) -> list[str]:
        heads = ["T", "first differing token", "scoring, s", "ours / scoring", "reward-lens 1.0.0 (all)", "plain loop"]
        out = [ABOUT["b"], *table(*heads, *self.others, "ours and the loop apart")]
        self.start(self.pythons)
        for length in (60,) if self.quick else (50, 100, 200, 500):
            for part in (0.25,) if self.quick else (0.25, 0.6):
                pair, scale, place = self.pair(length, part)
                names = [n for n in self.pythons if n in ("ours", "plain") or part == 0.25]
                calls = {n: self.call(n, pair, "components", "all" if n == "reward-lens" else "final") for n in names}
                calls["ours"] = self.call("ours", pair, "components", "final", repeat=3)
                calls["scoring"] = self.scoring(pair)
                answers = turns.in_turn(calls, 2 * self.rounds, slow=2 if length == 500 else 3)
                apart = turns.required(answers, scale)
                peer = turns.over_ours(answers, "reward-lens", None)
                cells = [turns.over_ours(answers, n, scale) for n in ("plain", *self.others)]
                out += [row(length, place, f"{seconds(answers, 'scoring'):.3f}",
                            shown(turns.ratios(answers, "ours", "scoring")), peer, *cells, apart)]  # fmt: skip
        return out

    def all_heads(self) -> list[str]:
        heads = ["at", "T", "first differing token", "ours, s", "plain loop", *self.peers, "ours and the loop apart"]
        out = [ABOUT["c"], *table(*heads)]
        self.start(self.pythons)
        cases = (("final", 100, 0.6), ("final", 200, 0.25), ("final", 200, 0.6), ("all", 200, 0.5), ("all", 200, 0.85))
        for at, length, part in (("final", 60, 0.5), ("all", 60, 0.5)) if self.quick else cases:
            pair, scale, place = self.pair(length, part)
            answers = turns.in_turn({n: self.call(n, pair, "heads", at) for n in self.pythons}, self.rounds)
            cells = [turns.over_ours(answers, n, scale) for n in ("plain", *self.peers)]
            where = "reward position" if at == "final" else "all positions"
            apart = turns.required(answers, scale)
            out += [row(where, length, place, f"{seconds(answers, 'ours'):.2f}", *cells, apart)]
        return out

    def curves(self) -> list[str]:
        names = [n for n in ("ours", "plain", "reward-lens") if n in self.pythons]
        columns = ["scoring", "ours, reward position", "ours, all positions", *names[2:]]
        out = [ABOUT["d"], *table("layers", "T", *columns)]
        depths = [(n, 60) for n in (2, 4)] if self.quick else [(n, 100) for n in (4, 8, 16, 32)]
        lengths = [(self.layers, n) for n in ((40, 60) if self.quick else (50, 100, 200, 400))]
        for axis, points in (("depth", depths), ("length", lengths)):
            took: dict[str, list[float]] = {c: [] for c in columns}
            for layers, length in points:
                if axis == "depth" or not self.workers:
                    folder = random_folder(self.args.work, layers) if axis == "depth" else self.folder
                    self.start(names, folder)
                pair, scale, _ = self.pair(length, 0.5)
                calls = {n: self.call(n, pair, "components", "all") for n in names[1:]}
                calls["ours, reward position"] = self.call("ours", pair, "components", "final", repeat=3)
                calls["ours, all positions"] = self.call("ours", pair, "components", "all")
                calls["scoring"] = self.scoring(pair)
                answers = turns.in_turn(calls, self.rounds, slow=2)
                turns.required(answers, scale, "ours, all positions")
                for name in columns:
                    took[name].append(seconds(answers, name))
                out += [row(layers, length, *(f"{t[-1]:.3f}" for t in took.values()))]
                if axis == "depth":
                    self.stop()
            x = [point[axis == "length"] for point in points]
            out += [row(f"growth with {axis}", "", *(f"{turns.slope(x, t):.2f}" for t in took.values()))]
        return out

    def memory(self) -> list[str]:
        cases = [(sites, at) for sites in ("components", "heads") for at in ("final", "all")]
        where = {"final": "reward position", "all": "all positions"}
        out = [ABOUT["e"], *table("T", "system", *(f"{sites}, {where[at]}" for sites, at in cases))]
        for length in (60,) if self.quick else (200, 500):
            self.start(["plain"])
            pair, _, _ = self.pair(length, 0.5)
            self.stop()
            scored = self.fresh("plain", {"do": "score", "pair": pair, "repeat": 1})
            out += [row(length, "plain scoring", turns.megabytes(scored), "", "", "")]
            for name in self.pythons:
                cells = []
                for sites, at in cases:
                    request = {"do": "effects", "pair": pair, "sites": sites, "at": at, "sample": SAMPLE, "repeat": 1}
                    cells.append(turns.megabytes(self.fresh(name, request), scored))
                out += [row(length, "plain loop" if name == "plain" else name, *cells)]
        return out

    def fresh(self, name: str, request: dict) -> dict:
        self.start([name])
        got = self.workers[name].ask(do="memory", request=request)
        self.stop()
        return got

    def settings(self) -> str:
        """What all sections of one page share."""
        peers = [f"{n} {version(self.pythons[n], n)}" if n in self.peers else f"{n} not measured"
                 for n in turns.PEERS]  # fmt: skip
        return (
            f"Demo model, {self.layers} layers, float32, {self.args.threads} CPU thread(s) of {os.cpu_count()}, "
            f"{platform.machine()}, torch {version(sys.executable, 'torch')}, transformers "
            f"{version(sys.executable, 'transformers')}. {self.rounds} paired rounds. Peers: {', '.join(peers)}."
        )


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "not installed"


def page(settings: str, sections: dict[str, dict]) -> str:
    """The sections measured with these settings, each with its day and the machine's other load when it began."""
    parts = [f"# Cost of patching sweeps\n\n`make bench-effects`. {settings}\n", HOW]
    for kept in (sections[letter] for letter in sorted(sections)):
        if kept["settings"] == settings:
            note = f"Measured {kept['day']}; load of the machine in the minute before: {kept['load']:.1f}."
            parts.append("\n".join([*kept["lines"], "", note]) + "\n")
    return "\n".join(parts)


def named(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in turns.PEERS or not Path(python).exists():
        raise argparse.ArgumentTypeError(f"{text}: expected {', '.join(turns.PEERS)} = an interpreter that exists")
    return name, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for model folders, logs and finished sections")
    parser.add_argument("--data", help="folder of preference pairs in .jsonl files; default: the bundled ones")
    parser.add_argument("--peer", type=named, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="a,b,c,d,e")
    parser.add_argument("--quick", action="store_true", help="small random models, short texts, one round, no page")
    args = parser.parse_args()
    args.work, args.peers, args.rounds = args.work.resolve(), dict(args.peer), 1 if args.quick else args.rounds
    args.work.mkdir(parents=True, exist_ok=True)
    store = args.work / "sections.json"
    bench = Bench(args)
    settings = bench.settings()
    steps = {"a": bench.components_everywhere, "b": bench.components_at_the_end, "c": bench.all_heads,
             "d": bench.curves, "e": bench.memory}  # fmt: skip
    for letter in args.only.split(","):
        load, day = os.getloadavg()[0], datetime.date.today().isoformat()
        try:
            lines = steps[letter]()
        finally:
            bench.stop()
        print("\n".join(lines) + "\n", flush=True)
        if not args.quick:
            sections = json.loads(store.read_text()) if store.exists() else {}
            sections[letter] = {"settings": settings, "day": day, "load": load, "lines": lines}
            store.write_text(json.dumps(sections, indent=1))
            Path(__file__).with_suffix(".md").write_text(page(settings, sections))


if __name__ == "__main__":
    main()
