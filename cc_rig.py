"""Contextual imagined goals (CC-RIG): imagine only what this scene allows.

What
    RIG (`rig_td3.py`) imagines goals with objects that are not there, where scenes differ from
    episode to episode. Here a context-conditioned VAE sees the first frame of the episode as well:
    what stays as it is goes into the context z_c, and only what can change into z. A goal is a
    random z in the present context: the same scene, with the agent elsewhere. TD3 practises to
    reach it. With --context none the first frame is black: that is RIG, in the same loop.

Paper
    Nair, Bahl, Khazatsky, Pong, Berseth & Levine, "Contextual Imagined Goals for Self-Supervised
    Robotic Learning", 2019, arXiv 1910.11670. RIG: Nair et al., 2018, arXiv 1807.04742. TD3:
    Fujimoto, van Hoof & Meger, 2018, arXiv 1802.09477.

Algorithm
    images ← collect_scenes                        many scenes (--appearances), the agent anywhere
    see_scenes: --vae-updates times update_cc_vae  one step on (1), with a β that falls
    repeat until --total-steps:
        practise_here: z_c of the first frame, a goal z̄_g (3) for each environment,
                       an episode toward it, stored in codes; random at first
        as many times as these episodes had steps:
            contextual_batch                       other goals (5), the same context, rewards (4)
            update_goal_critic                     one step on (8)
            every second time update_goal_actor    one step on (9); slow copies follow
        every 2,000 steps: HeldOutScenes.reach     goal images z̄_g = (μ(s_g, s₀), z_c), in scenes
                                                   as in training and in unseen ones

Equations
    (1)  CC-VAE: minimise  E_q[−log p(s|z, z_c)] − log p(s₀|z_c) + β KL(q(z|s, s₀) ‖ N(0, I)),
         z_c = e₀(s₀), q = N(μ(s, s₀), σ²(s, s₀)), p with an independent Bernoulli for each pixel.
         (Notes of the paper print the second term with a plus: a loss would then unlearn s₀.)
    (2)  KL = ½ Σ (μ² + σ² − log σ² − 1),   over z alone: what z_c says costs nothing
    (3)  goals: z̄_g = (z_g, z_c),   z_g ~ N(0, I), z_c of the present episode
    (4)  reward: r(z̄', z̄_g) = −‖z̄' − z̄_g‖;   parts z_c are equal, so it is the distance in z
    (5)  relabelling: z_g ← as practised, or from N(0, I), or μ of a later image of the episode
    (6)  TD3: a' = clip(π̄(z̄', z̄_g) + clip(ε, −c, c), −1, 1),   ε ~ N(0, σ_ε²)
    (7)  y = r + γ (1 − terminated) min Q̄ᵢ(z̄', z̄_g, a')
    (8)  minimise  Σᵢ E[(Qᵢ(z̄, z̄_g, a) − y)²]
    (9)  maximise  E[Q₁(z̄, z̄_g, π(z̄, z̄_g))]

Notation
    s image, s₀ the first of its episode, z code of s, z_c context, z̄ = (z, z_c), z_g and z̄_g
    goals, a action, π the actor, Q the twin critics, bars on π and Q: slow copies, prime: next
    step. N environments, T steps of an episode, B batch, E scenes (or episodes) and F images of
    each besides the first, M held-out goals, K = 4 objects in the frame, P x P patches of p x p
    pixels, H hidden units, Z size of z, C of z_c, A (in shapes) of an action, D of an input.

Differs from the paper
    1. Scenes: reach, with the square and two triangles at rest; only the agent moves. In images
       for the VAE it is put anywhere in each frame: after a random walk it would still be near its
       start, and z would say where it is from there. s₀ itself is not among the images to be
       painted: every goal would show the agent at its start as well, faintly. These images are not
       steps of the environment: --total-steps does not count them.
    2. The encoder sees s and s₀ as two channels, not s and z_c: what has changed is a difference.
       Each 4 x 4 pixels are drawn from z, their place, and z_c by weights of their own.
    3. β goes from 2 to 1 beside a *sum* over pixels (authors' code: 1 to 50, mean over pixels).
       From 20, as in rig_td3.py, z never wakes: the context is learnt first, and meanwhile the
       decoder learns that z is noise. From 4 it wakes so late that a dimension may be missing.
    4. TD3 is given z_c at 0.03 of its size. At full size the distance to goals is twice as large:
       in reach the action does not depend on it, but 128 numbers drown eight.
    5. No batch norm, dropout or weight decay. Networks, TD3's settings, relabelling and exploration
       are those of rig_td3.py, but for 8,000 steps, 128 hidden units, z̄_g itself in place of its
       difference from z̄, and a constant learning rate, a quarter as large. No fine-tuning and no
       fitted prior, as in the paper; in all of this --context none is not rig_td3.py.
    6. The replay holds every episode of the run, so no context is ever overwritten.

Run
    python cc_rig.py
    python cc_rig.py --context none
    python cc_rig.py --appearances 1

Writes
    to runs/cc_rig/<context>_<appearances>_d2_s<seed>/: args.json, curve.csv, curve.png,
    imagined_goals.png (unseen s₀, imagined goals below it), exchanged.png (one z_g in a row, one
    scene in a column), reached.png (unseen scenes: start, goal, reached), rollout.gif (the same,
    the goal as a ghost), checkpoint.pt (at every report) and summary.json with
    `final_agent_distance` (frame widths, mean over `eval_episodes` goals), `success_rate` (within
    0.05), `untouched_agent_distance` (doing nothing), `imagined_scene_error` (squared error of
    imagined goals within squares around what is at rest), `mean_scene_error` (of the mean image of
    training), `probe_r2_agent` (linear map from z to the agent's place), `probe_r2_scene_z`,
    `probe_r2_scene_context` (from z and z_c to the centre of mass of what is at rest; 0 where that
    is always the same), `vae_minutes`, `minutes`; all in scenes as in training (with --appearances
    all, new ones). The same in unseen scenes, where both triangles point up:
    `unseen_agent_distance`, `unseen_success_rate`, `unseen_untouched_distance`,
    `unseen_imagined_scene_error`, `unseen_mean_scene_error`, `unseen_probe_r2_agent`,
    `unseen_probe_r2_scene_z`, `unseen_probe_r2_scene_context`. Columns of curve.csv: `step`,
    `seconds`, `steps_per_second` (with the VAE's time), both distances and success rates, and of
    the last batch `critic_loss`, `q` (of the actor's actions) and `reward`.

Result
    Three seeds, ever new scenes: imagined goals miss the scene by .11, without a context by .68. In
    unseen scenes, with triangles never seen, .24 and .68; there the agent ends .038 from its goal,
    without a context .25, doing nothing .42. All: benchmark/README.md.

Try
    1. --beta-start 0.02 --beta 0.02 --out runs/free: z costs nothing. What is in z now? (Look at
       exchanged.png and probe_r2_scene_z.)
    2. --appearances 1, with and without --context none: who needs a context if nothing varies?
    3. --context-dim 4 --out runs/narrow: a scene with three sprites in four numbers.
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

UP = sprites_env.SHAPES.index("triangle_up")  # the distractors that training never sees
FRAMES = 5  # images of a scene for the VAE; the first is the context of the others
VAE_SCENES = 32  # in a batch of the VAE, with all of their images
CONTEXT_SCALE = 0.03  # of z_c beside z in codes: in reach no action depends on it
PROBED = 2000  # scenes of each kind to measure the VAE with
MEASURES = ("imagined_scene_error", "mean_scene_error", "probe_r2_agent", "probe_r2_scene_z")
MEASURES += ("probe_r2_scene_context",)
TARGET_NOISE, NOISE_CLIP = 0.2, 0.5  # of the target's action in (6): σ_ε and c
RANDOM_STEPS = 800  # of random actions before the policy acts
ACTOR_EVERY = 2  # updates of the critic to one of the actor
HIDDEN = 128  # units of each of the two hidden layers of actor and critic
SUCCESS = 0.05  # frame widths from the goal
REPORT_EVERY = 2000  # steps


@dataclass(frozen=True)
class Args:
    context: Literal["frame", "none"] = "frame"  # the episode's first frame; none: RIG
    appearances: Literal["1", "4", "all"] = "all"  # scenes in training; all: new ones every time
    z_dim: int = 4  # Z, numbers for what changes within an episode
    context_dim: int = 64  # C, numbers for what does not
    beta: float = 1.0  # weight of KL in the VAE's loss, at the end
    beta_start: float = 2.0  # and at the start; falls in equal ratios
    scenes: int = 10_000  # to train the VAE with, five images of each
    vae_updates: int = 3_000  # gradient steps of the VAE, before any practice
    vae_learning_rate: float = 2e-3  # of Adam, for all of its networks
    total_steps: int = 8_000  # of the environment
    num_envs: int = 10  # episodes of a round, after which come as many updates as it had steps
    goal_fractions: tuple[float, float, float] = (0.2, 0.4, 0.4)  # practised, prior, future
    noise: float = 0.2  # standard deviation of the exploration noise, in actions
    batch_size: int = 256  # transitions per update of TD3, B
    learning_rate: float = 5e-4  # of Adam, for actor and critic
    gamma: float = 0.9  # discount factor
    tau: float = 0.01  # how fast the target networks follow
    eval_episodes: int = 200  # goal images in seen scenes, and as many in unseen ones
    seed: int = 1  # of scenes, networks and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 if several runs share the machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        require_positive(self, but="goal_fractions noise gamma")
        require(self.gamma < 1 and self.tau <= 1, "--gamma must be below 1, --tau not above")
        shares = abs(sum(self.goal_fractions) - 1) < 1e-6
        require(shares, "--goal-fractions must be three shares that add up to 1")
        least = self.num_envs * make_env(self, 1).horizon
        require(self.total_steps >= least, f"--total-steps must be at least {least}")

    @property
    def environment(self):
        return {"task": "reach", "distractors": 2}

    @property
    def run_name(self):
        return f"{self.context}_{self.appearances}_d2_s{self.seed}"


# --- Networks --------------------------------------------------------------------------------


def strided_convolutions(channels):
    """3 x 3 convolutions, each halving the image's height and width, each followed by a ReLU."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class FramesEncoder(nn.Module):
    """Three convolutions, 64 x 64 -> 8 x 8 pixels, of one frame or of several as channels, and a
    linear map, to which the place of a sprite is still plain."""

    def __init__(self, frames, size_out):
        super().__init__()
        self.convolutions = strided_convolutions((frames, 8, 16, 32))
        self.head = nn.Linear(32 * 8 * 8, size_out)
        orthogonal_(self).to(memory_format=torch.channels_last)  # same numbers, faster

    def forward(self, frames):  # float (B, frames, 64, 64) in [0, 1] -> (B, size_out)
        return self.head(self.convolutions(frames).flatten(1))


