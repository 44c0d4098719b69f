"""Train the embedded demo reward model: SmolLM2-135M-Instruct + LoRA + a scalar head, Bradley-Terry on pairs.

    python training/train_demo.py --data DIR --out DIR [--gguf FILE] [--device cuda]

Steps, each seeded: (1) the lowest `--frozen` blocks carry no adapter, so their output is computed once per
text and kept; (2) the head starts from a logistic regression on differences of frozen last-token features
after the final norm (from a random head the adapter learns next to nothing); (3) LoRA on every projection
of the other blocks and the head are tuned on

    L = w * softplus(-m) + centre * (r_chosen + r_rejected)^2 + teach / 2 * (m - t)^2,  m = r_chosen - r_rejected

with w from the length classes (`--balance`) and t the margin of a frozen-feature reader (demo_teacher.py); (4) the
state with the best validation score is saved as a PEFT adapter; (5) with `--test` the saved adapter is loaded into a
float32 model and measured on the test sets, once. A run that was stopped goes on from `OUT/state.pt`; `torchrun
--nproc-per-node 2` shares one between processes.
"""

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import softplus

from demo_data import (
    HH_TRAINING_ROWS,
    Texts,
    batches,
    length_class,
    packs,
    pair_weights,
    pairs_of,
    read,
    training_pairs,
)
from demo_metrics import style_matrix, summary
from demo_model import BASE, Ranks, Scorer, find_gguf, load_base, merged_rewards
from demo_teacher import teacher_margins

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
log = logging.getLogger("train_demo")


def fit_head(scorer, pairs, weights, validation, texts):
    """Logistic regression on feature differences; its penalty is chosen on validation pairs."""
    found = scorer.base.double().numpy()
    rows = {
        name: np.stack([found[p.chosen] - found[p.rejected] for p in some])
        for name, some in (("training", pairs), ("validation", validation))
    }
    scale = rows["training"].std(0)
    x = rows["training"] / scale
    x, y, w = np.concatenate([x, -x]), np.repeat([1, 0], len(x)), np.tile(weights, 2)
    best = None
    for c in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2):
        fit = LogisticRegression(C=c, fit_intercept=False, max_iter=2000).fit(x, y, sample_weight=w)
        weight = fit.coef_[0] / scale
        score = validation_score(rows["validation"] @ weight, validation, texts)
        log.info("head C=%g validation %s", c, shown(score))
        if best is None or score["select"] > best[0]:
            best = (score["select"], weight)
    mean = np.mean([found[i] for p in pairs for i in (p.chosen, p.rejected)], 0)
    weight = best[1] - mean * (best[1] @ mean) / (mean @ mean)  # rewards of the training texts get mean 0
    log.info("head centred: validation %s", shown(validation_score(rows["validation"] @ weight, validation, texts)))
    return torch.tensor(weight, dtype=torch.float32)[None]


def validation_score(margin, pairs, texts):
    """`select` = mean of AlpacaEval accuracy, its balanced form and HH accuracy, less 0.1 of the log loss.

    The log loss breaks near-ties: it is smooth where accuracies of a few hundred pairs are
    not.
    """
    margin = np.asarray(margin)
    won, side = margin > 0, np.array([length_class(p, texts) for p in pairs])
    source = np.array([p.source for p in pairs])
    alpaca, hh = source == "alpaca", source == "hh"
    score = {
        "alpaca": won[alpaca].mean(),
        "alpaca_balanced": (won[alpaca & (side > 0)].mean() + won[alpaca & (side < 0)].mean()) / 2,
        "hh": won[hh].mean(),
        "loss": np.logaddexp(0, -margin).mean(),
    }
    score["select"] = (score["alpaca"] + score["alpaca_balanced"] + score["hh"]) / 3 - 0.1 * score["loss"]
    return {k: float(v) for k, v in score.items()}


def shown(score):
    return " ".join(f"{k} {v:.4f}" for k, v in score.items())


