"""Trains the default model: ``python training/train.py --data DIR --out RUN``.

Writes to RUN, after every epoch, so that a stop at any time leaves something to
export: ``model.pt`` (averaged weights), ``valid.npz`` (validation logits of those
weights), ``run.json`` (settings, history, machine, time).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import labels
import metrics
import prepare
import teacher
from model import GenreViT, ModelConfig, count_parameters


def parse_arguments() -> tuple[argparse.Namespace, dict[str, object]]:
    """The arguments, and the defaults of those that have one."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with the four .npz files")
    p.add_argument("--out", type=Path, required=True, help="folder for this run")
    p.add_argument("--epochs", type=int, default=70)
    p.add_argument("--max-minutes", type=float, default=0.0,
                   help="anneal so that the run ends by then (0: no limit)")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1.0e-3)
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--smoothing", type=float, default=0.1)
    p.add_argument("--mix", type=float, default=0.5, help="share of mixed windows")
    p.add_argument("--tags", type=float, default=0.05,
                   help="weight of the loss on FMA's tags (0: neither tags nor clips without a genre)")
    p.add_argument("--unlabelled", type=float, default=0.15,
                   help="share of clips that have tags but no target genre")
    p.add_argument("--balance", type=float, default=0.25, help="1: as the data, 0: genres equal")
    p.add_argument("--average", type=float, default=0.998, help="weight averaging per step")
    p.add_argument("--depth", type=int, default=ModelConfig.depth)
    p.add_argument("--teacher-share", type=float, default=0.5,
                   help="weight of teacher.py's soft targets")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=2,
                   help="at most; fewer are used while fewer are faster (a shared machine)")
    p.add_argument("--float32", action="store_true", help="no bfloat16")
    args = p.parse_args()
    return args, {k: p.get_default(k) for k in vars(args)}


