"""Eleven ways to learn what is in an image before there is a task. What does each one keep?

What
    A code keeps what its loss asks for. One encoder, one kind of data (sprites among which an agent
    acts at random), one budget, and `--objective` chooses the question that is asked of it: which
    action was it, which frame is a neighbour in time, are three frames in order, what did the frame
    look like, ... Then a linear map tries to read off the code where everything is and how it
    moves. The encoder goes on to ppo_encoder.py.

Paper
    One each: inverse, forward_inverse: Pathak et al. 2017, arXiv 1705.05363 (curiosity); forward:
    its forward model alone; forward_slow_target: Schwarzer et al. 2021, 2007.05929 (SPR), after
    Grill et al. 2020, 2006.07733 (BYOL); time_contrast: Sermanet et al. 2018, 1704.06888 (TCN);
    shuffle: Dorkenwald et al. 2022 (SCVRL); temporal_disentanglement: Dunion et al., ICLR 2023
    (TED); beta_vae: Higgins et al., ICLR 2017 (in RL as DARLA, 2017, 1707.08475, on features);
    augmentation_contrast: Laskin et al. 2020, 2004.04136 (CURL); reward_prediction: Yamada et al.
    2022, 2204.11827.

Algorithm
    repeat --updates times:
        batch ← sample_frames                   B trajectories, and of each the F frames that
                                                the objective needs (choose_times)
        update_on_objective                     one step of the encoder, and of the objective's own
                                                head, on the loss that OBJECTIVES names; polyak_
        every fourth time update_reconstruction a step of a decoder that looks on, z detached
                                                (autoencoder and beta_vae train theirs with z)
    eleven times in all: assess                 the loss and the probes, on held-out data

Equations
    (1)  inverse = mean of (a − â)²,   â = g(z, z′)
    (2)  forward = E[½ ‖ẑ′ − z′‖²],   ẑ′ = g(z, a)
    (3)  both = 10 (0.8 inverse + 0.2 forward)
    (4)  ℓᵢⱼ = qᵢᵀ W kⱼ − maxₗ qᵢᵀ W kₗ                     contrasts: queries q, keys k
    (5)  contrast = −E[log softmax(ℓᵢ)ᵢ]                    key i belongs to query i
    (6)  binary = −E[log σ(ℓ) if it is so, log(1 − σ(ℓ)) if not]
    (7)  ℓ = Σᵢ (|wᵢ zᵢ + w′ᵢ z′ᵢ + bᵢ| − (w̄ᵢ zᵢ + b̄ᵢ)²) + c  each coordinate for itself
    (8)  reconstruction = mean over pixels of (x − x̂)²
    (9)  KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − log σ² − 1)
    (10) variational = E[−log p(x|z)] + β KL,   z ~ N(μ, σ²)
    (11) rewards = Σₜ Σᵢ (rₜᵢ − r̂ₜᵢ)², mean over B; here T = 1, and the four i are positions
    (12) φ̄ ← φ̄ + τ (φ − φ̄), a slow copy that no gradient reaches

Notation
    x frames, x̂ decoded ones, z their codes, prime: HOLD steps later or the next frame; a actions,
    r rewards, hats: predictions, bars in (12): slow copies. g, W and the numbers of (7): the
    objective's head. B batch, F frames of a trajectory, Z size of the code, A of an action, K
    objects.

Differs from the paper
    1. One small encoder of single frames for all. Whatever needs motion gets several codes.
    2. An action is held for 4 steps, and pairs are 4 steps apart. In one step the agent moves by
       at most 3 pixels: after 2,000 updates inverse then explained .03 of the actions; with 4
       steps, .54.
    3. forward predicts codes with a gradient into both sides, the worst case, on purpose. Its
       cures: a slow copy makes the codes to be predicted, or the inverse model comes in (3).
    4. time_contrast is InfoNCE, not a triplet loss: two moments of an episode, at least 10 steps
       apart, are two queries, the frames 1 or 2 steps after them their keys. So what an episode
       keeps, the shapes of its triangles, does not help to tell its moments apart.
    5. shuffle swaps the first or the last two of three frames, 2 steps apart, and never reverses
       them: motion here looks the same backwards. The contrast beside it takes the first two.
    6. temporal_disentanglement is an auxiliary loss of RL in the paper; here it is all there is.
       Two strangers (the next frame of another episode; another moment of this one) to one pair.
    7. The loss of beta_vae is divided by the number of pixels: RAdam does not scale its first
       steps. The variances come from a second head on the convolutions; z of an image is μ. β is 1
       by default, a plain VAE; more of it (--beta 4) asks for independent coordinates.
    8. Optimiser, rates and batches of 32 trajectories as in rp_pretrain.py, but 4,500 updates
       instead of 8,000. At 3,000 most of the table was settled, but inverse had not yet forgotten
       the distractors with every seed (R² .17 with seed 2; .05 after 5,000).

Run
    python pretext.py --objective inverse
    python pretext.py --objective time_contrast --distractors 0
    python ppo_encoder.py --encoder pretrained --encoder-path runs/pretext/inverse_d2_s1/encoder.pt

Writes
    to runs/pretext/<objective>_d<distractors>_s<seed>/: args.json, curve.csv, curve.png,
    decoded.png (true frames above decoded ones, brightened), checkpoint.pt (at every report),
    encoder.pt (for ppo_encoder.py), walk.png (beta_vae: the six coordinates that cost most, one a
    row) and summary.json, all of it held out. R² of linear probes, means over coordinates:
    `r2_agent`, `r2_target`, `r2_distractors` (positions, of distractors their centre: which is
    which nobody can tell), from one frame; `r2_agent_displacement`, `r2_target_velocity` (how far
    the agent, the target went from one frame to another, HOLD steps later), from both;
    `r2_one_coordinate`, the mean of r2_agent and r2_target if each number must be read off a single
    coordinate of z (the best one, chosen on the same frames). `z_sd`, the mean standard deviation
    of z's coordinates: 0 is collapse. `loss_held_out`, the objective's loss, and its own measures.
    A code that knows nothing has `action_r2`, `code_r2` (of â, ẑ′) 0; `top_1` 1/B (time_contrast:
    1/2B); `order_loss` log 2, `order_accuracy` 1/2; `pair_loss` .637 (zero parameters: log 2),
    `pair_accuracy` 2/3; `mse_image` .058 (0 distractors: .034); `bce` 893 (592) and `kl` 0, in nats
    an image; `mse` .054. Then `updates`, `minutes`, and for objective none `pixels_r2_…`: what can
    be read off the pixels themselves, averaged over 4 x 4. Columns of curve.csv: `step` (updates),
    `seconds`, `steps_per_second`, and these.

Result
    R² of agent, target, distractors (2 distractors, five seeds): inverse .97, .01, .05; forward 0,
    0, 0; time_contrast .16, .59, .40; reward_prediction .93, .96, .03; pixels .13, .51, .32.
    The contrasts see every sprite (decoded.png), but not which one is the agent. Returns of PPO on
    the frozen codes: inverse 31.0 (as much as waiting in the centre), time_contrast 28.9,
    reward_prediction 36.5, none 28.5. All: benchmark/README.md.

Try
    1. --objective forward: what do loss_held_out and z_sd say together? Then forward_slow_target.
    2. --objective inverse with 2 distractors: who is left in decoded.png? What would the code have
       to keep if the target ran away from the agent?
    3. --objective shuffle --contrast 0 --out runs/order: what does order alone need to know?
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F

import sprites_env
from sprites_env import Run, require, require_positive

Objective = Literal[
    "inverse",  # which action was it?
    "forward",  # what code follows?
    "forward_slow_target",  # the same, but the code that follows is a slow copy's
    "forward_inverse",  # both, as in the intrinsic curiosity module
    "time_contrast",  # which frame is a neighbour in time?
    "shuffle",  # are three frames in order?
    "temporal_disentanglement",  # are two frames neighbours, each coordinate for itself?
    "autoencoder",  # the frame itself
    "beta_vae",  # the same, with noise in z, and a price for information
    "augmentation_contrast",  # which frame is the same, shifted?
    "reward_prediction",  # where are agent and target?
    "none",  # an encoder that has learnt nothing
]
STEPS = 20  # of a trajectory
HOLD = 4  # steps for which the agent does the same, and between the frames of a pair
NEAR, FAR = 2, 10  # neighbours in time are at most so many steps apart, strangers at least
PAD = 4  # random shifts are by at most this many pixels
HIDDEN = 128  # units of the heads' hidden layers
DECODER_EVERY = 4  # updates of the encoder to one of the decoder that stands by
SHORTEST_WARM_UP = 200  # updates
ACTION_VARIANCE = 1 / 3  # of a uniform action, per dimension
PROBES, FITTED = 4_000, 3_000  # pairs of frames to probe, and those that the probe is fitted to


@dataclass(frozen=True)
class Args:
    objective: Objective = "inverse"  # what shapes the encoder
    distractors: Literal[0, 1, 2] = 2  # triangles in the frame
    updates: int = 4_500  # gradient steps
    batch_size: int = 32  # trajectories per update (B)
    learning_rate: float = 4e-3  # of RAdam, times a linear warm-up, times a cosine down to zero
    z_dim: int = 64  # size of the representation (Z)
    contrast: float = 1.0  # weight of the contrastive loss beside shuffle's own
    beta: float = 1.0  # weight of KL in the loss of beta_vae (β)
    tau: float = 0.01  # how fast slow copies follow
    seed: int = 1  # of the networks and of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 1  # 0 for PyTorch's choice; these networks gain little from a second one
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        require_positive(self, but="contrast beta")
        require(self.batch_size > 1, "a contrastive loss needs others: --batch-size of 2 or more")
        require(self.tau <= 1, "--tau must not be above 1")

    @property
    def run_name(self):
        return f"{self.objective}_d{self.distractors}_s{self.seed}"


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


class PairClassifier(nn.Module):
    """The numbers of (7), five a coordinate, and c. From zeros nothing would be learnt."""

    def __init__(self, z_dim):
        super().__init__()
        self.w, self.w_next, self.w_bar = (nn.Parameter(torch.ones(z_dim)) for _ in range(3))
        self.b, self.b_bar = (nn.Parameter(torch.zeros(z_dim)) for _ in range(2))
        self.c = nn.Parameter(torch.zeros(()))

    def forward(self, z, z_next):  # (B, Z), (B, Z) -> (B,)
        return pair_logits(z, z_next, self.w, self.w_next, self.b, self.w_bar, self.b_bar, self.c)


class Learner:
    """The encoder, its slow copy, a decoder, and a head for each objective. A network that the
    objective does not use gets no gradient, and is not stepped."""

    def __init__(self, args, device):
        Z = args.z_dim
        self.encoder, self.decoder = Encoder(Z), Decoder(Z)  # first: of one seed, the same for all
        self.predict_action = mlp(2 * Z, HIDDEN, 2)
        self.predict_code = mlp(Z + 2, HIDDEN, Z)
        self.predict_order = mlp(3 * Z, HIDDEN, 1)
        self.predict_positions = mlp(Z, HIDDEN, 4)
        self.classify_pair = PairClassifier(Z)
        self.to_log_var = orthogonal_(nn.Linear(128, Z))
        networks = nn.ModuleList(vars(self).values()).to(device)  # all of the above
        self.W = nn.Parameter(torch.eye(Z, device=device))  # of (4)
        self.slow_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        parameters = [*networks.parameters(), self.W]
        self.optimizer = torch.optim.RAdam(parameters)  # its rate: see learning_rate

    def encode(self, frames):  # (B, F, 1, 64, 64) -> F codes, each (B, Z)
        return self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).unbind(1)

    def gaussian(self, frames):  # (B, 1, 64, 64) -> μ, which is z, and log σ², both (B, Z)
        h = self.encoder.convolutions(frames).flatten(1)
        return self.encoder.to_z(h), self.to_log_var(h)


# --- Losses: pure functions of tensors -------------------------------------------------------


def inverse_loss(predicted, actions):
    """Mean of (a − â)² over actions and their dimensions, eq. (1). Both (B, A) -> scalar."""
    assert predicted.shape == actions.shape
    return (actions - predicted).square().mean()


def forward_loss(predicted, z_next):
    """½ ‖ẑ′ − z′‖², eq. (2), mean over the batch. Both (B, Z) -> scalar."""
    assert predicted.shape == z_next.shape
    return 0.5 * (predicted - z_next).square().sum(-1).mean()


def curiosity_loss(inverse_error, forward_error):
    """10 (0.8 inverse + 0.2 forward), eq. (3)."""
    return 10 * (0.8 * inverse_error + 0.2 * forward_error)


def bilinear_logits(query, keys, W):
    """ℓᵢⱼ = qᵢᵀ W kⱼ − maxₗ qᵢᵀ W kₗ, eq. (4). query, keys (B, Z), W (Z, Z) -> (B, B).

    The maximum, there to keep exp(ℓ) finite, changes neither loss nor gradient."""
    assert query.shape == keys.shape
    logits = query @ W @ keys.T
    return logits - logits.amax(1, keepdim=True)


def info_nce_loss(logits):
    """−E[log softmax(ℓᵢ)ᵢ], eq. (5): key i belongs to query i. (B, B) -> scalar."""
    assert logits.shape == (len(logits), len(logits))
    return -logits.log_softmax(1).diagonal().mean()


def top_1_accuracy(logits):
    """The share of queries that have their own key nearest; 1/B by chance. (B, B) -> scalar."""
    return (logits.argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()


def binary_loss(positive, negative):
    """−E[log σ(ℓ)] for what is so, −E[log(1 − σ(ℓ))] for what is not, eq. (6), together one mean.
    Logits (B,), (M,) -> scalar; log 2 if all are zero."""
    assert positive.ndim == negative.ndim == 1
    return torch.cat([F.softplus(-positive), F.softplus(negative)]).mean()


def pair_logits(z, z_next, w, w_next, b, w_bar, b_bar, c):
    """ℓ = Σᵢ (|wᵢ zᵢ + w′ᵢ z′ᵢ + bᵢ| − (w̄ᵢ zᵢ + b̄ᵢ)²) + c, eq. (7). z, z′ (B, Z), c a scalar, the
    other numbers (Z,) -> (B,)."""
    assert z.shape == z_next.shape
    return ((w * z + w_next * z_next + b).abs() - (w_bar * z + b_bar).square()).sum(-1) + c


def reconstruction_loss(decoded, frames):
    """Mean of (x − x̂)² over pixels and frames, eq. (8). Both (B, 1, 64, 64) -> scalar."""
    assert decoded.shape == frames.shape
    return (frames - decoded).square().mean()


def kl_divergence(mean, log_var):
    """KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − log σ² − 1), eq. (9). (B, Z), (B, Z) -> (B,)."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(-1)


