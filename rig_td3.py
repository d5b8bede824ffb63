"""Reinforcement learning with imagined goals (RIG): practise what you can imagine.

What
    A variational autoencoder compresses images of the scene into a few numbers z. The agent then
    sets itself goals by sampling z, practises reaching them with TD3, and is paid by the distance
    to the goal in z: no reward, no state, no person involved. Afterwards it is shown the image of a
    goal, and reaches it. Baselines in the same loop: true positions as z, distance between pixels.

Paper
    Nair, Pong, Dalal, Bahl, Lin & Levine, "Visual Reinforcement Learning with Imagined Goals",
    2018, arXiv 1807.04742. TD3: Fujimoto, van Hoof & Meger, 2018, arXiv 1802.09477. Relabelling
    with the future: Andrychowicz et al., 2017, arXiv 1707.01495. Decoder: Watters, Matthey,
    Burgess & Lerchner, "Spatial Broadcast Decoder", 2019, arXiv 1901.07017.

Equations
    (1)  VAE: minimise  E_q[−log p(s|z)] + β KL(q(z|s) ‖ N(0, I)),   q(z|s) = N(μ(s), σ²(s))
         KL = ½ Σ (μ² + σ² − log σ² − 1)
    (2)  prior of goals: z_g ~ N(mean, sd²) of μ(s) over the images, one dimension at a time
    (3)  reward: r(z', z_g) = −‖z' − z_g‖,   z' = μ(s') of the next image
    (4)  TD3: y = r + γ min Q̄ᵢ(z', z_g, clip(π̄(z', z_g) + ε)),   minimise  Σᵢ E[(Qᵢ − y)²]
         and, every second time,  maximise  E[Q₁(z, z_g, π(z, z_g))]
    (5)  relabelling: z_g ← as practised, or from the prior, or μ of a later image of the episode

Notation
    N environments, T steps of an episode, E episodes, B batch, M images, K objects in the frame,
    Z size of z, A (in shapes) size of an action, D size of an observation.

Differs from the paper
    1. β in (1) falls from 20 to 1 while the VAE trains; it multiplies a *sum* over z, beside a
       *sum* over 4,096 pixels. Much noise at first lets z unfold: places that are close in the
       image come to be close in z. The encoder keeps a grid of places up to its last layer, and
       the decoder draws 4 x 4 pixels at a time, from z and their place.
    2. Other sprites are at rest: what moves by itself would rule the distance in z. Still, of an
       imagined goal the agent can only reach its own part; in reach the square stays where it is.
    3. Two layers of 128 units, 20,000 steps (push 60,000), one update a step; the authors' code has
       400-300, half a million, four. γ = 0.9 in reach, where going straight is best; 0.98 in push,
       where the way around pays late. Gaussian exploration noise; the first 800 steps are random.
    4. When the VAE is fine-tuned, practised goals are carried over: the old decoder draws them, the
       new encoder reads them. Everything else in the buffer is encoded again.
    5. --goals pixel pays −0.2 ‖s' − p(z_g)‖, even for goals from the future, whose image is known.

Run
    python rig_td3.py
    python rig_td3.py --task push
    python rig_td3.py --goals oracle

Writes
    to runs/rig_td3/<task>_<goals>_d<distractors>_s<seed>/: args.json, curve.csv, curve.png,
    reached.png, rollout.gif (the goal as a ghost), imagined_goals.png, latent_walk.png,
    checkpoint.pt (at every report) and summary.json with `final_agent_distance`,
    `final_block_distance` (frame widths, means over `eval_episodes` unseen goals),
    `untouched_agent_distance`, `untouched_block_distance` (doing nothing), `success_rate` (agent in
    reach, square in push within 0.05), `probe_r2_agent`, `probe_r2_square`, the smaller `probe_r2`
    (linear map from z to positions, on new images), `vae_minutes`, `minutes`. No VAE in oracle.

Result
    Distance to unseen goals at the end, frame widths, mean ± sd over seeds, each on one thread of a
    busy AMD EPYC (python benchmark/study.py --study rig; README.md has relabelling and rewards):
        reach   agent 0.024 ± 0.001 (untouched 0.403), success 93 %    5 seeds, 2.4 minutes
        push    square 0.078 ± 0.010 (untouched 0.278), success 33 %, agent 0.147 ± 0.009
                                                                       3 seeds, 5.1 minutes

Try
    1. --beta 20 --out runs/vague, --beta 0.05 --out runs/sharp: what is lost in latent_walk.png?
    2. --gamma 0 --out runs/near, with --task push --out runs/far: which task needs foresight?
    3. --distractors 2: more that the agent cannot move, elsewhere in every imagined goal.
"""

