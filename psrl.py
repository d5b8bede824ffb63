"""PSRL: soft actor critic from pixels, whose convolutions also learn to match neighbouring frames.

What
    Where did each part of a frame come from? A small network answers with a map of displacements,
    an optical flow, learnt from nothing but frames: what it fetches from the last frame should look
    like this one. Features that are moved along the flow, and features that are predicted from the
    action, should both equal those of the next frame. `--mode` switches the parts in one loop. rad:
    soft actor critic on shifted frames, nothing else. Each of the next adds one part to rad, aat:
    the action-aware transform (SPR with one step); cat: the correspondence-aware transform, along a
    flow that does not train the features; correspondence: only the flow, which trains the features.
    full: everything; full_shuffled_actions: its control.

Paper
    Choi, Lee, Song, Jeon, Sohn & Min, "Local-Guided Global: Paired Similarity Representation for
    Visual Reinforcement Learning", CVPR 2023. Relatives: SPR (Schwarzer et al., arXiv 2007.05929);
    base: RAD (Laskin et al., arXiv 2004.14990), soft actor critic (Haarnoja et al., 1812.05905).

Algorithm
    repeat until --total-steps:
        act (at random at first), store             one step of N environments
        before the first update: update_flow        --flow-updates steps on (4) alone
        --updates times:
            batch ← sample_transitions              stacks, shifted
            at every fourth:
                windows ← sample_windows            stacks of three successive steps, one shift
            update_critic_and_features              one step on (10), and on (4) and (7)
            every second time:
                update_actor_and_temperature        one step on (11) and (12)
                polyak_                             (8): target critic and slow features
        twenty times in all: evaluate
    flow_errors, probe                              is the flow right? what do the features keep?

Equations
    (1)  V(u, δ) = ⟨z_a(u), z_b(u + δ)⟩ / (‖z_a(u)‖ ‖z_b(u + δ)‖),   |δ| ≤ 1: correlations
    (2)  c_{a→b} = C(V): p of frame a is at p + c(p) in frame b
    (3)  L_r(c_{a→b}) = mean |I_a(p) − I_b(p + c(p))| + μ Σ mean |∂c| exp(−κ |∂I_a|), images blurred
    (4)  L_c = L_r(c_{k→k+1}) + L_r(c_{k+1→k}) + L_r(c_{k+2→k+1}), the last two with slow features
         of the later frame
    (5)  transforms: Ẑ^tr(p) = Z_k(p + c_{k+1→k}(p)),   Ẑ^pr = G(Z_k, a_k);   Z a 1 x 1 conv. of z
    (6)  L_s(ŷ, y) = −cos(ŷ, y),   ŷ = φ(ψ(Ẑ)),   y = ψ̄(Z̄_{k+1})
    (7)  L_sim = Σ of both transforms: L_s(ŷ, y) + mean |Ẑ − Z̄_{k+1}| / mean |Z̄_{k+1} − Z̄_k|
    (8)  f̄ ← f̄ + τ (f − f̄), slow copies that no gradient reaches
    (9)  y = r + γ (1 − terminated) V(s'),   V(s') = min Q̄(x',a') − α log π(a'|s'),   a' ~ π
    (10) Q, f ← argmin Σ E[(Qᵢ(x,a) − y)²],   x = f(s) the code
    (11) π ← argmin E[α log π(a|s) − min Q(x,a)],   a ~ π; its convolutions are those of f
    (12) log α ← argmin E[−α (log π(a|s) − A)]: the entropy is held near −A
    (13) a = tanh(u), u ~ N(mean, sd²):   log π(a|s) = log N(u) − Σ log(1 − tanh²(u))
    (14) ŷ(x) = m + g(x)ᵀ (G + c I)⁻¹ (y − m),   R² = 1 − Σ (yₜ − ŷ(xₜ))² / Σ (yₜ − mₜ)²: a ridge
         regression with penalty c on data x, y of mean m, tested on data xₜ, yₜ of mean mₜ

Notation
    z features, f the encoder, bars: slow copies, prime: next step, k a step, p and u places, c a
    flow: displacements in rows and columns, first axis downwards. I the newest frame of a stack.
    N environments, T steps of an episode, B batch, W windows, S frames of a stack, C channels, H
    their height and width, X size of the code, Y of y, A of an action, F of what the convolutions
    give, D of an input, K objects, E episodes and M steps of the measures. (14) has letters of its
    own: x, y data, G = x xᵀ, g its row for a new x.

Differs from the paper
    The paper leaves open: base algorithm, sizes, weights, rates, augmentation, M, and how C is
    made. No code of it is public.
    1. Soft actor critic on shifted frames, as in curl.py --mode rad, with one more convolution: the
       features z lie on a grid of 16 x 16 cells of 4 pixels, and nothing moves more than a cell in
       a step: correlations with next neighbours are enough.
    2. M = 1. Correlations are cosines, so that brightness does not decide. Images are blurred
       before they are compared, and μ is small. Tried once, 300 times update_flow alone, seed 1:
       off by .38 pixels; with sharp images (BLUR .3) by .48, with RADIUS 2 by .44, with that and
       SMOOTH .05 by 2.2, as no flow is.
    3. In (5) no gradient passes to the flow, which would warp to please ψ and not to match.
    4. The absolute difference in (7) is divided by how far Z̄ moves: unscaled, it is won by
       shrinking Z. So the guess that nothing moves has about 1.
    5. One Adam step for everything, the new losses at every fourth one.

Run
    python psrl.py
    python psrl.py --mode rad
    python psrl.py --mode full_shuffled_actions --distractors 2

Writes
    to runs/psrl/<mode>_d<distractors>_s<seed>/: args.json, curve.csv, curve.png, rollout.gif,
    checkpoint.pt (at every report), in modes with a flow flow.png and flow.gif (the flow of random
    actions and of the policy's, beside how things really moved), and summary.json:
    `eval_return_mean`, `eval_return_std`, `eval_episodes`, `score` (0 random, 1 chasing with known
    velocity), `updates`, `minutes`; `probe_r2` (R² (14) by quantity, of the code x),
    `probe_r2_features` (of z), `probe_r2_random_features`; in modes with a flow `flow_error` (mean
    distance, in pixels, on pixels of objects, from how the drawing moved), `flow_error_zero` (of no
    flow), `residual` (mean |I_{k+1} − what is fetched|, blurred, on the same pixels),
    `residual_zero`. Columns of curve.csv: `step` (of all environments), `seconds`,
    `steps_per_second`, `eval_return`, `train_return` (last N episodes, with noise), `alpha`, and of
    the last batch `critic_loss`, `entropy` (of the policy, at s'); of the last windows `flow_loss`
    (4), and for the two transforms tr and pr `cosine_tr`, `cosine_pr` (−(6)), `distance_tr`,
    `distance_pr` (the quotient in (7)); `sd_y` (mean deviation of y per dimension: 0 if it
    collapses).

Result
    Three seeds. Returns with 2 distractors: full 35.7, rad 34.3, each part alone 34.7 to 34.9;
    without distractors 36.7, 36.7, 36.5 to 37.0. The flow is off by .4 pixels (2 distractors: .55),
    no flow by 2.4. No part teaches velocities (R² from z .59 in rad, .45 in full), and shuffled
    actions cost next to nothing. About 3.5 minutes on one thread. All: benchmark/README.md.

Try
    1. --mode full_shuffled_actions: does G use the action? (distance_pr)
    2. --mode cat: the features do not learn from the flow. Does the flow suffer, or the return?
    3. --flow-weight 0 --similarity-weight 0 --flow-updates 0 --out runs/off: is it rad again?
"""