class ContextDecoder(nn.Module):
    """p(s₀|z_c): the same small network draws every 4 x 4 patch, from the place of the patch and
    what z_c says about it. For each patch z_c is read by weights of its own: however many sprites
    there are, nothing has to be known about one in order to draw another."""

    def __init__(self, context_dim, hidden=64, patch=4):
        super().__init__()
        self.side, self.patch = sprites_env.SIZE // patch, patch  # P patches a side, p pixels
        axis = torch.linspace(-1.7, 1.7, self.side)  # uniform, of unit variance
        places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
        self.register_buffer("places", places)  # (P P, 2)
        self.from_place = orthogonal_(nn.Linear(2, hidden))
        self.from_context = nn.Linear(context_dim, self.side**2 * hidden)
        nn.init.normal_(self.from_context.weight, std=math.sqrt(2 / context_dim))
        nn.init.zeros_(self.from_context.bias)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head.append(nn.Linear(hidden, patch * patch))
        orthogonal_(self.head)
        nn.init.constant_(self.head[-1].bias, -3.0)  # most pixels are black

    def read(self, context):  # (E, C) -> (E, P P, H)
        read = self.from_context(context).unflatten(1, (self.side**2, -1))
        return read + self.from_place(self.places)

    def draw(self, h):  # (..., P P, H) -> logits (..., 1, 64, 64)
        patches = self.head(h).unflatten(-1, (self.patch, self.patch))  # (..., P P, p, p)
        grid = patches.unflatten(-3, (self.side, self.side))  # (..., P, P, p, p)
        return grid.transpose(-3, -2).flatten(-2).flatten(-3, -2).unsqueeze(-3)

    def forward(self, context):  # (E, C) -> logits (E, 1, 64, 64)
        return self.draw(self.read(context))