import copy
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
import torch.nn.functional as F
import tyro
from torch import nn

import sprites_env
from sprites_env import AGENT, TARGET


@dataclass(frozen=True)
class Args:
    task: Literal["reach", "push"] = "reach"  # move yourself, or push the square
    goals: Literal["latent", "oracle", "pixel"] = "latent"  # z; true positions; z, paid by pixels
    goal_fractions: tuple[float, float, float] = (0.2, 0.4, 0.4)  # practised, prior, future
    distractors: Literal[0, 1, 2] = 0  # more sprites at rest
    z_dim: int = 8  # Z, size of the latent space; what is not needed falls asleep
    beta: float = 1.0  # weight of KL in the VAE's loss, at the end
    beta_start: float = 20.0  # and at the start; falls in equal ratios
    images: int = 10_000  # frames of random scenes to train the VAE with, M
    vae_updates: int = 1_500  # gradient steps of the VAE before any practice
    finetune_every: int = 200  # episodes between fine-tunings of the VAE; 0 for never
    finetune_updates: int = 100  # gradient steps of each
    vae_learning_rate: float = 2e-3  # of Adam, for encoder and decoder
    total_steps: int | None = None  # of the environment (default: 20,000 reach, 60,000 push)
    num_envs: int = 10  # episodes of a round, after which come as many updates as it had steps
    noise: float = 0.2  # standard deviation of the exploration noise, in actions
    batch_size: int = 256  # transitions per update of TD3, B
    learning_rate: float = 1e-3  # of Adam, for actor and critic
    gamma: float | None = None  # discount factor (default: 0.9 reach, 0.98 push)
    tau: float = 0.01  # how fast the target networks follow
    eval_episodes: int = 200  # held-out goal images, each reached for in one episode
    seed: int = 1  # of images, networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 if several runs share the machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run


# --- Networks (those that other scripts have too are in the appendix) ------------------------


class GridEncoder(nn.Module):
    """Three convolutions, 64 x 64 -> 8 x 8 pixels, and a linear map, to which the place of a sprite
    is still plain: convolving down to one pixel folds it, and often z as well."""

    def __init__(self, size_out):
        super().__init__()
        self.convolutions = strided_convolutions((1, 8, 16, 32))
        self.head = nn.Linear(32 * 8 * 8, size_out)
        orthogonal_(self).to(memory_format=torch.channels_last)  # same numbers, faster
        with torch.no_grad():  # start with z all noise: what it comes to mean unfolds from there
            self.head.weight.mul_(0.05)

    def forward(self, frames):  # float (B, 1, 64, 64) in [0, 1] -> (B, 2 Z): μ and log σ²
        return self.head(self.convolutions(frames).flatten(1))


class BroadcastDecoder(nn.Module):
    """The same small network draws every 4 x 4 patch, from z and the place of the patch."""

    def __init__(self, z_dim, hidden=64, patch=4):
        super().__init__()
        self.side, self.patch = sprites_env.SIZE // patch, patch  # P patches a side, p pixels
        axis = torch.linspace(-1.7, 1.7, self.side)  # uniform, of unit variance
        places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
        self.register_buffer("places", places)  # (P P, 2)
        self.from_z = orthogonal_(nn.Linear(z_dim, hidden))
        self.from_place = orthogonal_(nn.Linear(2, hidden))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head.append(nn.Linear(hidden, patch * patch))
        orthogonal_(self.head)
        nn.init.constant_(self.head[-1].bias, -3.0)  # most pixels are black

    def forward(self, z):  # (B, Z) -> logits (B, 1, 64, 64)
        h = self.from_z(z)[:, None] + self.from_place(self.places)  # (B, P P, H)
        patches = self.head(h).unflatten(2, (self.patch, self.patch))  # (B, P P, p, p)
        grid = patches.unflatten(1, (self.side, self.side))  # (B, P, P, p, p)
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, None]