import copy
import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

import sprites_env
from sprites_env import Run, require, require_positive

Mode = Literal["rad", "aat", "cat", "correspondence", "full", "full_shuffled_actions"]
ACTION_AWARE = ("aat", "full", "full_shuffled_actions")  # modes that predict from the action
ALONG_FLOW = ("cat", "full", "full_shuffled_actions")  # modes that move features along the flow
MATCHING = ("cat", "correspondence", "full", "full_shuffled_actions")  # modes with a flow
LENGTH = 3  # steps of a window: k, k + 1 and k + 2
ACTOR_EVERY = 2  # updates of the critic to one of actor and slow copies
WINDOWS_EVERY = 4  # updates of the critic to one that has windows
RADIUS = 1  # cells: of the correlations and of the flow; in a step nothing moves further
CELL = 4  # pixels a side
BLUR, SMOOTH, EDGE = 1.5, 0.01, 10  # deviation in pixels, μ and κ of (3)
LOG_STD_LOW, LOG_STD_HIGH = -10, 2  # of the policy, before tanh
WHITE = 1.6  # in pictures: frames are grey, so that arrows show
PROBE_EPISODES = 160  # of random actions, three quarters of them to fit, the others to test


@dataclass(frozen=True)
class Args:
    mode: Mode = "full"  # which losses train the features, besides the critic's
    distractors: Literal[0, 1, 2] = 0  # other sprites in the frame
    total_steps: int = 30_000  # environment steps, rounded down to rounds of 40 num_envs
    num_envs: int = 50  # episodes side by side
    initial_steps: int = 1_000  # of random actions, before the first update
    flow_updates: int = 300  # gradient steps on (4) alone, before the first update
    updates: int = 10  # gradient steps after each step of all environments
    batch_size: int = 64  # transitions of an update (B)
    windows: int = 16  # of three steps, of every fourth update (W)
    flow_weight: float = 1.0  # of (4), after the first --flow-updates
    similarity_weight: float = 1.0  # of (7)
    learning_rate: float = 3e-3  # of Adam, falls linearly to zero
    gamma: float = 0.2  # discount factor
    tau: float = 0.01  # how fast the target critic and the slow features follow
    alpha: float = 0.01  # α at the start, for rewards in units of their standard deviation
    frame_stack: int = 3  # frames that the encoder sees at once (S)
    pad: int = 4  # a shift is by at most this many pixels
    z_dim: int = 50  # size of the code (X)
    hidden: int = 256  # units of each of the two hidden layers of policy and critic
    eval_episodes: int = 200  # held-out episodes of each evaluation, without noise
    seed: int = 1  # of networks, environments and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain little from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        require_positive(self, but="gamma pad flow_updates flow_weight similarity_weight")
        require(self.gamma < 1 and self.tau <= 1, "--gamma must be below 1, --tau not above")
        T = sprites_env.steps_of_episodes(make_env(self, 1))
        require(
            self.frame_stack < T, f"--frame-stack must be less than the {T} steps of an episode"
        )
        least = self.num_envs * T * math.ceil(self.initial_steps / (self.num_envs * T))
        rounds = f"in rounds of {self.num_envs * T}"
        require(self.total_steps >= least, f"--total-steps must be at least {least}, {rounds}")

    @property
    def first_update(self):  # after so many steps of all environments
        return max(LENGTH, math.ceil(self.initial_steps / self.num_envs))

    @property
    def environment(self):
        return {"distractors": self.distractors, "observation": "image"}

    @property
    def run_name(self):
        return f"{self.mode}_d{self.distractors}_s{self.seed}"


# --- Networks: soft actor critic -------------------------------------------------------------


def grid_convolutions(frames):
    """Patches of 4 x 4 pixels and their neighbours: (B, S, 64, 64) -> z (B, 32, 16, 16)."""
    layers = [nn.Conv2d(frames, 16, CELL, stride=CELL), nn.ReLU()]  # (B, 16, 16, 16)
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]  # (B, 32, 16, 16)
    return orthogonal_(nn.Sequential(*layers)).to(memory_format=torch.channels_last)