def save_adapter(model, folder):
    """PEFT adapter: a config without machine paths; LoRA in half precision, and the head, in one file."""
    model.save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {k: v.to(torch.float32 if "score" in k else torch.float16) for k, v in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config.update(base_model_name_or_path=BASE, inference_mode=True, revision=None, modules_to_save=["score"])
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def train(scorer, training, weights, targets, validation, ranks, args, out):
    model, device = scorer.model, scorer.device
    lora = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimiser = torch.optim.AdamW(
        [{"params": lora, "lr": args.lr}, {"params": head, "lr": args.head_lr}], weight_decay=args.decay
    )
    plan = [(epoch, b) for epoch in range(args.epochs) for b in batches(training, args.batch, args.seed, epoch)]
    warm = max(1, len(plan) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, s / len(plan))))),
    )
    state_path, first, best, since = out / "state.pt", 0, -math.inf, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first, best = state["step"], state["best"]
        log.info("resumed at step %d of %d", first, len(plan))
    checks = {round(len(plan) * (k + 1) / args.checks) for k in range(args.checks)}
    start = time.time()
    for step in range(first, len(plan)):
        _, members = plan[step]
        torch.manual_seed(args.seed * 100_003 + step)  # dropout does not depend on where a run was resumed
        model.train()
        by_prompt = {}
        for k in members:
            by_prompt.setdefault(training[k].prompt, []).append(k)
        mine = [k for g in ranks.share(list(by_prompt.values()), lambda g: positions(g, training, scorer)) for k in g]
        rewards = {}
        for pack in packs(texts_of(mine, training), scorer.lengths, args.pack):
            rewards.update(zip(pack, scorer.head(scorer.features(pack))[:, 0], strict=True))
        if mine:
            plus = torch.stack([rewards[training[k].chosen] for k in mine])
            minus = torch.stack([rewards[training[k].rejected] for k in mine])
            w = torch.tensor([weights[k] for k in mine], device=device)
            target = torch.tensor([targets[k] for k in mine], device=device, dtype=torch.float32)
            loss = w * softplus(minus - plus)
            taught = torch.where(target.isnan(), 0.0, plus - minus - target.nan_to_num())
            whole = loss + args.centre * (plus + minus) ** 2 + args.teach / 2 * taught**2
            (whole.sum() / len(members)).backward()
            since.append([x.sum().item() for x in (loss, w * (plus > minus), taught**2, w)])
        ranks.add_gradients(lora + head)
        torch.nn.utils.clip_grad_norm_(lora + head, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0 or step + 1 in checks:
            seen = sum(ranks.merge({ranks.rank: np.sum(since, 0)}).values())
            log.info("step %d/%d loss %.4f accuracy %.4f taught %.4f", step + 1, len(plan), *seen[:3] / seen[3])
            since = []
        if step + 1 in checks:
            score = validate(scorer, validation, ranks)
            log.info("step %d validation %s", step + 1, shown(score))
            if score["select"] > best:
                best = score["select"]
                if ranks.rank == 0:
                    save_adapter(model, out)
                log.info("step %d is the best so far: saved", step + 1)
        if ranks.rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 in checks):
            torch.save(
                {
                    "model": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                    "best": best,
                },
                state_path.with_suffix(".new"),
            )
            state_path.with_suffix(".new").replace(state_path)
            elapsed = time.time() - start
            print(f"{elapsed:.0f} s for {step + 1 - first} steps", file=sys.stderr)
    return best


def texts_of(members, pairs):
    return sorted({i for k in members for i in (pairs[k].chosen, pairs[k].rejected)})


def positions(members, pairs, scorer):
    return sum(scorer.lengths[i] for i in texts_of(members, pairs))


def validate(scorer, pairs, ranks):
    scorer.model.eval()
    mine = ranks.share(texts_of(range(len(pairs)), pairs), lambda i: scorer.lengths[i])
    r = ranks.merge(scorer.rewards(mine))
    return validation_score([r[p.chosen] - r[p.rejected] for p in pairs], pairs, scorer.texts)