class GoalActor(nn.Module):
    """π(z, z_g): a deterministic action in [-1, 1]."""

    def __init__(self, size_in, hidden, action_dim):
        super().__init__()
        self.mlp = mlp(size_in, hidden, action_dim)
        nn.init.orthogonal_(self.mlp[-1].weight, 0.01)  # start with actions around zero

    def forward(self, obs):  # (B, 2 Z), z and z_g side by side -> (B, A)
        return self.mlp(obs).tanh()


# --- The algorithm: pure functions of tensors ------------------------------------------------


def kl_divergence(mean, log_var):
    """KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − log σ² − 1), eq. (1). (B, Z), (B, Z) -> (B,)."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(-1)


def vae_loss(logits, frames, mean, log_var, beta):
    """E[−log p(s|z)] + β KL, eq. (1): sums over pixels and dimensions of z, mean over the batch.
    logits, frames (B, 1, 64, 64), mean, log_var (B, Z) -> scalar."""
    assert logits.shape == frames.shape
    pixels = F.binary_cross_entropy_with_logits(logits, frames, reduction="none")
    return (pixels.flatten(1).sum(-1) + beta * kl_divergence(mean, log_var)).mean()


def fit_prior(z):
    """Mean and standard deviation of each dimension of z, eq. (2): a dimension that the VAE does
    not use varies little, and so little is asked of it. (M, Z) -> (Z,), (Z,)."""
    return z.mean(0), z.std(0, unbiased=False)


def goal_reward(reached, goal):
    """r = −‖z' − z_g‖, eq. (3): not squared, of the *next* state. Both (B, D) -> (B,)."""
    assert reached.shape == goal.shape
    return -(reached - goal).norm(dim=-1)


def relabel(practised, prior, future, which):
    """z_g of each transition, eq. (5): which (B,) is 0 for the goal that was practised, 1 for one
    of the prior, 2 for a later state. Three times (B, Z), integers (B,) -> (B, Z)."""
    assert practised.shape == prior.shape == future.shape
    return torch.stack([practised, prior, future])[which, torch.arange(len(which))]


def smoothed(action, noise):
    """clip(π̄(z') + clip(ε, −0.5, 0.5), −1, 1), eq. (4): similar actions are worth about the same.
    Both (B, A) -> (B, A)."""
    return (action + noise.clamp(-0.5, 0.5)).clamp(-1, 1)


