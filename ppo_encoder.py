"""Proximal policy optimisation (PPO) on Sprites, seen through seven encoders.

What
    An agent learns to follow a target among distractors. What it sees decides how well: the true
    states, images through a network trained from scratch, or images through an encoder pretrained
    by rp_pretrain.py to predict rewards or to reconstruct images, frozen or trained on.
    Everything else is the same for all seven: two heads on z, losses, settings, budget.
    With --encoder pretrained it takes any encoder.pt, those of pretext.py among them.

Paper
    Schulman, Wolski, Dhariwal, Radford & Klimov, "Proximal Policy Optimization Algorithms", 2017,
    arXiv 1707.06347; advantages: Schulman et al. 2015, arXiv 1506.02438. The comparison of
    encoders: Jain, Lee & Pertsch, "Reward-Induced Representation Learning", and Yamada et al.,
    "Task-Induced Representation Learning", ICLR 2022, arXiv 2204.11827.

Algorithm
    encoder ← make_encoder                          pretrained first, if it is missing
    calibrate                                       random actions: the scale of z and of returns
    repeat until --total-steps:
        rollout ← collect_rollout                   T steps of N environments with the present π
        Â ← generalized_advantages                  (1)
        --epochs times, in --minibatches parts:
            update_actor_critic                     one step on (3) and (2); of the encoder, too,
                                                    unless it is frozen
        twenty times in all: evaluate               200 held-out episodes, without noise

Equations
    (1)  Âₜ = δₜ + γλ (1 − endedₜ) Âₜ₊₁,   δₜ = rₜ + γ (1 − terminatedₜ) V(sₜ₊₁) − V(sₜ)
    (2)  maximise  E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)],   ρ = π(a|s) / π_old(a|s)
    (3)  minimise  E[(V(s) − (Â + V_old(s)))²]

Notation
    s state or observation, a action, r reward, π the policy, V the critic's value. N environments,
    S images seen at once, T steps of a rollout, B minibatch, Z size of the representation z, A size
    of an action, K objects in the frame, M = N T samples of the calibration, D dimensions of what
    is standardised.

Differs from the paper
    1. γ = 0.2 instead of 0.95-0.99. Here the best action depends almost only on the next reward; a
       larger γ adds variance to Â, which hurts encoders of images most.
    2. Learning rate 4e-3, 32 minibatches, 4 epochs instead of 3e-4 and 10 epochs: the convolutions
       need many and large steps. 250,000 environment steps instead of 2 to 5 million.
    3. z and the returns are standardised by constants measured in a first, random rollout, so
       that critic, actor and encoder start on one scale, whatever the encoder.
    4. Orthogonal initialisation everywhere, no batch normalisation (it makes the ratio differ
       from 1 before any learning), two hidden layers of 64 units in actor and critic, not 32.
    5. The 40-step limit truncates: it ends the advantage's trace, not the bootstrap.
    6. Advantages are standardised in each minibatch, the gradient's norm is clipped, and there is
       no entropy bonus.
    7. All seven get the same settings, chosen for image_scratch and oracle, and one frame; with
       --frame-stack 2 they see velocities, too. z has 64 numbers, but 1,024 with cnn, and 8 to 16
       with oracle.

Run
    python ppo_encoder.py --encoder reward_prediction
    python ppo_encoder.py --encoder image_scratch --distractors 0
    python ppo_encoder.py --encoder pretrained --encoder-path runs/pretext/inverse_d2_s1/encoder.pt

Writes
    to runs/ppo_encoder/<encoder>[_<folder of encoder.pt>][_repel][_stack<S>]_d<distractors>_s<seed>
    (that folder only for pretrained ones): args.json, curve.csv, curve.png, rollout.gif (four
    episodes), checkpoint.pt (at every report) and summary.json with `eval_return_mean`,
    `eval_return_std` (over episodes), `eval_episodes`, `score` (0 random, 1 chasing with known
    velocity), `steps` and `minutes`. Columns of curve.csv: `step` (of all
    environments), `seconds`, `steps_per_second`, `eval_return`, `train_return` (last N episodes,
    with noise), `action_sd` (of the policy), and of the last minibatch `value_loss`, `kl` (from
    the policy that acted) and `clip_fraction`.

Result
    Returns with 2 distractors, five seeds: oracle 38.83, reward_prediction 37.26, image_scratch
    35.95, image_reconstruction 28.7; random 28.2, chasing 37.95. All: benchmark/README.md.

Try
    1. --encoder oracle --gamma 0.95 --out runs/a, image_scratch in runs/b: who needs the future?
    2. --task repel: does an encoder that was pretrained for positions serve another task?
    3. Delete the line with `orthogonal_` in `Encoder`, run --encoder image_scratch --out runs/init.
"""

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