class SceneDecoder(ContextDecoder):
    """p(s|z, z_c): one scene E, and F images of it."""

    def __init__(self, z_dim, context_dim, hidden=64, patch=4):
        super().__init__(context_dim, hidden, patch)
        self.from_z = orthogonal_(nn.Linear(z_dim, hidden))

    def forward(self, z, context):  # (E, F, Z), (E, C) -> logits (E, F, 1, 64, 64)
        return self.draw(self.read(context)[:, None] + self.from_z(z)[:, :, None])


class GoalActor(nn.Module):
    """π(z̄, z̄_g): a deterministic action in [-1, 1]."""

    def __init__(self, size_in, hidden, action_dim):
        super().__init__()
        self.mlp = mlp(size_in, hidden, action_dim)
        nn.init.orthogonal_(self.mlp[-1].weight, 0.01)  # start with actions around zero

    def forward(self, codes):  # (B, 2 Z + 2 C), z̄ and z̄_g side by side -> (B, A)
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


class CCVAE:
    """Encoder q(z|s, s₀), context encoder e₀, a decoder for each, and their optimiser. Codes are
    stored as numbers, so that TD3 never changes them. With --context none s₀ is shown as black,
    which says nothing: what is left is the VAE of RIG."""

    def __init__(self, args, device):
        self.device, self.z_dim, self.blank = device, args.z_dim, args.context == "none"
        self.encoder = FramesEncoder(2, 2 * args.z_dim).to(device)  # μ and log σ²
        with torch.no_grad():  # start with z all noise: what it comes to mean unfolds from there
            self.encoder.head.weight.mul_(0.05)
        self.context_encoder = FramesEncoder(1, args.context_dim).to(device)
        self.decoder = SceneDecoder(args.z_dim, args.context_dim).to(device)
        self.context_decoder = ContextDecoder(args.context_dim).to(device)
        names = "encoder", "context_encoder", "decoder", "context_decoder"
        self.networks = {name: getattr(self, name) for name in names}
        parameters = [p for network in self.networks.values() for p in network.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=args.vae_learning_rate, fused=True)

    def shown(self, first):  # uint8 (N, 1, 64, 64) -> float, or black
        return to_tensor(first, self.device) * (0 if self.blank else 1)

    @torch.no_grad()
    def encode_context(self, first):  # uint8 (N, 1, 64, 64) -> z_c, in units for TD3, (N, C)
        chunks = torch.as_tensor(first).split(500)
        context = torch.cat([self.context_encoder(self.shown(chunk)) for chunk in chunks])
        return CONTEXT_SCALE * context

    @torch.no_grad()
    def encode(self, frames, first):  # uint8 (N, 1, 64, 64), both -> μ(s, s₀) (N, Z)
        chunks = zip(torch.as_tensor(frames).split(500), torch.as_tensor(first).split(500))
        pairs = [torch.cat([to_tensor(s, self.device), self.shown(s0)], dim=1) for s, s0 in chunks]
        return torch.cat([self.encoder(pair)[:, : self.z_dim] for pair in pairs])

    @torch.no_grad()
    def decode(self, codes):  # z̄ (N, Z + C) -> (N, 1, 64, 64) in [0, 1]
        z, context = codes[:, None, : self.z_dim], codes[:, self.z_dim :] / CONTEXT_SCALE
        chunks = zip(z.split(250), context.split(250))
        return torch.cat([self.decoder(*chunk)[:, 0].sigmoid() for chunk in chunks])


