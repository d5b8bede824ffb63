"""Grasp2Vec: embeddings of objects, learnt by subtracting the scene after a grasp from that before.

What
    A robot takes one object out of a scene. What the scene lost is what is now in the gripper:
    φₛ(before) − φₛ(after) should be φₒ(outcome), and no other outcome's embedding. Nobody names the
    objects. As φ is a mean over places, the features themselves then show where an object lies.
    The scenes are drawn here: 48 objects, six shapes in two sizes and four grey levels; 12 of them,
    new combinations of the same shapes, sizes and greys, are never seen in training.

Paper
    Jang, Devin, Vanhoucke & Levine, "Grasp2Vec: Learning Object Representations from
    Self-Supervised Grasping", 2018, arXiv 1811.06964.

Algorithm
    measure_controls                                   chance, an untrained tower, raw pixels
    repeat --updates times:
        before, after, outcome ← sample_batch_of_grasps    B grasps of B different objects
        grasp2vec:       update_towers                 one step of both towers on (4)
        reconstruction:  update_autoencoder            one step of tower and decoder on (6)
        twenty times in all: measure_grasps            retrieval (7) and localisation (5)

Equations
    (1)  φ(x) = g · mean over the places of f(x): a tower's map f, here 16 x 16 places, g = 16
    (2)  a = φₛ(before) − φₛ(after),   p = φₒ(outcome)
    (3)  NPairs(a, p) = meanᵢ [−log (exp(aᵢᵀ pᵢ) / Σⱼ exp(aᵢᵀ pⱼ)) + λ (‖aᵢ‖² + ‖pᵢ‖²)]
    (4)  loss = NPairs(a, p) + NPairs(p, a), so the norms count twice
    (5)  heat(u) = pᵀ fₛ(before)(u): its maximum says where the object lies
    (6)  reconstruction loss = mean over pixels of (x − x̂)²
    (7)  retrieved: the outcome j ≠ i nearest to aᵢ, largest aᵢᵀ pⱼ / (‖aᵢ‖ ‖pⱼ‖) or least ‖aᵢ − pⱼ‖
    In the paper, (3) is a sum over the batch, and only NPairs(a, p) is written down; mean and both
    directions are those of the authors' release.

Notation
    B batch, M grasps of a test, K objects in a scene (the first is the one taken), C features, f a
    map, φ an embedding, u a place, i and j grasps, x an image, x̂ the decoded one. Indices s and o:
    the scene's tower, and the outcome's. before, after, outcome: images (B, 1, 64, 64) in [0, 1].

Differs from the paper
    1. Drawn scenes of two to four objects that do not hide each other, and no robot: no failed
       grasps. The others move by up to --jitter pixels; the outcome shows the object elsewhere.
    2. Four convolutions instead of a ResNet-50, orthogonal initialisation. All but the last halve
       the image or see its surroundings; the last sees one place only, as nothing in (4) says where
       a feature must fire: with 3 x 3 there, maxima moved beside the object.
    3. g = 16, not 1: an object touches about 9 of 256 places, and a plain mean starts so small that
       the softmax hardly differs from uniform for hundreds of updates.
    4. Adam at 1e-2 with warm-up and cosine, batches of 32 objects that all differ, since equal ones
       are not negatives; the release has 1e-4 and 8.
    5. Nearest by angle. The controls and reconstruction, which nobody trained for inner products,
       by distance; and as one tower serves as both, what an empty scene gives is taken off p.

Run
    python grasp2vec.py
    python grasp2vec.py --objective reconstruction
    python grasp2vec.py --same-place

Writes
    to runs/grasp2vec/<objective>[_same_place][_jitter<n>][_lam<λ>]_s<seed>/: args.json, curve.csv,
    curve.png, checkpoint.pt (the towers, at every report), heatmaps.png, neighbours.png and
    summary.json, shares of held-out grasps, with novel objects and with seen ones:
    `retrieval_seen`, `retrieval_novel` (same object retrieved, from outcomes of all 48),
    `localisation_seen`, `localisation_novel` (maximum on a 4 x 4 place that touches the
    object's bounding box); the same four
    after `chance_`, `untrained_` and `pixels_`; `wrong_shape`, `wrong_size`, `wrong_grey` (share of
    retrievals that differ in it), `updates`, `minutes`. Columns of curve.csv: `step` (updates),
    `seconds`, `steps_per_second`, `loss`, `norm_a`, `norm_p` (of the last batch, not of
    reconstruction), and these shares.

Result
    Shares of held-out grasps, five seeds: retrieval .996 (seen), .939 (novel), localisation .956,
    .948; untrained tower .42, .41, .36, .40. 2.5 minutes. All: benchmark/README.md.

Try
    1. --same-place: the outcome shows the object where it was in the scene. Can the towers cheat?
    2. --lam 0: what happens to norm_a and norm_p, what to retrieval?
    3. --jitter 0: the rest of the scene cancels exactly. Is it easier to learn? And how does it do
       in the tests, whose scenes do jitter?
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from torch import nn

import sprites_env
from sprites_env import SIZE, Run, require, require_positive

SIZES = (8, 14)  # pixels a side, for the sprites of 12
GREYS = np.array([64, 128, 191, 255], np.uint8)
BOX = 16  # pixels a side of what an object is drawn in
# Shape, size and grey of the 48 objects, (3, 48); of each shape and size, one grey is novel.
ATTRIBUTES = np.stack(np.unravel_index(np.arange(48), (6, len(SIZES), len(GREYS))))
NOVEL = np.array([1, 2, 1]) @ ATTRIBUTES % 4 == 0
POOLS = {"seen": np.flatnonzero(~NOVEL), "novel": np.flatnonzero(NOVEL)}
MOST = 4  # objects of a scene
JITTER = 2  # pixels, in the tests, and at most
TESTS = 16  # held-out grasps of each object
GAIN = 16  # g
SHORTEST_WARM_UP = 200  # updates


@dataclass(frozen=True)
class Args:
    objective: Literal["grasp2vec", "reconstruction"] = "grasp2vec"  # what shapes the embeddings
    same_place: bool = False  # in training, outcomes show the object where it was in the scene
    jitter: int = JITTER  # pixels by which, in training, the other objects move when one is taken
    lam: float = 5e-4  # λ, the weight of the embeddings' squared norms
    updates: int = 3_000  # gradient steps
    batch_size: int = 32  # grasps per update, all of different objects (B)
    learning_rate: float = 1e-2  # of Adam, times a linear warm-up, times a cosine down to zero
    seed: int = 1  # of the networks and of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int = 0  # 0 for PyTorch's choice; 1 when several runs share a machine
    out: str | None = None  # folder to write to (default: see Writes)
    overwrite: bool = False  # redo a finished run

    def __post_init__(self):
        require_positive(self, but="jitter lam")
        require(self.jitter <= JITTER, f"--jitter must be at most {JITTER}: objects must not meet")
        seen = len(POOLS["seen"])
        differ = 2 <= self.batch_size <= seen
        require(differ, f"--batch-size must be in 2 ... {seen}, the number of objects to be seen")

    @property
    def run_name(self):
        variant = [self.objective] + ["same_place"] * self.same_place
        variant += [f"jitter{self.jitter}"] * (self.jitter != Args.jitter)
        variant += [f"lam{self.lam:g}"] * (self.lam != Args.lam)
        return "_".join([*variant, f"s{self.seed}"])


# --- Networks --------------------------------------------------------------------------------


class Tower(nn.Module):
    """f: an image becomes a map of C features, none negative, at 16 x 16 places of 4 x 4 pixels. A
    feature sees 18 x 18 pixels around its place: more than an object has."""

    def __init__(self, features=64):
        super().__init__()
        layers = [nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU()]  # (B, 16, 32, 32)
        layers += [nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU()]  # (B, 32, 16, 16)
        layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]  # (B, 64, 16, 16)
        layers += [nn.Conv2d(64, features, 1), nn.ReLU()]  # (B, C, 16, 16)
        self.layers = orthogonal_(nn.Sequential(*layers)).to(memory_format=torch.channels_last)

    def forward(self, images):  # float (B, 1, 64, 64) in [0, 1]
        return self.layers(images)  # (B, C, 16, 16)


def orthogonal_(module):
    """Orthogonal weights and zero biases, so that no signal vanishes on its way."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return module