def td_target(reward, terminated, next_value, gamma):
    """y = r + γ (1 − terminated) V(s'), eq. (4). All (B,), called without gradient. A time limit
    is not in here: an episode that was cut off goes on, as far as values are concerned."""
    assert reward.shape == terminated.shape == next_value.shape
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q, target):
    """Σᵢ E[(Qᵢ(s,a) − y)²], eq. (4). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the target network follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Data ------------------------------------------------------------------------------------


class EpisodeReplay:
    """Whole episodes, so that a goal can be taken from the future of the same one."""

    def __init__(self, episodes, steps, observation_space, action_dim, z_dim):
        self.size = 0  # episodes so far
        shape, dtype = observation_space.shape, observation_space.dtype
        self.observations = np.zeros((episodes, steps + 1, *shape), dtype)
        self.actions = np.zeros((episodes, steps, action_dim), np.float32)
        self.terminated = np.zeros((episodes, steps), np.float32)
        self.goals = np.zeros((episodes, z_dim), np.float32)  # as practised
        self.z = np.zeros((episodes, steps + 1, z_dim), np.float32)  # encoded observations

    def add(self, observations, actions, terminated, goals, z):  # N episodes, each (N, ...)
        new = slice(self.size, self.size + len(goals))
        self.observations[new], self.actions[new] = observations, actions
        self.terminated[new], self.goals[new], self.z[new] = terminated, goals, z
        self.size = new.stop

    def sample(self, rng, batch):
        """B transitions: indices e, t, and that of a later state of the episode, t < h <= T."""
        steps = self.actions.shape[1]
        e, t = rng.integers(self.size, size=batch), rng.integers(steps, size=batch)
        return e, t, rng.integers(t + 1, steps + 1)


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One run: see, imagine, practise; returns the content of summary.json."""
    check(args, "z_dim beta beta_start images vae_updates num_envs batch_size learning_rate tau")
    check(args, "vae_learning_rate eval_episodes")
    oracle = args.goals == "oracle"

    def make_env(num_envs, horizon=40):
        observation = "state" if oracle else "image"
        options = {"distractors": args.distractors, "observation": observation}
        return sprites_env.SpritesVectorEnv(num_envs, task=args.task, horizon=horizon, **options)

    env = make_env(args.num_envs)
    N, T = env.num_envs, env.horizon
    total_steps, gamma = (60_000, 0.98) if args.task == "push" else (20_000, 0.9)
    rounds = (total_steps if args.total_steps is None else args.total_steps) // (N * T)
    gamma = gamma if args.gamma is None else args.gamma
    if min(args.goal_fractions) < 0 or not abs(sum(args.goal_fractions) - 1) < 1e-6:
        raise SystemExit("error: --goal-fractions must be three shares that add up to 1")
    if not (0 <= gamma < 1 and args.tau <= 1 and args.noise >= 0):
        raise SystemExit("error: --gamma in [0, 1), --tau in (0, 1] and --noise 0 or more, please")
    if rounds < 1 or args.images < 10 or min(args.finetune_every, args.finetune_updates) < 0:
        least = f"--total-steps must be at least {N * T}, --images at least 10"
        raise SystemExit(f"error: {least}, --finetune-every and --finetune-updates 0 or more")
    device = prepare(args)
    out = open_run(args, f"{args.task}_{args.goals}_d{args.distractors}_s{args.seed}", device)
    rng = np.random.default_rng(args.seed)
    log = Log(out, rounds * N * T)

    # see: images of random scenes, and a VAE of them
    scenes, new_scenes = make_env(100, horizon=5), make_env(100, horizon=5)
    images, positions = collect_images(scenes, args.images, rng, args.seed * 100_000)
    new_rng, new_seed = np.random.default_rng(0), 10**9 + 50_000  # for the probe, never trained on
    new_images, new_positions = collect_images(new_scenes, 2000, new_rng, new_seed)
    moved = 2 if args.task == "push" else 1  # objects that a goal is about
    Z = 2 * moved if oracle else args.z_dim
    encoder, decoder = GridEncoder(2 * Z).to(device), BroadcastDecoder(Z).to(device)
    vae = [*encoder.parameters(), *decoder.parameters()]
    vae_optimizer = torch.optim.Adam(vae, lr=args.vae_learning_rate, fused=True)

    def to_tensor(array):
        return torch.as_tensor(array, dtype=torch.float32, device=device)

    spread = to_tensor(positions[:, : 2 * moved].std(0))

    def encode(obs):
        """z = μ(s), without noise: how the agent sees. (..., *observation) -> (..., Z)."""
        obs = torch.as_tensor(obs, device=device)
        if oracle:  # positions, in standard deviations
            return (obs.unflatten(-1, (-1, 4))[..., :moved, :2].flatten(-2) - 0.5) / spread
        with torch.no_grad():
            chunks = obs.reshape(-1, *obs.shape[-3:]).split(1000)
            z = torch.cat([encoder(to_float(chunk, device))[:, :Z] for chunk in chunks])
        return z.reshape(*obs.shape[:-3], Z)

    def train_vae(sample, updates, beta_start):  # sample() -> uint8 (128, 1, 64, 64)
        for update in range(updates):
            f = update / updates  # β goes from its start to its end in equal ratios
            beta = beta_start ** (1 - f) * args.beta**f
            frames = to_float(sample(), device)
            mean, log_var = encoder(frames).chunk(2, dim=-1)
            z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
            loss = vae_loss(decoder(z), frames, mean, log_var, beta)
            vae_optimizer.zero_grad()
            loss.backward()
            vae_optimizer.step()
            if update % 250 == 249:
                print(f"VAE {update + 1}/{updates}  loss {loss.item():.1f}", flush=True)

    def some_images():
        return images[rng.integers(len(images), size=128)]

    if not oracle:
        train_vae(some_images, args.vae_updates, args.beta_start)
    vae_minutes = log.minutes()

    # imagine: the prior of goals
    def fit():
        """The prior's mean and standard deviation, and the probe's R² of agent and square."""
        z, z_new = encode(images), encode(new_images)
        return *fit_prior(z), position_probe(z.cpu(), positions, z_new.cpu(), new_positions)

    def imagine(count):
        return mean + sd * torch.randn(count, Z, device=device)

    mean, sd, r2 = fit()
    print("linear probe of z, new images: R² {:.3f} (agent), {:.3f} (square)".format(*r2))
    if min(r2[:moved]) < 0.95:
        print("warning: z does not tell places well, so goals will be missed: train the VAE longer")

    # practise: TD3 on (z, z_g)
    action_dim = env.single_action_space.shape[0]
    actor = GoalActor(2 * Z, 128, action_dim).to(device)
    critic = TwinCritic(nn.Identity(), 2 * Z, 128, action_dim).to(device)
    actor_target = copy.deepcopy(actor).requires_grad_(False)
    critic_target = copy.deepcopy(critic).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.learning_rate, fused=True)
    replay = EpisodeReplay(rounds * N, T, env.single_observation_space, action_dim, Z)
    eval_env = make_env(args.eval_episodes, horizon=T + 1)  # its last state stays to be looked at
    start, goal, shapes = draw_goals(eval_env, seed=10**9)
    goal_images, _ = eval_env.reset(options={"state": goal, "shapes": shapes})

    def pursue(obs, goals):
        """π(z, z_g) of observations (N, ...) and goals (N, Z), as an array (N, A)."""
        with torch.no_grad():
            return actor(torch.cat([encode(obs), goals], dim=-1)).cpu().numpy()

    obs, _ = env.reset(seed=args.seed * 100_000 + 50_000)  # not the scenes of the images
    for episodes in range(N, rounds * N + 1, N):
        # act and store: an episode in each environment, toward a goal that it set itself
        goals = imagine(N)
        observations, actions, ends = [obs], [], []
        for _ in range(T):
            action = pursue(obs, goals)
            action = (action + args.noise * rng.standard_normal(action.shape)).clip(-1, 1)
            if (episodes - N) * T < 800:  # random actions first
                action = rng.uniform(-1, 1, action.shape)
            obs, _, terminated, truncated, info = env.step(action)
            ended = terminated | truncated
            assert ended.all() == ended.any()  # in lockstep
            observations.append(info["final_obs"] if ended.any() else obs)
            actions.append(action)
            ends.append(terminated)
        observations, actions, ends = (np.stack(x, 1) for x in (observations, actions, ends))
        replay.add(observations, actions, ends, goals.cpu(), encode(observations).cpu())

        # learn: as many updates as steps
        for update in range(N * T):
            e, t, h = replay.sample(rng, args.batch_size)
            z, z_next, future = (to_tensor(replay.z[e, i]) for i in (t, t + 1, h))
            action = to_tensor(replay.actions[e, t])
            terminated = to_tensor(replay.terminated[e, t])
            which = torch.multinomial(torch.tensor(args.goal_fractions), len(e), replacement=True)
            practised = to_tensor(replay.goals[e])
            z_goal = relabel(practised, imagine(len(e)), future, which)
            with torch.no_grad():
                if args.goals == "pixel":
                    wanted = decoder(z_goal).sigmoid().flatten(1)
                    seen = to_float(replay.observations[e, t + 1], device).flatten(1)
                    reward = 0.2 * goal_reward(seen, wanted)
                else:
                    reward = goal_reward(z_next, z_goal)
                after = torch.cat([z_next, z_goal], dim=-1)  # the same goal, before and after
                next_action = smoothed(actor_target(after), 0.2 * torch.randn_like(action))
                next_value = critic_target(after, next_action).amin(0)
                y = td_target(reward, terminated, next_value, gamma)
            before = torch.cat([z, z_goal], dim=-1)
            loss = critic_loss(critic(before, action), y)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            if update % 2 == 0:
                actor_loss = -critic(before, actor(before))[0].mean()
                actor_optimizer.zero_grad()
                actor_loss.backward()
                actor_optimizer.step()
                polyak_(actor_target, actor, args.tau)
                polyak_(critic_target, critic, args.tau)

        # see again: fine-tune the VAE on old images and new ones; what was encoded is stale
        stale = args.finetune_every and episodes % args.finetune_every < N
        if stale and args.finetune_updates and not oracle and episodes < rounds * N:
            with torch.no_grad():
                chunks = to_tensor(replay.goals[: replay.size]).split(500)
                drawn = torch.cat([decoder(chunk).sigmoid() for chunk in chunks])

            def old_and_new():
                e, t = rng.integers(replay.size, size=64), rng.integers(T + 1, size=64)
                return np.concatenate([some_images()[:64], replay.observations[e, t]])

            train_vae(old_and_new, args.finetune_updates, args.beta)
            replay.z[: replay.size] = encode(replay.observations[: replay.size]).cpu()
            replay.goals[: replay.size] = encode(drawn.mul(255).round().byte()).cpu()
            mean, sd, r2 = fit()

        # report
        if episodes * T % 2000 < N * T or episodes == rounds * N:
            path = reach(pursue, eval_env, start, shapes, encode(goal_images), T)
            distance = np.linalg.norm(path[-1] - goal[..., :2], axis=-1)[:, :2]  # (N, 2)
            final = {
                "final_agent_distance": distance[:, AGENT].mean(),
                "final_block_distance": distance[:, TARGET].mean(),
                "success_rate": (distance[:, moved - 1] < 0.05).mean(),
            }
            final |= {} if oracle else {"probe_r2_agent": r2[AGENT], "probe_r2_square": r2[TARGET]}
            learning = {"critic_loss": loss.item(), "q": -actor_loss.item()}
            log.report(episodes * T, **final, **learning, reward=reward.mean().item())
            saved = {"encoder": encoder, "decoder": decoder, "actor": actor, "critic": critic}
            saved = {name: network.state_dict() for name, network in saved.items()}
            saved |= {"prior_mean": mean, "prior_sd": sd, "step": episodes * T}
            write_whole(out / "checkpoint.pt", lambda t, saved=saved: torch.save(saved, t))

    untouched = np.linalg.norm(start[..., :2] - goal[..., :2], axis=-1).mean(0)
    summary = final | {
        "eval_episodes": args.eval_episodes,
        "untouched_agent_distance": untouched[AGENT],
        "untouched_block_distance": untouched[TARGET],
    }
    if not oracle:
        summary |= {"probe_r2": min(r2), "vae_minutes": round(vae_minutes, 2)}
        plot_imagination(out, decoder, mean, sd)
    plot_reached(out, start, goal, path, shapes)
    names = ("agent", "block")[:moved]
    panels = [("final distance (frame widths)", [f"final_{name}_distance" for name in names])]
    levels = [(f"{name}, untouched", y) for name, y in zip(names, untouched)]
    plot_curve(out / "curve.png", log.rows, panels, "environment steps", levels)
    summary["minutes"] = round(log.minutes(), 2)
    write_whole(out / "summary.json", lambda t: t.write_text(json.dumps(summary, indent=1)))
    return summary