def pooling_convolution():
    """From the features to the critic: (B, 32, 16, 16) -> (B, 2048)."""
    layers = [nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()]  # (B, 32, 8, 8)
    return orthogonal_(nn.Sequential(*layers, nn.Flatten())).to(memory_format=torch.channels_last)


def code_head(size_in, z_dim):
    """A linear map, normalised and squashed: (B, F) -> (B, X) in [-1, 1]."""
    linear = orthogonal_(nn.Linear(size_in, z_dim))
    return nn.Sequential(linear, nn.LayerNorm(z_dim), nn.Tanh())


class SquashedActor(nn.Module):
    """π(a|s) before tanh: u ~ N(mean, sd²)."""

    def __init__(self, size_in, hidden, action_dim):
        super().__init__()
        self.mlp = mlp(size_in, hidden, 2 * action_dim)
        nn.init.orthogonal_(self.mlp[-1].weight, 0.01)  # start with actions around zero

    def forward(self, z):  # (B, X) -> mean (B, A), log_std (B, A)
        mean, x = self.mlp(z).chunk(2, dim=-1)
        return mean, LOG_STD_LOW + (LOG_STD_HIGH - LOG_STD_LOW) / 2 * (x.tanh() + 1)


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


# --- Networks: paired similarity -------------------------------------------------------------


class Correspondence(nn.Module):
    """C: a flow from the correlations of two maps of features, eq. (2), in cells of a's grid."""

    def __init__(self, hidden=32):
        super().__init__()
        layers = [nn.Conv2d((2 * RADIUS + 1) ** 2, hidden, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU()]
        self.layers = orthogonal_(nn.Sequential(*layers, nn.Conv2d(hidden, 2, 3, padding=1)))

    def forward(self, z_a, z_b):  # (W, C, H, H) twice -> (W, 2, H, H)
        return RADIUS * self.layers(correlation_volume(z_a, z_b)).tanh()


class ActionAwareTransform(nn.Module):
    """G: the next step's Z from this one's and the action, a plane for each of its numbers."""

    def __init__(self, channels, action_dim, hidden=32):
        super().__init__()
        layers = [nn.Conv2d(channels + action_dim, hidden, 3, padding=1), nn.ReLU()]
        self.layers = orthogonal_(nn.Sequential(*layers, nn.Conv2d(hidden, channels, 3, padding=1)))

    def forward(self, Z, action):  # (W, 16, 16, 16), (W, A) -> (W, 16, 16, 16)
        planes = action[:, :, None, None].expand(*action.shape, *Z.shape[2:])
        return self.layers(torch.cat([Z, planes], dim=1))


class LocalFeatures(nn.Module):
    """What the targets of the new losses are made of: z, its projection Z, and ψ."""

    def __init__(self, z, size_y=64):
        super().__init__()
        self.z = z
        self.Z = orthogonal_(nn.Conv2d(32, 16, 1))
        linear = orthogonal_(nn.Linear(16 * 16 * 16, size_y))
        self.psi = nn.Sequential(nn.Flatten(), linear, nn.LayerNorm(size_y), nn.Tanh())


class PSRLAgent:
    """Encoder, critic, actor and α; C, G, Z, ψ and φ; slow copies; and two optimisers."""

    def __init__(self, space, action_dim, args, device):
        self.space, self.device = space, device
        features = grid_convolutions(args.frame_stack)
        self.convolutions = nn.Sequential(features, pooling_convolution())
        self.head = code_head(2048, args.z_dim)
        self.encoder = nn.Sequential(self.convolutions, self.head).to(device)
        self.critic = TwinCritic(args.z_dim, args.hidden, action_dim).to(device)
        actor = SquashedActor(args.z_dim, args.hidden, action_dim)
        self.actor = nn.Sequential(code_head(2048, args.z_dim), actor).to(device)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha), device=device))
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

        self.fast = LocalFeatures(features).to(device)
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.correspondence = Correspondence().to(device)
        self.transform = ActionAwareTransform(16, action_dim).to(device)
        self.phi = orthogonal_(nn.Linear(64, 64)).to(device)

        learnt = nn.ModuleList([self.critic, self.encoder])  # what the mode has
        if args.mode in MATCHING:
            learnt.append(self.correspondence)
        if args.mode in ACTION_AWARE or args.mode in ALONG_FLOW:
            learnt.extend([self.fast, self.phi])
        if args.mode in ACTION_AWARE:
            learnt.append(self.transform)
        rate, acting = args.learning_rate, [*self.actor.parameters(), self.log_alpha]
        self.optimizer = torch.optim.Adam(learnt.parameters(), lr=rate, fused=True)
        self.actor_optimizer = torch.optim.Adam(acting, lr=rate, fused=True)

    @torch.no_grad()
    def act(self, obs, noise=False):  # (N, S, 64, 64) -> (N, A), arrays
        mean, log_std = self.actor(self.convolutions(to_tensor(obs, self.device)))
        action = sample_squashed(mean, log_std)[0] if noise else mean.tanh()
        return action.cpu().numpy()


# --- Losses: pure functions of tensors -------------------------------------------------------


def random_shift(stacks, offsets, pad):
    """Zero-pad by `pad` pixels and crop to the old size: one offset for all frames of a stack.

    Array (B, S, H, W), offsets (2, B) in 0 ... 2 pad, where `pad` changes nothing."""
    padded = np.pad(stacks, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, stacks.shape[2:], axis=(2, 3))
    return crops[np.arange(len(stacks)), :, *offsets]