def vae_loss(logits, frames, mean, log_var, beta):
    """E[−log p(x|z)] + β KL, eq. (10): sums over pixels and dimensions of z, mean over the batch.
    logits, frames (B, 1, 64, 64), mean, log_var (B, Z) -> scalar."""
    assert logits.shape == frames.shape
    pixels = F.binary_cross_entropy_with_logits(logits, frames, reduction="none")
    return (pixels.flatten(1).sum(-1) + beta * kl_divergence(mean, log_var)).mean()


def reward_prediction_loss(predicted, rewards):
    """Σₜ Σₖ (rₜₖ − r̂ₜₖ)², eq. (11), averaged over the batch. Both (B, T, K) -> scalar."""
    assert predicted.shape == rewards.shape
    return (rewards - predicted).square().sum(dim=(1, 2)).mean()


def polyak_(slow, fast, tau):
    """φ̄ ← φ̄ + τ (φ − φ̄), eq. (12), in place: the slow copy follows."""
    with torch.no_grad():
        for target, source in zip(slow.parameters(), fast.parameters()):
            target.lerp_(source, tau)


def random_shift(stacks, offsets, pad):
    """Zero-pad by `pad` pixels and crop to the old size: one offset for all frames of a stack.

    Array (B, S, H, W), offsets (2, B) in 0 ... 2 pad, where `pad` changes nothing."""
    padded = np.pad(stacks, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, stacks.shape[2:], axis=(2, 3))
    return crops[np.arange(len(stacks)), :, *offsets]