# --- Appendix: images, measures, shared networks, pictures, run folder, log ----------------------


def collect_images(env, count, rng, seed):
    """What the exploration policy sees: random actions, in a new scene after every episode.

    Returns observations (M, ...) and, to measure with, the positions (M, 4) of agent and square."""
    observations, positions = [], []
    obs, _ = env.reset(seed=seed)
    while len(observations) * env.num_envs < count:
        observations.append(obs)
        positions.append(env.states[:, :2, :2].reshape(-1, 4))
        obs, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
    return np.concatenate(observations)[:count], np.concatenate(positions)[:count]


def draw_goals(env, seed):
    """Held-out tasks: start states and goal states (N, K, 4), shapes (N, K). The goal is the same
    scene with the agent elsewhere (reach), or the agent and the square (push)."""
    env.reset(seed=seed)
    start, shapes = env.states, env.shapes
    env.reset()
    moved = 2 if env.task == "push" else 1
    goal = np.concatenate([env.states[:, :moved], start[:, moved:]], axis=1)
    return start, goal, shapes


def position_probe(z, positions, z_new, new_positions):
    """R² on new images of a linear map from z (M, Z) to the positions (M, 4) of agent and square:
    two numbers, each a mean over x and y."""
    inputs, new = (torch.cat([x.double(), torch.ones(len(x), 1)], 1) for x in (z, z_new))
    y, y_new = torch.as_tensor(positions), torch.as_tensor(new_positions)
    error = new @ torch.linalg.lstsq(inputs, y, driver="gelsd").solution - y_new
    r2 = 1 - error.square().mean(0) / y_new.var(0, unbiased=False)
    return r2.unflatten(0, (2, 2)).mean(1).tolist()