import sprites_env
from sprites_env import Run, require, require_positive

Input = Literal[
    "oracle",  # the objects' states
    "cnn",  # a small convolutional network, from scratch
    "image_scratch",  # the encoder of rp_pretrain.py, from scratch
    "image_reconstruction",  # the same, pretrained to reconstruct images, frozen
    "image_reconstruction_finetune",  # the same, trained on
    "reward_prediction",  # the same, pretrained to predict rewards, frozen
    "reward_prediction_finetune",  # the same, trained on
    "pretrained",  # the same, whatever it was pretrained for (--encoder-path), frozen
    "pretrained_finetune",  # the same, trained on
]
PRETRAINED = ("image_reconstruction", "reward_prediction", "pretrained")
INITIAL_LOG_STD = -0.5  # of the policy
FROZEN = ("oracle", *PRETRAINED)  # z of an observation never changes


@dataclass(frozen=True)
class Args:
    encoder: Input = "reward_prediction"  # true states, or images through this encoder
    distractors: Literal[0, 1, 2] = 1  # triangles in the frame
    task: Literal["follow", "repel"] = "follow"  # what the agent is paid for
    total_steps: int = 250_000  # environment steps, all environments together
    num_envs: int = 128  # environments in lockstep (N)
    rollout_steps: int = 40  # steps of each environment between two rounds of learning (T)
    epochs: int = 4  # passes over each rollout
    minibatches: int = 32  # gradient steps per pass
    learning_rate: float = 4e-3  # of Adam at the start; falls linearly to zero
    gamma: float = 0.2  # discount factor
    gae_lambda: float = 0.95  # decay of the advantage's trace
    clip: float = 0.2  # how far the probability ratio may move from 1
    value_coefficient: float = 1.0  # weight of the critic's loss
    max_grad_norm: float = 0.5  # clipping of the gradient's norm
    frame_stack: int = 1  # images that the encoder sees at once (S): two show velocities
    encoder_path: str | None = None  # an encoder.pt (default: of this seed, made if missing)
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 when several runs share a machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        require_positive(self, but="gamma gae_lambda")
        require(
            self.gamma < 1 and self.gae_lambda <= 1,
            "--gamma must be below 1, --gae-lambda not above",
        )
        rollout = self.num_envs * self.rollout_steps
        least = f"--total-steps must be at least two rollouts, {2 * rollout}"
        require(self.total_steps >= 2 * rollout, least)
        most = f"--minibatches must be at most half of a rollout, {rollout // 2}"
        require(2 * self.minibatches <= rollout, most)
        stacks = self.frame_stack == 1 or self.encoder != "oracle"
        require(stacks, "--frame-stack is of no use to --encoder oracle, which knows velocities")
        if self.encoder.startswith("pretrained"):
            require(self.encoder_path, f"--encoder {self.encoder} needs an --encoder-path")
        if self.encoder_path:
            useful = self.encoder.startswith(PRETRAINED)
            require(useful, f"--encoder-path is of no use to --encoder {self.encoder}")
            load_encoder(self.encoder_path, self)
            kept = Path(self.out or "").resolve() != Path(self.encoder_path).resolve().parent
            require(kept, "--out must not be the folder of --encoder-path, which would be emptied")

    @property
    def environment(self):
        observation = "state" if self.encoder == "oracle" else "image"
        facts = {"distractors": self.distractors, "task": self.task, "observation": observation}
        return facts | {"frame_stack": self.frame_stack}

    @property
    def run_name(self):
        task = "_repel" if self.task == "repel" else ""
        source = ""
        if self.encoder.startswith("pretrained"):  # told apart by the folder of their encoders
            source = "_" + Path(self.encoder_path).resolve().parent.name
        stack = f"_stack{self.frame_stack}" if self.frame_stack > 1 else ""
        return f"{self.encoder}{source}{task}{stack}_d{self.distractors}_s{self.seed}"


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