class GoalAgent:
    """TD3 on z̄ and z̄_g side by side: actor, critic, their slow copies, and their optimisers."""

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
    def act(self, z, goals):  # both (N, Z + C) -> (N, A), an array, without noise
        return self.actor(torch.cat([z, goals], dim=-1)).cpu().numpy()


# --- Losses: pure functions of tensors -------------------------------------------------------


def kl_divergence(mean, log_var):
    """KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − log σ² − 1), eq. (2). (B, Z), (B, Z) -> (B,)."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(-1)


def cc_vae_loss(logits, frames, first_logits, first, mean, log_var, beta):
    """E[−log p(s|z, z_c)] − log p(s₀|z_c) + β KL, eq. (1): sums over pixels and dimensions of z,
    means over images and over scenes. logits, frames (E, F, 1, 64, 64), first_logits, first
    (E, 1, 64, 64), mean, log_var (E, F, Z) -> scalar."""
    assert logits.shape == frames.shape and first_logits.shape == first.shape
    pixels = F.binary_cross_entropy_with_logits(logits, frames, reduction="none")
    context = F.binary_cross_entropy_with_logits(first_logits, first, reduction="none")
    kl = kl_divergence(mean, log_var)
    return (pixels.flatten(2).sum(-1) + beta * kl).mean() + context.flatten(1).sum(-1).mean()


def imagine_here(context, z_dim):
    """z̄_g = (z_g, z_c) with z_g ~ N(0, I), eq. (3): something else, but in this scene.
    z_c (N, C) -> (N, Z + C)."""
    return torch.cat([torch.randn(len(context), z_dim, device=context.device), context], dim=-1)


def goal_reward(reached, goal):
    """r = −‖z̄' − z̄_g‖, eq. (4): not squared, of the *next* code. Both (B, Z + C) -> (B,)."""
    assert reached.shape == goal.shape
    return -(reached - goal).norm(dim=-1)


