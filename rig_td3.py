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

Algorithm
    images ← collect_images                        random actions in many scenes
    see: --vae-updates times update_vae            one step on (1), with a β that falls
    repeat until --total-steps:
        imagine: a goal z_g for each environment   from the prior (3)
        practise: an episode toward it, stored     with exploration noise, random at first
        as many times as these episodes had steps:
            relabelled_batch                       other goals (5), rewards (4)
            update_goal_critic                     one step on (8)
            every second time update_goal_actor    one step on (9); slow copies follow
        see_again, every --finetune-every episodes update_vae, encode the replay, fit the prior (3)
        every 2,000 steps: HeldOut.reach           images of goals that it has never seen

Equations
    (1)  VAE: minimise  E_q[−log p(s|z)] + β KL(q(z|s) ‖ N(0, I)),   q(z|s) = N(μ(s), σ²(s)), and
         p(s|z) has an independent Bernoulli for each pixel
    (2)  KL = ½ Σ (μ² + σ² − log σ² − 1)
    (3)  goals: z_g ~ N(mean, sd²) of μ(s) over the images, one dimension at a time
    (4)  reward: r(z', z_g) = −‖z' − z_g‖,   z' = μ(s') of the next image
    (5)  relabelling: z_g ← as practised, or from the prior, or μ of a later image of the episode
    (6)  TD3: a' = clip(π̄(z', z_g) + clip(ε, −c, c), −1, 1),   ε ~ N(0, σ_ε²)
    (7)  y = r + γ (1 − terminated) min Q̄ᵢ(z', z_g, a')
    (8)  minimise  Σᵢ E[(Qᵢ(z, z_g, a) − y)²]
    (9)  maximise  E[Q₁(z, z_g, π(z, z_g))]

Notation
    s image, z its code, z_g a goal, a action, π the actor, Q the twin critics, bars: slow copies,
    prime: next step. N environments, T steps of an episode, B batch, M images (or held-out goals),
    K objects in the frame, P x P patches of p x p pixels, H hidden units, Z size of z, A (in
    shapes) of an action, D of an input.