# --- The objectives: what is asked of a batch. Each returns its loss and its own measures ------


def inverse(model, batch, args):
    """Two frames, one after the other: which action was it?"""
    z, z_next = model.encode(batch["frames"])
    predicted = model.predict_action(torch.cat([z, z_next], dim=-1))
    loss = inverse_loss(predicted, batch["actions"])
    return loss, {"action_r2": 1 - loss / ACTION_VARIANCE}


def forward(model, batch, args):
    """A frame and an action: what is the code of the next frame? A constant code answers that."""
    z, z_next = model.encode(batch["frames"])
    predicted = model.predict_code(torch.cat([z, batch["actions"]], dim=-1))
    loss = forward_loss(predicted, z_next)
    return loss, {"code_r2": explained(predicted, z_next)}


def forward_slow_target(model, batch, args):
    """The same, but the next code is that of the slow copy: the encoder cannot come to meet it."""
    z = model.encoder(batch["frames"][:, 0])
    with torch.no_grad():
        z_next = model.slow_encoder(batch["frames"][:, 1])
    predicted = model.predict_code(torch.cat([z, batch["actions"]], dim=-1))
    loss = forward_loss(predicted, z_next)
    return loss, {"code_r2": explained(predicted, z_next)}


def forward_inverse(model, batch, args):
    """Both together: the inverse model makes the code, the forward model its error a surprise."""
    z, z_next = model.encode(batch["frames"])
    actions = batch["actions"]
    action_error = inverse_loss(model.predict_action(torch.cat([z, z_next], dim=-1)), actions)
    predicted = model.predict_code(torch.cat([z, actions], dim=-1))
    loss = curiosity_loss(action_error, forward_loss(predicted, z_next))
    measures = {"action_r2": 1 - action_error / ACTION_VARIANCE}
    return loss, measures | {"code_r2": explained(predicted, z_next)}


