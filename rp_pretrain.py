"""Pretrain an image encoder by predicting rewards, or by reconstructing images.

What
    Watch moving sprites and learn to predict several rewards at once: whatever the rewards
    depend on must get through the encoder, whatever they do not depend on (distractors) need not.
    Image reconstruction, the rival objective, must encode everything that covers pixels.
    The encoder is then used by ppo_encoder.py; heads, LSTM and decoder have done their work.

Paper
    Jain, Lee & Pertsch, "Reward-Induced Representation Learning"; its successor: Yamada, Pertsch,
    Gunjal & Lim, "Task-Induced Representation Learning", ICLR 2022, arXiv 2204.11827.

Equations
    (1)  p(r¹:ᴷ | x) = Πₖ ∫ p(rₖ | z) p(z | x) dz          one encoder, K reward heads
    (2)  L = Σₜ Σₖ (rₖᵗ − r̂ₖᵗ)²                             reward prediction, mean over B
    (3)  L = mean over pixels of (x − x̂)²                  image reconstruction

Notation
    B batch, N conditioning frames, T predicted steps, K tasks, Z latent size, H hidden size,
    M and L samples of the probe (fitted and held out), D quantities that it reads.

Differs from the paper
    1. No batch normalisation (--batch-norm turns it on; in PPO it then keeps its pretraining
       statistics): with it --updates 2000 took a third longer and left an error of .0091, without
       it .0076 (1 distractor, seed 1).
    2. Ten predicted steps, the first of them those of the conditioning frames: the nearer a
       reward is to a frame, the sharper the gradient that reaches the encoder.
    3. RAdam at 4e-3, warmed up and annealed, batches of 32, orthogonal initialisation of encoder
       and MLPs. In short single runs 6e-3 left one seed of two blind to the agent; 3e-3 was slower.
    4. Data is drawn afresh for every update instead of from a fixed set: nothing to overfit.
    5. The decoder that looks on is trained at every fourth update, to save time.
    6. The reconstruction loss is a mean over pixels, for one frame of each sequence: neighbours
       look alike, and RAdam does not scale its first steps, so that a sum over 4,096 pixels throws
       the weights far off. Even so, one seed of five never reconstructs the agent at 0
       distractors (seed 3, error .0126; at half the learning rate .0125).

Run
    python rp_pretrain.py --distractors 2
    python rp_pretrain.py --objective image_reconstruction --distractors 2
    python rp_pretrain.py --tasks agent_x

Writes
    to runs/rp_pretrain/<objective>[_<tasks>]_d<distractors>_s<seed>/:
    args.json, curve.csv, curve.png, decoded.png (true frames above decoded ones), checkpoint.pt
    (all networks, at every report), encoder.pt (the encoder, at the end, for ppo_encoder.py) and
    summary.json with `mse` (mean over tasks and steps, held out), `mse_<task>`, `mse_first_step`,
    `mse_image` (per pixel), `r2_<object>_<axis>` (linear probe on z, held out), `minutes`.

Result
    Reward prediction, held out, mean over seeds 1-5 of python benchmark/study.py:

        0 distractors: error 0.0009; R² agent 0.977, target 0.985
        1 distractors: error 0.0015; R² agent 0.988, target 0.996, distractors -0.01
        2 distractors: error 0.0018; R² agent 0.973, target 0.995, distractors -0.02

    2.3 minutes on two otherwise idle cores (AMD EPYC). Predicting the mean would leave an error of
    .053. README.md has the standard deviations, and image reconstruction beside it.

Try
    1. python rp_pretrain.py --tasks agent_x: which object, and which of its coordinates,
       survives in decoded.png?
    2. --distractors 2 with either objective: who still sees the triangles?
    3. --tasks follow: is the distance alone enough to find both objects? How much longer does
       it take than with the four positions?
"""

import csv
import ctypes
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn

import sprites_env

Objective = Literal["reward_prediction", "image_reconstruction"]
Task = Literal["agent_x", "agent_y", "target_x", "target_y", "follow", "repel"]
POSITIONS = ("agent_x", "agent_y", "target_x", "target_y")  # the paper's pretraining tasks