def correlation_volume(z_a, z_b):
    """V(u, δ) = ⟨z_a(u), z_b(u + δ)⟩ / norms, eq. (1), for 3 x 3 displacements δ, rows first.

    Both (W, C, H, H) -> (W, 9, H, H); beyond the edge correlations are 0."""
    assert z_a.shape == z_b.shape
    z_a, z_b = (nn.functional.normalize(z, dim=1) for z in (z_a, z_b))
    padded, H = nn.functional.pad(z_b, 4 * (RADIUS,)), z_a.shape[2]
    shifts = product(range(2 * RADIUS + 1), repeat=2)
    return torch.stack([(z_a * padded[:, :, i : i + H, j : j + H]).sum(1) for i, j in shifts], 1)


def warp(maps, flow):
    """Ẑ(p) = Z(p + c(p)), eq. (5): bilinear, and at the edge the nearest.

    maps (W, C, H, H), flow (W, 2, H, H) in their pixels, rows first -> (W, C, H, H)."""
    assert flow.shape == (len(maps), 2, *maps.shape[2:])
    H = maps.shape[2]
    here = torch.arange(H, dtype=flow.dtype, device=flow.device)
    rows, columns = here[:, None] + flow[:, 0], here + flow[:, 1]  # (W, H, H)
    place = torch.stack([columns, rows], dim=-1) * 2 / (H - 1) - 1  # grid_sample: columns first
    return nn.functional.grid_sample(maps, place, padding_mode="border", align_corners=True)


def in_pixels(flow):
    """A flow of cells, in cells -> of pixels, in pixels. (W, 2, 16, 16) -> (W, 2, 64, 64)."""
    return CELL * nn.functional.interpolate(flow, scale_factor=CELL, mode="bilinear")


def blur(images):
    """A Gaussian of deviation BLUR, nothing beyond the edge. (W, 1, 64, 64) -> the same."""
    x = torch.arange(-5, 6, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (x / BLUR).square()).exp()
    kernel = kernel / kernel.sum()
    images = nn.functional.conv2d(images, kernel.reshape(1, 1, -1, 1), padding=(5, 0))
    return nn.functional.conv2d(images, kernel.reshape(1, 1, 1, -1), padding=(0, 5))


def matching_loss(image_a, image_b, flow):
    """mean |I_a(p) − I_b(p + c(p))| + μ Σ mean |∂c| exp(−κ |∂I_a|), eq. (3), over both axes.

    Blurred images (W, 1, 64, 64), flow (W, 2, 64, 64) in pixels -> scalar."""
    assert image_a.shape == image_b.shape
    loss = (image_a - warp(image_b, flow)).abs().mean()
    for axis in (2, 3):
        edge = (-EDGE * image_a.diff(dim=axis).abs()).exp()
        loss = loss + SMOOTH * (flow.diff(dim=axis).abs() * edge).mean()
    return loss


def cosine_loss(y_1, y_2):
    """L_s = −cos(y₁, y₂), eq. (6). (W, Y) -> scalar."""
    assert y_1.shape == y_2.shape
    return -nn.functional.cosine_similarity(y_1, y_2).mean()


def moved_distance(Z_hat, Z_next, Z):
    """mean |Ẑ − Z̄_{k+1}| / mean |Z̄_{k+1} − Z̄_k|, in (7): 1 for the guess that nothing moves.
    Three times (W, C, H, H) -> scalar."""
    assert Z_hat.shape == Z_next.shape == Z.shape
    return (Z_hat - Z_next).abs().mean() / (Z_next - Z).abs().mean()


def td_target(reward, terminated, next_value, gamma):
    """y = r + γ (1 − terminated) V(s'), eq. (9). All (B,), called without gradient. A time limit
    is not in here: an episode that was cut off goes on, as far as values are concerned."""
    assert reward.shape == terminated.shape == next_value.shape
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q, target):
    """Σᵢ E[(Qᵢ(x,a) − y)²], eq. (10). q (2, B), target (B,) -> scalar."""
    assert q.shape == (2, *target.shape)
    return (q - target).square().mean(-1).sum()


def soft_actor_loss(q, log_prob, alpha):
    """E[α log π(a|s) − min Q(x,a)], eq. (11), a ~ π(·|s), reparametrised. Both (B,) -> scalar."""
    assert q.shape == log_prob.shape
    return (alpha * log_prob - q).mean()


def temperature_loss(log_alpha, log_prob, target_entropy):
    """E[−α (log π(a|s) + target entropy)], eq. (12). log_alpha scalar, log_prob (B,) -> scalar."""
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


def gaussian_log_prob(actions, mean, log_std):
    """log π(a|s) of a diagonal Gaussian. actions, mean (B, A), log_std (A,) -> (B,)."""
    deviation = (actions - mean) / log_std.exp()
    return -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def squashed_log_prob(u, mean, log_std):
    """log π(a|s) = log N(u) − Σ log(1 − tanh²(u)) for a = tanh(u), eq. (13). (B, A) -> (B,).

    log(1 − tanh²(u)) = 2 (log 2 − u − softplus(−2u)), which stays finite for large u."""
    correction = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
    return gaussian_log_prob(u, mean, log_std) - correction.sum(-1)


def sample_squashed(mean, log_std):
    """a ~ π(·|s), differentiable in both, and log π(a|s). (B, A), (B, A) -> (B, A), (B,)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return u.tanh(), squashed_log_prob(u, mean, log_std)


def polyak_(slow, fast, tau):
    """f̄ ← f̄ + τ (f − f̄), eq. (8), in place: the slow copy follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_critic_and_features(agent, batch, windows, args):
    """One step of critic and encoder on (10) and, given windows, of the features and of the mode's
    other networks on (4) and (7). Returns metrics, and the convolutions' output (B, F) for the
    actor, without gradient."""
    h = agent.convolutions(batch["x"])  # (B, F)
    code = agent.head(h)  # (B, X)
    with torch.no_grad():
        h_next = agent.convolutions(batch["x_next"])
        a_next, log_prob_next = sample_squashed(*agent.actor(h_next))
        next_value = agent.critic_target(agent.head(h_next), a_next).amin(0)  # (B,)
        next_value -= agent.log_alpha.exp() * log_prob_next
        y = td_target(batch["r"], batch["terminated"], next_value, args.gamma)
    loss = critic_loss(agent.critic(code, batch["a"]), y)
    metrics = {"critic_loss": loss.detach(), "entropy": -log_prob_next.mean()}
    if windows:
        more, new_metrics = paired_similarity(agent, windows, args)
        loss, metrics = loss + more, metrics | new_metrics
    agent.optimizer.zero_grad()
    loss.backward()
    agent.optimizer.step()
    return metrics, h.detach()