def time_contrast(model, batch, args):
    """Two moments of an episode, far apart, and a neighbour of each: who belongs to whom? Neither
    what all moments share nor what an episode keeps, such as shapes, tells."""
    z, near, z_far, near_far = model.encode(batch["frames"])
    queries, keys = torch.cat([z, z_far]), torch.cat([near, near_far])  # (2 B, Z)
    logits = bilinear_logits(queries, keys, model.W)
    return info_nce_loss(logits), {"top_1": top_1_accuracy(logits)}


def shuffle(model, batch, args):
    """Three frames of an episode: in order, or two neighbours swapped? And a contrast beside it."""
    z0, z1, z2 = model.encode(batch["frames"])
    half = len(z0) // 2
    in_order, first_two = torch.cat([z0, z1, z2], dim=-1), torch.cat([z1, z0, z2], dim=-1)
    swapped = torch.cat([first_two[:half], torch.cat([z0, z2, z1], dim=-1)[half:]])
    ordered, shuffled = (model.predict_order(x)[:, 0] for x in (in_order, swapped))
    order_loss = binary_loss(ordered, shuffled)
    logits = bilinear_logits(z0, z1, model.W)
    loss = order_loss + args.contrast * info_nce_loss(logits)
    right = torch.cat([ordered > 0, shuffled < 0]).float().mean()
    measures = {"order_loss": order_loss, "order_accuracy": right}
    return loss, measures | {"top_1": top_1_accuracy(logits)}


