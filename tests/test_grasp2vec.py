"""grasp2vec.py: equations by hand, updates, data, measures, runs in miniature, learning."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import grasp2vec as gv

TINY = {"updates": 1, "batch_size": 4, "torch_threads": 1, "device": "cpu"}
A, P = torch.eye(2), torch.tensor([[2.0, 1.0], [0.0, 1.0]])  # of the hand-computed losses
NAMES = [f"{what}_{pool}" for what in ("retrieval", "localisation") for pool in gv.POOLS]


def tiny(out="unused", **changes):
    return gv.Args(**TINY | changes, out=str(out))


def rows_of(folder):
    with open(folder / "curve.csv") as file:
        return list(csv.DictReader(file))


# --- Equations -------------------------------------------------------------------------------


def test_spatial_mean_by_hand():
    """Two places of 256 have 8 and 24: g 32 / 256 = 2. The second feature is 1 everywhere: g."""
    maps = torch.zeros(1, 2, 16, 16)
    maps[0, 0, 3, 5], maps[0, 0, 9, 0], maps[0, 1] = 8, 24, 1
    assert gv.spatial_mean(maps).tolist() == [[2, 16]]


def test_scene_difference_by_hand():
    """What is in both cancels; nothing taken, nothing lost."""
    before, after = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    assert gv.scene_difference(before, after).tolist() == [[2, -1]]
    assert not gv.scene_difference(before, before).any()


def test_n_pairs_loss_by_hand():
    """aᵢᵀ pⱼ = [[2, 0], [1, 1]]: ln(1 + e⁻²) = .1269 and ln 2. Transposed:
    ln(1 + e⁻¹) = .3133, twice. Sums over B = 2."""
    assert 2 * gv.n_pairs_loss(A, P, 0).item() == pytest.approx(0.8201, abs=1e-4)
    assert 2 * gv.n_pairs_loss(P, A, 0).item() == pytest.approx(0.6265, abs=1e-4)
    assert 2 * gv.symmetric_n_pairs_loss(A, P, 0).item() == pytest.approx(1.4466, abs=1e-4)
    # squared norms: of A 1 + 1, of P 5 + 1; λ .5 and the mean over B make 2, in each direction
    assert gv.n_pairs_loss(A, P, 0.5).item() == pytest.approx(0.8201 / 2 + 2, abs=1e-4)
    both = gv.symmetric_n_pairs_loss(A, P, 0.5).item()
    assert both == pytest.approx(1.4466 / 2 + 4, abs=1e-4)


def test_n_pairs_loss_of_nothing_and_of_one():
    """Zero embeddings: ln B. A single pair has nothing to be confused with: only λ's part."""
    zero = torch.zeros(5, 3)
    assert gv.n_pairs_loss(zero, zero, 1).item() == pytest.approx(math.log(5))
    assert gv.n_pairs_loss(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 1).item() == 25


def test_n_pairs_loss_against_a_loop():
    rng = np.random.default_rng(0)
    a, p = rng.normal(size=(2, 6, 4))
    total = 0
    for i in range(6):
        weights = [math.exp(a[i] @ p[j]) for j in range(6)]
        total -= math.log(weights[i] / sum(weights))
        total += 0.3 * (sum(a[i] ** 2) + sum(p[i] ** 2))
    loss = gv.n_pairs_loss(torch.from_numpy(a), torch.from_numpy(p), 0.3)
    assert loss.item() == pytest.approx(total / 6)


def test_heatmaps_by_hand():
    """Places (1, 2) and (3, 4) have features (1, 0) and (0, 1): with p = (5, -2) heat 5 and -2."""
    maps = torch.zeros(2, 2, 16, 16)
    maps[0, 0, 1, 2] = maps[0, 1, 3, 4] = maps[1, 0, 0, 0] = 1
    heat = gv.heatmaps(torch.tensor([[5.0, -2.0], [7.0, 0.0]]), maps)
    assert heat.shape == (2, 16, 16) and heat.count_nonzero() == 3
    assert heat[0, 1, 2] == 5 and heat[0, 3, 4] == -2 and heat[1, 0, 0] == 7


def test_reconstruction_loss_by_hand():
    """Squared errors 4 and 1 among 2 x 4096 pixels."""
    frames, decoded = torch.zeros(2, 2, 1, 64, 64)
    decoded[0, 0, 3, 4], decoded[1, 0, 0, 0] = 2, -1
    assert gv.reconstruction_loss(decoded, frames).item() == pytest.approx(5 / 8192)


