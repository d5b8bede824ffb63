"""Pretrain an image encoder by predicting rewards, or by reconstructing images.

What
    Watch moving sprites and learn to predict several rewards at once: whatever the rewards
    depend on must get through the encoder, whatever they do not depend on (distractors) need not.
    Image reconstruction, the rival objective, must encode everything that covers pixels.
    The encoder is then used by ppo_encoder.py; heads, LSTM and decoder are no longer needed.

Paper
    Jain, Lee & Pertsch, "Reward-Induced Representation Learning"; its successor: Yamada, Pertsch,
    Gunjal & Lim, "Task-Induced Representation Learning", ICLR 2022, arXiv 2204.11827.

Algorithm
    repeat --updates times:
        frames, rewards ← sample_batch               B sequences, drawn for this update
        reward prediction:
            update_reward_prediction                 a step of encoder and predictor on (2)
            every fourth time update_reconstruction  a step of the decoder on (3), z detached
        image reconstruction:
            update_reconstruction                    a step of encoder and decoder on (3)
        twenty times in all: measure                 errors and a linear probe, on held-out data

Equations
    (1)  p(r₁ … r_K | x) = ∫ Πₖ p(rₖ | z) p(z | x) dz      one encoder, K reward heads
    (2)  loss = Σₜ Σₖ (rₜₖ − r̂ₜₖ)²                         reward prediction, mean over B
    (3)  loss = mean over pixels of (x − x̂)²              image reconstruction
    In the slides that this follows, the product of (1) stands outside the integral: then every
    reward would have a z of its own. Here p(z|x) is a point, z = encoder(x).

Notation
    x frames, r rewards, z the code, hats: predictions. B batch, N conditioning frames, S frames
    seen at once, T predicted steps, K tasks, Z latent size, H hidden size, M samples of the probe,
    D quantities it reads.

Differs from the paper
    1. No batch normalisation (--batch-norm turns it on; in PPO it then keeps its pretraining
       statistics): with it --updates 2000 took a third longer and left an error of .0091, without
       it .0076 (1 distractor, seed 1).
    2. Ten rewards are predicted; the first N belong to the visible frames. The nearer a reward is
       to a frame, the sharper the gradient that reaches the encoder.
    3. RAdam at 4e-3, a linear warm-up times a cosine, batches of 32, orthogonal initialisation of
       encoder and MLPs. In short single runs 6e-3 left one seed of two blind to the agent; 3e-3
       was slower.
    4. Data is drawn afresh for every update instead of from a fixed set: nothing to overfit.
    5. The decoder of reward prediction, which only shows what is in z, is the encoder in reverse,
       and trained at every fourth update, to save time.
    6. Reconstruction has one frame of each sequence, as neighbours look alike; a decoder that
       starts at 4 x 4 pixels instead of one; and twice the updates: with 2 distractors the error
       of a pixel is .0047, where the encoder in reverse and 8,000 updates left .0139. Its loss is
       a mean over pixels: RAdam does not scale its first steps, and the gradient of a sum over
       4,096 pixels throws the weights far off.

Run
    python rp_pretrain.py --distractors 2
    python rp_pretrain.py --objective image_reconstruction --distractors 2
    python rp_pretrain.py --tasks agent_x

Writes
    to runs/rp_pretrain/<objective>[_<tasks>][_batch_norm][_stack<S>]_d<distractors>_s<seed>/:
    args.json, curve.csv, curve.png, decoded.png (true frames above decoded ones), checkpoint.pt
    (all networks, at every report), encoder.pt (the encoder, at the end, for ppo_encoder.py) and
    summary.json with `mse` (mean over tasks and steps, held out), `mse_<task>`, `mse_first_step`,
    `mse_image` (per pixel), `r2_<object>_<axis>` (linear probe on z, held out), `updates`,
    `minutes`. Columns of curve.csv: `step` (updates), `seconds`, `steps_per_second`, `loss` (of the
    last batch), and these.

Result
    1 distractor, five seeds: error .0015 (predicting the mean: .053), R² of a linear probe .99
    (agent and target), -.01 (distractors), in 2.3 minutes on two cores. All: benchmark/README.md.

Try
    1. python rp_pretrain.py --tasks agent_x: which object, and which of its coordinates,
       survives in decoded.png?
    2. --distractors 2 with either objective: who still sees the triangles?
    3. --tasks follow: is the distance alone enough to find both objects? How much longer does
       it take than with the four positions?
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

import sprites_env
from sprites_env import Run, require, require_positive

Objective = Literal["reward_prediction", "image_reconstruction"]
Task = Literal["agent_x", "agent_y", "target_x", "target_y", "follow", "repel"]
POSITIONS = ("agent_x", "agent_y", "target_x", "target_y")  # the paper's pretraining tasks
DECODER_EVERY = 4  # updates of the encoder, in reward prediction, to one of the decoder
SHORTEST_WARM_UP = 200  # updates
UPDATES = {"reward_prediction": 8_000, "image_reconstruction": 16_000}  # the defaults
CHANNELS = {  # of the decoder: one that looks on may be small, one that trains the encoder may not
    "reward_prediction": (128, 64, 32, 16, 8, 4),
    "image_reconstruction": (128, 64, 32, 16),
}


@dataclass(frozen=True)
class Args:
    objective: Objective = "reward_prediction"  # what shapes the encoder
    tasks: tuple[Task, ...] = POSITIONS  # rewards to predict; try one alone
    distractors: Literal[0, 1, 2] = 1  # triangles in the frame
    updates: int | None = None  # gradient steps (default: 8,000; image_reconstruction 16,000)
    batch_size: int = 32  # sequences per update (B)
    conditioning_frames: int = 3  # frames that the predictor sees (N); reconstruction: 1
    horizon: int = 10  # steps to predict (T), from the first conditioning frame on
    frame_stack: int = 1  # frames that the encoder sees at once (S): two show velocities
    learning_rate: float = 4e-3  # of RAdam, times a linear warm-up, times a cosine down to zero
    z_dim: int = 64  # size of the representation (Z)
    batch_norm: bool = False  # batch normalisation after each convolution
    seed: int = 1  # of the networks and of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 when several runs share a machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        if self.updates is None:
            object.__setattr__(self, "updates", UPDATES[self.objective])
        require_positive(self)
        tasks_differ = 0 < len(set(self.tasks)) == len(self.tasks)
        require(tasks_differ, "--tasks needs at least one task, each named once")
        reaches = self.horizon >= self.conditioning_frames
        require(reaches, "--horizon must reach over the --conditioning-frames")

    @property
    def frames(self):
        """N. For reconstruction neighbouring frames add little to look at."""
        return self.conditioning_frames if self.objective == "reward_prediction" else 1

    @property
    def run_name(self):
        some = self.objective == "reward_prediction" and self.tasks != POSITIONS
        variant = [self.objective, *(["+".join(self.tasks)] if some else [])]
        variant += ["batch_norm"] if self.batch_norm else []
        variant += [f"stack{self.frame_stack}"] if self.frame_stack > 1 else []
        return "_".join([*variant, f"d{self.distractors}", f"s{self.seed}"])


# --- Networks --------------------------------------------------------------------------------


def strided_convolutions(channels):
    """3 x 3 convolutions, each halving the image's height and width, each followed by a ReLU."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Six convolutions, 64 x 64 -> 1 x 1 pixel, and a linear map: an image becomes a vector z."""

    def __init__(self, z_dim=64, frames=1):
        super().__init__()
        self.convolutions = strided_convolutions((frames, 4, 8, 16, 32, 64, 128))
        self.to_z = nn.Linear(128, z_dim)
        orthogonal_(self).to(memory_format=torch.channels_last)  # same numbers, faster

    def forward(self, frames):  # float (B, S, 64, 64) in [0, 1]
        h = self.convolutions(frames)  # (B, 128, 1, 1)
        return self.to_z(h.flatten(1))  # (B, Z)