def relabel(practised, prior, future, which):
    """z̄_g of each transition, eq. (5): which (B,) is 0 for the goal that was practised, 1 for one
    of the prior, 2 for a later state. Three times (B, Z + C), integers (B,) -> (B, Z + C)."""
    assert practised.shape == prior.shape == future.shape
    return torch.stack([practised, prior, future])[which, torch.arange(len(which))]


def smoothed(action, noise):
    """clip(π̄(z̄', z̄_g) + clip(ε, −c, c), −1, 1), eq. (6): similar actions are worth about the
    same. Both (B, A) -> (B, A)."""
    return (action + noise.clamp(-NOISE_CLIP, NOISE_CLIP)).clamp(-1, 1)


def td_target(reward, terminated, next_value, gamma):
    """y = r + γ (1 − terminated) min Q̄ᵢ, eq. (7); next_value is that minimum. All (B,), called
    without gradient. A time limit is not in here: an episode that was cut off goes on, as far as
    values are concerned."""
    assert reward.shape == terminated.shape == next_value.shape
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q, target):
    """Σᵢ E[(Qᵢ(z̄, z̄_g, a) − y)²], eq. (8). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def deterministic_actor_loss(q):
    """−E[Q₁(z̄, z̄_g, π(z̄, z̄_g))], eq. (9), of the first of the two critics. (2, B) -> scalar."""
    assert len(q) == 2
    return -q[0].mean()


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), in place: the slow copy follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_cc_vae(vae, frames, beta):
    """One step of all four networks on (1). frames uint8 (E, 1 + F, 1, 64, 64), of which the first
    of each scene is the context of the others. Returns the loss."""
    first, frames = vae.shown(frames[:, 0]), to_tensor(frames[:, 1:], vae.device)
    pairs = torch.cat(torch.broadcast_tensors(frames, first[:, None]), dim=2)  # (E, F, 2, 64, 64)
    parameters = vae.encoder(pairs.flatten(0, 1)).unflatten(0, frames.shape[:2])
    mean, log_var = parameters.chunk(2, dim=-1)  # (E, F, Z)
    z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
    context = vae.context_encoder(first)  # (E, C)
    logits, first_logits = vae.decoder(z, context), vae.context_decoder(context)
    loss = cc_vae_loss(logits, frames, first_logits, first, mean, log_var, beta)
    vae.optimizer.zero_grad()
    loss.backward()
    vae.optimizer.step()
    return loss.detach()


def update_goal_critic(agent, batch, gamma):
    """One step of the critic on (8). y (7) takes the smaller value of the slow critic, at a
    smoothed action (6) of the slow actor. batch: see `contextual_batch`."""
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


class Scenes:
    """Where episodes begin: the agent anywhere, among sprites at rest as --appearances has it. In
    training distractors point right, down or left. In unseen scenes both point up."""

    def __init__(self, args, seed, unseen=False):
        self.rng, self.unseen, self.fixed = np.random.default_rng(seed), unseen, None
        if args.appearances != "all" and not unseen:
            self.fixed = self.sample(np.random.default_rng(args.seed), int(args.appearances))

    def sample(self, rng, count):
        states, shapes = sprites_env.sample_states(rng, count, 2, "reach")
        shapes[:, 2:] = UP if self.unseen else rng.integers(2, UP, (count, 2))
        return states, shapes

    def start(self, count):
        """States (N, 4, 4) and shapes (N, 4), as the environment's reset takes them."""
        states, shapes = self.sample(self.rng, count)
        if self.fixed:
            which = self.rng.integers(len(self.fixed[0]), size=count)
            states[:, TARGET:], shapes = self.fixed[0][which, TARGET:], self.fixed[1][which]
        return states, shapes

    def elsewhere(self, states):
        """The same scenes with the agent anywhere. (N, 4, 4) -> (N, 4, 4)."""
        moved = states.copy()
        moved[:, AGENT] = self.sample(self.rng, len(states))[0][:, AGENT]
        return moved