@dataclass(frozen=True)
class Args:
    objective: Objective = "reward_prediction"  # what shapes the encoder
    tasks: tuple[Task, ...] = POSITIONS  # rewards to predict; try one alone
    distractors: Literal[0, 1, 2] = 1  # triangles in the frame
    updates: int = 8_000  # gradient steps
    batch_size: int = 32  # sequences per update (B)
    conditioning_frames: int = 3  # frames that the predictor sees (N); reconstruction: 1
    horizon: int = 10  # steps to predict (T), from the first conditioning frame on
    learning_rate: float = 4e-3  # of RAdam at its peak: a linear warm-up, then a cosine to zero
    z_dim: int = 64  # size of the representation (Z)
    batch_norm: bool = False  # batch normalisation after each convolution
    seed: int = 1  # of the networks and of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 when several runs share a machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run


# --- Networks --------------------------------------------------------------------------------


def strided_convolutions(channels, batch_norm=False):
    """3 x 3 convolutions, each halving the image's height and width, each followed by a ReLU."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), *norm, nn.ReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Six convolutions, 64 x 64 -> 1 x 1 pixel, and a linear map: an image becomes a vector z."""

    def __init__(self, z_dim=64, batch_norm=False):
        super().__init__()
        self.convolutions = strided_convolutions((1, 4, 8, 16, 32, 64, 128), batch_norm)
        self.to_z = nn.Linear(128, z_dim)
        orthogonal_(self).to(memory_format=torch.channels_last)  # same numbers, faster

    def forward(self, frames):  # float (B, 1, 64, 64) in [0, 1]
        h = self.convolutions(frames)  # (B, 128, 1, 1)
        return self.to_z(h.flatten(1))  # (B, Z)


class Decoder(nn.Module):
    """The encoder in reverse: z -> 64 x 64 pixels."""

    def __init__(self, z_dim=64):
        super().__init__()
        channels = (128, 64, 32, 16, 8, 4, 1)
        self.from_z = nn.Linear(z_dim, 128)
        layers = []
        for c_in, c_out in zip(channels[:-1], channels[1:]):
            layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z):  # (B, Z)
        return self.convolutions(self.from_z(z)[:, :, None, None])  # (B, 1, 64, 64)


class RewardPredictor(nn.Module):
    """An MLP over the N codes starts an LSTM, which runs on without input; K heads read it."""

    def __init__(self, z_dim, conditioning_frames, tasks, hidden=64):
        super().__init__()
        self.start = mlp(conditioning_frames * z_dim, 32, hidden)
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.heads = nn.ModuleList(mlp(hidden, 32, 1) for _ in range(tasks))

    def forward(self, z, steps):  # (B, N, Z)
        h0 = self.start(z.flatten(1))[None]  # (1, B, H)
        no_input = z.new_zeros(len(z), steps, 1)
        h, _ = self.lstm(no_input, (h0, torch.zeros_like(h0)))  # (B, T, H)
        return torch.cat([head(h) for head in self.heads], dim=-1)  # (B, T, K)


