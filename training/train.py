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
from typing import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import labels
import metrics
import own_audio
import prepare
import teacher
from model import GenreViT, ModelConfig, count_parameters, load_network


def parse_arguments() -> tuple[argparse.Namespace, dict[str, object]]:
    """The arguments, and the defaults of those that have one."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True,
                   help="folder with the four .npz files, or a CSV of audio files (own_audio.py)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--out", type=Path, required=True, help="folder for this run")
    p.add_argument("--epochs", type=int, default=70)
    p.add_argument("--max-minutes", type=float, default=0.0,
                   help="anneal so that the run ends by then (0: no limit)")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1.0e-3)
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--smoothing", type=float, default=0.1)
    p.add_argument("--mix", type=float, default=0.5, help="share of mixed windows")
    p.add_argument("--tags", type=float, default=0.0,
                   help="weight of the loss on FMA's tags, e.g. 0.05 (0: neither tags nor clips without a genre)")
    p.add_argument("--unlabelled", type=float, default=0.15,
                   help="share of clips that have tags but no target genre")
    p.add_argument("--balance", type=float, default=0.5, help="1: as the data, 0: genres equal")
    p.add_argument("--prior", type=float, default=0.25,
                   help="what the finished network takes a genre's frequency for: its training clips to this power")
    p.add_argument("--average", type=float, default=0.998, help="weight averaging per step")
    p.add_argument("--depth", type=int, default=ModelConfig.depth)
    p.add_argument("--teacher-share", type=float, default=0.5,
                   help="weight of teacher.py's soft targets")
    p.add_argument("--modulations", action="store_true",
                   help="the teacher also hears spectro-temporal modulations")
    p.add_argument("--init", type=Path, help="a run whose weights to begin with")
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
def level_prior(model: GenreViT, clips: np.ndarray, balance: float, prior: float) -> None:
    """Moves the genre prior that the network has learned, clips^balance, to clips^prior.

    A catalogue is not mixed like the training data, and a genre with 50 clips there would
    hardly ever be answered. Drawing the rare clips more often instead makes the network
    learn them by heart. Logit adjustment: Menon et al. 2021, https://arxiv.org/abs/2007.07314
    """
    share = torch.from_numpy(clips / clips.sum()).float().clamp(min=1e-6)
    model.head.bias -= (balance - prior) * share.log().to(model.head.bias.device)


@torch.no_grad()
def predict(model: GenreViT, windows: Tensor, batch: int = 64) -> Tensor:
    """Logits float32 [n, classes] of prepared windows uint8 [n, 128, 128]."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat(
        [model.prepared_logits(w.to(device)).float().cpu() for w in windows.split(batch)]
    )


def processor_name() -> str:
    """What the run states as its hardware."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_of(choice: str) -> torch.device:
    """``auto``: a CUDA device where there is one."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def machine_name(device: torch.device, args: argparse.Namespace) -> str:
    """What the run states that it ran on."""
    precision = "float32" if args.float32 else "bfloat16 autocast"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    return f"{processor_name()}, {args.threads} threads, {precision}"


def load_data(data: Path) -> tuple[prepare.Clips, prepare.Clips]:
    """Training and validation clips of the four arrays in a folder, or of anybody's
    audio that a CSV names. Validation clips all have a label."""
    if data.suffix == ".csv":
        try:
            return own_audio.load_manifest(data)
        except own_audio.ManifestError as fault:
            raise SystemExit(str(fault)) from None
    return prepare.load_split(data, "train"), prepare.load_split(data, "valid").labelled()


def soft_labels(
    train: prepare.Clips, smoothing: float, teacher_share: float, modulated: bool
) -> prepare.F32:
    """Targets float32 [n, classes] of labelled clips: smoothed labels and what the
    teacher says of clips that it has not seen."""
    classes = len(train.names)
    targets = np.eye(classes, dtype=np.float32)[train.label]
    targets = targets * (1 - smoothing) + smoothing / classes
    if teacher_share > 0:
        targets = teacher_share * teacher.soft_targets(train, modulated) + (1 - teacher_share) * targets
    return targets.astype(np.float32)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay; biases, norms and positions do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] != 1]
    others = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] != 1)]
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


def loss_of(model: GenreViT, batch: prepare.Batch, tag_weight: float) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and the part of it that is the network's own answer."""
    *answers, tags = model.training_logits(batch.windows)
    # A clip without a genre has an all-zero target, and so no loss here.
    main, stem, statistics = (
        -(batch.genre * F.log_softmax(z.float(), dim=1)).sum(dim=1).mean() for z in answers
    )
    total = main + 0.3 * stem + 0.3 * statistics
    if tag_weight > 0 and tags.shape[1] > 0:
        each = F.binary_cross_entropy_with_logits(tags.float(), batch.tags, reduction="none")
        total = total + tag_weight * (each * batch.tagged).sum(dim=1).mean()
    return total, main