def test_nearness_by_hand():
    """Outcome 1 points like a₀, outcome 2 lies nearer to it; its own, 0, would be the best."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    p = torch.tensor([[1.0, 0.0], [9.0, 0.0], [1.0, 1.5]])
    assert gv.order_by_nearness(a, p, by_angle=True)[0].tolist() == [1, 2, 0]
    assert gv.order_by_nearness(a, p, by_angle=False)[0].tolist() == [2, 1, 0]


def test_losses_refuse_to_broadcast():
    row, rows, maps = torch.zeros(1, 3), torch.zeros(4, 3), torch.zeros(4, 3, 16, 16)
    for call in (
        (gv.scene_difference, row, rows),
        (gv.n_pairs_loss, row, rows, 0.1),
        (gv.order_by_nearness, row, rows, True),
        (gv.heatmaps, row, maps),
        (gv.reconstruction_loss, maps[:1], maps),
    ):
        with pytest.raises(AssertionError):
            call[0](*call[1:])


# --- Networks --------------------------------------------------------------------------------


def test_tower():
    """No feature is negative; weights are orthogonal; it looks at 18 x 18 pixels around a place."""
    torch.manual_seed(0)
    tower = gv.Tower(7)
    maps = tower(torch.rand(2, 1, 64, 64))
    assert maps.shape == (2, 7, 16, 16) and maps.min() == 0 and maps.max() > 0.1
    for layer in [m for m in tower.modules() if isinstance(m, nn.Conv2d)]:
        w = layer.weight.flatten(1)
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-4)  # gain √2
        assert not layer.bias.any()
        nn.init.ones_(layer.weight)
    image = torch.rand(1, 1, 64, 64, requires_grad=True)
    tower(image)[0, 0, 5, 8].backward()
    seen = image.grad[0, 0].nonzero()
    assert seen.amin(0).tolist() == [20 - 7, 32 - 7]
    assert seen.amax(0).tolist() == [23 + 7, 35 + 7]


@pytest.mark.parametrize("objective", ["grasp2vec", "reconstruction"])
def test_towers(objective):
    """Each parameter in the optimiser once; two towers that differ, or one with a decoder."""
    model = gv.Towers(tiny(objective=objective), "cpu")
    other = model.outcome if objective == "grasp2vec" else model.decoder
    (group,) = model.optimizer.param_groups
    expected = [*model.scene.parameters(), *other.parameters()]
    assert sorted(map(id, group["params"])) == sorted(map(id, expected))
    assert isinstance(model.optimizer, torch.optim.Adam)
    first, second = model.scene.layers[0].weight, model.outcome.layers[0].weight
    assert torch.equal(first, second) == (objective == "reconstruction")
    assert (model.outcome is model.scene) == (objective == "reconstruction")
    assert model.scene(torch.zeros(1, 1, 64, 64)).shape == (1, 64, 16, 16)


# --- Updates: each is compared with one step of gradient descent on a loss written out here -----


def model_with_leftovers(objective):
    torch.manual_seed(0)
    model = gv.Towers(tiny(objective=objective), "cpu")
    parameters = model.optimizer.param_groups[0]["params"]
    for p in parameters:
        p.grad = torch.ones_like(p)  # left over from an earlier step
    model.optimizer = torch.optim.SGD(parameters, lr=0.1)
    return model, parameters


def check_step(loss, parameters, update, *inputs):
    """After `update` the parameters are one step of `loss` away, and every one of them moved."""
    old = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(loss, parameters)
    returned = update(*inputs)
    for p, before, gradient in zip(parameters, old, gradients):
        torch.testing.assert_close(p.detach(), before - 0.1 * gradient, atol=1e-5, rtol=1e-3)
        assert not torch.equal(p, before)
    assert not any(value.requires_grad for value in returned.values())
    assert returned["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    return returned


@pytest.mark.parametrize("lam", [0, 0.3])
def test_update_towers(lam):
    """before and after go through one tower, outcomes through the other; no gradient is cut."""
    model, parameters = model_with_leftovers("grasp2vec")
    before, after, outcome = torch.rand(3, 3, 1, 64, 64)
    phi = [16 * model.scene(x).mean((2, 3)) for x in (before, after)]
    a, p = phi[0] - phi[1], 16 * model.outcome(outcome).mean((2, 3))
    logits, truth = a @ p.T, torch.arange(3)
    loss = sum(nn.functional.cross_entropy(x, truth) for x in (logits, logits.T))
    loss = loss + 2 * lam * (a.square().sum() + p.square().sum()) / 3
    inputs = model, before, after, outcome, lam
    returned = check_step(loss, parameters, gv.update_towers, *inputs)
    assert returned["norm_a"].item() == pytest.approx(a.norm(dim=1).mean().item(), rel=1e-3)
    assert returned["norm_p"].item() == pytest.approx(p.norm(dim=1).mean().item(), rel=1e-3)


def test_update_autoencoder():
    model, parameters = model_with_leftovers("reconstruction")
    images = torch.rand(3, 1, 64, 64)
    loss = ((model.decoder(model.scene(images)) - images) ** 2).mean()
    check_step(loss, parameters, gv.update_autoencoder, model, images)


def test_learning_rate_by_hand():
    """8,000 updates: a warm-up over a twentieth, 400. 1,000: over 200. Times (1 + cos) / 2."""
    long, short = tiny(updates=8000), tiny(updates=1000, learning_rate=1.0)
    assert gv.learning_rate(1, long) == pytest.approx(1e-2 / 400)
    assert gv.learning_rate(4001, long) == pytest.approx(5e-3)
    assert 0 < gv.learning_rate(8000, long) < 1e-9
    assert gv.learning_rate(101, short) == pytest.approx(101 / 200 * 0.975528, rel=1e-5)
    assert gv.learning_rate(251, short) == pytest.approx(0.853553, rel=1e-5)


# --- Data ------------------------------------------------------------------------------------


def test_objects():
    """48 that all differ; 36 seen and 12 novel ones, both with every shape, size and grey."""
    assert len(np.unique(gv.TEMPLATES, axis=0)) == 48 and gv.TEMPLATES.shape == (48, 16, 16)
    assert [len(pool) for pool in gv.POOLS.values()] == [36, 12]
    assert not set(gv.POOLS["seen"]) & set(gv.POOLS["novel"])
    for pool in gv.POOLS.values():
        for attribute, count in zip(gv.ATTRIBUTES[:, pool], (6, 2, 4)):
            assert set(attribute) == set(range(count))
    shape, size, grey = gv.ATTRIBUTES
    for k, template in enumerate(gv.TEMPLATES):
        assert set(np.unique(template)) == {0, gv.GREYS[grey[k]]}
        assert not template[[0, -1]].any() and not template[:, [0, -1]].any()
        alike = gv.TEMPLATES[(shape == shape[k]) & (size == size[k])] > 0
        assert (alike == (template > 0)).all()
    areas = (gv.TEMPLATES > 0).sum((1, 2))
    assert areas[size == 1].min() > areas[size == 0].max()


def test_paint_by_hand():
    """Each object where its box is; -1 is none; where two meet, the brighter one is seen."""
    objects = np.array([[7, -1, 3], [7, 0, -1]])
    corners = np.array([[[0, 48], [9, 9], [30, 5]], [[20, 20], [20, 20], [0, 0]]])
    images = gv.paint(objects, corners)
    assert images.shape == (2, 1, 64, 64) and images.dtype == np.uint8
    expected = np.zeros((2, 64, 64), np.uint8)
    expected[0, 0:16, 48:64], expected[0, 30:46, 5:21] = gv.TEMPLATES[7], gv.TEMPLATES[3]
    expected[1, 20:36, 20:36] = np.maximum(gv.TEMPLATES[0], gv.TEMPLATES[7])
    assert (images[:, 0] == expected).all()


@pytest.fixture(scope="module")
def grasps():
    pool = gv.POOLS["seen"]
    return gv.sample_grasps(np.random.default_rng(3), np.repeat(pool, 10), pool)


def window(image, corner):
    return image[corner[0] : corner[0] + 16, corner[1] : corner[1] + 16]


def test_scenes(grasps):
    """Two to four objects of the pool, all different, that do not overlap, anywhere."""
    assert (grasps.objects[:, 0] == np.repeat(gv.POOLS["seen"], 10)).all()
    present = grasps.objects >= 0
    assert set(present.sum(1)) == {2, 3, 4} and present[:, :2].all()
    assert set(grasps.objects[present]) == set(gv.POOLS["seen"])
    assert grasps.corners.min() == 2 and grasps.corners.max() == 46
    images = grasps.before[:, 0]
    for row, here, corners, image in zip(grasps.objects, present, grasps.corners, images):
        objects = row[here]
        assert len(set(objects)) == len(objects)
        assert (image > 0).sum() == (gv.TEMPLATES[objects] > 0).sum()
        for k, corner in zip(objects, corners[here]):
            assert (window(image, corner) == gv.TEMPLATES[k]).all()


@pytest.mark.parametrize("jitter", [0, 1, 2])
def test_the_object_is_really_gone(jitter):
    """after: the other objects, up to `jitter` pixels from where they were, and nothing else."""
    pool, offsets = gv.POOLS["seen"], set()
    grasps = gv.sample_grasps(np.random.default_rng(3), np.repeat(pool, 3), pool, jitter)
    for row, corners, after in zip(grasps.objects, grasps.corners, grasps.after[:, 0]):
        rest = after.copy()
        for k, corner in zip(row[1:], corners[1:]):
            if k >= 0:
                shape, found = gv.TEMPLATES[k] > 0, []
                for i, j in np.ndindex(5, 5):
                    shown = window(rest, corner + (i - 2, j - 2))
                    if (shown[shape] == gv.TEMPLATES[k].max()).all():
                        found.append((i - 2, j - 2))
                (offset,) = found
                window(rest, corner + offset)[shape] = 0
                offsets.add(offset)
        assert not rest.any()
    assert len(offsets) == (2 * jitter + 1) ** 2 and np.abs(list(offsets)).max() == jitter


def test_outcomes(grasps):
    """The object alone, whole, where nothing lay; or, if asked for, where it was."""
    taken = gv.TEMPLATES[grasps.objects[:, 0]]
    assert ((grasps.outcome > 0).sum((1, 2, 3)) == (taken > 0).sum((1, 2))).all()
    assert (grasps.outcome.max((1, 2, 3)) == taken.max((1, 2))).all()
    assert not ((grasps.outcome > 0) & (grasps.before > 0)).any()
    pool = gv.POOLS["seen"]
    same = gv.sample_grasps(np.random.default_rng(3), np.repeat(pool, 10), pool, same_place=True)
    assert (same.before == grasps.before).all() and (same.after == grasps.after).all()
    for image, corner, template in zip(same.outcome[:, 0], same.corners[:, 0], taken):
        assert (window(image, corner) == template).all()


def test_batches():
    """Of seen objects that all differ, drawn as the flags have it; before, after, outcome."""
    args = tiny(batch_size=32, jitter=1, same_place=True)
    batch = gv.sample_batch_of_grasps(np.random.default_rng(1), args, "cpu")
    rng = np.random.default_rng(1)
    taken = rng.permutation(gv.POOLS["seen"])[:32]
    expected = gv.sample_grasps(rng, taken, gv.POOLS["seen"], 1, True)
    assert len(set(taken)) == 32
    for got, images in zip(batch, (expected.before, expected.after, expected.outcome)):
        assert got.shape == (32, 1, 64, 64) and torch.equal(got, torch.from_numpy(images) / 255)


def test_held_out_grasps():
    """16 of each object; pools never mix; other scenes than any run's; outcomes elsewhere."""
    held_out, again = gv.held_out_grasps(), gv.held_out_grasps()
    for i, (name, grasps) in enumerate(held_out.items()):
        pool = gv.POOLS[name]
        assert set(grasps.objects[grasps.objects >= 0]) == set(pool)
        assert (np.bincount(grasps.objects[:, 0])[pool] == 16).all()
        assert not ((grasps.outcome > 0) & (grasps.before > 0)).any()
        assert (grasps.before == again[name].before).all()
        rng = np.random.default_rng(10**9 + i)  # standard ones, of seeds that no run can have
        standard = gv.sample_grasps(rng, np.repeat(pool, 16), pool, 2, False)
        assert (grasps.after == standard.after).all()
        with pytest.raises(SystemExit):
            tiny(seed=10**9 + i)