def mlp(size_in, hidden, size_out):
    """A multilayer perceptron of three layers."""
    layers = [nn.Linear(size_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return orthogonal_(nn.Sequential(*layers, nn.Linear(hidden, size_out)))


def orthogonal_(module):
    """Orthogonal weights and zero biases. With PyTorch's default, the signal all but vanishes on
    its way through six stride-2 layers, and nothing is learnt for thousands of updates."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return module


# --- The algorithm: losses and the probe, pure functions of tensors --------------------------


def reward_prediction_loss(predicted, rewards):
    """L = Σₜ Σₖ (rₖᵗ − r̂ₖᵗ)², eq. (2), averaged over the batch. Both (B, T, K) -> scalar."""
    assert predicted.shape == rewards.shape
    return (rewards - predicted).square().sum(dim=(1, 2)).mean()


def reconstruction_loss(decoded, frames):
    """L = mean of (x − x̂)² over pixels and frames, eq. (3). Both (B, 1, 64, 64) -> scalar."""
    assert decoded.shape == frames.shape
    return (frames - decoded).square().mean()


def linear_probe(z, y, z_test, y_test, ridge=1e-6):
    """R² on held-out data of the ridge regression z -> y: how much of y can be read off z
    linearly. z (M, Z), y (M, D), z_test (L, Z), y_test (L, D) -> R² per column, (D,)."""
    z, y, z_test, y_test = (x.double() for x in (z, y, z_test, y_test))
    centre, mean = z.mean(0), y.mean(0)
    a = z - centre
    penalty = ridge * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    weights = torch.linalg.solve(a.T @ a + penalty, a.T @ (y - mean))
    error = y_test - ((z_test - centre) @ weights + mean)
    return 1 - error.square().mean(0) / y_test.var(0, correction=0)


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One pretraining run; returns the content of summary.json."""
    check(args, "updates batch_size conditioning_frames horizon learning_rate z_dim")
    if not args.tasks or len(set(args.tasks)) < len(args.tasks):
        raise SystemExit("error: --tasks needs at least one task, each named once")
    if args.horizon < args.conditioning_frames:
        raise SystemExit("error: --horizon must reach over the --conditioning-frames")
    by_reward, T = args.objective == "reward_prediction", args.horizon
    N = args.conditioning_frames if by_reward else 1  # neighbouring frames add little to look at
    tasks = "_" + "+".join(args.tasks) if by_reward and args.tasks != POSITIONS else ""
    tasks += "_batch_norm" if args.batch_norm else ""
    device = prepare(args)
    out = open_run(args, f"{args.objective}{tasks}_d{args.distractors}_s{args.seed}", device)
    (out / "encoder.pt").unlink(missing_ok=True)  # of an earlier run
    rng = np.random.default_rng(args.seed)

    encoder = Encoder(args.z_dim, args.batch_norm).to(device)
    decoder = Decoder(args.z_dim).to(device)
    predictor = RewardPredictor(args.z_dim, N, len(args.tasks)).to(device)
    trained = [encoder, decoder, predictor] if by_reward else [encoder, decoder]
    optimizer = torch.optim.RAdam(
        [p for module in trained for p in module.parameters()], lr=args.learning_rate
    )
    warm_up = max(200, args.updates // 20)  # RAdam takes its first steps unscaled: keep them small
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda u: min(1, (u + 1) / warm_up) * (1 + math.cos(math.pi * u / args.updates)) / 2,
    )

    def sample(generator, batch):
        frames, _, rewards = sprites_env.sample_trajectories(
            generator, batch, T, args.distractors, N
        )
        rewards = np.stack([rewards[task] for task in args.tasks], axis=-1)  # (B, T, K)
        frames = frames.reshape(batch * N, 1, 64, 64)
        return to_float(frames, device), torch.from_numpy(rewards).to(device)

    held_out = sample(np.random.default_rng(10**9), 500)
    probe_frames, probe_states = probe_data(args.distractors, device)

    @torch.no_grad()
    def evaluate():
        encoder.eval()
        frames, rewards = held_out
        z = torch.cat([encoder(chunk) for chunk in frames.split(500)])
        decoded = torch.cat([decoder(chunk) for chunk in z.split(500)])
        metrics = {}
        if by_reward:
            error = (predictor(z.unflatten(0, (-1, N)), T) - rewards).square()
            metrics |= {"mse": error.mean().item(), "mse_first_step": error[:, 0].mean().item()}
            metrics |= {f"mse_{k}": e.item() for k, e in zip(args.tasks, error.mean((0, 1)))}
        metrics["mse_image"] = (decoded - frames).square().mean().item()
        z = torch.cat([encoder(chunk) for chunk in probe_frames.split(500)])
        r2 = linear_probe(z[:2000], probe_states[:2000], z[2000:], probe_states[2000:])
        names = ["agent", "target"] + [f"distractor{i + 1}" for i in range(args.distractors)]
        metrics |= {
            f"r2_{k}": v.item() for k, v in zip([f"{n}_{a}" for n in names for a in "xy"], r2)
        }
        encoder.train()
        return metrics

    def save(path, **modules):
        facts = {"objective": args.objective, "tasks": list(args.tasks), "update": update}
        facts |= {name: getattr(args, name) for name in ("distractors", "z_dim", "batch_norm")}
        facts |= {name: module.state_dict() for name, module in modules.items()}
        write_whole(path, lambda temporary: torch.save(facts, temporary))

    log, reports = Log(out, args.updates), {math.ceil(args.updates * i / 20) for i in range(1, 21)}
    for update in range(1, args.updates + 1):
        # sample
        frames, rewards = sample(rng, args.batch_size)  # (B N, 1, 64, 64), (B, T, K)

        # learn
        z = encoder(frames)  # (B N, Z)
        if by_reward:
            predicted = predictor(z.unflatten(0, (-1, N)), T)  # (B, T, K)
            loss = total_loss = reward_prediction_loss(predicted, rewards)
            if update % 4 == 0:  # the decoder looks on, now and then: the encoder gets no gradient
                decoded = decoder(z[::N].detach())
                total_loss = loss + reconstruction_loss(decoded, frames[::N])
        else:
            loss = total_loss = reconstruction_loss(decoder(z), frames)
        optimizer.zero_grad()
        total_loss.backward()
        optimizer.step()
        schedule.step()

        # report
        if update in reports:
            metrics = evaluate()
            log.report(update, loss=loss.item(), **metrics)
            save(out / "checkpoint.pt", encoder=encoder, decoder=decoder, predictor=predictor)

    summary = metrics | {"updates": args.updates, "minutes": round(log.minutes(), 2)}
    columns = list(metrics)
    panels = [("mean squared error, held out", [c for c in columns if c.startswith("mse")])]
    panels += [("R² of a linear probe on z", [c for c in columns if c.startswith("r2")])]
    plot_curve(out / "curve.png", log.rows, panels, "updates")
    encoder.eval()
    decoded = decoder(encoder(probe_frames[:8])).detach()
    title = f"{args.objective}{tasks}, distractors: {args.distractors}"
    plot_decoded(out / "decoded.png", probe_frames[:8], decoded, title)
    save(out / "encoder.pt", encoder=encoder)
    write_whole(out / "summary.json", lambda t: t.write_text(json.dumps(summary, indent=1)))
    return summary


# --- Appendix: data for the probe, run folder, log, pictures ---------------------------------


def probe_data(distractors, device):
    """3000 frames (3000, 1, 64, 64) and the objects' positions (3000, 2 K), never trained on."""
    states, shapes = sprites_env.sample_states(np.random.default_rng(10**9 + 1), 3000, distractors)
    positions = states[:, :, :2]
    frames = sprites_env.draw(positions, shapes)[:, None]
    return to_float(frames, device), torch.from_numpy(positions.reshape(3000, -1)).to(device)


def to_float(frames, device):
    """uint8 (...), array or tensor -> float32 (...) in [0, 1] on the device."""
    return torch.as_tensor(frames, device=device).to(torch.float32, copy=True).div_(255)


def plot_decoded(path, frames, decoded, title):
    """Row 1: true frames (M, 1, 64, 64); row 2: what the decoder makes of their z."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(len(frames), 2.4), layout="constrained")
    axes = figure.subplots(2, len(frames), squeeze=False)
    for row, images, label in zip(axes, (frames, decoded), ("true", "decoded")):
        row[0].set_ylabel(label)
        for axis, image in zip(row, images):
            axis.imshow(image[0].cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=10)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=100))


def plot_curve(path, rows, panels, x_label, levels=(), offline=0):
    """A panel for each (y label, columns of curve.csv); dashed: levels (name, y); grey: offline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * max(1.2, len(panels)), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    axes[0].axvspan(0, offline, color="grey", alpha=0.15, lw=0)
    for name, y in levels:
        axes[0].axhline(y, color="grey", lw=0.8, ls="--", zorder=0)
        axes[0].annotate(name, (0, y), xycoords=("axes fraction", "data"), color="grey", size=8)
    for axis, (y_label, names) in zip(axes, panels):
        for name in names:
            values = [row[name] for row in rows]
            axis.plot([row["step"] for row in rows], values, label=name.replace("_", " "))
        axis.set(xlabel=x_label, ylabel=y_label, yscale="log" if "error" in y_label else "linear")
        axis.legend(fontsize=8)
    figure.suptitle(path.parent.name, fontsize=10)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=100))