def temporal_disentanglement(model, batch, args):
    """Neighbours in time, or strangers: of two episodes, or of two distant moments?"""
    z = model.encoder(batch["frames"][:, 0])
    with torch.no_grad():
        near, far = (model.slow_encoder(batch["frames"][:, i]) for i in (1, 2))
    neighbours = model.classify_pair(z, near)
    others = near.roll(1, dims=0)  # of the episode before, in this batch
    strangers = torch.cat([model.classify_pair(z, others), model.classify_pair(z, far)])
    loss = binary_loss(neighbours, strangers)
    right = torch.cat([neighbours > 0, strangers < 0]).float().mean()
    return loss, {"pair_loss": loss, "pair_accuracy": right}


def autoencoder(model, batch, args):
    """The frame itself, through z."""
    frames = batch["frames"][:, 0]
    loss = reconstruction_loss(model.decoder(model.encoder(frames)), frames)
    return loss, {"mse_image": loss}


def beta_vae(model, batch, args):
    """The frame itself, through a noisy z in which every bit has its price."""
    frames = batch["frames"][:, 0]
    mean, log_var = model.gaussian(frames)
    z = mean + (log_var / 2).exp() * torch.randn_like(mean)
    loss = vae_loss(model.decoder(z), frames, mean, log_var, args.beta)
    kl = kl_divergence(mean, log_var).mean()
    return loss / frames[0].numel(), {"bce": loss - args.beta * kl, "kl": kl}