def test(gguf, out, args, limit=None):
    """Figures of the saved adapter on the test sets, from a float32 model with the adapter merged."""
    base, tokenizer = load_base(gguf)
    merged = PeftModel.from_pretrained(base, out).merge_and_unload().to(args.device).eval()
    texts, sets, found = Texts(tokenizer), {}, {}
    rows = {
        name: read(Path(args.data) / f"{name}.jsonl")
        for name in ("alpaca_eval_test", "hh_harmless_test", "llmbar", "rm_bench_styles")
    }
    rows["hh_harmless_test"] = rows["hh_harmless_test"][HH_TRAINING_ROWS:]
    styles = rows.pop("rm_bench_styles")[:limit]
    for name, some in rows.items():
        sets[name] = pairs_of(some[:limit], texts, name)
    items = [[[texts.add(r["prompt"], x) for x in r[side]] for r in styles] for side in ("chosen", "rejected")]
    r = merged_rewards(merged, texts, args)
    spread = np.array(list(r.values()))
    found["rewards"] = {"texts": len(spread), "mean": round(spread.mean(), 4), "sd": round(spread.std(), 4)}
    found["cut_texts"] = texts.cut
    tokens = texts.response_tokens
    for name, some in sets.items():
        arrays = (
            [r[p.chosen] - r[p.rejected] for p in some],
            [tokens[p.chosen] - tokens[p.rejected] for p in some],
            [p.prompt for p in some],
        )
        found[name] = summary(*arrays)
        if name == "llmbar":
            margin, subset = np.array(arrays[0]), np.array([p.subset for p in some])
            found[name]["subsets"] = {s: round(float((margin[subset == s] > 0).mean()), 4) for s in sorted(set(subset))}
    chosen, rejected = (np.array([[r[i] for i in item] for item in side]) for side in items)
    found["rm_bench_styles"] = style_matrix(chosen, rejected)
    for name, some in found.items():
        log.info("test %s %s", name, json.dumps(some))
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with the jsonl files")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct GGUF file; default: the installed wheel's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of training; tests are fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checks", type=int, default=4, help="validations, evenly spread over the run")
    parser.add_argument("--batch", type=int, default=24, help="pairs, at least; the pairs of a prompt stay together")
    parser.add_argument("--pack", type=int, default=800, help="positions run at once, padding included")
    parser.add_argument("--frozen", type=int, default=15, help="lowest blocks without an adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--head-lr", type=float, default=2e-4)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--centre", type=float, default=0.01)
    parser.add_argument("--balance", type=float, default=0.5, help="0 = pairs as they are, 1 = length classes equal")
    parser.add_argument("--teach", type=float, default=1.0, help="weight of the reader's margins")
    parser.add_argument("--teacher-balance", type=float, default=0.7, help="--balance of the reader")
    parser.add_argument("--off-topic", type=float, nargs=2, default=(1.0, 0.2), help="added pairs a prompt: Alpaca, HH")
    parser.add_argument("--cache", type=Path, help="folder for the frozen blocks' outputs; default: --out")
    parser.add_argument("--compile", action="store_true", help="compile the tuned blocks (1.4 times as fast on a CPU)")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--test", action="store_true", help="measure the saved adapter on the test sets at the end")
    parser.add_argument("--test-only", action="store_true")
    parser.add_argument("--limit", type=int, help="few training pairs and test rows: to try the script")
    return parser.parse_args()


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    ranks = Ranks()
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.FileHandler(args.out / "train_demo.log"), logging.StreamHandler()][
            : 2 if ranks.rank == 0 else 0
        ]
        or [logging.NullHandler()],
    )
    torch.set_num_threads(args.threads)
    gguf = args.gguf or find_gguf()
    hidden = ("data", "out", "gguf", "cache", "threads", "device")
    log.info("settings %s", json.dumps({k: v for k, v in vars(args).items() if k not in hidden}))
    if not args.test_only:
        base, tokenizer = load_base(gguf, args.seed)
        texts = Texts(tokenizer)
        training, validation = training_pairs(args.data, texts, args.seed, args.off_topic)
        if args.limit:
            training, validation = training[: args.limit], validation[:: len(validation) // args.limit]
        weights = pair_weights(training, texts, args.balance)
        log.info(
            "pairs %d training %d validation; texts %d, tokens %d, cut from the left %d",
            len(training),
            len(validation),
            len(texts.ids),
            sum(map(len, texts.ids)),
            texts.cut,
        )
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=args.rank,
            lora_alpha=2 * args.rank,
            lora_dropout=args.dropout,
            target_modules=PROJECTIONS,
            modules_to_save=["score"],
            layers_to_transform=list(range(args.frozen, base.config.num_hidden_layers)),
            layers_pattern="layers",
        )
        model = get_peft_model(base, config)
        if args.precision == "bf16":
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and "lora_" not in name and "score" not in name:
                    module.to(torch.bfloat16)
        model.to(args.device)
        scorer = Scorer(model, texts, args)
        needed = sorted({i for p in [*training, *validation] for i in (p.chosen, p.rejected)})
        start = time.time()
        name = f"low-{args.frozen}-{args.seed}-{'-'.join(map(str, args.off_topic))}.safetensors"
        scorer.fill_from((args.cache or args.out) / name, needed, ranks)
        print(f"{time.time() - start:.0f} s for the frozen blocks", file=sys.stderr)
        head_path = args.out / "head.safetensors"
        fitted = head_path.exists()
        ranks.wait()
        if not fitted:
            weight = fit_head(scorer, training, weights, validation, texts)
            if ranks.rank == 0:
                save_file({"score": weight.contiguous()}, head_path)
            ranks.wait()
        head = model.base_model.model.score.modules_to_save["default"].weight
        head.data.copy_(load_file(head_path)["score"])
        if args.compile:
            for block in scorer.blocks[args.frozen :]:
                block.compile(dynamic=True)
        targets, reading = teacher_margins(scorer, training, validation, args.teacher_balance)
        log.info("reader: validation %s", shown(validation_score(reading, validation, texts)))
        taught = ~np.isnan(targets)
        log.info(
            "reader: out-of-fold accuracy on training pairs %.4f, margin SD %.4f",
            (targets[taught] > 0).mean(),
            targets[taught].std(),
        )
        train(scorer, training, weights, targets, validation, ranks, args, args.out)
    if (args.test or args.test_only) and ranks.rank == 0:
        test(gguf, args.out, args, args.limit)


if __name__ == "__main__":
    main()