def batch_normalized(convolutions):
    """The same layers, with batch normalisation after each convolution."""
    layers = []
    for layer in convolutions:
        is_convolution = isinstance(layer, nn.Conv2d)
        layers += [layer, nn.BatchNorm2d(layer.out_channels)] if is_convolution else [layer]
    return nn.Sequential(*layers)


class Decoder(nn.Module):
    """A linear map to a small image and transposed convolutions, each doubling its height and
    width: z -> 64 x 64 pixels. With the default, the encoder in reverse, it starts at one pixel."""

    def __init__(self, z_dim=64, frames=1, channels=(128, 64, 32, 16, 8, 4)):
        super().__init__()
        self.side = 64 >> len(channels)  # pixels
        self.from_z = nn.Linear(z_dim, channels[0] * self.side**2)
        layers = []
        for c_in, c_out in zip(channels, (*channels[1:], frames)):
            layers += [nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, z):  # (B, Z)
        small = self.from_z(z).unflatten(1, (-1, self.side, self.side))
        return self.convolutions(small)  # (B, S, 64, 64)


class RewardPredictor(nn.Module):
    """r̂ of every step and task from N codes, eq. (1): an MLP over the codes starts an LSTM, which
    runs on without input, and K heads read its state."""

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


class Model:
    """The three networks and their optimiser."""

    def __init__(self, args, device):
        self.encoder = Encoder(args.z_dim, args.frame_stack)
        channels = CHANNELS[args.objective]
        self.decoder = Decoder(args.z_dim, args.frame_stack, channels).to(device)
        if args.batch_norm:
            self.encoder.convolutions = batch_normalized(self.encoder.convolutions)
        self.encoder.to(device)
        self.predictor = RewardPredictor(args.z_dim, args.frames, len(args.tasks)).to(device)
        networks = nn.ModuleList([self.encoder, self.decoder, self.predictor])
        self.optimizer = torch.optim.RAdam(networks.parameters())  # its rate: see learning_rate