class Towers:
    """Scene tower, outcome tower and their optimiser. For reconstruction one tower serves as both,
    and a decoder makes 4 x 4 pixels of each place's features."""

    def __init__(self, args, device):
        self.scene = Tower().to(device)
        if args.objective == "grasp2vec":
            self.outcome = Tower().to(device)
            learnt = [self.scene, self.outcome]
        else:
            self.outcome = self.scene
            self.decoder = nn.ConvTranspose2d(64, 1, 4, stride=4).to(device)
            learnt = [self.scene, self.decoder]
        self.optimizer = torch.optim.Adam(nn.ModuleList(learnt).parameters())  # see learning_rate


# --- Losses and comparisons: pure functions of tensors ---------------------------------------


def spatial_mean(maps):
    """φ = g · mean of f over the places, eq. (1). (B, C, 16, 16) -> (B, C)."""
    return GAIN * maps.mean(dim=(2, 3))


def scene_difference(before, after):
    """a = φₛ(before) − φₛ(after), eq. (2): what the scene lost. Both (B, C) -> (B, C)."""
    assert before.shape == after.shape
    return before - after


def n_pairs_loss(a, p, lam):
    """meanᵢ [−log (exp(aᵢᵀ pᵢ) / Σⱼ exp(aᵢᵀ pⱼ)) + λ (‖aᵢ‖² + ‖pᵢ‖²)], eq. (3).
    Both (B, C) -> scalar."""
    assert a.shape == p.shape
    found = (a @ p.T).log_softmax(1).diagonal()  # (B,)
    return (lam * (a.square().sum(1) + p.square().sum(1)) - found).mean()