def reach(policy, env, start, shapes, goals, steps):
    """Positions (steps + 1, N, K, 2) on the way from the states `start` (N, K, 4) to `goals`
    (N, Z), without noise. `policy` maps observations and goals to actions."""
    obs, _ = env.reset(options={"state": start, "shapes": shapes})
    path = [start[..., :2]]
    for _ in range(steps):
        obs, *_ = env.step(policy(obs, goals))
        path.append(env.states[..., :2])
    return np.stack(path)


def plot_reached(out, start, goal, path, shapes):
    """reached.png, eight episodes: start, goal, reached; rollout.gif: how four of them went, the
    goal shining through."""

    def draw(states, count):  # uint8 (count, height, width, 3)
        pairs = zip(states[:count, :, :2], shapes)
        return np.stack([sprites_env.draw_rgb(*pair) for pair in pairs])

    rows = [draw(states, 8) for states in (start, goal, path[-1])]
    plot_images(out / "reached.png", rows, ("start", "goal", "reached"))
    ghost, frames = 0.65 * 255 + 0.35 * draw(goal, 4), [draw(states, 4) for states in path]
    film = [np.where((x == 255).all(-1, keepdims=True), ghost, x).astype(np.uint8) for x in frames]
    save_gif(out / "rollout.gif", film)