def make_encoder(args):
    """What turns an observation into z: true states stay as they are."""
    if args.encoder == "oracle":
        return nn.Identity()
    if args.encoder == "cnn":
        convolutions = strided_convolutions((args.frame_stack, 16, 16, 16))
        cnn = nn.Sequential(convolutions, nn.Flatten())  # 16 x 8 x 8
        return orthogonal_(cnn).to(memory_format=torch.channels_last)
    if args.encoder == "image_scratch":
        return Encoder(frames=args.frame_stack)
    return load_encoder(args.encoder_path or find_or_pretrain(args), args)


def find_or_pretrain(args):
    """The encoder.pt of this objective, number of distractors and seed; if there is none yet,
    rp_pretrain.py is run, as a program of its own, so that neither script imports the other."""
    objective = args.encoder.removesuffix("_finetune")
    stack = f"_stack{args.frame_stack}" if args.frame_stack > 1 else ""
    folder = Path("runs") / "rp_pretrain" / f"{objective}{stack}_d{args.distractors}_s{args.seed}"
    if not (folder / "encoder.pt").exists():
        script = Path(__file__).with_name("rp_pretrain.py")
        require(script.exists(), f"--encoder {args.encoder} needs {script}: copy it, too")
        print(f"{folder / 'encoder.pt'} is missing: running {script.name} first", flush=True)
        command = [sys.executable, str(script), "--objective", objective, "--out", str(folder)]
        for flag in ("distractors", "frame_stack", "seed", "device", "torch_threads"):
            command += ["--" + flag.replace("_", "-"), str(getattr(args, flag))]
        require(subprocess.run(command).returncode == 0, "pretraining failed, see above")
    return folder / "encoder.pt"


def load_encoder(path, args):
    """An encoder from a file that rp_pretrain.py or pretext.py wrote; its objective must be that of
    --encoder, unless any will do, and it must see as many frames at once."""
    try:
        saved = torch.load(path, map_location="cpu")
        if not args.encoder.startswith((saved["objective"], "pretrained")):
            raise ValueError(f"its objective was {saved['objective']}")
        frames = saved.get("frame_stack", 1)  # older files, and those of pretext.py: one
        if frames != args.frame_stack:
            raise ValueError(f"it sees {frames} frames at once, --frame-stack {args.frame_stack}")
        encoder = Encoder(saved["z_dim"], frames)
        if saved["batch_norm"]:
            encoder.convolutions = batch_normalized(encoder.convolutions)
        encoder.load_state_dict(saved["encoder"])
        if not all(x.isfinite().all() for x in encoder.state_dict().values()):
            raise ValueError("its numbers are not finite")
    except Exception as error:  # missing, not a checkpoint, or of another architecture
        reason = " ".join(str(error).split())[:100]
        words = f"error: {path} is no file for --encoder {args.encoder}: {reason}"
        raise SystemExit(words) from None
    return encoder


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


class Standardize(nn.Module):
    """(x - mean) / sd, with constants measured once, at the start."""

    def __init__(self, x):  # (M, D), or (M,) for a scalar
        super().__init__()
        sd = x.std(0)
        floor = 0.1 * sd.mean().item() or 1.0  # what hardly varied is not blown up
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("sd", sd.clamp(min=floor))

    def forward(self, x):
        return (x - self.mean) / self.sd

    def inverse(self, y):
        return y * self.sd + self.mean