def update_flow(agent, windows, args):
    """One step of C, and of the features if the mode has it so, on (4) alone. Returns the loss."""
    loss, _ = flow_loss(agent, windows, *features_of(agent, windows), args)
    agent.optimizer.zero_grad()
    loss.backward()
    agent.optimizer.step()
    return loss.detach()


def update_actor_and_temperature(agent, h):
    """One step of the actor on (11), of α on (12). h (B, F) is what the convolutions gave, without
    gradient: they learn from update_critic_and_features only. (11) fills the critic's .grad as
    well; its own zero_grad discards that."""
    a, log_prob = sample_squashed(*agent.actor(h))
    q = agent.critic(agent.head(h).detach(), a).amin(0)
    loss = soft_actor_loss(q, log_prob, agent.log_alpha.exp().detach())
    loss = loss + temperature_loss(agent.log_alpha, log_prob, target_entropy=-a.shape[1])
    agent.actor_optimizer.zero_grad()
    loss.backward()
    agent.actor_optimizer.step()


def features_of(agent, windows):
    """Fast features of k and k + 1 (2, W, 32, 16, 16), and slow ones of k, k + 1 and k + 2."""
    stacks = windows["x"].transpose(0, 1)  # (3, W, S, 64, 64)
    z = agent.fast.z(stacks[:2].flatten(0, 1)).unflatten(0, (2, -1))
    with torch.no_grad():
        slow = agent.slow.z(stacks.flatten(0, 1)).unflatten(0, (3, -1))
    return z, slow


def flow_loss(agent, windows, z, slow, args):
    """L_c, eq. (4), and the flow c_{k+1→k} (W, 2, 16, 16) in cells. z, slow: `features_of`."""
    if args.mode == "cat":  # there, the flow does not train the features
        z = z.detach()
    z_a, z_b = torch.stack([z[0], slow[1], slow[2]]), torch.stack([z[1], z[0], z[1]])
    flow = agent.correspondence(z_a.flatten(0, 1), z_b.flatten(0, 1))  # (3 W, 2, 16, 16)
    newest = blur(windows["x"][:, :, -1:].transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1))
    image_a, image_b = newest[[0, 1, 2]].flatten(0, 1), newest[[1, 0, 1]].flatten(0, 1)
    loss = 3 * matching_loss(image_a, image_b, in_pixels(flow))  # the sum of the three
    return loss, flow.unflatten(0, (3, -1))[1]


def paired_similarity(agent, windows, args):
    """The mode's sum of L_c (4) and L_sim, eq. (7), with their weights, and metrics."""
    loss, metrics, guesses = 0, {}, {}
    z, slow = features_of(agent, windows)
    Z = agent.fast.Z(z[0])
    if args.mode in MATCHING:
        loss, flow = flow_loss(agent, windows, z, slow, args)
        loss, metrics["flow_loss"] = args.flow_weight * loss, loss.detach()
    if args.mode in ALONG_FLOW:
        guesses["tr"] = warp(Z, flow.detach())
    if args.mode in ACTION_AWARE:
        guesses["pr"] = agent.transform(Z, windows["a"])
    with torch.no_grad():
        Z_now, Z_next = agent.slow.Z(slow[0]), agent.slow.Z(slow[1])
        y = agent.slow.psi(Z_next)  # (W, Y)
    for name, Z_hat in guesses.items():
        cosine = cosine_loss(agent.phi(agent.fast.psi(Z_hat)), y)
        distance = moved_distance(Z_hat, Z_next, Z_now)
        loss = loss + args.similarity_weight * (cosine + distance)
        metrics |= {f"cosine_{name}": -cosine.detach(), f"distance_{name}": distance.detach()}
        metrics["sd_y"] = y.std(0).mean()
    return loss, metrics


# --- Data ------------------------------------------------------------------------------------


def make_env(args, num_envs, **options):
    """Environments in lockstep. To train on others, change this line: any vector environment will
    do that resets in the step that ends an episode (README.md has an example)."""
    return sprites_env.SpritesVectorEnv(num_envs, **args.environment, **options)