class Threads:
    """Uses one thread or all, whichever lately took a step in less time.

    Two threads meet at the end of every operation. While other work holds one of two
    cores, both then advance at the pace of the held one: slower than one thread.
    """

    TRIAL = 3
    PERIOD = 40

    def __init__(self, most: int) -> None:
        self.choices = sorted({1, most})
        self.best = most
        self.times: dict[int, list[float]] = {}

    def before(self, step: int) -> None:
        """Sets the number of threads for this step."""
        place = step % self.PERIOD
        if place == 0:
            self.times = {n: [] for n in self.choices}
        if place == self.TRIAL * len(self.choices):
            self.best = min(self.choices, key=lambda n: min(self.times[n], default=1e9))
        self.now = self.best
        if place < self.TRIAL * len(self.choices):
            self.now = self.choices[place // self.TRIAL]
        if torch.get_num_threads() != self.now:
            torch.set_num_threads(self.now)

    def after(self, step: int, seconds: float) -> None:
        """Notes how long the step took."""
        self.times.setdefault(self.now, []).append(seconds)


class Average:
    """Exponential moving average of parameters and batch-norm statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval()
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        # Short memory at first, or the random start would be averaged in.
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10.0))
        mine, theirs = self.model.state_dict(), model.state_dict()
        for name, value in mine.items():
            if value.dtype.is_floating_point:
                value.lerp_(theirs[name], 1.0 - decay)
            else:
                value.copy_(theirs[name])


@torch.no_grad()
def predict(model: GenreViT, windows: Tensor, batch: int = 64) -> Tensor:
    """Logits float32 [n, classes] of prepared windows uint8 [n, 128, 128]."""
    model.eval()
    return torch.cat([model.prepared_logits(w).float() for w in windows.split(batch)])


def processor_name() -> str:
    """What the run states as its hardware."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> None:
    args, defaults = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    every = prepare.load_split(args.data, "train")
    train = every.labelled()
    valid = prepare.load_split(args.data, "valid").labelled()
    valid_windows = prepare.plain_windows(valid)

    classes = len(labels.LABELS)
    targets = np.eye(classes, dtype=np.float32)[train.label]
    targets = targets * (1 - args.smoothing) + args.smoothing / classes
    if args.teacher_share > 0:
        soft = teacher.soft_targets(train)
        targets = args.teacher_share * soft + (1 - args.teacher_share) * targets
    used, used_targets = train, targets
    if args.tags > 0:
        used = every
        used_targets = np.zeros((len(every), classes), dtype=np.float32)
        used_targets[every.label >= 0] = targets

    sample = prepare.plain_windows(train).float() / 255.0
    config = replace(
        ModelConfig(), depth=args.depth, tags=len(labels.TAGS) if args.tags > 0 else 0,
        mean=round(float(sample.mean()), 4), std=round(float(sample.std()), 4),
    )
    del sample
    model = GenreViT(config).to(memory_format=torch.channels_last)
    average = Average(model, args.average)

    decayed = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] != 1]
    others = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] != 1)]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay},
         {"params": others, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98),
    )

    steps = len(train) // args.batch
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    changed = [k for k, v in settings.items() if v != defaults[k]]
    history: list[dict[str, object]] = []
    threads = Threads(args.threads)
    begin = time.time()
    done = 0.0
    epoch = 0
    print(f"{len(train)} training clips, {len(valid)} validation clips, "
          f"{count_parameters(model) / 1e6:.2f} M parameters", flush=True)

    while done < 1.0:
        started = time.time()
        model.train()
        loss_sum = 0.0
        taken = 0
        batches = prepare.training_batches(
            used, used_targets, args.batch, steps, args.seed * 10_000 + epoch,
            args.balance, args.mix, args.unlabelled,
        )
        ended = time.time()
        threads.before(0)
        for batch in batches:
            # Progress is steps, or time where a limit is set and nearer: on a
            # shared machine the schedule still ends where it should.
            done = (epoch * steps + taken) / (args.epochs * steps)
            if args.max_minutes > 0:
                done = max(done, (time.time() - begin) / (args.max_minutes * 60))
            if done >= 1.0:
                break
            warm = min(1.0, (epoch * steps + taken + 1) / (2.0 * steps))
            rate = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not args.float32):
                *answers, tags = model.training_logits(batch.windows)
            # A clip without a genre has an all-zero target, and so no loss here.
            loss, stem_loss, statistics_loss = (
                -(batch.genre * F.log_softmax(z.float(), dim=1)).sum(dim=1).mean()
                for z in answers
            )
            total = loss + 0.3 * stem_loss + 0.3 * statistics_loss
            if args.tags > 0:
                each = F.binary_cross_entropy_with_logits(
                    tags.float(), batch.tags, reduction="none"
                )
                total = total + args.tags * (each * batch.tagged).sum(dim=1).mean()
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            average.update(model)
            loss_sum += float(loss.detach())
            threads.after(taken, time.time() - ended)
            taken += 1
            ended = time.time()
            threads.before(taken)
        if taken == 0:
            break
        epoch += 1
        done = max(done, epoch / args.epochs)
        spent = time.time() - started

        logits = predict(average.model, valid_windows).numpy()
        line: dict[str, object] = {
            "epoch": epoch, "loss": round(loss_sum / taken, 4),
            "valid": metrics.figures(logits, valid.label),
            "bySource": metrics.by_source(logits, valid.label, valid.source),
            "shared": metrics.shared_genres(logits, valid.label, valid.source),
            "samplesPerSecond": round(taken * args.batch / spent, 1),
        }
        history.append(line)
        f = metrics.figures(logits, valid.label)
        s = metrics.by_source(logits, valid.label, valid.source)
        h = metrics.shared_genres(logits, valid.label, valid.source)
        print(f"epoch {epoch:3d}  loss {loss_sum / taken:.3f}  top1 {f['top1']:.3f}  "
              f"top3 {f['top3']:.3f}  recall {f['meanRecall']:.3f}  "
              f"gtzan {s['gtzan']['top1']:.3f}  fma {s['fma']['top1']:.3f}  "
              f"shared {h['gtzan']['top1']:.3f}/{h['fma']['top1']:.3f}  "
              f"{taken * args.batch / spent:.0f}/s on {threads.best}  {(time.time() - begin) / 60:.1f} min", flush=True)

        torch.save({"config": config.to_dict(), "state": average.model.state_dict()},
                   args.out / "model.tmp")
        os.replace(args.out / "model.tmp", args.out / "model.pt")
        np.savez(args.out / "valid.npz", logits=logits, label=valid.label, source=valid.source)
        (args.out / "run.json").write_text(json.dumps({
            "settings": settings, "nonDefault": changed, "parameters": count_parameters(model),
            "trainClips": len(train), "validClips": len(valid),
            "trainClipsByGenre": {
                name: int((train.label == c).sum()) for c, name in enumerate(labels.LABELS)
            },
            "epochsDone": epoch, "finished": done >= 1.0,
            "minutes": round((time.time() - begin) / 60, 1),
            "machine": f"{processor_name()}, {args.threads} threads, "
                       + ("float32" if args.float32 else "bfloat16 autocast"),
            "torch": torch.__version__, "history": history,
        }, indent=1))


if __name__ == "__main__":
    main()