class ActorCritic(nn.Module):
    """Two separate MLPs on the same standardised z; the policy's sd does not depend on z."""

    def __init__(self, encoder, z, returns, action_dim):  # z (M, Z) and returns (M,) to calibrate
        super().__init__()
        self.encoder = encoder
        self.standardize, self.return_scale = Standardize(z), Standardize(returns)
        self.actor, self.critic = mlp(z.shape[1], 64, action_dim), mlp(z.shape[1], 64, 1)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)  # start with actions around zero
        self.log_std = nn.Parameter(torch.full((action_dim,), INITIAL_LOG_STD))

    def features(self, obs):  # uint8 (B, S, 64, 64), or states (B, 4 K); arrays or tensors
        return self.standardize(self.encoder(to_tensor(obs, self.log_std.device)))  # (B, Z)

    def value(self, z):  # (B, Z)
        return self.return_scale.inverse(self.critic(z)[:, 0])  # (B,), in units of reward

    @torch.no_grad()
    def policy(self, obs):  # (N, ...) -> (N, A), arrays, without noise
        return self.actor(self.features(obs)).cpu().numpy()


# --- Losses: pure functions of tensors -------------------------------------------------------


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def generalized_advantages(rewards, values, next_values, ended, gamma, lam):
    """Âₜ = δₜ + γλ (1 − endedₜ) Âₜ₊₁, δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ), eq. (1).

    All (T, N). `next_values` are those of the state that followed, 0 if it is terminal. A time
    limit ends the trace (`ended` 1), not the bootstrap: its last state has a value."""
    delta = rewards + gamma * next_values - values
    advantages, following = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = delta[t] + gamma * lam * (1 - ended[t]) * following
        advantages[t] = following
    return advantages


def clipped_objective(log_prob, old_log_prob, advantage, clip):
    """E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)] with ρ = π(a|s) / π_old(a|s), eq. (2); maximise.

    All (B,) -> scalar; old_log_prob and advantage carry no gradient."""
    assert log_prob.shape == old_log_prob.shape == advantage.shape
    ratio = (log_prob - old_log_prob).exp()
    return torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def value_loss(value, target):
    """E[(V(s) − target)²], eq. (3). Both (B,), in units of the calibrated return's sd."""
    assert value.shape == target.shape
    return (value - target).square().mean()


# --- The update ------------------------------------------------------------------------------


def update_actor_critic(model, optimizer, minibatch, args):
    """One step of all that is trained on (3) − (2), on standardised advantages.

    minibatch: x (B, ...), observations or, if the encoder is frozen, z; actions (B, A);
    old_log_prob, advantage and target (B,), without gradient, the target in units of the critic."""
    x, actions, old_log_prob, advantage, target = minibatch
    z = x if args.encoder in FROZEN else model.features(x)
    log_prob = gaussian_log_prob(actions, model.actor(z), model.log_std)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    objective = clipped_objective(log_prob, old_log_prob, advantage, args.clip)
    critic_loss = value_loss(model.critic(z)[:, 0], target)
    loss = args.value_coefficient * critic_loss - objective
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    optimizer.step()
    return {"value_loss": critic_loss.detach(), "log_ratio": (log_prob - old_log_prob).detach()}


# --- Data ------------------------------------------------------------------------------------


def make_env(args, num_envs, **options):
    """Environments in lockstep. To train on others, change this line: any vector environment will
    do that resets in the step that ends an episode (README.md has an example)."""
    return sprites_env.SpritesVectorEnv(num_envs, **args.environment, **options)


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


@torch.no_grad()
def calibrate(encoder, episodes, steps, args, device):
    """A rollout of random actions, to measure how z and the discounted returns are distributed:
    z (M, Z) and returns (M,)."""
    rng, z, rows = np.random.default_rng(args.seed), [], []
    for _ in range(steps):
        z.append(encoder(to_tensor(episodes.obs, device)))
        actions = rng.uniform(-1, 1, episodes.env.action_space.shape)
        _, rewards, terminated, truncated = episodes.step(actions)
        rows.append(to_tensor(np.stack([rewards, terminated | truncated]), device))
    rewards, ended = torch.stack(rows, dim=1)  # each (T, N)
    ended[-1] = 1
    # With V = 0 and λ = 1 the advantage (1) is the discounted return; at an end, roughly what would
    # have come after it.
    rest = ended * rewards.mean() / (1 - args.gamma)
    zeros = torch.zeros_like(rewards)
    returns = generalized_advantages(rewards, zeros, rest, ended, args.gamma, 1)
    return torch.cat(z), returns.flatten()