def test_to_tensor():
    """Frames in [0, 1]; the caller's own are left alone."""
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert gv.to_tensor(frames, "cpu").tolist() == pytest.approx([0, 0.2, 1])
    assert frames.tolist() == [0, 51, 255]
    assert gv.to_tensor(np.array([51.0, -1.0]), "cpu").tolist() == [51, -1]


# --- Measures --------------------------------------------------------------------------------


def perfect(images):
    """Knows the objects: a feature for each, 1 at the place of its box's centre. As the drawings
    are exact, matching them pixel by pixel finds everything: what is measured can be reached."""
    assert not torch.is_grad_enabled()
    templates = torch.from_numpy(gv.TEMPLATES)[:, None] / 255
    energy = nn.functional.conv2d(images.square(), torch.ones(1, 1, 16, 16))
    squares = templates.square().sum((1, 2, 3))[:, None, None]
    distances = energy - 2 * nn.functional.conv2d(images, templates) + squares  # (M, 48, 49, 49)
    maps = torch.zeros(len(images), 48, 16, 16)
    for m, k, i, j in (distances < 1e-3).nonzero().tolist():
        maps[m, k, (i + 8) // 4, (j + 8) // 4] = 1
    return maps


@pytest.fixture(scope="module")
def small():
    """Two grasps of each of 10 seen and of 6 novel objects."""
    rng, held_out = np.random.default_rng(0), {}
    for (name, pool), objects in zip(gv.POOLS.items(), (10, 6)):
        held_out[name] = gv.sample_grasps(rng, np.repeat(pool[:objects], 2), pool, jitter=0)
    return held_out


@pytest.mark.parametrize("by_angle", [True, False])
def test_a_perfect_encoder(small, by_angle):
    metrics = gv.measure_grasps(perfect, perfect, small, "cpu", by_angle)
    wrong = dict.fromkeys(("wrong_shape", "wrong_size", "wrong_grey"), 0)
    assert metrics == dict.fromkeys(NAMES, 1) | wrong


def test_a_blind_encoder(small):
    """All embeddings are equal: retrieved is the first other outcome, found the first place. So
    the two grasps of the first object find each other, and everybody else finds the first one."""
    blind = lambda images: torch.ones(len(images), 3, 16, 16)  # noqa: E731
    metrics = gv.measure_grasps(blind, blind, small, "cpu", False)
    assert metrics["retrieval_seen"] == 2 / 20 and metrics["retrieval_novel"] == 0
    for name, grasps in small.items():
        share = gv.places_of_taken(grasps)[:, 0, 0].mean()
        assert metrics[f"localisation_{name}"] == share < 0.2
    truth = np.concatenate([grasps.objects[:, 0] for grasps in small.values()])
    wrong = (gv.ATTRIBUTES[:, truth] != gv.ATTRIBUTES[:, truth[:1]]).mean(1).tolist()
    assert list(metrics.values())[-3:] == pytest.approx(wrong)
    assert list(metrics)[-3:] == ["wrong_shape", "wrong_size", "wrong_grey"]


def test_what_is_embedded(grasps):
    """before and after by the scene tower, outcomes by the other; more than a chunk of them."""
    torch.manual_seed(0)
    model, few = gv.Towers(tiny(), "cpu"), gv.Grasps(*(x[:130] for x in vars(grasps).values()))
    a, p, heat = gv.embed(model.scene, model.outcome, few, "cpu")
    images = (few.before, few.after, few.outcome)
    before, after, outcome = (torch.from_numpy(x).float() / 255 for x in images)
    with torch.no_grad():
        maps = model.scene(before)
        expected_a = 16 * (maps.mean((2, 3)) - model.scene(after).mean((2, 3)))
        expected_p = 16 * model.outcome(outcome).mean((2, 3))
    expected_heat = (maps * expected_p[:, :, None, None]).sum(1)
    for got, expected in ((a, expected_a), (p, expected_p), (heat, expected_heat)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_what_one_tower_for_both_embeds(grasps):
    """What an empty scene has as well does not belong to the object."""
    few = gv.Grasps(*(x[:3] for x in vars(grasps).values()))
    tower = lambda images: nn.functional.avg_pool2d(images, 4) + 7  # noqa: E731
    _, p, heat = gv.embed(tower, tower, few, "cpu")
    mean = torch.from_numpy(few.outcome).float().mean((1, 2, 3)) / 255
    torch.testing.assert_close(p[:, 0], 16 * mean)
    images = torch.from_numpy(few.before).float() / 255
    torch.testing.assert_close(heat, p[:, :, None] * tower(images)[:, 0])


def test_places_by_hand():
    """A large square is 12 x 12 pixels: in the box at (4, 21), rows 6 to 17, columns 23 to 34. A
    triangle is located by its bounding box."""
    objects, corners = np.array([[7, 3], [16 + 7, 3]]), np.array([[[4, 21], [40, 40]]] * 2)
    rows, columns = np.nonzero(gv.paint(objects[:, :1], corners[:, :1])[0, 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 17, 23, 34)
    taken = SimpleNamespace(objects=objects, corners=corners)
    square, triangle = gv.places_of_taken(taken)
    expected = np.zeros((16, 16), bool)
    expected[1:5, 5:9] = True
    assert (square == expected).all()
    rows, columns = np.nonzero(triangle)
    assert triangle.sum() == len(set(rows)) * len(set(columns)) >= 6


def test_controls(small, monkeypatch):
    """By chance, untrained and raw pixels (one tower for both images, by distance)."""
    torch.manual_seed(0)
    monkeypatch.setattr(gv, "TESTS", 2)
    model = gv.Towers(tiny(), "cpu")
    metrics = gv.measure_controls(model, small, "cpu")
    assert metrics["chance_retrieval_seen"] == metrics["chance_retrieval_novel"] == 1 / 31
    patches = lambda x: x.reshape(len(x), 16, 4, 16, 4).permute(0, 2, 4, 1, 3).flatten(1, 2)  # noqa: E731
    for control, tower in (("untrained", model.scene), ("pixels", patches)):
        expected = gv.measure_grasps(tower, tower, small, "cpu", by_angle=False)
        assert [metrics[f"{control}_{name}"] for name in NAMES] == [expected[n] for n in NAMES]
    for name, grasps in small.items():
        share = gv.places_of_taken(grasps).mean()
        assert metrics[f"chance_localisation_{name}"] == pytest.approx(share)
    assert len(metrics) == 12 and model.outcome is not model.scene


# --- Runs ------------------------------------------------------------------------------------


def by_hand(args):
    """`train` once more, in fewer words: the model, and the metrics of each update."""
    torch.manual_seed(args.seed)
    rng, model, rows = np.random.default_rng(args.seed), gv.Towers(args, "cpu"), []
    for update in range(1, args.updates + 1):
        images = gv.sample_batch_of_grasps(rng, args, "cpu")
        model.optimizer.param_groups[0]["lr"] = gv.learning_rate(update, args)
        if args.objective == "grasp2vec":
            rows.append(gv.update_towers(model, *images, args.lam))
        else:
            rows.append(gv.update_autoencoder(model, torch.cat(images)))
    return model, rows


@pytest.fixture
def drawn(monkeypatch, small):
    """Few tests, and no pictures: what was to be drawn."""
    pictures = {}

    def instead_of(name):
        def draw(*what):
            pictures[name] = what
            return Figure()

        return draw

    monkeypatch.setattr(gv, "held_out_grasps", lambda: small)
    monkeypatch.setattr(gv, "TESTS", 2)
    for name in ("draw_heatmaps", "draw_retrieved"):
        monkeypatch.setattr(gv, name, instead_of(name))
    monkeypatch.setattr(gv.sprites_env, "draw_curve", instead_of("draw_curve"))
    return pictures


@pytest.mark.parametrize(
    "changes",
    [
        {"updates": 21, "learning_rate": 0.1, "lam": 0.01, "seed": 5, "same_place": True},
        {"objective": "reconstruction", "updates": 2, "jitter": 0},
    ],
    ids=["grasp2vec", "reconstruction"],
)
def test_each_update_of_a_run(tmp_path, monkeypatch, drawn, small, changes):
    """A run ends with the weights that its updates give one after the other, reports the last
    batch's metrics, twenty times, and measures what it has learnt."""
    controls = {f"{c}_retrieval_seen": i for i, c in enumerate(("chance", "untrained", "pixels"))}
    monkeypatch.setattr(gv, "measure_controls", lambda *args: controls)
    args = tiny(tmp_path, **changes)
    summary, (model, expected), rows = gv.train(args), by_hand(args), rows_of(tmp_path)
    total = args.updates
    assert [int(row["step"]) for row in rows] == list(range(1, total + 1))[-20:]
    for row, metrics in zip(rows[::-1], expected[::-1]):
        for name, value in metrics.items():
            assert float(row[name]) == pytest.approx(value.item(), rel=1e-3)
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert checkpoint.pop("update") == total and checkpoint.keys() == {"scene", "outcome"}
    for name, state in checkpoint.items():
        after = dict(getattr(model, name).state_dict())
        torch.testing.assert_close(state, after, atol=1e-5, rtol=1e-3)
    measured = gv.measure_grasps(
        model.scene, model.outcome, small, "cpu", args.objective == "grasp2vec"
    )
    others = {"updates": total, "minutes": summary["minutes"]}
    assert summary == pytest.approx(measured | controls | others)
    assert {name: float(rows[-1][name]) for name in measured} == pytest.approx(measured)
    _, panels, x_label, levels, _ = drawn["draw_curve"]
    assert [names for _, names in panels] == [NAMES[:2], NAMES[2:]] and x_label == "updates"
    assert levels == [("chance", 0), ("untrained", 1), ("pixels", 2)]


@pytest.mark.parametrize("objective", ["grasp2vec", "reconstruction"])
def test_train(tmp_path, small, drawn, objective):
    """Done twice, it gives the same; its controls are those of the untrained tower."""
    curves, summaries = [], []
    for name in "ab":
        summaries.append(gv.train(tiny(tmp_path / name, objective=objective)))
        curves.append(rows_of(tmp_path / name))
        saved = json.loads((tmp_path / name / "summary.json").read_text())
        assert saved == summaries[-1] and saved.pop("minutes") < 1
        del summaries[-1]["minutes"], curves[-1][0]["seconds"], curves[-1][0]["steps_per_second"]
    assert summaries[0] == summaries[1] and curves[0] == curves[1]
    assert set(NAMES) < set(summaries[0])
    torch.manual_seed(1)
    model = gv.Towers(tiny(objective=objective), "cpu")
    controls = gv.measure_controls(model, small, "cpu")
    assert controls == {name: summaries[0][name] for name in controls}
    assert not list(tmp_path.glob("*/unfinished_*"))


def test_pictures(small, tmp_path):
    """They can be drawn, and say what they should."""
    torch.manual_seed(0)
    model = gv.Towers(tiny(), "cpu")
    codes = {
        name: gv.embed(model.scene, model.outcome, grasps, "cpu") for name, grasps in small.items()
    }
    figure = gv.draw_heatmaps(small, codes, columns=1)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["seen object", "novel object"]
    for axis in figure.axes[4:]:
        assert axis.get_xlabel() in ("on the object", "elsewhere") and axis.patches
    figure.savefig(tmp_path / "heatmaps.png")
    figure = gv.draw_retrieved(small, codes, by_angle=True, rows=2, nearest=2)
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert any(label.startswith("other ") for label in labels)
    figure.savefig(tmp_path / "neighbours.png")
    for name in ("heatmaps", "neighbours"):
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "grasp2vec_s1"),
        ({"objective": "reconstruction", "seed": 7}, "reconstruction_s7"),
        ({"same_place": True, "jitter": 0}, "grasp2vec_same_place_jitter0_s1"),
        ({"lam": 0}, "grasp2vec_lam0_s1"),
    ],
)
def test_run_name(changes, name):
    assert gv.Args(**changes).run_name == name


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--objective smell", "--objective"),
        ("--batch-size 37", "error: --batch-size must be in 2 ... 36"),
        ("--batch-size 1", "error: --batch-size must be in 2 ... 36"),
        ("--jitter 3", "error: --jitter must be at most 2"),
        ("--jitter -1", "error: --jitter must be 0 or more"),
        ("--lam nan", "error: --lam must be 0 or more"),
        ("--updates 0", "error: --updates must be positive"),
        ("--seed 10000", "error: --seed must be in 0 ... 9999, not 10000"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        gv.train(gv.tyro.cli(gv.Args, args=flags.split()))
    if stop.value.code == 2:  # tyro's own
        assert message in capsys.readouterr().err
    else:
        assert stop.value.code.startswith(message) and "\n" not in stop.value.code
    assert not list(tmp_path.iterdir())


def test_subtraction_teaches_objects(monkeypatch):
    """Short, real learning: new scenes' loss falls below 2 ln 36, that of knowing nothing."""
    monkeypatch.setattr(gv, "SHORTEST_WARM_UP", 20)
    args = tiny(updates=100, batch_size=16, lam=0)
    rng = np.random.default_rng(10**9)
    images = gv.sample_batch_of_grasps(rng, tiny(batch_size=36), "cpu")
    untrained, trained = (
        gv.update_towers(model, *images, 0)["loss"].item()
        for model in (gv.Towers(args, "cpu"), by_hand(args)[0])
    )
    assert untrained > 7 and trained < 6.9