def symmetric_n_pairs_loss(a, p, lam):
    """NPairs(a, p) + NPairs(p, a), eq. (4). Both (B, C) -> scalar."""
    return n_pairs_loss(a, p, lam) + n_pairs_loss(p, a, lam)


def heatmaps(p, maps):
    """heat(u) = pᵀ f(u), eq. (5). p (M, C), maps (M, C, 16, 16) -> (M, 16, 16)."""
    assert p.shape == maps.shape[:2]
    return torch.einsum("mc,mcij->mij", p, maps)


def reconstruction_loss(decoded, frames):
    """Mean of (x − x̂)² over pixels and frames, eq. (6). Both (B, 1, 64, 64) -> scalar."""
    assert decoded.shape == frames.shape
    return (frames - decoded).square().mean()


def order_by_nearness(a, p, by_angle):
    """The outcomes j from the nearest to aᵢ to the farthest; i itself comes last, eq. (7).

    Both (M, C) -> (M, M). By angle, or by distance."""
    assert a.shape == p.shape
    if by_angle:
        nearness = nn.functional.normalize(a) @ nn.functional.normalize(p).T
    else:
        nearness = -torch.cdist(a, p)
    return nearness.fill_diagonal_(-math.inf).argsort(dim=1, descending=True, stable=True)


# --- Updates: one gradient step each ---------------------------------------------------------


def update_towers(model, before, after, outcome, lam):
    """One step of both towers on (4). Images (B, 1, 64, 64). Returns loss and mean norms."""
    scenes = spatial_mean(model.scene(torch.cat([before, after])))  # (2 B, C)
    a, p = scene_difference(*scenes.chunk(2)), spatial_mean(model.outcome(outcome))
    loss = symmetric_n_pairs_loss(a, p, lam)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    norms = {"norm_a": a.detach().norm(dim=1).mean(), "norm_p": p.detach().norm(dim=1).mean()}
    return {"loss": loss.detach()} | norms


def update_autoencoder(model, images):
    """One step of the tower and the decoder on (6). (B, 1, 64, 64). Returns the loss."""
    loss = reconstruction_loss(model.decoder(model.scene(images)), images)
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()
    return {"loss": loss.detach()}