@torch.no_grad()
def collect_rollout(model, episodes, args):
    """T steps with the present policy: x (observations or, if the encoder is frozen, z), actions,
    log_probs, rewards, values, next_values and ended, each (T, N, ...). Without gradient: in the
    update, π_old and V_old are constants."""
    frozen, device, rollout = args.encoder in FROZEN, model.log_std.device, []
    z = model.features(episodes.obs)
    for _ in range(args.rollout_steps):
        # act
        mean, value = model.actor(z), model.value(z)
        action = mean + model.log_std.exp() * torch.randn_like(mean)
        log_prob = gaussian_log_prob(action, mean, model.log_std)
        x = z if frozen else torch.as_tensor(episodes.obs, device=device)  # frozen: encoded once
        successors, *outcome = episodes.step(action.cpu().numpy())
        reward, terminated, truncated = to_tensor(np.stack(outcome), device)

        # store
        z_next = model.features(successors)
        next_value = model.value(z_next) * (1 - terminated)  # a time limit is no termination
        ended = terminated.maximum(truncated)
        rollout.append((x, action, log_prob, reward, value, next_value, ended))
        z = model.features(episodes.obs) if ended.any() else z_next
    return [torch.stack(column) for column in zip(*rollout)]


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One PPO run; returns the content of summary.json."""
    N, T = args.num_envs, args.rollout_steps
    iterations = args.total_steps // (N * T) - 1  # the first rollout is the calibration
    run = Run(args, total=(iterations + 1) * N * T)
    device = run.device
    encoder = make_encoder(args).to(device)
    run.start = time.perf_counter()  # pretraining does not count
    encoder.eval()  # batch normalisation, if any, keeps its pretraining statistics
    encoder.requires_grad_(args.encoder not in FROZEN)
    episodes = sprites_env.Episodes(make_env(args, N), args.seed * 100_000)
    z, returns = calibrate(encoder, episodes, T, args, device)
    action_dim = episodes.env.single_action_space.shape[0]
    model = ActorCritic(encoder, z, returns, action_dim).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=True)

    reports = {math.ceil(iterations * i / 20) for i in range(1, 21)}  # every 5 %
    for iteration in range(1, iterations + 1):
        # act and store
        columns = collect_rollout(model, episodes, args)
        x, actions, log_probs, rewards, values, next_values, ended = columns

        # learn
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / iterations)
        advantages = generalized_advantages(
            rewards, values, next_values, ended, args.gamma, args.gae_lambda
        )
        targets = model.return_scale(advantages + values)
        batch = [c.flatten(0, 1) for c in (x, actions, log_probs, advantages, targets)]
        for _ in range(args.epochs):
            for rows in torch.randperm(T * N, device=device).tensor_split(args.minibatches):
                last = update_actor_critic(model, optimizer, [c[rows] for c in batch], args)

        # report
        if iteration in reports:
            env = make_env(args, args.eval_episodes)
            eval_returns, ratio = sprites_env.evaluate(model.policy, env), last["log_ratio"].exp()
            run.report(
                (iteration + 1) * N * T,
                eval_return=eval_returns.mean(),
                train_return=np.mean(episodes.finished[-N:] or float("nan")),
                action_sd=model.log_std.exp().mean().item(),
                value_loss=last["value_loss"].item(),
                kl=(ratio - 1 - ratio.log()).mean().item(),
                clip_fraction=((ratio - 1).abs() > args.clip).float().mean().item(),
            )
            saved = {"model": model.state_dict(), "encoder": args.encoder}
            run.save("checkpoint.pt", saved | {"step": (iteration + 1) * N * T})

    env = make_env(args, 4, render_mode="rgb_array")
    run.save("rollout.gif", sprites_env.film(model.policy, env))
    summary = sprites_env.summary(eval_returns, args.task) | {"steps": run.total}
    panels = [("return of an episode", ("train_return", "eval_return"))]
    levels = sprites_env.REFERENCE_RETURNS[args.task].items()
    return run.finish(summary, panels, "environment steps", levels)


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