# --- Losses and the probe: pure functions of tensors -----------------------------------------


def reward_prediction_loss(predicted, rewards):
    """Σₜ Σₖ (rₜₖ − r̂ₜₖ)², eq. (2), averaged over the batch. Both (B, T, K) -> scalar."""
    assert predicted.shape == rewards.shape
    return (rewards - predicted).square().sum(dim=(1, 2)).mean()


def reconstruction_loss(decoded, frames):
    """Mean of (x − x̂)² over pixels and frames, eq. (3). Both (B, S, 64, 64) -> scalar."""
    assert decoded.shape == frames.shape
    return (frames - decoded).square().mean()


def linear_probe(z, y, z_test, y_test, ridge=1e-6):
    """R² on held-out data of the ridge regression z -> y: how much of y can be read off z
    linearly. z (M, Z), y (M, D), z_test (M', Z), y_test (M', D) -> R² per column, (D,)."""
    z, y, z_test, y_test = (x.double() for x in (z, y, z_test, y_test))
    centre, mean = z.mean(0), y.mean(0)
    a = z - centre
    penalty = ridge * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    weights = torch.linalg.solve(a.T @ a + penalty, a.T @ (y - mean))
    error = y_test - ((z_test - centre) @ weights + mean)
    return 1 - error.square().mean(0) / y_test.var(0, correction=0)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_reward_prediction(model, frames, rewards):
    """One step of encoder and predictor on (2). frames (B N, S, 64, 64), rewards (B, T, K).

    Returns the loss, and z (B N, Z) without gradient."""
    z = model.encoder(frames)
    predicted = model.predictor(z.unflatten(0, (len(rewards), -1)), rewards.shape[1])  # (B, T, K)
    loss = reward_prediction_loss(predicted, rewards)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    return loss.detach(), z.detach()


def update_reconstruction(model, z, frames):
    """One step on (3) of the decoder, and of the encoder, unless z (B, Z) is without gradient: a
    network without gradient is not stepped. frames (B, S, 64, 64). Returns the loss."""
    loss = reconstruction_loss(model.decoder(z), frames)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    return loss.detach()