def collect_scenes(scenes, count):
    """Images of scenes, in each of which the agent has been put somewhere else. Returns images
    uint8 (E, 1 + F, 1, 64, 64) and, to measure with, states (E, 1 + F, 4, 4) and shapes (E, 4)."""
    states, shapes = scenes.start(count)
    states = np.stack([states] + [scenes.elsewhere(states) for _ in range(FRAMES - 1)], axis=1)
    images = sprites_env.draw(states[..., :2].reshape(-1, 4, 2), shapes.repeat(FRAMES, axis=0))
    return images.reshape(count, FRAMES, 1, *images.shape[1:]), states, shapes


class ContextReplay:
    """Whole episodes in codes: one context for each, whatever goal is put in place of its own."""

    def __init__(self, episodes, steps, action_dim, z_dim, context_dim):
        self.size = 0  # episodes so far
        self.z = np.zeros((episodes, steps + 1, z_dim), np.float32)
        self.contexts = np.zeros((episodes, context_dim), np.float32)
        self.goals = np.zeros((episodes, z_dim), np.float32)  # as practised
        self.actions = np.zeros((episodes, steps, action_dim), np.float32)
        self.terminated = np.zeros((episodes, steps), np.float32)

    def add(self, z, contexts, goals, actions, terminated):  # N episodes, each (N, ...)
        new = slice(self.size, self.size + len(z))
        self.z[new], self.contexts[new], self.goals[new] = z, contexts, goals
        self.actions[new], self.terminated[new] = actions, terminated
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


def contextual_batch(replay, rng, args, device):
    """B transitions with goals (5) and rewards (4): before = (z̄, z̄_g) and after = (z̄', z̄_g),
    both (B, 2 Z + 2 C), with the context of their own episode everywhere; action (B, A), reward
    and terminated (B,)."""
    e, t, h = replay.sample(rng, args.batch_size)
    context, practised = (to_tensor(x[e], device) for x in (replay.contexts, replay.goals))
    codes = [to_tensor(replay.z[e, i], device) for i in (t, t + 1, h)] + [practised]
    z, z_next, future, practised = (torch.cat([code, context], dim=-1) for code in codes)
    which = torch.multinomial(torch.tensor(args.goal_fractions), len(e), replacement=True)
    goal = relabel(practised, imagine_here(context, args.z_dim), future, which)
    before, after = (torch.cat([x, goal], dim=-1) for x in (z, z_next))
    action, terminated = (to_tensor(x[e, t], device) for x in (replay.actions, replay.terminated))
    batch = {"before": before, "action": action, "reward": goal_reward(z_next, goal)}
    return batch | {"after": after, "terminated": terminated}


# --- Measures --------------------------------------------------------------------------------


def position_probe(z, positions, z_new, new_positions):
    """R² on new images of a linear map from z (M, Z), or z_c, to positions (M, 4), two each of the
    agent and of what is at rest: two numbers, each a mean over x and y."""
    inputs, new = (torch.cat([x.double(), torch.ones(len(x), 1)], 1) for x in (z, z_new))
    y, y_new = torch.as_tensor(positions), torch.as_tensor(new_positions)
    error = new @ torch.linalg.lstsq(inputs, y, driver="gelsd").solution - y_new
    r2 = 1 - error.square().mean(0) / y_new.var(0, unbiased=False)
    return r2.unflatten(0, (2, 2)).mean(1).tolist()


def scenes_without_agent(states, shapes):
    """What is at rest, as float (N, 64, 64) in [0, 1], and the region in which it is judged: bool,
    a square of 10 x 10 pixels around each of these sprites."""
    places, shapes = states[:, TARGET:, :2], shapes[:, TARGET:]
    square = np.full_like(shapes, sprites_env.SHAPES.index("square"))
    return sprites_env.draw(places, shapes) / 255, sprites_env.draw(places, square) > 0


def scene_error(images, scenes, region):
    """Mean squared error of images in the region. All (N, 64, 64)."""
    assert images.shape == scenes.shape == region.shape
    return np.square(images - scenes)[region].mean()


def centre_of_mass(scenes):
    """Of all white pixels, (N, 64, 64) -> (N, 2) in frame widths: where the sprites are, without
    a question which of them is which."""
    axis, mass = np.arange(sprites_env.SIZE) / 63, scenes.sum((1, 2))
    return np.stack([scenes.sum(2) @ axis, scenes.sum(1) @ axis], axis=1) / mass[:, None]