def learning_rate(update, args):
    """A linear warm-up times a cosine. With 1e-2 from the first update on, features die."""
    warm_up = max(SHORTEST_WARM_UP, args.updates // 20)
    cosine = (1 + math.cos(math.pi * (update - 1) / args.updates)) / 2
    return args.learning_rate * (min(1, update / warm_up) * cosine)


# --- Data ------------------------------------------------------------------------------------


def make_templates():
    """The 48 objects, uint8 (48, 16, 16): sprites_env's six sprites in all sizes and greys."""
    templates = np.zeros((6, len(SIZES), len(GREYS), BOX, BOX), np.uint8)
    for z, size in enumerate(SIZES):
        pixel = ((np.arange(size) + 0.5) * 12 / size).astype(int)  # the nearest of the sprite's 12
        sprites = sprites_env.sprites()[:, pixel[:, None], pixel]  # (6, size, size)
        inside = slice((BOX - size) // 2, (BOX + size) // 2)
        templates[:, z, :, inside, inside] = sprites[:, None] * GREYS[:, None, None]
    return templates.reshape(48, BOX, BOX)


TEMPLATES = make_templates()


@dataclass
class Grasps:
    """M grasps. Object 0 of each is the one that is taken; -1 stands for none."""

    before: np.ndarray  # uint8 (M, 1, 64, 64)
    after: np.ndarray  # the same without object 0; the others have moved a little
    outcome: np.ndarray  # object 0 alone
    objects: np.ndarray  # (M, 4), indices into TEMPLATES
    corners: np.ndarray  # (M, 4, 2), of their boxes in `before`: row, column


def paint(objects, corners):
    """Images uint8 (M, 1, 64, 64) of objects (M, K) whose boxes have the corners (M, K, 2)."""
    images, side = np.zeros((len(objects), SIZE, SIZE), np.uint8), np.arange(BOX)
    sprites = TEMPLATES[objects] * (objects >= 0)[:, :, None, None]  # (M, K, 16, 16)
    for k in range(objects.shape[1]):
        rows, columns = (corners[:, k, axis, None] + side for axis in (0, 1))  # (M, 16)
        window = (np.arange(len(objects))[:, None, None], rows[:, :, None], columns[:, None])
        images[window] = np.maximum(images[window], sprites[:, k])
    return images[:, None]


def sample_grasps(rng, taken, pool, jitter=JITTER, same_place=False):
    """A grasp for each of the objects `taken` (M,), out of scenes with one to three others of the
    pool, all different. Objects lie in 3 x 3 cells of 20 pixels, one in a cell."""
    M = len(taken)
    order = rng.random((M, len(pool)))
    order[pool == taken[:, None]] = -1  # first
    objects = pool[order.argsort(axis=1)[:, :MOST]]
    objects[np.arange(MOST) > rng.integers(1, MOST, size=(M, 1))] = -1
    cells = np.divmod(rng.random((M, 9)).argsort(axis=1)[:, : MOST + 1], 3)
    corners = 2 + 20 * np.stack(cells, axis=-1) + rng.integers(5, size=(M, MOST + 1, 2))
    moved = corners[:, 1:MOST] + rng.integers(-jitter, jitter + 1, size=(M, MOST - 1, 2))
    place = slice(0, 1) if same_place else slice(MOST, MOST + 1)
    before, after = paint(objects, corners), paint(objects[:, 1:], moved)
    return Grasps(
        before, after, paint(objects[:, :1], corners[:, place]), objects, corners[:, :MOST]
    )


def sample_batch_of_grasps(rng, args, device):
    """before, after, outcome, float (B, 1, 64, 64), of B different seen objects."""
    taken = rng.permutation(POOLS["seen"])[: args.batch_size]
    grasps = sample_grasps(rng, taken, POOLS["seen"], args.jitter, args.same_place)
    return [to_tensor(x, device) for x in (grasps.before, grasps.after, grasps.outcome)]


def held_out_grasps():
    """Grasps for the tests, as in the default training, by name of the pool: seen objects in new
    scenes, and novel objects among novel ones."""
    return {
        name: sample_grasps(np.random.default_rng(10**9 + i), np.repeat(pool, TESTS), pool)
        for i, (name, pool) in enumerate(POOLS.items())
    }


def to_tensor(array, device):
    """float32 on the device; frames, which are uint8, in [0, 1]. Array or tensor."""
    x = torch.as_tensor(array, device=device)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


# --- Measures --------------------------------------------------------------------------------


@torch.no_grad()
def embed(scene_tower, outcome_tower, grasps, device):
    """a, p (M, C) and heatmaps (M, 16, 16) by these towers, on the CPU. If one tower serves as
    both, p is what the outcome has more than an empty scene."""
    chunks, size = [], 128
    for i in range(0, len(grasps.objects), size):
        images = (grasps.before, grasps.after, grasps.outcome)
        before, after, outcome = (to_tensor(x[i : i + size], device) for x in images)
        maps, p = scene_tower(before), spatial_mean(outcome_tower(outcome))
        if outcome_tower is scene_tower:
            p = scene_difference(p, spatial_mean(scene_tower(torch.zeros_like(outcome))))
        a = scene_difference(spatial_mean(maps), spatial_mean(scene_tower(after)))
        chunks.append((a, p, heatmaps(p, maps)))
    return [torch.cat(parts).cpu() for parts in zip(*chunks)]


def places_of_taken(grasps):
    """Which of the 16 x 16 places touch the bounding box of the object taken: (M, 16, 16)."""
    image = paint(grasps.objects[:, :1], grasps.corners[:, :1])[:, 0] > 0
    box = image.any(2)[:, :, None] & image.any(1)[:, None]
    return box.reshape(-1, 16, 4, 16, 4).any((2, 4))


def find_maxima(heat, grasps):
    """Where each heatmap (M, 16, 16) has its maximum, a number of 0 ... 255, and whether that is on
    the object: (M,), (M,)."""
    maximum, touched = heat.flatten(1).argmax(1).numpy(), places_of_taken(grasps)
    return maximum, touched.reshape(len(heat), -1)[np.arange(len(heat)), maximum]


def measure_grasps(scene_tower, outcome_tower, held_out, device, by_angle):
    """Shares of the held-out grasps whose object is retrieved and localised, and of those whose
    retrieved object has the wrong shape, size or grey."""
    codes = [embed(scene_tower, outcome_tower, x, device) for x in held_out.values()]
    a, p, _ = (torch.cat(parts) for parts in zip(*codes))
    truth = np.concatenate([grasps.objects[:, 0] for grasps in held_out.values()])
    retrieved = truth[order_by_nearness(a, p, by_angle)[:, 0].numpy()]
    metrics = {}
    for (name, grasps), (_, _, heat) in zip(held_out.items(), codes):
        mine = np.isin(truth, POOLS[name])
        metrics[f"retrieval_{name}"] = float((retrieved == truth)[mine].mean())
        metrics[f"localisation_{name}"] = float(find_maxima(heat, grasps)[1].mean())
    wrong = (ATTRIBUTES[:, retrieved] != ATTRIBUTES[:, truth]).mean(1).tolist()
    return metrics | dict(zip(("wrong_shape", "wrong_size", "wrong_grey"), wrong))


def measure_controls(model, held_out, device):
    """The same shares without learning: by chance; of the scene tower as it is before training;
    and of raw pixels, the 4 x 4 of a place as its features. One tower sees scenes and outcomes."""
    metrics = {}
    for name, tower in (("untrained", model.scene), ("pixels", nn.PixelUnshuffle(4))):
        measured = measure_grasps(tower, tower, held_out, device, by_angle=False)
        metrics |= {f"{name}_{k}": v for k, v in measured.items() if "wrong" not in k}
    tests = sum(len(grasps.objects) for grasps in held_out.values())
    for name, grasps in held_out.items():
        metrics[f"chance_retrieval_{name}"] = (TESTS - 1) / (tests - 1)
        metrics[f"chance_localisation_{name}"] = float(places_of_taken(grasps).mean())
    return metrics


# --- Training --------------------------------------------------------------------------------


def train(args):
    """One run; returns the content of summary.json."""
    run = Run(args, total=args.updates)
    device, by_angle = run.device, args.objective == "grasp2vec"
    rng, model = np.random.default_rng(args.seed), Towers(args, device)
    held_out = held_out_grasps()
    controls = measure_controls(model, held_out, device)

    reports = {math.ceil(args.updates * i / 20) for i in range(1, 21)}
    for update in range(1, args.updates + 1):
        # sample
        before, after, outcome = sample_batch_of_grasps(rng, args, device)

        # learn
        model.optimizer.param_groups[0]["lr"] = learning_rate(update, args)
        if args.objective == "grasp2vec":
            metrics = update_towers(model, before, after, outcome, args.lam)
        else:
            metrics = update_autoencoder(model, torch.cat([before, after, outcome]))

        # report
        if update in reports:
            metrics = {name: value.item() for name, value in metrics.items()}
            measured = measure_grasps(model.scene, model.outcome, held_out, device, by_angle)
            run.report(update, **measured, **metrics)
            towers = {"scene": model.scene.state_dict(), "outcome": model.outcome.state_dict()}
            run.save("checkpoint.pt", towers | {"update": update})

    codes = {
        name: embed(model.scene, model.outcome, grasps, device) for name, grasps in held_out.items()
    }
    run.save("heatmaps.png", draw_heatmaps(held_out, codes))
    run.save("neighbours.png", draw_retrieved(held_out, codes, by_angle))
    panels = [
        (f"share of grasps: {what}", [f"{what}_seen", f"{what}_novel"])
        for what in ("retrieval", "localisation")
    ]
    levels = [
        (name, controls[f"{name}_retrieval_seen"]) for name in ("chance", "untrained", "pixels")
    ]
    summary = measured | controls | {"updates": args.updates}
    return run.finish(summary, panels, "updates", levels)


# --- Appendix: pictures ----------------------------------------------------------------------


def draw_heatmaps(held_out, codes, columns=4):
    """Scenes of four objects: what is looked for, where it lies, and where the towers see it. Of
    each pool the first that is missed, if there is one, and others that are found."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(1.9 * columns * len(codes), 6.6), layout="constrained")
    axes = figure.subplots(3, columns * len(codes), subplot_kw={"xticks": [], "yticks": []})
    empty, extent = iter(axes.T), (0, SIZE, SIZE, 0)
    for name, grasps in held_out.items():
        heat, touched = codes[name][2], places_of_taken(grasps)
        (maximum, found), full = find_maxima(heat, grasps), (grasps.objects >= 0).all(1)
        missed, hit = np.flatnonzero(full & ~found), np.flatnonzero(full & found)
        for i in [*missed[:1], *hit[:: max(1, len(hit) // columns)], *missed[1:]][:columns]:
            column = next(empty)
            column[0].set_title(f"{name} object", size=11)
            column[2].set_xlabel("on the object" if found[i] else "elsewhere", size=11)
            for axis, image in zip(column, (grasps.outcome[i, 0], grasps.before[i, 0])):
                axis.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent)
            column[2].imshow(heat[i].numpy(), cmap="magma", extent=extent)
            first, last = (f(np.argwhere(touched[i]), axis=0)[::-1] for f in (np.min, np.max))
            for axis in column[1:]:
                box = Rectangle(4 * first, *(4 * (last - first + 1)), fill=False)
                axis.add_patch(box).set(edgecolor="#E69F00", lw=2)
            row, place = divmod(maximum[i], 16)
            column[2].plot(4 * place + 2, 4 * row + 2, "wP", mec="black", ms=10)
    rows = ("outcome", "before, where\nthe object lies", "heat, and its\nmaximum")
    for axis, label in zip(axes[:, 0], rows):
        axis.set_ylabel(label, size=11)
    return figure


def draw_retrieved(held_out, codes, by_angle, rows=3, nearest=5):
    """Grasps, and the outcomes nearest to what their scene lost. Of each pool one grasp that
    retrieves another object, if there is one, and others that do not."""
    from matplotlib.figure import Figure

    a, p, _ = (torch.cat(parts) for parts in zip(*codes.values()))
    order = order_by_nearness(a, p, by_angle)[:, :nearest].numpy()
    names = ("objects", "before", "after", "outcome")
    parts = ([getattr(grasps, name)[:, 0] for grasps in held_out.values()] for name in names)
    truth, before, after, outcomes = (np.concatenate(part) for part in parts)
    right = truth[order[:, 0]] == truth
    figure = Figure(figsize=(1.5 * (3 + nearest), 1.75 * rows * 2), layout="constrained")
    axes = figure.subplots(rows * 2, 3 + nearest)
    for row, (pool, k) in enumerate((pool, k) for pool in POOLS for k in range(rows)):
        mine = np.isin(truth, POOLS[pool])
        wrong, good = np.flatnonzero(mine & ~right), np.flatnonzero(mine & right)
        i = [*wrong[:1], *good[:: max(1, len(good) // rows)], *wrong[1:]][k]
        images = [before[i], after[i], outcomes[i], *outcomes[order[i]]]
        for axis, image in zip(axes[row], images):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(f"{pool} object", size=11)
        for axis, j in zip(axes[row, 3:], order[i]):
            differs = ATTRIBUTES[:, truth[j]] != ATTRIBUTES[:, truth[i]]
            other = [word for word, d in zip(("shape", "size", "grey"), differs) if d]
            axis.set_xlabel("other " + ", ".join(other) if other else "same object", size=9)
            colour = "#E69F00" if other else "#0072B2"
            for spine in axis.spines.values():
                spine.set(color=colour, lw=3)
    titles = ("before", "after", "outcome", "nearest", "2nd", "3rd", "4th", "5th")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, size=11)
    return figure


if __name__ == "__main__":
    with sprites_env.one_line_errors():
        train(tyro.cli(Args, description=__doc__))