def describe(logits: np.ndarray, valid: prepare.Clips) -> tuple[dict[str, object], str]:
    """Validation figures for the history, and as a line to read."""
    overall = metrics.figures(logits, valid.label)
    sources = metrics.by_source(logits, valid.label, valid.source)
    found: dict[str, object] = {"valid": overall, "bySource": sources}
    text = (f"top1 {overall['top1']:.3f}  top3 {overall['top3']:.3f}  "
            f"recall {overall['meanRecall']:.3f}")
    if valid.names == labels.LABELS:
        shared = metrics.shared_genres(logits, valid.label, valid.source)
        found["shared"] = shared
        text += "".join(f"  {name} {f['top1']:.3f}" for name, f in sources.items())
        text += "  shared " + "/".join(f"{f['top1']:.3f}" for f in shared.values())
    return found, text


def main() -> None:
    args, defaults = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = device_of(args.device)

    every, valid = load_data(args.data)
    train = every.labelled()
    valid_windows = prepare.plain_windows(valid)
    targets = soft_labels(train, args.smoothing, args.teacher_share, args.modulations)
    tag_weight = args.tags if every.tags.shape[1] > 0 else 0.0
    used, used_targets = train, targets
    if tag_weight > 0:
        used = every
        used_targets = np.zeros((len(every), targets.shape[1]), dtype=np.float32)
        used_targets[every.label >= 0] = targets

    sample = prepare.plain_windows(train).float() / 255.0
    config = replace(
        ModelConfig(), classes=len(train.names), depth=args.depth,
        tags=every.tags.shape[1] if tag_weight > 0 else 0,
        mean=round(float(sample.mean()), 4), std=round(float(sample.std()), 4),
    )
    del sample
    model = GenreViT(config)
    if args.init:
        model.load_state_dict(torch.load(args.init / "model.pt", weights_only=True)["state"])
    model.to(device, memory_format=torch.channels_last)
    average = Average(model, args.average)
    optimiser = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.98)
    )

    steps = max(1, len(train) // args.batch)
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    changed = [k for k, v in settings.items() if v != defaults[k]]
    history: list[dict[str, object]] = []
    clips = np.bincount(train.label, minlength=len(train.names))
    threads = Threads(args.threads)
    begin = time.time()
    done = 0.0
    epoch = 0
    print(f"{len(train)} training clips, {len(valid)} validation clips, "
          f"{count_parameters(model) / 1e6:.2f} M parameters, on {machine_name(device, args)}",
          flush=True)

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
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not args.float32):
                total, loss = loss_of(model, batch.to(device), tag_weight)
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
        found, text = describe(logits, valid)
        history.append({
            "epoch": epoch, "loss": round(loss_sum / taken, 4), **found,
            "samplesPerSecond": round(taken * args.batch / spent, 1),
        })
        print(f"epoch {epoch:3d}  loss {loss_sum / taken:.3f}  {text}  "
              f"{taken * args.batch / spent:.0f}/s on {threads.best}  "
              f"{(time.time() - begin) / 60:.1f} min", flush=True)

        save(args.out, average.model, train.names, logits, valid, {
            "settings": settings, "nonDefault": changed, "parameters": count_parameters(model),
            "labels": list(train.names),
            "trainClips": len(train), "validClips": len(valid),
            "unlabelledClips": len(used) - len(train),
            "trainClipsByGenre": dict(zip(train.names, clips.tolist())),
            "init": json.loads((args.init / "run.json").read_text()) if args.init else None,
            "epochsDone": epoch, "finished": done >= 1.0, "prior": args.balance,
            "minutes": round((time.time() - begin) / 60, 1),
            "machine": machine_name(device, args),
            "torch": torch.__version__, "history": history,
        })
    finish(args.out, args.prior, valid)


def save(
    out: Path, model: GenreViT, names: Sequence[str], logits: np.ndarray, valid: prepare.Clips,
    facts: dict[str, object],
) -> None:
    """Weights, validation logits and run.json; the weights are never half-written."""
    torch.save({"config": model.config.to_dict(), "state": model.state_dict(),
                "labels": list(names)}, out / "model.tmp")
    os.replace(out / "model.tmp", out / "model.pt")
    np.savez(out / "valid.npz", logits=logits, label=valid.label, source=valid.source)
    (out / "run.json").write_text(json.dumps(facts, indent=1))


def finish(out: Path, prior: float, valid: prepare.Clips) -> None:
    """Gives the saved network of ``out`` the genre prior that it is shipped with."""
    facts = json.loads((out / "run.json").read_text())
    model = load_network(out)
    clips = np.array(list(facts["trainClipsByGenre"].values()), dtype=np.float64)
    level_prior(model, clips, facts.get("prior", facts["settings"]["balance"]), prior)
    logits = predict(model, prepare.plain_windows(valid)).numpy()
    print(f"prior {facts.get('prior')} -> {prior}: {describe(logits, valid)[1]}", flush=True)
    facts["prior"] = prior
    save(out, model, list(facts["trainClipsByGenre"]), logits, valid, facts)


if __name__ == "__main__":
    main()