Differs from the paper
    1. β in (1) falls from 20 to 1 while the VAE trains; it multiplies a *sum* over z, beside a
       *sum* over 4,096 pixels. Much noise at first lets z unfold: places that are close in the
       image come to be close in z. The encoder keeps a grid of places up to its last layer, and
       the decoder draws 4 x 4 pixels at a time, from z and their place.
    2. Other sprites are at rest: what moves by itself would dominate the distance in z. In reach
       the agent can match only its own position in an imagined goal: the square stays where it is.
    3. Two layers of 256 units, 20,000 steps (push 100,000), one update a step; the authors' code
       has 400-300, half a million, four. γ = 0.9 in reach, where going straight is best; 0.98 in
       push, where the way around pays late. Gaussian exploration noise; the first 800 steps are
       random. The learning rate falls to zero over the second half, so that the policy settles.
    4. Actor and critic are given the goal relative to z: (z, z_g − z) in place of (z, z_g). They
       are still functions of z and z_g, which need not learn to subtract.
    5. When the VAE is fine-tuned, practised goals are carried over: the old decoder draws them, the
       new encoder reads them. Everything else in the buffer is encoded again.
    6. --goals pixel pays −0.2 ‖s' − p(z_g)‖, even for goals from the future, whose image is known.

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
    Columns of curve.csv: `step`, `seconds`, `steps_per_second` (with the VAE's time), the final
    distances, `success_rate`, `probe_r2_agent`, `probe_r2_square`, and of the last batch
    `critic_loss`, `q` (of the actor's actions) and `reward`.

Result
    Distance to unseen goals, in frame widths: reach, agent .019 ± .002 (untouched .403), 4.3
    minutes; push, square .037 ± .004 (.278), 19 minutes. All: benchmark/README.md.

Try
    1. --beta 20 --out runs/vague, --beta 0.05 --out runs/sharp: what is lost in latent_walk.png?
    2. --gamma 0 --out runs/near, with --task push --total-steps 30000 --out runs/far: which task
       needs foresight?
    3. --distractors 2: more that the agent cannot move, elsewhere in every imagined goal.
"""

import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

import sprites_env
from sprites_env import AGENT, TARGET, Run, require, require_positive

USUAL = {  # defaults that depend on the task
    "reach": {"total_steps": 20_000, "gamma": 0.9},
    "push": {"total_steps": 100_000, "gamma": 0.98},
}
TARGET_NOISE, NOISE_CLIP = 0.2, 0.5  # of the target's action in (6): σ_ε and c
RANDOM_STEPS = 800  # of random actions before the policy acts
ACTOR_EVERY = 2  # updates of the critic to one of the actor
PIXEL_SCALE = 0.2  # of the reward with --goals pixel, whose distances are larger
VAE_BATCH = 128  # images
HIDDEN = 256  # units of each of the two hidden layers of actor and critic
SUCCESS = 0.05  # frame widths from the goal
REPORT_EVERY = 2000  # steps


@dataclass(frozen=True)
class Args:
    task: Literal["reach", "push"] = "reach"  # move yourself, or push the square
    goals: Literal["latent", "oracle", "pixel"] = "latent"  # z; true positions; z, paid by pixels
    goal_fractions: tuple[float, float, float] = (0.2, 0.4, 0.4)  # practised, prior, future
    distractors: Literal[0, 1, 2] = 0  # more sprites at rest
    z_dim: int = 8  # Z, size of the latent space; what is not needed stays near N(0, 1)
    beta: float = 1.0  # weight of KL in the VAE's loss, at the end
    beta_start: float = 20.0  # and at the start; falls in equal ratios
    images: int = 10_000  # frames of random scenes to train the VAE with, M
    vae_updates: int = 1_500  # gradient steps of the VAE before any practice
    finetune_every: int = 200  # episodes between fine-tunings of the VAE; 0 for never
    finetune_updates: int = 100  # gradient steps of each
    vae_learning_rate: float = 2e-3  # of Adam, for encoder and decoder
    total_steps: int | None = None  # of the environment (default: 20,000 reach, 100,000 push)
    num_envs: int = 10  # episodes of a round, after which come as many updates as it had steps
    noise: float = 0.2  # standard deviation of the exploration noise, in actions
    batch_size: int = 256  # transitions per update of TD3, B
    learning_rate: float = 2e-3  # of Adam, for actor and critic; falls to zero over the second half
    gamma: float | None = None  # discount factor (default: 0.9 reach, 0.98 push)
    tau: float = 0.01  # how fast the target networks follow
    eval_episodes: int = 200  # held-out goal images, each reached for in one episode
    seed: int = 1  # of images, networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 if several runs share the machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        for name, value in USUAL[self.task].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # a frozen class allows no other way
        require_positive(self, "goal_fractions finetune_every finetune_updates noise gamma")
        require(self.gamma < 1 and self.tau <= 1, "--gamma must be below 1, --tau not above")
        shares = abs(sum(self.goal_fractions) - 1) < 1e-6
        require(shares, "--goal-fractions must be three shares that add up to 1")
        least = self.num_envs * make_env(self, 1).horizon
        require(self.total_steps >= least, f"--total-steps must be at least {least}")
        require(self.images >= 10, "--images must be at least 10")

    @property
    def moved(self):  # objects that a goal is about: the agent, or the agent and the square
        return 2 if self.task == "push" else 1

    @property
    def environment(self):
        observation = "state" if self.goals == "oracle" else "image"
        return {"task": self.task, "distractors": self.distractors, "observation": observation}

    @property
    def run_name(self):
        return f"{self.task}_{self.goals}_d{self.distractors}_s{self.seed}"


# --- Networks --------------------------------------------------------------------------------


def strided_convolutions(channels):
    """3 x 3 convolutions, each halving the image's height and width, each followed by a ReLU."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


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

    def forward(self, codes):  # (B, 2 Z), z and z_g − z side by side -> (B, A)
        return self.mlp(codes).tanh()


class TwinCritic(nn.Module):
    """Two Q functions of one input. Targets take the smaller of both: a single one is too high
    wherever its error happens to be positive, as that is where the policy goes."""

    def __init__(self, size_in, hidden, action_dim):
        super().__init__()
        self.heads = nn.ModuleList(mlp(size_in + action_dim, hidden, 1) for _ in range(2))

    def forward(self, x, action):  # (B, D), (B, A) -> (2, B)
        inputs = torch.cat([x, action], dim=-1)
        return torch.cat([head(inputs) for head in self.heads], dim=-1).T


def mlp(size_in, hidden, size_out):
    """A multilayer perceptron of three layers."""
    layers = [nn.Linear(size_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return orthogonal_(nn.Sequential(*layers, nn.Linear(hidden, size_out)))


def orthogonal_(module):
    """Orthogonal weights and zero biases, so that no signal vanishes on its way."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return module


class VAE:
    """Encoder, decoder and their optimiser. z of an image is μ(s), without noise and without
    gradient: it is stored as numbers, so that TD3 never changes the VAE."""

    def __init__(self, args, device):
        self.device, self.z_dim = device, args.z_dim
        self.encoder = GridEncoder(2 * args.z_dim).to(device)
        self.decoder = BroadcastDecoder(args.z_dim).to(device)
        self.networks = {"encoder": self.encoder, "decoder": self.decoder}
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=args.vae_learning_rate, fused=True)

    @torch.no_grad()
    def encode(self, frames):  # uint8 (..., 1, 64, 64) -> (..., Z)
        frames = torch.as_tensor(frames, device=self.device)
        chunks = frames.reshape(-1, *frames.shape[-3:]).split(1000)
        z = [self.encoder(to_tensor(chunk, self.device))[:, : self.z_dim] for chunk in chunks]
        return torch.cat(z).reshape(*frames.shape[:-3], self.z_dim)

    @torch.no_grad()
    def decode(self, z):  # (M, Z) -> (M, 1, 64, 64) in [0, 1]
        return torch.cat([self.decoder(chunk).sigmoid() for chunk in z.split(500)])


class TruePositions:
    """What --goals oracle has in place of a VAE: z holds positions, in standard deviations."""

    def __init__(self, args, device, positions):  # positions (M, 4) of agent and square
        self.device, self.moved, self.z_dim = device, args.moved, 2 * args.moved
        self.networks = {}
        self.spread = to_tensor(positions[:, : self.z_dim].std(0), device)

    def encode(self, states):  # (..., 4 K) -> (..., Z)
        states = torch.as_tensor(states, device=self.device).unflatten(-1, (-1, 4))
        return (states[..., : self.moved, :2].flatten(-2) - 0.5) / self.spread


class GoalAgent:
    """TD3 on z and z_g − z side by side: actor, critic, their slow copies, and their optimisers."""

    def __init__(self, code_dim, action_dim, args, device):
        self.actor = GoalActor(2 * code_dim, HIDDEN, action_dim).to(device)
        self.critic = TwinCritic(2 * code_dim, HIDDEN, action_dim).to(device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        networks = self.actor, self.critic
        made = [
            torch.optim.Adam(n.parameters(), lr=args.learning_rate, fused=True) for n in networks
        ]
        self.actor_optimizer, self.critic_optimizer = made

    @torch.no_grad()
    def act(self, z, goals):  # (N, Z), (N, Z) -> (N, A), an array, without noise
        return self.actor(torch.cat([z, goals], dim=-1)).cpu().numpy()


# --- Losses: pure functions of tensors -------------------------------------------------------


def kl_divergence(mean, log_var):
    """KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − log σ² − 1), eq. (2). (B, Z), (B, Z) -> (B,)."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(-1)


def vae_loss(logits, frames, mean, log_var, beta):
    """E[−log p(s|z)] + β KL, eq. (1): sums over pixels and dimensions of z, mean over the batch.
    logits, frames (B, 1, 64, 64), mean, log_var (B, Z) -> scalar."""
    assert logits.shape == frames.shape
    pixels = F.binary_cross_entropy_with_logits(logits, frames, reduction="none")
    return (pixels.flatten(1).sum(-1) + beta * kl_divergence(mean, log_var)).mean()


def fit_prior(z):
    """Mean and standard deviation of each dimension of z, eq. (3): a dimension that the VAE does
    not use varies little, and so little is asked of it. (M, Z) -> (Z,), (Z,)."""
    return z.mean(0), z.std(0, unbiased=False)


def goal_reward(reached, goal):
    """r = −‖z' − z_g‖, eq. (4): not squared, of the *next* state. Both (B, D) -> (B,)."""
    assert reached.shape == goal.shape
    return -(reached - goal).norm(dim=-1)


def relabel(practised, prior, future, which):
    """z_g of each transition, eq. (5): which (B,) is 0 for the goal that was practised, 1 for one
    of the prior, 2 for a later state. Three times (B, Z), integers (B,) -> (B, Z)."""
    assert practised.shape == prior.shape == future.shape
    return torch.stack([practised, prior, future])[which, torch.arange(len(which))]


def smoothed(action, noise):
    """clip(π̄(z', z_g) + clip(ε, −c, c), −1, 1), eq. (6): similar actions are worth about the same.
    Both (B, A) -> (B, A)."""
    return (action + noise.clamp(-NOISE_CLIP, NOISE_CLIP)).clamp(-1, 1)


def td_target(reward, terminated, next_value, gamma):
    """y = r + γ (1 − terminated) min Q̄ᵢ, eq. (7); next_value is that minimum. All (B,), called
    without gradient. A time limit is not in here: an episode that was cut off goes on, as far as
    values are concerned."""
    assert reward.shape == terminated.shape == next_value.shape
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q, target):
    """Σᵢ E[(Qᵢ(z, z_g, a) − y)²], eq. (8). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def deterministic_actor_loss(q):
    """−E[Q₁(z, z_g, π(z, z_g))], eq. (9), of the first of the two critics. (2, B) -> scalar."""
    assert len(q) == 2
    return -q[0].mean()


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the slow copy follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_vae(vae, frames, beta):
    """One step of encoder and decoder on (1). frames float (B, 1, 64, 64). Returns the loss."""
    mean, log_var = vae.encoder(frames).chunk(2, dim=-1)
    z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
    loss = vae_loss(vae.decoder(z), frames, mean, log_var, beta)
    vae.optimizer.zero_grad()
    loss.backward()
    vae.optimizer.step()
    return loss.detach()


def update_goal_critic(agent, batch, gamma):
    """One step of the critic on (8). y (7) takes the smaller value of the slow critic, at a
    smoothed action (6) of the slow actor. batch: see `relabelled_batch`."""
    with torch.no_grad():
        noise = TARGET_NOISE * torch.randn_like(batch["action"])
        next_action = smoothed(agent.actor_target(batch["after"]), noise)
        next_value = agent.critic_target(batch["after"], next_action).amin(0)  # (B,)
        y = td_target(batch["reward"], batch["terminated"], next_value, gamma)
    loss = critic_loss(agent.critic(batch["before"], batch["action"]), y)
    agent.critic_optimizer.zero_grad()
    loss.backward()
    agent.critic_optimizer.step()
    return {"critic_loss": loss.detach()}


def update_goal_actor(agent, batch, tau):
    """One step of the actor on (9), then the slow copies follow. This fills the critic's .grad as
    well; its own zero_grad discards that."""
    before = batch["before"]
    loss = deterministic_actor_loss(agent.critic(before, agent.actor(before)))
    agent.actor_optimizer.zero_grad()
    loss.backward()
    agent.actor_optimizer.step()
    polyak_(agent.actor_target, agent.actor, tau)
    polyak_(agent.critic_target, agent.critic, tau)
    return {"q": -loss.detach()}


# --- Data ------------------------------------------------------------------------------------


def make_env(args, num_envs, **options):
    """Environments in lockstep. To train on others, change this line: any vector environment will
    do that resets in the step that ends an episode (README.md has an example)."""
    return sprites_env.SpritesVectorEnv(num_envs, **args.environment, **options)


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


class EpisodeReplay:
    """Whole episodes, so that a goal can be taken from the future of the same one."""

    def __init__(self, episodes, steps, observation_space, action_dim, z_dim):
        self.size = 0  # episodes so far
        shape, dtype = observation_space.shape, observation_space.dtype
        self.observations = np.zeros((episodes, steps + 1, *shape), dtype)  # push: 420 MB
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


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def relabelled_batch(replay, rng, seer, prior, args):
    """B transitions with goals (5) and rewards (4): before = (z, z_g − z), after = (z', z_g − z'),
    both (B, 2 Z), with the same goal; action (B, A), reward and terminated (B,)."""
    e, t, h = replay.sample(rng, args.batch_size)
    z, z_next, future = (to_tensor(replay.z[e, i], seer.device) for i in (t, t + 1, h))
    action, terminated = (
        to_tensor(x[e, t], seer.device) for x in (replay.actions, replay.terminated)
    )
    practised = to_tensor(replay.goals[e], seer.device)
    which = torch.multinomial(torch.tensor(args.goal_fractions), len(e), replacement=True)
    goal = relabel(practised, imagine(prior, len(e)), future, which)
    if args.goals == "pixel":
        seen = to_tensor(replay.observations[e, t + 1], seer.device).flatten(1)
        reward = PIXEL_SCALE * goal_reward(seen, seer.decode(goal).flatten(1))
    else:
        reward = goal_reward(z_next, goal)
    before, after = (torch.cat([x, goal - x], dim=-1) for x in (z, z_next))
    transition = {"before": before, "action": action, "reward": reward, "after": after}
    return transition | {"terminated": terminated}


# --- Measures --------------------------------------------------------------------------------


def position_probe(z, positions, z_new, new_positions):
    """R² on new images of a linear map from z (M, Z) to the positions (M, 4) of agent and square:
    two numbers, each a mean over x and y."""
    inputs, new = (torch.cat([x.double(), torch.ones(len(x), 1)], 1) for x in (z, z_new))
    y, y_new = torch.as_tensor(positions), torch.as_tensor(new_positions)
    error = new @ torch.linalg.lstsq(inputs, y, driver="gelsd").solution - y_new
    r2 = 1 - error.square().mean(0) / y_new.var(0, unbiased=False)
    return r2.unflatten(0, (2, 2)).mean(1).tolist()


def look(seer, images, positions, new_images, new_positions):
    """The prior of goals (3), and the probe's R² of agent and square, on new images."""
    z, z_new = seer.encode(images), seer.encode(new_images)
    r2 = position_probe(z.cpu(), positions, z_new.cpu(), new_positions)
    return fit_prior(z), r2


class HeldOut:
    """Tasks to be tested with: start and goal states (M, K, 4), images of the goals. A goal is the
    same scene with the agent elsewhere (reach), or the agent and the square (push)."""

    def __init__(self, args):
        self.moved, self.steps = args.moved, make_env(args, 1).horizon
        self.env = make_env(
            args, args.eval_episodes, horizon=self.steps + 1
        )  # its last state stays
        self.env.reset(seed=10**9)
        self.start, self.shapes = self.env.states, self.env.shapes
        self.env.reset()
        parts = self.env.states[:, : self.moved], self.start[:, self.moved :]
        self.goal = np.concatenate(parts, axis=1)
        options = {"state": self.goal, "shapes": self.shapes}
        self.goal_images, _ = self.env.reset(options=options)

    def reach(self, policy, goals):
        """Positions (T + 1, M, K, 2) on the way to goals (M, Z), without noise; `policy` maps
        observations and goals to actions."""
        obs, _ = self.env.reset(options={"state": self.start, "shapes": self.shapes})
        path = [self.start[..., :2]]
        for _ in range(self.steps):
            obs, *_ = self.env.step(policy(obs, goals))
            path.append(self.env.states[..., :2])
        return np.stack(path)

    def measure(self, positions, name):
        """Mean distances of agent and block from where the goal has them; success."""
        distance = np.linalg.norm(positions - self.goal[..., :2], axis=-1)  # (M, K)
        success = (distance[:, self.moved - 1] < SUCCESS).mean()
        agent, block = distance[:, AGENT].mean(), distance[:, TARGET].mean()
        return {f"{name}_agent_distance": agent, f"{name}_block_distance": block}, success


# --- Training --------------------------------------------------------------------------------


def see(vae, sample, updates, beta_start, beta):
    """Train the VAE on what `sample()` gives, uint8 (B, 1, 64, 64). β goes from its start to its
    end in equal ratios."""
    for i in range(updates):
        f = i / updates
        frames = to_tensor(sample(), vae.device)
        loss = update_vae(vae, frames, beta_start ** (1 - f) * beta**f)
        if i % 250 == 249:
            print(f"VAE {i + 1}/{updates}  loss {loss.item():.1f}", flush=True)


def imagine(prior, count):
    """Goals (count, Z) from the prior (3): its mean and standard deviation."""
    mean, sd = prior
    return mean + sd * torch.randn(count, len(mean), device=mean.device)


def pursue(agent, seer, obs, goals):
    """Actions (N, A) toward goals (N, Z), without noise. The agent is given the relative goal."""
    z = seer.encode(obs)
    return agent.act(z, goals - z)


def practise(agent, seer, episodes, replay, prior, rng, args):
    """Act and store: an episode in each environment, toward a goal that it sets itself."""
    goals, rows = imagine(prior, args.num_envs), []
    observations = [episodes.obs]
    for _ in range(episodes.env.horizon):
        action = pursue(agent, seer, episodes.obs, goals)
        action = (action + args.noise * rng.standard_normal(action.shape)).clip(-1, 1)
        if replay.size * episodes.env.horizon < RANDOM_STEPS:
            action = rng.uniform(-1, 1, action.shape)
        successors, _, terminated, truncated = episodes.step(action)
        observations.append(successors)
        rows.append((action, terminated))
    assert (terminated | truncated).all()  # in lockstep
    observations = np.stack(observations, axis=1)
    actions, terminated = (np.stack(column, axis=1) for column in zip(*rows))
    z = seer.encode(observations)
    replay.add(observations, actions, terminated, goals.cpu(), z.cpu())


def see_again(vae, images, replay, rng, args):
    """Fine-tune the VAE on old images and new ones, and encode the replay anew: it was stale. Goals
    are kept as pictures: the old decoder draws them, the new encoder reads them."""
    size, half = replay.size, VAE_BATCH // 2
    drawn = vae.decode(to_tensor(replay.goals[:size], vae.device))

    def old_and_new():
        e, t = rng.integers(size, size=half), rng.integers(replay.z.shape[1], size=half)
        old = images[rng.integers(len(images), size=VAE_BATCH)][:half]
        return np.concatenate([old, replay.observations[e, t]])

    see(vae, old_and_new, args.finetune_updates, args.beta, args.beta)
    replay.z[:size] = vae.encode(replay.observations[:size]).cpu()
    replay.goals[:size] = vae.encode(drawn.mul(255).round().byte()).cpu()


def train(args):
    """One run: see, imagine, practise; returns the content of summary.json."""
    env, rng = make_env(args, args.num_envs), np.random.default_rng(args.seed)
    N, T = args.num_envs, env.horizon
    rounds = args.total_steps // (N * T)
    run = Run(args, total=rounds * N * T)
    device = run.device

    # see
    scenes, new_scenes = (make_env(args, 100, horizon=5) for _ in range(2))
    images, positions = collect_images(scenes, args.images, rng, args.seed * 100_000)
    new_rng, new_seed = np.random.default_rng(0), 10**9 + 50_000  # for the probe, never trained on
    new = collect_images(new_scenes, 2000, new_rng, new_seed)
    oracle = args.goals == "oracle"
    seer = TruePositions(args, device, positions) if oracle else VAE(args, device)
    if not oracle:
        sample = lambda: images[rng.integers(len(images), size=VAE_BATCH)]  # noqa: E731
        see(seer, sample, args.vae_updates, args.beta_start, args.beta)
    vae_minutes = (time.perf_counter() - run.start) / 60
    prior, r2 = look(seer, images, positions, *new)
    print("linear probe of z, new images: R² {:.3f} (agent), {:.3f} (square)".format(*r2))
    if min(r2[: args.moved]) < 0.95:
        print("warning: z does not tell places well, so goals will be missed: train the VAE longer")

    # imagine, practise
    action_dim = env.single_action_space.shape[0]
    agent = GoalAgent(seer.z_dim, action_dim, args, device)
    replay = EpisodeReplay(rounds * N, T, env.single_observation_space, action_dim, seer.z_dim)
    episodes = sprites_env.Episodes(env, args.seed * 100_000 + 50_000)  # other scenes than images
    held_out = HeldOut(args)
    for count in range(N, rounds * N + 1, N):
        practise(agent, seer, episodes, replay, prior, rng, args)

        # learn: as many updates as steps
        left = min(1, 2 - 2 * (count - N) / (rounds * N))  # 1 for half of the run, then to 0
        for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
            optimizer.param_groups[0]["lr"] = args.learning_rate * left
        for i in range(N * T):
            batch = relabelled_batch(replay, rng, seer, prior, args)
            metrics = update_goal_critic(agent, batch, args.gamma)
            if i % ACTOR_EVERY == 0:
                improved = update_goal_actor(agent, batch, args.tau)

        # see again, in the first round past a multiple, but not after the last one
        stale = args.finetune_every and count % args.finetune_every < N and count < rounds * N
        if stale and args.finetune_updates and not oracle:
            see_again(seer, images, replay, rng, args)
            prior, r2 = look(seer, images, positions, *new)

        # report
        if count * T % REPORT_EVERY < N * T or count == rounds * N:
            path = held_out.reach(
                lambda obs, goals: pursue(agent, seer, obs, goals),
                seer.encode(held_out.goal_images),
            )
            final, success = held_out.measure(path[-1], "final")
            final["success_rate"] = success
            final |= {} if oracle else {"probe_r2_agent": r2[AGENT], "probe_r2_square": r2[TARGET]}
            metrics |= improved | {"reward": batch["reward"].mean()}
            run.report(count * T, **final, **{name: x.item() for name, x in metrics.items()})
            networks = {"actor": agent.actor, "critic": agent.critic} | seer.networks
            saved = {name: network.state_dict() for name, network in networks.items()}
            saved |= {"prior_mean": prior[0], "prior_sd": prior[1], "step": count * T}
            run.save("checkpoint.pt", saved)

    untouched, _ = held_out.measure(path[0], "untouched")
    summary = final | untouched | {"eval_episodes": args.eval_episodes}
    if not oracle:
        summary |= {"probe_r2": min(r2), "vae_minutes": round(vae_minutes, 2)}
        draw_imagination(run, seer, prior)
    draw_reached(run, held_out, path)
    names = ("agent", "block")[: args.moved]
    panels = [("final distance (frame widths)", [f"final_{name}_distance" for name in names])]
    levels = [(f"{name}, untouched", summary[f"untouched_{name}_distance"]) for name in names]
    return run.finish(summary, panels, "environment steps", levels)


# --- Appendix: pictures --------------------------------------------------------------------


def draw_reached(run, held_out, path):
    """reached.png, eight episodes: start, goal, reached; rollout.gif: how four of them went, the
    goal shining through."""

    def draw(states, count):  # uint8 (count, height, width, 3)
        pairs = zip(states[:count, :, :2], held_out.shapes)
        return np.stack([sprites_env.draw_rgb(*pair) for pair in pairs])

    rows = {"start": held_out.start, "goal": held_out.goal, "reached": path[-1]}
    rows = {name: draw(states, 8) for name, states in rows.items()}
    run.save("reached.png", sprites_env.draw_images(rows))
    ghost, frames = 0.65 * 255 + 0.35 * draw(held_out.goal, 4), [draw(x, 4) for x in path]
    film = [np.where((x == 255).all(-1, keepdims=True), ghost, x).astype(np.uint8) for x in frames]
    run.save("rollout.gif", film)


def draw_imagination(run, vae, prior):
    """imagined_goals.png: samples of the prior, decoded; latent_walk.png: one dimension of z at a
    time, from -2 to 2 standard deviations of the prior."""
    (mean, sd), steps = prior, torch.linspace(-2, 2, 9, device=vae.device)
    samples = vae.decode(imagine(prior, 16)).view(2, 8, 64, 64)
    walk = vae.decode((mean + steps[:, None] * torch.diag(sd)[:, None]).flatten(0, 1))
    walk = walk.view(-1, 9, 64, 64)
    run.save("imagined_goals.png", sprites_env.draw_images(dict(zip(("", " "), samples.cpu()))))
    rows = {f"z{i + 1}": frames.cpu() for i, frames in enumerate(walk)}
    run.save("latent_walk.png", sprites_env.draw_images(rows))


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