def augmentation_contrast(model, batch, args):
    """The same frame, shifted twice: who belongs to whom?"""
    query = model.encoder(batch["frames"][:, 0])
    with torch.no_grad():
        keys = model.slow_encoder(batch["frames"][:, 1])
    logits = bilinear_logits(query, keys, model.W)
    return info_nce_loss(logits), {"top_1": top_1_accuracy(logits)}


def reward_prediction(model, batch, args):
    """Where are agent and target?"""
    predicted = model.predict_positions(model.encoder(batch["frames"][:, 0]))[:, None]
    loss = reward_prediction_loss(predicted, batch["rewards"])
    return loss, {"mse": loss / predicted.shape[-1]}


def none(model, batch, args):
    """No question: the encoder stays as it was made."""
    return batch["frames"].new_zeros(()), {}


OBJECTIVES = {name: globals()[name] for name in get_args(Objective)}  # the functions above


def explained(predicted, true, least=1e-6):
    """R² of a prediction over a batch. `least`, the square of a hundredth of an untrained code's
    spread, is added in both places, so that a collapsed code scores 0. Both (B, Z) -> scalar."""
    error, spread = (true - predicted).square().mean(), true.var(0, correction=0).mean()
    return 1 - (error + least) / (spread + least)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_on_objective(model, batch, args):
    """One step of the encoder, and of the objective's own head; the slow copy follows."""
    loss, _ = OBJECTIVES[args.objective](model, batch, args)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    polyak_(model.slow_encoder, model.encoder, args.tau)
    return loss.detach()


def update_reconstruction(model, z, frames):
    """One step of the decoder on (8). z (B, Z) is without gradient: the encoder stays as it is.
    frames (B, 1, 64, 64). Returns the loss."""
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


# --- Data ------------------------------------------------------------------------------------