def learning_rate(update, args):
    """A linear warm-up times a cosine. RAdam takes its first steps unscaled: keep them small."""
    warm_up = max(SHORTEST_WARM_UP, args.updates // 20)
    cosine = (1 + math.cos(math.pi * (update - 1) / args.updates)) / 2
    return args.learning_rate * (min(1, update / warm_up) * cosine)


# --- Data and measures -----------------------------------------------------------------------


def sample_batch(rng, batch, args, device):
    """New sequences: frames float (B N, S, 64, 64), the N of a sequence together, and rewards
    (B, T, K) of its T steps. For data of your own, change this and `probe_data`."""
    N, S = args.frames, args.frame_stack
    frames, _, rewards = sprites_env.sample_trajectories(
        rng, batch, args.horizon + S - 1, args.distractors, N + S - 1
    )
    rewards = np.stack([rewards[task][:, S - 1 :] for task in args.tasks], axis=-1)
    frames = np.stack([frames[:, i : i + S] for i in range(N)], axis=1)  # (B, N, S, 64, 64)
    return to_tensor(frames.reshape(batch * N, S, 64, 64), device), to_tensor(rewards, device)


def probe_data(distractors, device, frame_stack=1):
    """Stacks of frames (3000, S, 64, 64) and the positions (3000, D) of the objects in the newest,
    never trained on."""
    rng = np.random.default_rng(10**9 + 1)
    frames, states, _ = sprites_env.sample_trajectories(rng, 3000, frame_stack, distractors)
    positions = torch.from_numpy(states[:, -1, :, :2].reshape(3000, -1))
    return to_tensor(frames, device), positions.to(device)


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


@torch.no_grad()
def measure(model, held_out, probe, args):
    """Errors on held-out sequences, and R² of the probe, fitted on two thirds of its frames."""
    model.encoder.eval()
    frames, rewards = held_out
    z = torch.cat([model.encoder(chunk) for chunk in frames.split(500)])
    decoded = torch.cat([model.decoder(chunk) for chunk in z.split(500)])
    metrics = {}
    if args.objective == "reward_prediction":
        error = model.predictor(z.unflatten(0, (len(rewards), -1)), args.horizon) - rewards
        error = error.square()  # (B, T, K)
        metrics |= {"mse": error.mean().item(), "mse_first_step": error[:, 0].mean().item()}
        metrics |= {f"mse_{k}": e.item() for k, e in zip(args.tasks, error.mean((0, 1)))}
    metrics["mse_image"] = reconstruction_loss(decoded, frames).item()
    frames, positions = probe
    z = torch.cat([model.encoder(chunk) for chunk in frames.split(500)])
    r2 = linear_probe(z[:2000], positions[:2000], z[2000:], positions[2000:])
    objects = ["agent", "target"] + [f"distractor{i + 1}" for i in range(args.distractors)]
    names = [f"r2_{name}_{axis}" for name in objects for axis in "xy"]
    model.encoder.train()
    return metrics | dict(zip(names, r2.tolist()))


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One pretraining run; returns the content of summary.json."""
    run = Run(args, total=args.updates)
    device = run.device
    (run.folder / "encoder.pt").unlink(missing_ok=True)  # of an earlier run
    rng, model = np.random.default_rng(args.seed), Model(args, device)
    held_out = sample_batch(np.random.default_rng(10**9), 500, args, device)
    probe = probe_data(args.distractors, device, args.frame_stack)
    names = ("objective", "distractors", "z_dim", "frame_stack")
    facts = {name: getattr(args, name) for name in names}
    facts |= {"tasks": list(args.tasks), "batch_norm": args.batch_norm}

    reports = {math.ceil(args.updates * i / 20) for i in range(1, 21)}
    for update in range(1, args.updates + 1):
        # sample
        frames, rewards = sample_batch(rng, args.batch_size, args, device)

        # learn
        model.optimizer.param_groups[0]["lr"] = learning_rate(update, args)
        if args.objective == "reward_prediction":
            loss, z = update_reward_prediction(model, frames, rewards)
            if update % DECODER_EVERY == 0:  # the decoder learns what is in z
                update_reconstruction(model, z[:: args.frames], frames[:: args.frames])
        else:
            loss = update_reconstruction(model, model.encoder(frames), frames)

        # report
        if update in reports:
            metrics = measure(model, held_out, probe, args)
            run.report(update, loss=loss.item(), **metrics)
            saved = facts | {"update": update, "encoder": model.encoder.state_dict()}
            others = {"decoder": model.decoder.state_dict()}
            others["predictor"] = model.predictor.state_dict()
            run.save("checkpoint.pt", saved | others)

    run.save("encoder.pt", saved)
    model.encoder.eval()
    with torch.no_grad():
        decoded = model.decoder(model.encoder(probe[0][:8]))
    rows = {"true": probe[0][:8, -1].cpu(), "decoded": decoded[:, -1].cpu()}
    run.save("decoded.png", sprites_env.draw_images(rows))
    columns = {kind: [name for name in metrics if name.startswith(kind)] for kind in ("mse", "r2")}
    panels = [("mean squared error, held out", columns["mse"])]
    panels += [("R² of a linear probe on z", columns["r2"])]
    return run.finish(metrics | {"updates": args.updates}, panels, "updates")


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