def look_around(vae, images, states, shapes, mean_image):
    """Of scenes as `collect_scenes` gives them: the error of imagined goals in what is at rest,
    that of the mean image of training, and probes, fitted on one half, judged on the other."""
    first, later = images[:, 0], images[:, 1]
    context, z = vae.encode_context(first), vae.encode(later, first).cpu()
    imagined = vae.decode(imagine_here(context, vae.z_dim))[:, 0].cpu().numpy()
    scenes, region = scenes_without_agent(states[:, 1], shapes)
    usual = np.broadcast_to(mean_image, imagined.shape)
    errors = [scene_error(x, scenes, region) for x in (imagined, usual)]
    rest = centre_of_mass(scenes)
    places, half = np.concatenate([states[:, 1, AGENT, :2], rest], axis=1), len(z) // 2
    (agent, scene_z), (_, scene_context) = (
        position_probe(x[:half], places[:half], x[half:], places[half:]) for x in (z, context.cpu())
    )
    if np.ptp(rest, axis=0).max() < 1e-9:  # always the same scene: there is nothing to tell
        scene_z = scene_context = 0.0
    return dict(zip(MEASURES, (*errors, agent, scene_z, scene_context)))


class HeldOutScenes:
    """Tasks to be tested with, in scenes of one kind: starts and goals (M, K, 4), which are the
    same scenes with the agent elsewhere, and images of both."""

    def __init__(self, args, scenes):
        self.steps = make_env(args, 1).horizon
        # one step longer, or the environment would reset before the last state has been read
        self.env = make_env(args, args.eval_episodes, horizon=self.steps + 1)
        self.start, self.shapes = scenes.start(args.eval_episodes)
        self.goal = scenes.elsewhere(self.start)
        self.goal_images, self.first = self.show(self.goal), self.show(self.start)

    def show(self, states):
        obs, _ = self.env.reset(options={"state": states, "shapes": self.shapes})
        return obs

    def reach(self, agent, vae):
        """Positions (T + 1, M, K, 2) on the way to z̄_g = (μ(s_g, s₀), z_c), without noise."""
        obs, context = self.show(self.start), vae.encode_context(self.first)
        goals = torch.cat([vae.encode(self.goal_images, self.first), context], dim=-1)
        path = [self.start[..., :2]]
        for _ in range(self.steps):
            codes = torch.cat([vae.encode(obs, self.first), context], dim=-1)
            obs, *_ = self.env.step(agent.act(codes, goals))
            path.append(self.env.states[..., :2])
        return np.stack(path)

    def distance(self, positions):
        """From the agent to where the goal has it: (M, K, 2) -> (M,)."""
        return np.linalg.norm((positions - self.goal[..., :2])[:, AGENT], axis=-1)


# --- Training --------------------------------------------------------------------------------


def see_scenes(vae, images, rng, args):
    """Train the CC-VAE. β goes from its start to its end in equal ratios."""
    for i in range(args.vae_updates):
        f = i / args.vae_updates
        frames = images[rng.integers(len(images), size=VAE_SCENES)]
        loss = update_cc_vae(vae, frames, args.beta_start ** (1 - f) * args.beta**f)
        if i % 250 == 249:
            print(f"VAE {i + 1}/{args.vae_updates}  loss {loss.item():.1f}", flush=True)


def practise_here(agent, vae, episodes, scenes, replay, rng, args):
    """Act and store: an episode in each environment, toward a goal that is imagined in its own
    scene."""
    env = episodes.env
    states, shapes = scenes.start(env.num_envs)
    first, _ = env.reset(options={"state": states, "shapes": shapes})
    context = vae.encode_context(first)
    goals, codes, rows = imagine_here(context, args.z_dim), [vae.encode(first, first)], []
    for _ in range(env.horizon):
        action = agent.act(torch.cat([codes[-1], context], dim=-1), goals)
        action = (action + args.noise * rng.standard_normal(action.shape)).clip(-1, 1)
        if replay.size * env.horizon < RANDOM_STEPS:
            action = rng.uniform(-1, 1, action.shape)
        successors, _, terminated, truncated = episodes.step(action)
        codes.append(vae.encode(successors, first))
        rows.append((action, terminated))
    assert (terminated | truncated).all()  # in lockstep
    actions, terminated = (np.stack(column, axis=1) for column in zip(*rows))
    z, goals = torch.stack(codes, dim=1), goals[:, : args.z_dim]
    replay.add(z.cpu(), context.cpu(), goals.cpu(), actions, terminated)