def choose_times(rng, batch, objective):
    """Which steps of its trajectory each row of a batch is asked about: (B, F)."""
    if objective.startswith(("inverse", "forward")):  # before and after an action
        t = HOLD * rng.integers((STEPS - 1) // HOLD, size=batch)
        return np.stack([t, t + HOLD], axis=1)
    t = rng.integers(STEPS - 1 - 2 * NEAR - FAR, size=batch)  # with room for what comes later
    near = t + rng.integers(1, NEAR + 1, size=batch)
    if objective == "time_contrast":  # a moment and its neighbour, and the same far from both
        far = rng.integers(near + FAR, STEPS - NEAR)
        return np.stack([t, near, far, far + rng.integers(1, NEAR + 1, size=batch)], axis=1)
    if objective == "temporal_disentanglement":  # next, and another that is not
        return np.stack([t, t + 1, rng.integers(t + 2, STEPS)], axis=1)
    if objective == "shuffle":
        return t[:, None] + NEAR * np.arange(3)
    if objective == "augmentation_contrast":  # twice the same, shifted later on
        return np.stack([t, t], axis=1)
    return t[:, None]


def sample_frames(rng, batch, args, device):
    """Of new trajectories, the frames that the objective needs, (B, F, 1, 64, 64), the action
    (B, 2) after the first of them, and its rewards (B, 1, 4), where agent and target are."""
    states, shapes, actions = sprites_env.sample_walks(rng, batch, STEPS, args.distractors, HOLD)
    rows, times = np.arange(batch), choose_times(rng, batch, args.objective)
    positions = states[rows[:, None], times, :, :2]  # (B, F, K, 2)
    frames = draw_positions(positions, shapes)
    if args.objective == "augmentation_contrast":
        offsets = rng.integers(2 * PAD + 1, size=(2, batch * frames.shape[1]))
        frames = random_shift(frames.reshape(-1, 1, 64, 64), offsets, PAD).reshape(frames.shape)
    arrays = {"frames": frames, "actions": actions[rows, times[:, 0]]}
    arrays["rewards"] = positions[:, 0, :2].reshape(batch, 1, 4)
    return {name: to_tensor(array, device) for name, array in arrays.items()}


def draw_positions(positions, shapes):
    """uint8 frames (B, F, 1, 64, 64) of objects at positions (B, F, K, 2)."""
    batch, count, K, _ = positions.shape  # B, F, K
    frames = sprites_env.draw(positions.reshape(-1, K, 2), shapes.repeat(count, axis=0))
    return frames.reshape(batch, count, 1, 64, 64)


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


# --- Measures: what is in the code? ----------------------------------------------------------


def pairs_to_probe(distractors, device):
    """Frames (PROBES, 2, 1, 64, 64), HOLD steps apart, never trained on, and what can be asked
    about the second one: name -> (PROBES, 2)."""
    rng = np.random.default_rng(10**9 + 1)
    states, shapes, _ = sprites_env.sample_walks(rng, PROBES, HOLD + 1, distractors, HOLD)
    before, now = states[:, 0, :, :2], states[:, -1, :, :2]
    quantities = {"agent": now[:, 0], "target": now[:, 1]}
    quantities["agent_displacement"] = now[:, 0] - before[:, 0]
    quantities["target_velocity"] = now[:, 1] - before[:, 1]
    if distractors:
        quantities["distractors"] = now[:, 2:].mean(1)
    frames = draw_positions(np.stack([before, now], axis=1), shapes)
    tensors = {name: torch.from_numpy(y).to(device) for name, y in quantities.items()}
    return to_tensor(frames, device), tensors


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


@torch.no_grad()
def probe_code(encoder, frames, quantities):
    """`z_sd`, `r2_one_coordinate`, and R² by quantity: of moves from both frames of a pair, of
    positions from the second. Codes are put on one scale first, with their sd, so that the probe's
    ridge means the same for all."""
    z = torch.cat([encoder(chunk) for chunk in frames.flatten(0, 1).split(500)]).double()
    sd = z.std(0).mean().item()
    z = ((z - z.mean(0)) / max(sd, 1e-6)).unflatten(0, (-1, 2))  # (M, 2, Z)
    metrics = {"z_sd": sd}
    for name, y in quantities.items():
        x = z.flatten(1) if name in ("agent_displacement", "target_velocity") else z[:, 1]
        r2 = linear_probe(x[:FITTED], y[:FITTED], x[FITTED:], y[FITTED:], ridge=1e-2)
        metrics[f"r2_{name}"] = r2.mean().item()
    positions = torch.cat([quantities["agent"], quantities["target"]], dim=1)
    together = torch.corrcoef(torch.cat([positions, z[:, 1]], dim=1).T)[:4, 4:]  # (4, Z)
    metrics["r2_one_coordinate"] = together.nan_to_num().square().amax(1).mean().item()
    return metrics


@torch.no_grad()
def assess(model, held_out, probed, args):
    """The objective's loss and own measures, means over held-out batches, and the probes."""
    rows = []
    with torch.random.fork_rng():  # beta_vae draws noise: leave training's random stream as it was
        for batch in held_out:
            loss, measures = OBJECTIVES[args.objective](model, batch, args)
            rows.append({"loss_held_out": loss.item()} | {k: x.item() for k, x in measures.items()})
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return means | probe_code(model.encoder, *probed)


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One pretraining run; returns the content of summary.json."""
    run = Run(args, total=args.updates)
    device = run.device
    (run.folder / "encoder.pt").unlink(missing_ok=True)  # of an earlier run
    rng, model = np.random.default_rng(args.seed), Learner(args, device)
    other = np.random.default_rng(10**9)
    held_out = [sample_frames(other, args.batch_size, args, device) for _ in range(16)]
    probed = pairs_to_probe(args.distractors, device)
    facts = {name: getattr(args, name) for name in ("objective", "distractors", "z_dim")}
    facts["batch_norm"] = False  # for ppo_encoder.py, as are the others

    reports = {1} | {math.ceil(args.updates * i / 10) for i in range(1, 11)}
    for update in range(1, args.updates + 1):
        # sample
        batch = sample_frames(rng, args.batch_size, args, device)

        # learn
        model.optimizer.param_groups[0]["lr"] = learning_rate(update, args)
        if args.objective != "none":
            update_on_objective(model, batch, args)
        if update % DECODER_EVERY == 0 and args.objective not in ("autoencoder", "beta_vae"):
            frames = batch["frames"][:, 0]  # the decoder learns what is in z
            update_reconstruction(model, model.encoder(frames).detach(), frames)

        # report
        if update in reports:
            metrics = assess(model, held_out, probed, args)
            run.report(update, **metrics)
            saved = facts | {"update": update, "encoder": model.encoder.state_dict()}
            run.save("checkpoint.pt", saved | {"decoder": model.decoder.state_dict()})

    run.save("encoder.pt", saved)
    run.save("decoded.png", draw_decoded(model, probed[0][:8, 1], args.objective))
    if args.objective == "beta_vae":
        run.save("walk.png", draw_walk(model, probed[0][:500, 1]))
    own = [name for name in metrics if not name.startswith(("r2", "loss", "z_sd"))]
    panels = [("R² of a linear probe on z", [n for n in metrics if n.startswith("r2")])]
    panels += [("standard deviation of z", ["z_sd"])]
    panels += [("the objective's own measures", own)] if own else []
    if args.objective == "none":
        pixels = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
        metrics |= {f"pixels_{k}": x for k, x in probe_code(pixels, *probed).items() if "r2" in k}
    return run.finish(metrics | {"updates": args.updates}, panels, "updates")


# --- Appendix: pictures ----------------------------------------------------------------------


@torch.no_grad()
def draw_decoded(model, frames, objective):
    """True frames (M, 1, 64, 64) above what the decoder makes of their codes, as bright as can be:
    what it is not sure of is grey, and grey on black is hard to see."""
    decoded = model.decoder(model.encoder(frames))
    decoded = decoded.sigmoid() if objective == "beta_vae" else decoded
    decoded = decoded / decoded.amax().clamp(min=1e-6)
    return sprites_env.draw_images({"true": frames[:, 0].cpu(), "decoded": decoded[:, 0].cpu()})


@torch.no_grad()
def draw_walk(model, frames, rows=6):
    """The coordinates of beta_vae's z with the largest KL, one a row, from -2 to 2 where the first
    frame's others stay."""
    mean, log_var = model.gaussian(frames)
    cost = torch.stack(
        [kl_divergence(*pair) for pair in zip(mean.T[..., None], log_var.T[..., None])]
    )
    images = {}
    for i in cost.mean(1).argsort(descending=True)[:rows].tolist():
        z = mean[:1].repeat(8, 1)
        z[:, i] = torch.linspace(-2, 2, 8, device=z.device)
        images[f"z{i}"] = model.decoder(z).sigmoid()[:, 0].cpu()
    return sprites_env.draw_images(images)


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