def check(args, positive):
    """End with one line if one of these arguments is not above zero, or the seed is unusable."""
    for name in positive.split():
        if not getattr(args, name) > 0:
            flag = name.replace("_", "-")
            raise SystemExit(f"error: --{flag} must be positive, not {getattr(args, name)}")
    if not 0 <= args.seed < 10_000:  # evaluation and held-out data use seeds from 10**9 on
        raise SystemExit(f"error: --seed must be in 0 ... 9999, not {args.seed}")


def prepare(args):
    """Threads, seed and memory; returns the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but this PyTorch finds no CUDA device")
    if args.torch_threads > 0:
        torch.set_num_threads(args.torch_threads)
    torch.manual_seed(args.seed)
    if platform.libc_ver()[0] == "glibc":
        # Large activations come and go with every update. By default glibc hands them back to
        # the system each time and maps them anew, page by page: up to half of the time.
        for option, value in ((-1, 1 << 30), (-2, 1 << 28), (-3, 1 << 30)):
            ctypes.CDLL(None).mallopt(option, value)  # M_TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD
    cuda = args.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def open_run(args, name, device):
    """Make the run's folder and write args.json; a finished run is not overwritten unasked."""
    out = Path(args.out or Path("runs") / Path(__file__).stem / name)
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    facts = {"arguments": asdict(args), "git_commit": (commit or "").strip() or None}
    facts |= {module.__name__: module.__version__ for module in (np, torch, gymnasium)}
    facts |= {"python": platform.python_version(), "device": str(device)}
    facts |= {"threads": torch.get_num_threads()}
    try:
        if (out / "summary.json").exists() and not args.overwrite:
            raise SystemExit(f"error: {out} holds a finished run: use --overwrite, or --out FOLDER")
        out.mkdir(parents=True, exist_ok=True)
        for old in ("summary.json", "checkpoint.pt", "curve.csv"):
            (out / old).unlink(missing_ok=True)  # of an earlier run: not to be taken for this one's
        write_whole(out / "args.json", lambda t: t.write_text(json.dumps(facts, indent=1)))
    except OSError as error:
        raise SystemExit(f"error: cannot write to {out}: {error.strerror}") from None
    return out


def write_whole(path, save):
    """Write a file whole or not at all: `save` fills a temporary file, which is then renamed."""
    temporary = path.with_name("unfinished_" + path.name)
    save(temporary)
    temporary.replace(path)


class Log:
    """Appends a row to curve.csv and prints a line of progress at every report."""

    def __init__(self, out, total):
        self.path, self.total = out / "curve.csv", total
        self.start, self.rows = time.perf_counter(), []

    def minutes(self):
        return (time.perf_counter() - self.start) / 60

    def report(self, step, **metrics):
        seconds = 60 * self.minutes()
        row = {"step": step, "seconds": round(seconds, 2)}
        row |= {"steps_per_second": round(step / seconds, 1)} | metrics
        with open(self.path, "a" if self.rows else "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        left = seconds * (self.total / step - 1)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
        line = f"{step:,}/{self.total:,}  {step / seconds:,.0f}/s  {left:.0f} s left  {shown}"
        live = sys.stdout.isatty()  # one line that changes, or else one line a report
        end = "" if live and step < self.total else "\n"
        print(f"\r\033[K{line}" if live else line, end=end, flush=True)


if __name__ == "__main__":
    try:
        train(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: curve.csv and checkpoint.pt hold what was reported, if anything")