def train(args):
    """One run: see, imagine, practise; returns the content of summary.json."""
    env, rng = make_env(args, args.num_envs), np.random.default_rng(args.seed)
    N, T = args.num_envs, env.horizon
    rounds = args.total_steps // (N * T)
    run = Run(args, total=rounds * N * T)
    device = run.device
    scenes = Scenes(args, args.seed * 100_000)
    kinds = {"": False, "unseen_": True}  # prefix of a measure: are its scenes unseen?

    # see
    images, *_ = collect_scenes(scenes, args.scenes)
    vae = CCVAE(args, device)
    see_scenes(vae, images, rng, args)
    vae_minutes, measured = (time.perf_counter() - run.start) / 60, {}
    mean_image = images.mean((0, 1, 2)) / 255
    for kind, unseen in kinds.items():
        new = collect_scenes(Scenes(args, 10**9 + 50_000, unseen), PROBED)  # never trained on
        found = look_around(vae, *new, mean_image)
        measured |= {kind + name: x for name, x in found.items()}
        print("  ".join(f"{kind}{name} {x:.3f}" for name, x in found.items()), flush=True)

    # imagine, practise
    action_dim = env.single_action_space.shape[0]
    agent = GoalAgent(args.z_dim + args.context_dim, action_dim, args, device)
    replay = ContextReplay(rounds * N, T, action_dim, args.z_dim, args.context_dim)
    episodes = sprites_env.Episodes(env, args.seed)
    tests = {kind: HeldOutScenes(args, Scenes(args, 10**9, x)) for kind, x in kinds.items()}
    for count in range(N, rounds * N + 1, N):
        practise_here(agent, vae, episodes, scenes, replay, rng, args)

        # learn: as many updates as steps
        for i in range(N * T):
            batch = contextual_batch(replay, rng, args, device)
            metrics = update_goal_critic(agent, batch, args.gamma)
            if i % ACTOR_EVERY == 0:
                improved = update_goal_actor(agent, batch, args.tau)

        # report
        if count * T % REPORT_EVERY < N * T or count == rounds * N:
            paths = {kind: test.reach(agent, vae) for kind, test in tests.items()}
            far = {kind: tests[kind].distance(path[-1]) for kind, path in paths.items()}
            final = {"final_agent_distance": far[""].mean()}
            final |= {"unseen_agent_distance": far["unseen_"].mean()}
            final |= {f"{kind}success_rate": (x < SUCCESS).mean() for kind, x in far.items()}
            metrics |= improved | {"reward": batch["reward"].mean()}
            run.report(count * T, **final, **{name: x.item() for name, x in metrics.items()})
            networks = {"actor": agent.actor, "critic": agent.critic} | vae.networks
            saved = {name: network.state_dict() for name, network in networks.items()}
            run.save("checkpoint.pt", saved | {"step": count * T})

    test, path = tests["unseen_"], paths["unseen_"]
    untouched, unseen_untouched = (tests[kind].distance(paths[kind][0]).mean() for kind in kinds)
    summary = final | measured | {"untouched_agent_distance": untouched}
    summary |= {"unseen_untouched_distance": unseen_untouched}
    summary |= {"eval_episodes": args.eval_episodes, "vae_minutes": round(vae_minutes, 2)}
    draw_imagined_here(run, vae, test.first)
    draw_reached(run, test, path)
    names = ["final_agent_distance", "unseen_agent_distance"]
    panels = [("final distance (frame widths)", names)]
    return run.finish(summary, panels, "environment steps", [("untouched", unseen_untouched)])


# --- Appendix: pictures ----------------------------------------------------------------------


def draw_imagined_here(run, vae, first, columns=8):
    """imagined_goals.png: unseen scenes, and below each what is imagined in it; exchanged.png: one
    z_g in a row, one scene in a column."""
    first = first[:columns]
    context = vae.encode_context(first)
    goals = [imagine_here(context, vae.z_dim) for _ in range(3)]
    rows = {"s₀": first[:, 0] / 255}
    imagined = {f"goal {i + 1}": vae.decode(x)[:, 0].cpu() for i, x in enumerate(goals)}
    run.save("imagined_goals.png", sprites_env.draw_images(rows | imagined))
    same = [torch.cat([x[:1, : vae.z_dim].expand(len(x), -1), context], dim=-1) for x in goals]
    exchanged = {f"z_g {i + 1}": vae.decode(x)[:, 0].cpu() for i, x in enumerate(same)}
    run.save("exchanged.png", sprites_env.draw_images(rows | exchanged))


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


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