@torch.no_grad()
def plot_imagination(out, decoder, mean, sd):
    """imagined_goals.png: samples of the prior, decoded; latent_walk.png: one dimension of z at a
    time, from -2 to 2 standard deviations of the prior."""
    samples = decoder(mean + sd * torch.randn(16, len(mean), device=mean.device))
    steps = torch.linspace(-2, 2, 9, device=mean.device)
    walk = decoder((mean + steps[:, None] * torch.diag(sd)[:, None]).flatten(0, 1))  # (9 Z, ...)
    grids = {"imagined_goals": samples.view(2, 8, 64, 64), "latent_walk": walk.view(-1, 9, 64, 64)}
    for name, grid in grids.items():
        labels = [f"z{i + 1}" if name == "latent_walk" else "" for i in range(len(grid))]
        plot_images(out / f"{name}.png", grid.sigmoid().cpu().numpy(), labels)


def plot_images(path, rows, labels):
    """Rows of images, grey in [0, 1] or RGB, each row with a label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(len(rows[0]), len(rows)), layout="constrained")
    for axis, images, label in zip(figure.subplots(len(rows), 1), rows, labels):
        w = len(images[0]) // 64  # of grey frames
        edge = ((w, w), (w, w), (0, 0))[: np.ndim(images[0])]
        framed = [np.pad(image, edge, constant_values=image.max() / 2) for image in images]
        row = np.concatenate(framed, axis=1)
        axis.imshow(row, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], ylabel=label)
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


def strided_convolutions(channels, batch_norm=False):
    """3 x 3 convolutions, each halving the image's height and width, each followed by a ReLU."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), *norm, nn.ReLU()]
    return nn.Sequential(*layers)


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


class TwinCritic(nn.Module):
    """Two Q functions; the smaller one is believed."""

    def __init__(self, features, size_in, hidden, action_dim):
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(mlp(size_in + action_dim, hidden, 1) for _ in range(2))

    def forward(self, obs, action):  # (B, D), (B, A) -> (2, B)
        x = torch.cat([self.features(obs), action], dim=-1)
        return torch.cat([head(x) for head in self.heads], dim=-1).T


def save_gif(path, film):
    """film: a list of tuples of images uint8 (height, width, 3), shown side by side."""
    from PIL import Image

    rows = [np.concatenate([np.pad(i, ((3, 3), (3, 3), (0, 0))) for i in row], 1) for row in film]
    first, *rest = [Image.fromarray(row).quantize(16) for row in rows]
    settings = {"save_all": True, "append_images": rest, "loop": 0, "duration": 100}  # ms
    write_whole(path, lambda temporary: first.save(temporary, **settings))


def to_float(frames, device):
    """uint8 (...), array or tensor -> float32 (...) in [0, 1] on the device."""
    return torch.as_tensor(frames, device=device).to(torch.float32, copy=True).div_(255)


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