class FrameReplay:
    """Every observation once; stacks are rebuilt when sampled, and never cross an episode's start:
    there, the first frame is repeated. Nothing is ever dropped."""

    def __init__(self, rounds, num_envs, horizon, space, action_dim, frames):
        self.num_envs, self.horizon, self.frames, self.size = num_envs, horizon, frames, 0
        transitions = rounds * horizon * num_envs  # in the order: round, step, environment
        # horizon + 1: the observations of an episode, and what followed its last step
        self.observations = np.zeros((rounds, horizon + 1, num_envs, *space.shape), space.dtype)
        self.actions = np.zeros((transitions, action_dim), np.float32)
        self.rewards = np.zeros(transitions, np.float32)
        self.terminated = np.zeros(transitions, bool)

    def add(self, obs, action, reward, successor, terminated):  # each (N, ...): one step of all
        episode, t = divmod(self.size // self.num_envs, self.horizon)
        self.observations[episode, t], self.observations[episode, t + 1] = obs, successor
        new = slice(self.size, self.size + self.num_envs)
        self.actions[new], self.rewards[new], self.terminated[new] = action, reward, terminated
        self.size = new.stop

    def measure_rewards(self):
        """Mean and deviation of what is there now, to standardise with from now on. No mean where
        episodes terminate: without it a longer life would be worth more, or less. The deviation is
        at least a tenth of the largest reward, for there may have been but one."""
        rewards = self.rewards[: self.size]
        self.reward_mean = 0.0 if self.terminated.any() else np.mean(rewards)
        self.reward_sd = max(np.std(rewards), np.abs(rewards).max() / 10) or 1.0

    def sample(self, rng, batch):
        """B transitions: stacks, actions, rewards, next stacks, terminated."""
        i = rng.integers(self.size, size=batch)
        step, env = np.divmod(i, self.num_envs)
        episode, t = np.divmod(step, self.horizon)
        times = np.maximum(t[:, None] + np.arange(1 - self.frames, 2), 0)  # (B, S + 1)
        x = self.observations[episode[:, None], times, env[:, None]]  # (B, S + 1, ...)
        stacks, successors = (y.reshape(batch, -1, *y.shape[3:]) for y in (x[:, :-1], x[:, 1:]))
        return stacks, self.actions[i], self.rewards[i], successors, self.terminated[i]


def sample_transitions(replay, rng, agent, args):
    """A batch as `update_critic_and_features` takes it: tensors x and x_next (B, S, 64, 64), each
    shifted by offsets of its own, a, r, terminated."""

    def shift(stacks):
        offsets = rng.integers(2 * args.pad + 1, size=(2, len(stacks)))
        return to_tensor(random_shift(stacks, offsets, args.pad), agent.device)

    s, a, r, s_next, terminated = replay.sample(rng, args.batch_size)
    r = (r - replay.reward_mean) / replay.reward_sd
    outcome = {"a": a, "r": r, "terminated": terminated}
    batch = {name: to_tensor(array, agent.device) for name, array in outcome.items()}
    return batch | {"x": shift(s), "x_next": shift(s_next)}


def sample_windows(replay, rng, agent, args):
    """Stacks x (W, 3, S, 64, 64) of three successive steps of an episode, under ONE shift, which
    would be a motion otherwise, and the actions a (W, A) after the first."""
    last = replay.size // replay.num_envs  # so many steps are stored, and what followed the last
    steps = np.arange(last)
    steps = steps[(steps % replay.horizon <= replay.horizon - 2) & (steps <= last - 2)]
    step, env = rng.choice(steps, args.windows), rng.integers(replay.num_envs, size=args.windows)
    episode, t = np.divmod(step, replay.horizon)
    times = np.maximum(t[:, None] + np.arange(1 - args.frame_stack, LENGTH), 0)  # (W, S + 2)
    x = replay.observations[episode[:, None], times, env[:, None]][:, :, 0]  # (W, S + 2, 64, 64)
    x = random_shift(x, rng.integers(2 * args.pad + 1, size=(2, len(x))), args.pad)
    stacks = np.stack([x[:, i : i + args.frame_stack] for i in range(LENGTH)], axis=1)
    a = replay.actions[step * replay.num_envs + env]
    if args.mode == "full_shuffled_actions":
        a = rng.permutation(a)
    return {"x": to_tensor(stacks, agent.device), "a": to_tensor(a, agent.device)}


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def remembering(policy, frames):
    """A policy of single observations, for one episode, from one of stacks: it remembers the last
    ones, and repeats the first where there are none yet."""
    memory = []

    def act(obs):
        memory[:] = [*(memory or [obs] * frames), obs][-frames:]
        return policy(np.concatenate(memory, axis=1))

    return act


# --- Measures: is the flow right? What is in the code? ---------------------------------------


def steps_of(act, env, frames):
    """Stacks (E, M, S, 64, 64), states (E, M, K, 4) and shapes (E, K) of E episodes, every step
    from where a stack is full. act: stacks (E, S, 64, 64) -> actions (E, A)."""
    obs, _ = env.reset(seed=10**9 + 50_000)
    stack_of, rows, shapes = remembering(lambda stacks: stacks, frames), [], env.shapes
    for t in range(env.horizon):
        stacks = stack_of(obs)
        if t >= frames - 1:
            rows.append((stacks, env.states))
        obs, *_ = env.step(act(stacks))
    return *(np.stack(column, axis=1) for column in zip(*rows)), shapes


@torch.no_grad()
def estimated_flow(agent, stacks, next_stacks):
    """c_{k+1→k} in pixels (E, 2, 64, 64), and what it fetches from blurred frames k, (E, 64, 64);
    stacks (E, S, 64, 64) in [0, 1]."""
    flow = in_pixels(agent.correspondence(agent.slow.z(next_stacks), agent.fast.z(stacks)))
    return flow, warp(blur(stacks[:, -1:]), flow)[:, 0]


def true_flow(states, next_states, shapes):
    """Where what is drawn at p was in frame k, from p: c_{k+1→k} (E, 2, 64, 64), and where it is
    known (E, 64, 64): on the pixels of exactly one object. states (E, K, 4), shapes (E, K)."""
    here, then = (np.floor(63 * s[..., :2]) for s in (next_states, states))
    flow, count = np.zeros((len(here), 2, 64, 64)), np.zeros((len(here), 64, 64), int)
    for k in range(here.shape[1]):
        drawn = sprites_env.draw(next_states[:, k : k + 1, :2], shapes[:, k : k + 1]) > 0
        drawn = drawn.reshape(len(here), 64, 64)
        flow += drawn[:, None] * (then - here)[:, k, :, None, None]
        count += drawn
    return flow, count == 1


def flow_errors(agent, stacks, states, shapes):
    """On pixels of objects, every fourth of `steps_of`: the mean distance of the flow from the
    true one, in pixels, and what is left of the next frame; the same for no flow at all."""
    names, sums, pixels = ("flow_error", "flow_error_zero", "residual", "residual_zero"), 0, 0
    for t in range(0, stacks.shape[1] - 1, 4):
        x, x_next = (to_tensor(stacks[:, i], agent.device) for i in (t, t + 1))
        true, known = true_flow(states[:, t], states[:, t + 1], shapes)
        flow, fetched = (y.cpu().numpy() for y in estimated_flow(agent, x, x_next))
        before, after = (blur(y[:, -1:])[:, 0].cpu().numpy() for y in (x, x_next))
        errors = [np.linalg.norm(guess - true, axis=1) for guess in (flow, 0 * flow)]
        errors += [abs(guess - after) for guess in (fetched, before)]
        sums, pixels = sums + np.array([e[known].sum() for e in errors]), pixels + known.sum()
    return dict(zip(names, (sums / pixels).tolist()))


def ridge_r2(x, y, x_test, y_test, penalty=0.1):
    """R² of ŷ(x) = m + g(x)ᵀ (G + c I)⁻¹ (y − m) on test data, eq. (14), c the penalty.

    x (M, D), y (M, C), x_test (L, D), y_test (L, C) -> (C,). This is the dual form: D may be all
    pixels of a stack. G is scaled to a mean of 1 on its diagonal."""
    centre, mean = x.mean(0), y.mean(0)
    a, b = x - centre, x_test - centre
    gram, products = a @ a.T, b @ a.T
    scale = gram.diagonal().mean()
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    weights = torch.linalg.solve(gram / scale + penalty * identity, y - mean)
    predicted = mean + products / scale @ weights
    error, deviation = y_test - predicted, y_test - y_test.mean(0)
    return 1 - error.square().sum(0) / deviation.square().sum(0)


@torch.no_grad()
def encode_stacks(encoder, stacks, device):
    """Codes (E, M, D) of stacks (E, M, S, 64, 64), one step of all episodes at a time."""
    steps = np.swapaxes(stacks, 0, 1)
    return torch.stack([encoder(to_tensor(x, device)).flatten(1).cpu() for x in steps], dim=1)


def probe(codes, states):
    """R² of ridge regressions (14) from codes (E, M, D) to what the frames show, by quantity:
    fitted on the first three quarters of the episodes, tested on the others."""
    agent, target = states[..., 0, :2], states[..., 1, :2]
    quantities = {"agent": agent, "target": target, "relative_position": target - agent}
    quantities["target_velocity"] = states[..., 1, 2:]
    if states.shape[2] > 2:
        quantities["distractors"] = states[..., 2:, :2].reshape(*states.shape[:2], -1)
    y = torch.cat([torch.from_numpy(q).float() for q in quantities.values()], dim=-1)
    M, widths = len(codes) * 3 // 4, [q.shape[-1] for q in quantities.values()]
    r2 = ridge_r2(*(part.flatten(0, 1) for part in (codes[:M], y[:M], codes[M:], y[M:])))
    return {n: r.mean().item() for n, r in zip(quantities, r2.split(widths))}


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One run; returns the content of summary.json."""
    env = make_env(args, args.num_envs)
    N, T, space = args.num_envs, env.horizon, env.single_observation_space
    rounds, action_dim = args.total_steps // (N * T), env.single_action_space.shape[0]
    require(space.shape == (1, 64, 64), f"frames must be grey and 64 x 64, not {space.shape}")
    run = Run(args, total=rounds * N * T)
    agent = PSRLAgent(space, action_dim, args, run.device)
    random_features = copy.deepcopy(agent.fast.z)  # the probe's control
    replay = FrameReplay(rounds, N, T, space, action_dim, args.frame_stack)
    rng, updates, metrics = np.random.default_rng(args.seed), 0, {}
    window_rng = np.random.default_rng([args.seed, 1])  # so that mode rad draws what others draw
    total_updates = (rounds * T - args.first_update + 1) * args.updates
    reports = {max(args.first_update, math.ceil(rounds * T * i / 20)) for i in range(1, 21)}

    held_out = make_env(args, args.eval_episodes)
    episodes = sprites_env.Episodes(env, args.seed * 100_000)
    for step in range(1, rounds * T + 1):
        # act
        if (step - 1) % T == 0:  # all environments start an episode together
            act = remembering(lambda stacks: agent.act(stacks, noise=True), args.frame_stack)
        obs, action = episodes.obs, act(episodes.obs)
        if step <= args.first_update:
            action = rng.uniform(-1, 1, action.shape)
        successors, reward, terminated, truncated = episodes.step(action)
        ended = terminated | truncated
        require((ended == (step % T == 0)).all(), f"all episodes must have {T} steps")

        # store
        replay.add(obs, action, reward, successors, terminated)
        if step < args.first_update:
            continue
        if step == args.first_update:
            replay.measure_rewards()
            for _ in range(args.flow_updates if args.mode in MATCHING else 0):
                update_flow(agent, sample_windows(replay, window_rng, agent, args), args)

        # learn
        for _ in range(args.updates):
            rate = args.learning_rate * (1 - updates / total_updates)
            for optimizer in (agent.optimizer, agent.actor_optimizer):
                optimizer.param_groups[0]["lr"] = rate
            updates += 1
            batch, windows = sample_transitions(replay, rng, agent, args), None
            if updates % WINDOWS_EVERY == 1 and args.mode != "rad":
                windows = sample_windows(replay, window_rng, agent, args)
            new_metrics, h = update_critic_and_features(agent, batch, windows, args)
            metrics |= new_metrics
            if updates % ACTOR_EVERY == 0:
                update_actor_and_temperature(agent, h)
                polyak_(agent.critic_target, agent.critic, args.tau)
                polyak_(agent.slow, agent.fast, args.tau)

        # report
        if step in reports:
            policy = remembering(agent.act, args.frame_stack)
            returns = sprites_env.evaluate(policy, held_out)
            losses = {name: value.item() for name, value in metrics.items()}
            losses["alpha"] = agent.log_alpha.exp().item()
            last = np.mean(episodes.finished[-N:] or float("nan"))
            run.report(step * N, eval_return=returns.mean(), train_return=last, **losses)
            networks = {"encoder": agent.encoder.state_dict(), "actor": agent.actor.state_dict()}
            run.save("checkpoint.pt", networks | {"step": step * N})

    summary = sprites_env.summary(returns) | {"updates": updates}
    film_policy(run, agent, args)
    summary |= examine(run, agent, random_features, args)
    panels = [(f"return of a {T}-step episode", ("train_return", "eval_return"))]
    made = [name for name in ("distance_tr", "distance_pr") if name in losses]
    if made:
        panels.append(("distance from the next Z (1: no move)", made))
    levels = sprites_env.REFERENCE_RETURNS["follow"].items()
    return run.finish(summary, panels, "environment steps", levels)


def examine(run, agent, random_features, args):
    """For summary.json, in episodes of random actions: what is in the code and in the features, and
    is the flow right? Draws flow.png."""
    env, rng = make_env(args, PROBE_EPISODES), np.random.default_rng(0)
    shape, measures = env.action_space.shape, {}
    stacks, states, shapes = steps_of(lambda _: rng.uniform(-1, 1, shape), env, args.frame_stack)
    probed = {"": agent.encoder, "_features": agent.fast.z, "_random_features": random_features}
    for name, encoder in probed.items():
        codes = encode_stacks(encoder, stacks[:, 1::4], run.device)
        measures[f"probe_r2{name}"] = probe(codes, states[:, 1::4])
    if args.mode in MATCHING:
        measures |= flow_errors(agent, stacks, states, shapes)
        middle = stacks.shape[1] // 2 - 1
        some = slice(6), slice(middle, middle + 2)
        run.save("flow.png", draw_flows(agent, stacks[some], states[some], shapes[:6]))
    return measures


def film_policy(run, agent, args):
    """rollout.gif of the policy and, where there is a flow, flow.gif of two more episodes."""
    env = make_env(args, 4, render_mode="rgb_array")
    run.save("rollout.gif", sprites_env.film(remembering(agent.act, args.frame_stack), env))
    if args.mode in MATCHING:
        stacks, states, shapes = steps_of(agent.act, make_env(args, 2), args.frame_stack)
        run.save("flow.gif", draw_flow_film(agent, stacks, states, shapes))


# --- Appendix: pictures ----------------------------------------------------------------------


def draw_motion(axis, frame, flow, known):
    """An arrow, three times as long as the motion −c, for every cell whose centre is known to be on
    an object. frame (64, 64), flow (2, 64, 64) in pixels, known (64, 64)."""
    rows, columns = np.nonzero(known[CELL // 2 :: CELL, CELL // 2 :: CELL])
    y, x = rows * CELL + CELL // 2, columns * CELL + CELL // 2
    axis.imshow(frame, cmap="gray", vmin=0, vmax=WHITE)
    options = {"angles": "xy", "scale_units": "xy", "scale": 1 / 3, "width": 0.015}
    axis.quiver(x, y, -flow[1, y, x], -flow[0, y, x], color="orange", **options)


def draw_pair(axes, agent, stacks, states, shapes):
    """How one pair of frames really moved, and the flow that was found. stacks (1, 2, S, 64, 64).
    Returns frame k, frame k + 1, and what the flow fetches, blurred, as (64, 64)."""
    true, known = true_flow(states[:, 0], states[:, 1], shapes)
    x, x_next = (to_tensor(stacks[:, i], agent.device) for i in (0, 1))
    flow, fetched = (y.cpu().numpy() for y in estimated_flow(agent, x, x_next))
    before, after = (y[0, -1].cpu().numpy() for y in (x, x_next))
    draw_motion(axes[0], after, true[0], known[0])
    draw_motion(axes[1], after, flow[0], known[0])
    return before, after, fetched[0]


def draw_flows(agent, stacks, states, shapes):
    """A column for each pair of successive frames; stacks (E, 2, S, 64, 64)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(stacks) + 0.3, 7.5), layout="constrained")
    axes = figure.subplots(5, len(stacks), squeeze=False)
    for i, column in enumerate(axes.T):
        of = slice(i, i + 1)
        before, after, fetched = draw_pair(column[1:3], agent, stacks[of], states[of], shapes[of])
        column[0].imshow(before, cmap="gray", vmin=0, vmax=WHITE)
        column[3].imshow(fetched, cmap="gray", vmin=0, vmax=WHITE)
        smooth = blur(torch.from_numpy(after)[None, None])[0, 0].numpy()
        column[4].imshow(smooth - fetched, cmap="RdBu", vmin=-1, vmax=1)
    labels = ["frame k", "k + 1: true\nmotion, x 3", "motion\nfound, x 3", "fetched\nfrom k"]
    for axis, label in zip(axes[:, 0], [*labels, "left over"]):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def draw_flow_film(agent, stacks, states, shapes):
    """Tuples of RGB images, for a GIF: of each episode, the true motion beside the one found."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    film = []
    for t in range(stacks.shape[1] - 1):
        figure = Figure(figsize=(3 * len(stacks), 1.6), dpi=80, layout="constrained")
        axes = figure.subplots(1, 2 * len(stacks))
        for i, two in enumerate(axes.reshape(-1, 2)):
            at = slice(i, i + 1), slice(t, t + 2)
            draw_pair(two, agent, stacks[at], states[at], shapes[at[0]])
        for axis, title in zip(axes, ("true motion", "found") * len(stacks)):
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, size=8)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        film.append((np.asarray(canvas.buffer_rgba())[..., :3],))
    return film


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
