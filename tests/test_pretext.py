"""pretext.py: losses by hand, what objectives ask, updates, data, probes, runs in miniature."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F

import ppo_encoder
import pretext
import sprites_env

TINY = {"updates": 5, "batch_size": 4, "z_dim": 5, "torch_threads": 1, "device": "cpu"}
OBJECTIVES = pretext.Objective.__args__
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
LOG2 = math.log(2)


def tiny(out="unused", **changes):
    return pretext.Args(**TINY | changes, out=str(out))


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# --- Equations -------------------------------------------------------------------------------


def test_inverse_loss_by_hand():
    """Errors .5, 0, -1, 1 in two actions of two dimensions: 2.25 / 4."""
    predicted = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    actions = torch.tensor([[1.0, 0.0], [-1.0, 1.5]])
    assert pretext.inverse_loss(predicted, actions).item() == pytest.approx(0.5625)


def test_a_blind_inverse_model_has_the_variance_of_the_actions():
    rng = np.random.default_rng(0)
    actions = sprites_env.sample_walks(rng, 9000, 3, 0, hold=1)[2]
    loss = pretext.inverse_loss(torch.zeros(18000, 2), torch.from_numpy(actions).flatten(0, 1))
    assert loss.item() == pytest.approx(pretext.ACTION_VARIANCE, rel=0.02)
    assert pretext.ACTION_VARIANCE == 1 / 3


def test_forward_loss_by_hand():
    """Half of 4 + 1 in one of two codes: a sum over coordinates, a mean over the batch."""
    z_next = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    predicted = torch.tensor([[3.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert pretext.forward_loss(predicted, z_next).item() == pytest.approx(1.25)


def test_curiosity_loss_by_hand():
    assert pretext.curiosity_loss(torch.tensor(0.5), torch.tensor(2.0)).item() == pytest.approx(8)


def test_contrast_by_hand():
    """q W: rows (1, 2), (0, 1). With keys (1, 0), (0, 1) and (2, 2) each logit is plain."""
    q, W = torch.eye(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    logits = pretext.bilinear_logits(q, keys, W)  # 1, 6; 0, 2
    assert logits.tolist() == [[-5, 0], [-2, 0]]
    loss = (math.log(1 + math.exp(5)) + math.log(1 + math.exp(-2))) / 2
    assert pretext.info_nce_loss(logits).item() == pytest.approx(loss, rel=1e-6)
    assert pretext.top_1_accuracy(logits).item() == 0.5
    constant = pretext.bilinear_logits(torch.ones(7, 3), torch.ones(7, 3), torch.eye(3))
    assert pretext.info_nce_loss(constant).item() == pytest.approx(math.log(7))


def test_binary_loss_by_hand():
    """σ(log 3) = 3/4. One pair at log 3, strangers at 0 and -log 3: -log(3/4), log 2, -log(3/4)."""
    positive, negative = torch.tensor([math.log(3)]), torch.tensor([0.0, -math.log(3)])
    expected = (2 * math.log(4 / 3) + LOG2) / 3
    assert pretext.binary_loss(positive, negative).item() == pytest.approx(expected)
    worst = pretext.binary_loss(-positive, -negative).item()
    assert worst == pytest.approx((2 * math.log(4) + LOG2) / 3)
    far = pretext.binary_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert far.item() == pytest.approx(1e4)  # finite


def test_pair_logits_by_hand():
    """Coordinate 1: |2·1 - 1·3 + .5| - (1·1 + 1)² = .5 - 4. Coordinate 2: |1·2 + 1·0 + 0| - (3·2 -
    5)² = 2 - 1. And c = 10: 7.5."""
    z, z_next = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    w, w_next, b = torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.0])
    w_bar, b_bar = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -5.0])
    logits = pretext.pair_logits(z, z_next, w, w_next, b, w_bar, b_bar, torch.tensor(10.0))
    assert logits.tolist() == [7.5]


def test_pairs_without_knowledge():
    """Zero parameters: log 2. The best that a constant can do with one pair to two strangers, at
    the logit log(1/2), is .637, the entropy of the labels: that is what there is to beat."""
    nothing = pretext.PairClassifier(3)
    for p in nothing.parameters():
        nn.init.zeros_(p)
    logits = nothing(torch.randn(4, 3), torch.randn(4, 3))
    assert logits.shape == (4,)
    loss = pretext.binary_loss(logits, torch.cat([logits, logits]))
    assert loss.item() == pytest.approx(LOG2)
    best = pretext.binary_loss(logits - LOG2, torch.cat([logits, logits]) - LOG2)
    assert (
        best.item() == pytest.approx(math.log(3) - 2 / 3 * LOG2) == pytest.approx(0.637, abs=1e-3)
    )


def test_pair_classifier_uses_each_of_its_numbers():
    classifier = pretext.PairClassifier(2)
    names = "w w_next b w_bar b_bar c".split()
    start = [classifier.get_parameter(name).tolist() for name in names]
    assert start == [[1, 1], [1, 1], [0, 0], [1, 1], [0, 0], 0]
    for i, name in enumerate(names):
        nn.init.constant_(classifier.get_parameter(name), i + 0.5)
    numbers = [classifier.get_parameter(name) for name in names]
    z, z_next = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(classifier(z, z_next), pretext.pair_logits(z, z_next, *numbers))


def test_reconstruction_and_rewards_by_hand():
    frames, decoded = torch.zeros(2, 2, 1, 64, 64)
    decoded[0, 0, 3, 4], decoded[1, 0, 0, 0] = 2, -1
    assert pretext.reconstruction_loss(decoded, frames).item() == pytest.approx(5 / 8192)
    rewards = torch.tensor([[[0.5, 0.1], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    predicted = torch.tensor([[[0.0, 0.1], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert pretext.reward_prediction_loss(predicted, rewards).item() == pytest.approx(5.25 / 2)


def test_variational_loss_by_hand():
    """KL of N(1, 1) is 1/2 a dimension; of variance e, (e - 2) / 2. Logit 0 costs log 2 a pixel."""
    mean, log_var = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    kl = 0.5 + (math.e - 2) / 2
    assert pretext.kl_divergence(mean, log_var).tolist() == pytest.approx([kl, 0])
    frames = torch.tensor([1.0, 0, 1, 0]).view(2, 1, 1, 2)
    loss = pretext.vae_loss(torch.zeros(2, 1, 1, 2), frames, mean, log_var, beta=3)
    assert loss.item() == pytest.approx(2 * LOG2 + 3 * kl / 2)


def test_losses_against_loops():
    a, b = normal(6, 3), normal(6, 3, seed=1)
    error = [[(a[i, j] - b[i, j]).item() ** 2 for j in range(3)] for i in range(6)]
    assert pretext.inverse_loss(a, b).item() == pytest.approx(np.mean(error))
    assert pretext.forward_loss(a, b).item() == pytest.approx(np.sum(error) / 12)
    W = normal(3, 3, seed=2)
    logits, total = pretext.bilinear_logits(a, b, W), 0
    for i in range(6):
        row = [(a[i] @ W @ b[j]).item() for j in range(6)]
        np.testing.assert_allclose(logits[i], np.array(row) - max(row))
        total -= row[i] - math.log(sum(math.exp(x) for x in row))
    assert pretext.info_nce_loss(logits).item() == pytest.approx(total / 6)
    sigmoid = [1 / (1 + math.exp(-x)) for x in a[:, 0].tolist()]
    total = -sum(math.log(s) for s in sigmoid[:2]) - sum(math.log(1 - s) for s in sigmoid[2:])
    assert pretext.binary_loss(a[:2, 0], a[2:, 0]).item() == pytest.approx(total / 6)
    w, v, c, u, d = normal(5, 3, seed=3)
    got = pretext.pair_logits(a, b, w, v, c, u, d, torch.tensor(0.3))
    for n in range(6):
        expected = 0.3
        for i in range(3):
            expected += abs(w[i] * a[n, i] + v[i] * b[n, i] + c[i]) - (u[i] * a[n, i] + d[i]) ** 2
        assert got[n].item() == pytest.approx(float(expected))


@pytest.mark.parametrize(
    "refused",
    [
        lambda: pretext.inverse_loss(torch.zeros(4, 1), torch.zeros(4, 2)),
        lambda: pretext.forward_loss(torch.zeros(1, 2), torch.zeros(4, 2)),
        lambda: pretext.bilinear_logits(torch.zeros(4, 3), torch.zeros(5, 3), torch.eye(3)),
        lambda: pretext.info_nce_loss(torch.zeros(4, 5)),
        lambda: pretext.binary_loss(torch.zeros(4, 1), torch.zeros(4)),
        lambda: pretext.pair_logits(torch.zeros(4, 3), torch.zeros(1, 3), *[torch.zeros(3)] * 6),
        lambda: pretext.reconstruction_loss(torch.zeros(4, 1), torch.zeros(4, 4)),
        lambda: pretext.vae_loss(torch.zeros(4, 1), torch.zeros(4, 4), *[torch.zeros(4, 2)] * 2, 1),
        lambda: pretext.reward_prediction_loss(torch.zeros(4, 1, 2), torch.zeros(4, 1, 1)),
    ],
)
def test_losses_refuse_to_broadcast(refused):
    with pytest.raises(AssertionError):
        refused()


def test_polyak():
    slow, fast = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(slow.weight, 2.0), nn.init.constant_(fast.weight, 6.0)
    pretext.polyak_(slow, fast, 0.25)
    assert slow.weight.item() == pytest.approx(3) and fast.weight.item() == 6


def test_random_shift():
    """Offset (4, 4) changes nothing; (0, 8) moves a pixel down by 4, left by 4; what leaves is
    gone."""
    stacks = np.zeros((2, 1, 64, 64), np.uint8)
    stacks[:, 0, 10, 20] = 255
    stacks[:, 0, 62, 30] = 255
    same, moved = pretext.random_shift(stacks, np.array([[4, 0], [4, 8]]), 4)
    assert np.array_equal(same, stacks[0])
    assert np.argwhere(moved[0]).tolist() == [[14, 16]]


def test_explained_by_hand():
    """Errors 1 and 0, twice; the spread of the truth is 1 and 4 a coordinate: 1 - .5 / 2.5. A code
    without spread is not explained by whoever knows it."""
    true = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    predicted = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    assert pretext.explained(predicted, true).item() == pytest.approx(0.8, abs=1e-4)
    constant = torch.ones(5, 3)
    assert pretext.explained(constant, constant).item() == 0
    assert -1.1 < pretext.explained(constant + 1e-3, constant).item() < -0.9


# --- What the objectives ask -----------------------------------------------------------------

HEADS = {
    "inverse": "predict_action",
    "forward": "predict_code",
    "forward_slow_target": "predict_code",
    "forward_inverse": "predict_action predict_code",
    "time_contrast": "W",
    "shuffle": "predict_order W",
    "temporal_disentanglement": "classify_pair",
    "autoencoder": "decoder",
    "beta_vae": "decoder to_log_var",
    "augmentation_contrast": "W",
    "reward_prediction": "predict_positions",
    "none": "",
}
PARTS = "encoder decoder predict_action predict_code predict_order predict_positions classify_pair"
PARTS = [*PARTS.split(), "to_log_var", "W"]


def parameters(model, name):
    part = getattr(model, name)
    return [part] if name == "W" else list(part.parameters())


def make_model(args):
    """A learner whose slow copy is another than its encoder, and W another than the identity."""
    torch.manual_seed(0)
    model = pretext.Learner(args, "cpu")
    model.slow_encoder.load_state_dict(pretext.Encoder(args.z_dim).state_dict())
    nn.init.normal_(model.W)
    nn.init.constant_(model.to_log_var.bias, 3.0)  # enough noise to matter
    return model


def make_batch(args, seed=3):
    return pretext.sample_frames(np.random.default_rng(seed), args.batch_size, args, "cpu")


def expected_loss(model, batch, args):
    """The losses once more, sample by sample, with other words."""
    codes = [[model.encoder(f[None])[0] for f in row] for row in batch["frames"]]
    slow = [[model.slow_encoder(f[None])[0].detach() for f in row] for row in batch["frames"]]
    a, B = batch["actions"], len(codes)
    name, first = args.objective, batch["frames"][:, 0]

    def join(*parts):
        return torch.cat(parts)[None]

    def inverse():
        return sum(
            (a[i] - model.predict_action(join(*codes[i]))[0]).square().sum() for i in range(B)
        ) / (2 * B)

    def forward(targets):
        predicted = [model.predict_code(join(codes[i][0], a[i]))[0] for i in range(B)]
        return sum((predicted[i] - targets[i][1]).square().sum() for i in range(B)) / (2 * B)

    def contrast(queries, keys):
        logits = torch.stack([torch.stack([q @ model.W @ k for k in keys]) for q in queries])
        return F.cross_entropy(logits, torch.arange(len(keys)))

    if name == "inverse":
        return inverse()
    if name == "forward":
        return forward(codes)
    if name == "forward_slow_target":
        return forward(slow)
    if name == "forward_inverse":
        return 8 * inverse() + 2 * forward(codes)
    if name == "time_contrast":
        queries = [row[0] for row in codes] + [row[2] for row in codes]
        return contrast(queries, [row[1] for row in codes] + [row[3] for row in codes])
    if name == "shuffle":
        logits = [model.predict_order(join(*row))[0, 0] for row in codes]
        orders = [(1, 0, 2) if i < B // 2 else (0, 2, 1) for i in range(B)]
        logits += [
            model.predict_order(join(*(row[k] for k in o)))[0, 0] for row, o in zip(codes, orders)
        ]
        labels = torch.tensor([1.0] * B + [0.0] * B)
        order = F.binary_cross_entropy_with_logits(torch.stack(logits), labels)
        return order + args.contrast * contrast(
            [row[0] for row in codes], [row[1] for row in codes]
        )
    if name == "temporal_disentanglement":
        pairs = [(codes[i][0], slow[i][1]) for i in range(B)]
        pairs += [(codes[i][0], slow[i - 1][1]) for i in range(B)]
        pairs += [(codes[i][0], slow[i][2]) for i in range(B)]
        logits = torch.cat([model.classify_pair(x[None], y[None]) for x, y in pairs])
        labels = torch.tensor([1.0] * B + [0.0] * 2 * B)
        return F.binary_cross_entropy_with_logits(logits, labels)
    if name == "autoencoder":
        return F.mse_loss(model.decoder(model.encoder(first)), first)
    if name == "beta_vae":
        h = model.encoder.convolutions(first).flatten(1)
        q = torch.distributions.Normal(model.encoder.to_z(h), (0.5 * model.to_log_var(h)).exp())
        z = q.mean + q.stddev * torch.randn(B, args.z_dim)
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum() / B
        bce = F.binary_cross_entropy_with_logits(model.decoder(z), first)
        return bce + args.beta * kl / 4096
    if name == "augmentation_contrast":
        return contrast([row[0] for row in codes], [row[1] for row in slow])
    if name == "reward_prediction":
        predicted = model.predict_positions(torch.stack([row[0] for row in codes]))
        return (predicted - batch["rewards"][:, 0]).square().sum() / B
    return torch.zeros(())


@each_objective
def test_what_an_objective_asks(objective):
    """Its loss and where its gradient goes: to the encoder and its own head only. What is compared
    with a slow copy gives no gradient there."""
    args = tiny(objective=objective, contrast=0.7, beta=3.0)
    model, batch = make_model(args), make_batch(args)
    torch.manual_seed(5)
    loss, measures = pretext.OBJECTIVES[objective](model, batch, args)
    torch.manual_seed(5)
    expected = expected_loss(model, batch, args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    every = [p for name in PARTS for p in parameters(model, name)]
    assert not any(p.requires_grad for p in model.slow_encoder.parameters())
    if objective == "none":
        assert not loss.requires_grad and measures == {}
        return
    ours = torch.autograd.grad(loss, every, allow_unused=True)
    theirs = torch.autograd.grad(expected, every, allow_unused=True)
    for p, q in zip(ours, theirs):
        assert (p is None) == (q is None)
        if p is not None:
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3)
    moved = {id(p) for p, g in zip(every, ours) if g is not None and g.any()}
    reached = {name for name in PARTS if any(id(p) in moved for p in parameters(model, name))}
    assert reached == {"encoder", *HEADS[objective].split()}


def test_measures_of_the_objectives():
    """What they say about themselves, next to the loss."""
    args = tiny(objective="inverse")
    model, batch = make_model(args), make_batch(args)

    def told(objective, **changes):
        args = tiny(objective=objective, **changes)
        torch.manual_seed(1)
        loss, measures = pretext.OBJECTIVES[objective](model, make_batch(args), args)
        return loss.item(), {name: x.item() for name, x in measures.items()}

    loss, measures = told("inverse")
    assert measures == {"action_r2": pytest.approx(1 - 3 * loss)}
    loss, measures = told("forward_inverse")
    assert list(measures) == ["action_r2", "code_r2"]
    assert measures["action_r2"] == pytest.approx(told("inverse")[1]["action_r2"])
    assert measures["code_r2"] == pytest.approx(told("forward")[1]["code_r2"])
    z, z_next = model.encode(batch["frames"])
    predicted = model.predict_code(torch.cat([z, batch["actions"]], dim=1))
    r2 = 1 - (predicted - z_next).square().sum() / (z_next - z_next.mean(0)).square().sum()
    assert measures["code_r2"] == pytest.approx(r2.item(), rel=1e-2)
    loss, measures = told("shuffle", contrast=0.0)
    assert measures["order_loss"] == pytest.approx(loss)
    assert measures["order_accuracy"] * 8 in range(9) and measures["top_1"] * 4 in range(5)
    loss, measures = told("temporal_disentanglement")
    assert measures["pair_loss"] == loss and measures["pair_accuracy"] * 12 == pytest.approx(
        round(measures["pair_accuracy"] * 12)
    )
    loss, measures = told("beta_vae", beta=2.0)
    assert measures["bce"] + 2 * measures["kl"] == pytest.approx(4096 * loss, rel=1e-5)
    assert measures["kl"] > 0
    loss, measures = told("reward_prediction")
    assert measures == {"mse": pytest.approx(loss / 4)}
    loss, measures = told("autoencoder")
    assert measures == {"mse_image": loss}
    assert list(told("time_contrast")[1]) == list(told("augmentation_contrast")[1]) == ["top_1"]


class Constant(nn.Module):
    """An encoder that sees nothing."""

    def forward(self, frames):
        return torch.full((len(frames), 5), 0.3)


@pytest.mark.parametrize(
    "objective, expected",
    [
        ("time_contrast", math.log(8)),
        ("augmentation_contrast", math.log(4)),
        ("shuffle", LOG2 + math.log(4)),
        ("inverse", 1 / 3),
        ("forward", 0),
    ],
)
def test_a_constant_code_knows_nothing(objective, expected):
    """Only forward does not mind."""
    args = tiny(objective=objective, batch_size=4)
    model = make_model(args)
    model.encoder = model.slow_encoder = Constant()
    for head in (model.predict_action, model.predict_code, model.predict_order):
        nn.init.zeros_(head[-1].weight)  # each answers with its bias, the best one
    nn.init.constant_(model.predict_code[-1].bias, 0.3)
    losses = [
        pretext.OBJECTIVES[objective](model, make_batch(args, seed), args)[0].item()
        for seed in range(200 if objective == "inverse" else 1)
    ]
    assert np.mean(losses) == pytest.approx(expected, abs=0.02 if objective == "inverse" else 1e-5)


# --- Networks --------------------------------------------------------------------------------


def test_learner():
    """Each parameter once in the optimiser, but the slow copy; the same encoder for all."""
    args = tiny(objective="shuffle")
    torch.manual_seed(0)
    model = pretext.Learner(args, "cpu")
    (group,) = model.optimizer.param_groups
    every = [p for name in PARTS for p in parameters(model, name)]
    assert sorted(map(id, group["params"])) == sorted(map(id, every))
    assert isinstance(model.optimizer, torch.optim.RAdam)
    assert torch.equal(model.W, torch.eye(5))
    for slow, fast in zip(model.slow_encoder.parameters(), model.encoder.parameters()):
        assert torch.equal(slow, fast) and slow is not fast and not slow.requires_grad
    torch.manual_seed(0)
    assert torch.equal(pretext.Encoder(5).to_z.weight, model.encoder.to_z.weight)
    frames = torch.rand(3, 2, 1, 64, 64)
    first, second = model.encode(frames)
    torch.testing.assert_close(first, model.encoder(frames[:, 0]))
    torch.testing.assert_close(second, model.encoder(frames[:, 1]))
    mean, log_var = model.gaussian(frames[:, 0])
    torch.testing.assert_close(mean, first)
    assert log_var.shape == mean.shape and not torch.equal(mean, log_var)


# --- Updates ---------------------------------------------------------------------------------


@each_objective
def test_update_on_objective(objective):
    """A step of gradient descent on the objective's loss; then the slow copy follows."""
    if objective == "none":
        return
    args = tiny(objective=objective, tau=0.25)
    model, batch = make_model(args), make_batch(args)
    every = model.optimizer.param_groups[0]["params"]
    for p in every:
        p.grad = torch.ones_like(p)  # left over from an earlier step
    model.optimizer = torch.optim.SGD(every, lr=0.01)
    slow = [p.clone() for p in model.slow_encoder.parameters()]
    torch.manual_seed(5)
    loss, _ = pretext.OBJECTIVES[objective](model, batch, args)
    gradients = torch.autograd.grad(loss, every, allow_unused=True)
    expected = [p if g is None else (p - 0.01 * g) for p, g in zip(every, gradients)]
    expected = [p.detach().clone() for p in expected]
    torch.manual_seed(5)
    got = pretext.update_on_objective(model, batch, args)
    assert got.item() == pytest.approx(loss.item(), rel=1e-5) and not got.requires_grad
    for p, q in zip(every, expected):
        torch.testing.assert_close(p.detach(), q, atol=1e-6, rtol=1e-4)
    for p, old, new in zip(model.slow_encoder.parameters(), slow, model.encoder.parameters()):
        torch.testing.assert_close(p, 0.75 * old + 0.25 * new.detach())


def test_the_decoder_that_looks_on_does_not_touch_the_encoder():
    args = tiny()
    model, frames = make_model(args), torch.rand(3, 1, 64, 64)
    before = {name: [p.clone() for p in parameters(model, name)] for name in PARTS}
    model.optimizer.param_groups[0]["lr"] = 0.1
    loss = pretext.update_reconstruction(model, model.encoder(frames).detach(), frames)
    assert not loss.requires_grad
    for name in PARTS:
        same = all(torch.equal(p, q) for p, q in zip(parameters(model, name), before[name]))
        assert same == (name != "decoder"), name


def test_learning_rate_by_hand():
    long, short = tiny(updates=8000), tiny(updates=1000, learning_rate=1.0)
    assert pretext.learning_rate(1, long) == pytest.approx(4e-3 / 400)
    assert pretext.learning_rate(4001, long) == pytest.approx(2e-3)
    assert pretext.learning_rate(101, short) == pytest.approx(101 / 200 * 0.975528, rel=1e-5)


# --- Data ------------------------------------------------------------------------------------


@each_objective
def test_choose_times(objective):
    """In bounds; all that may be is; a frame is never its own negative, nor near to it."""
    t = pretext.choose_times(np.random.default_rng(0), 4000, objective)
    assert t.min() == 0 and t.max() < pretext.STEPS and t.dtype.kind == "i"
    if objective.startswith(("inverse", "forward")):
        assert set(t[:, 0]) == {0, 4, 8, 12} and (t[:, 1] - t[:, 0] == 4).all()  # one action
    elif objective == "time_contrast":
        assert t.shape == (4000, 4)
        assert set(t[:, 1] - t[:, 0]) == set(t[:, 3] - t[:, 2]) == {1, 2}
        assert (t[:, 2] - t[:, 1]).min() == 10 and t.max() == 19  # and so of all four
        assert len(set(t[:, 2] - t[:, 1])) > 4
    elif objective == "temporal_disentanglement":
        assert (t[:, 1] - t[:, 0] == 1).all()
        assert (t[:, 2] - t[:, 0]).min() == 2 and t.max() == 19
    elif objective == "shuffle":
        assert t.shape == (4000, 3) and (np.diff(t, axis=1) == 2).all()
    elif objective == "augmentation_contrast":
        assert t.shape == (4000, 2) and (t[:, 0] == t[:, 1]).all()
    else:
        assert t.shape == (4000, 1)
    assert len(set(t[:, 0])) > 3


@each_objective
def test_sample_frames(objective):
    """Frames show the states at the chosen times, rewards say where agent and target are in the
    first of them, and the action is the one that led on from there."""
    args = tiny(objective=objective, distractors=1)
    batch = pretext.sample_frames(np.random.default_rng(7), 6, args, "cpu")
    rng = np.random.default_rng(7)
    states, shapes, actions = sprites_env.sample_walks(rng, 6, 20, 1, hold=4)
    times = pretext.choose_times(rng, 6, objective)
    assert batch["frames"].shape == (6, times.shape[1], 1, 64, 64)
    assert {x.dtype for x in batch.values()} == {torch.float32}
    for b in range(6):
        for f, t in enumerate(times[b]):
            true = sprites_env.draw(states[b, t][None, :, :2], shapes[b][None])[0] / 255
            frame = batch["frames"][b, f, 0].numpy()
            if objective == "augmentation_contrast":
                padded = np.pad(true, 4)
                fits = [
                    (padded[i : i + 64, j : j + 64] == frame).all() for i, j in np.ndindex(9, 9)
                ]
                assert any(fits)
            else:
                assert np.array_equal(frame, true)
        t = times[b, 0]
        assert torch.equal(batch["actions"][b], torch.from_numpy(actions[b, t]))
        expected = states[b, t, :2, :2].reshape(1, 4)
        np.testing.assert_allclose(batch["rewards"][b], expected, rtol=1e-6)
    if objective == "augmentation_contrast":
        assert (batch["frames"][:, 0] != batch["frames"][:, 1]).any()  # shifts of their own
    if objective == "inverse":  # what was executed moved the agent, unless a wall was in the way
        moved = states[np.arange(6), times[:, 1], 0, :2] - states[np.arange(6), times[:, 0], 0, :2]
        straight = np.abs(moved - 0.2 * batch["actions"].numpy()) < 1e-6
        assert straight.mean() > 0.5


def test_pairs_to_probe():
    """Positions of what the second frame shows; moves since the first; others than in training."""
    frames, y = pretext.pairs_to_probe(2, "cpu")
    assert frames.shape == (4000, 2, 1, 64, 64) and {len(x) for x in y.values()} == {4000}
    names = "agent target agent_displacement target_velocity distractors".split()
    assert list(y) == names and {x.shape[1] for x in y.values()} == {2}
    for n in range(20):
        for name, half in (("agent", 2), ("target", 5)):
            move = y["agent_displacement" if name == "agent" else "target_velocity"][n]
            for f, position in ((1, y[name][n]), (0, y[name][n] - move)):
                i, j = (63 * position + 1e-9).int().tolist()
                assert frames[n, f, 0, i - half : i + half, j - half : j + half].all()
    rng = np.random.default_rng(10**9 + 1)
    states, _, actions = sprites_env.sample_walks(rng, 4000, 5, 2, hold=4)
    np.testing.assert_allclose(y["distractors"], states[:, -1, 2:, :2].mean(1))
    inside = np.abs(actions[:, 0] * 0.2 - y["agent_displacement"].numpy()).max(1) < 1e-6
    assert 0.6 < inside.mean() < 1  # the rest met a wall
    assert "distractors" not in pretext.pairs_to_probe(0, "cpu")[1]


# --- Measures --------------------------------------------------------------------------------


def test_linear_probe_by_hand():
    """As in test_rp_pretrain.py: weight .5, R² 1 - 3.25 / 4."""
    z, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [6.0]])
    z_test, y_test = torch.tensor([[3.0], [1.0]]), torch.tensor([[8.0], [4.0]])
    assert pretext.linear_probe(z, y, z_test, y_test, ridge=1).tolist() == pytest.approx([0.1875])


@pytest.fixture
def few(monkeypatch):
    """Less to probe."""
    monkeypatch.setattr(pretext, "PROBES", 80)
    monkeypatch.setattr(pretext, "FITTED", 60)


class Pixels(nn.Module):
    """z = the pixels, times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, frames):
        return self.factor * frames.flatten(1)


def test_probe_code(few):
    """Frames of 1 x 2 pixels. A position is read off the second frame only, a move off both; the
    scale of z does not count, and a constant code tells nothing."""
    frames = torch.rand(80, 2, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    before, now = frames[:, 0].flatten(1).double(), frames[:, 1].flatten(1).double()
    quantities = {"agent": now, "target": before, "agent_displacement": now - before}
    quantities["target_velocity"] = 2 * before + now[:, :1]
    got = pretext.probe_code(Pixels(1.0), frames, quantities)
    sd = frames.flatten(0, 1).flatten(1).std(0).mean().item()
    assert got.pop("z_sd") == pytest.approx(sd)
    assert got["r2_agent"] > 0.95 and got["r2_target"] < 0.2
    assert got["r2_agent_displacement"] > 0.95 and got["r2_target_velocity"] > 0.95
    squares = [np.corrcoef(now[:, i], now[:, i])[0, 1] ** 2 for i in (0, 1)]
    for i in (0, 1):
        squares.append(max(np.corrcoef(before[:, i], now[:, j])[0, 1] ** 2 for j in (0, 1)))
    assert got["r2_one_coordinate"] == pytest.approx(np.mean(squares))
    z = ((now - frames.flatten(0, 1).flatten(1).double().mean(0)) / sd)[:, :2]
    r2 = pretext.linear_probe(z[:60], now[:60], z[60:], now[60:], ridge=1e-2).mean().item()
    assert got["r2_agent"] == pytest.approx(r2, rel=1e-6)
    scaled = pretext.probe_code(Pixels(1e-3), frames, quantities)
    assert scaled.pop("z_sd") == pytest.approx(sd / 1000, rel=1e-4)
    assert scaled == pytest.approx(got, rel=1e-3)
    blind = pretext.probe_code(Pixels(0.0), frames, quantities)
    assert blind["z_sd"] == blind["r2_one_coordinate"] == 0 and blind["r2_agent"] < 0.01


def test_assess(monkeypatch):
    """Means over the held-out batches, without gradient, and without a trace in the random
    stream."""
    monkeypatch.setattr(pretext, "probe_code", lambda *args: {"probed": args})
    args = tiny(objective="beta_vae")
    model, batches = make_model(args), [make_batch(args, seed) for seed in (1, 2)]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    metrics = pretext.assess(model, batches, ("frames", "quantities"), args)
    assert torch.equal(torch.get_rng_state(), before)
    rows = [pretext.beta_vae(model, batch, args) for batch in batches]
    assert metrics["loss_held_out"] == pytest.approx(np.mean([loss.item() for loss, _ in rows]))
    for name in ("bce", "kl"):
        assert metrics[name] == pytest.approx(np.mean([row[name].item() for _, row in rows]))
    assert metrics["probed"] == (model.encoder, "frames", "quantities")


# --- Runs ------------------------------------------------------------------------------------


@pytest.fixture
def pictures(monkeypatch):
    """What is to be drawn; blank figures are drawn instead."""
    drawn = {}

    def draw_curve(rows, panels, *others):
        drawn["panels"] = panels
        return Figure()

    def draw_images(rows):
        drawn.setdefault("images", []).append(rows)
        return Figure()

    monkeypatch.setattr(sprites_env, "draw_curve", draw_curve)
    monkeypatch.setattr(sprites_env, "draw_images", draw_images)
    return drawn


def rows_of(folder):
    with open(folder / "curve.csv") as file:
        return list(csv.DictReader(file))


def by_hand(args):
    """`train` once more, in fewer words."""
    torch.manual_seed(args.seed)
    model, rng = pretext.Learner(args, "cpu"), np.random.default_rng(args.seed)
    for update in range(1, args.updates + 1):
        batch = pretext.sample_frames(rng, args.batch_size, args, "cpu")
        model.optimizer.param_groups[0]["lr"] = pretext.learning_rate(update, args)
        if args.objective != "none":
            pretext.update_on_objective(model, batch, args)
        if update == 4 and args.objective not in ("autoencoder", "beta_vae"):
            frames = batch["frames"][:, 0]
            pretext.update_reconstruction(model, model.encoder(frames).detach(), frames)
    return model


@each_objective
def test_a_run_by_hand(tmp_path, few, pictures, objective):
    """A run ends with the weights that its updates give one after the other; what it reports is
    measured on held-out data, at the first update and ten times more at most."""
    args = tiny(tmp_path, objective=objective, learning_rate=0.1, seed=2, distractors=1)
    summary = pretext.train(args)
    model = by_hand(args)
    saved, checkpoint = (torch.load(tmp_path / f"{name}.pt") for name in ("encoder", "checkpoint"))
    exactly = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(
        checkpoint.pop("decoder"), dict(model.decoder.state_dict()), **exactly
    )
    for file in (saved, checkpoint):
        torch.testing.assert_close(file.pop("encoder"), dict(model.encoder.state_dict()), **exactly)
        facts = {"objective": objective, "distractors": 1, "z_dim": 5}
        assert file == facts | {"batch_norm": False, "update": 5}

    other = np.random.default_rng(10**9)
    held_out = [pretext.sample_frames(other, 4, args, "cpu") for _ in range(16)]
    probed = pretext.pairs_to_probe(1, "cpu")
    expected = pretext.assess(model, held_out, probed, args)
    missing = ["bce"] if objective == "beta_vae" else []  # its noise is not ours
    for name in ["loss_held_out", *missing]:
        assert summary[name] == pytest.approx(expected.pop(name), rel=0.1 if missing else 1e-3)
    got = {name: summary[name] for name in expected}
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)
    rest = set(summary) - set(expected) - {"loss_held_out", "bce"}
    others = (
        {f"pixels_{k}" for k in expected if k.startswith("r2")} if objective == "none" else set()
    )
    assert rest == {"updates", "minutes"} | others
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
    assert {n: float(rows[-1][n]) for n in expected} == pytest.approx(got)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in [*rows[0], *summary]:
        assert f"`{name}`" in pretext.__doc__ or name.startswith("pixels_r2")

    (_, r2), (_, sd), *own = pictures["panels"]
    drawn = [*r2, *sd, *(own[0][1] if own else [])]
    assert sorted([*drawn, "loss_held_out"]) == sorted([*expected, "loss_held_out", *missing])
    assert all(n.startswith("r2_") for n in r2) and sd == ["z_sd"]
    decoded = model.decoder(model.encoder(probed[0][:8, 1]))[:, 0].detach()
    decoded = decoded.sigmoid() if objective == "beta_vae" else decoded
    decoded = decoded / decoded.max()
    torch.testing.assert_close(pictures["images"][0]["decoded"], decoded, atol=1e-4, rtol=1e-3)
    assert torch.equal(pictures["images"][0]["true"], probed[0][:8, 1, 0])
    assert len(pictures["images"]) == 1 + (objective == "beta_vae")


def test_pixels_are_probed_for_comparison(tmp_path, pictures):
    """An untrained encoder and pixels averaged over 4 x 4: neither is blind, neither sees all."""
    summary = pretext.train(tiny(tmp_path, objective="none", updates=1, distractors=0))
    assert 0.8 < summary["pixels_r2_target"] < 1 and summary["pixels_r2_agent"] < 0.8


@pytest.mark.parametrize("objective", ["beta_vae", "temporal_disentanglement"])
def test_twice_the_same(tmp_path, few, pictures, objective):
    rows = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        pretext.train(tiny(folder, objective=objective, updates=2))
        rows.append([list(row.values())[3:] for row in rows_of(folder)])
    assert rows[0] == rows[1]


def test_a_run_with_its_pictures(tmp_path, few):
    pretext.train(tiny(tmp_path, objective="beta_vae", updates=1, z_dim=7))
    names = (
        "args.json checkpoint.pt curve.csv curve.png decoded.png encoder.pt summary.json walk.png"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == names.split()
    for name in ("curve", "decoded", "walk"):
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()


def test_walk(pictures):
    """The coordinates that cost most, the dearest first; one at a time moves, from -2 to 2."""
    model = make_model(tiny(objective="beta_vae", z_dim=3))
    frames = torch.rand(4, 1, 64, 64)
    mean = torch.tensor([[0.5, 0.1, 2.0]] * 4)
    model.gaussian = lambda frames: (mean, torch.zeros(4, 3))
    pretext.draw_walk(model, frames, rows=2)
    (images,) = pictures["images"]
    assert list(images) == ["z2", "z0"]
    z = torch.tensor([[0.5, 0.1, -2.0]])
    torch.testing.assert_close(images["z2"][:1], model.decoder(z).sigmoid()[:, 0].detach())
    z = torch.tensor([[2.0, 0.1, 2.0]])
    torch.testing.assert_close(images["z0"][-1:], model.decoder(z).sigmoid()[:, 0].detach())


def test_the_encoder_goes_on_to_ppo(tmp_path, few, pictures):
    pretext.train(tiny(tmp_path, objective="shuffle", updates=1))
    path = str(tmp_path / "encoder.pt")
    args = ppo_encoder.Args(encoder="pretrained", encoder_path=path, out="elsewhere")
    encoder, frames = ppo_encoder.make_encoder(args), torch.rand(2, 1, 64, 64)
    saved = pretext.Encoder(5)
    saved.load_state_dict(torch.load(path)["encoder"])
    assert torch.equal(encoder(frames), saved(frames))


def test_starting_over_takes_away_the_old_encoder(tmp_path, few, pictures, monkeypatch):
    pretext.train(tiny(tmp_path, updates=1))
    monkeypatch.setattr(pretext, "sample_frames", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretext.train(tiny(tmp_path, overwrite=True))
    assert not [*tmp_path.glob("*.pt"), *tmp_path.glob("summary.json")]


def test_objectives_and_run_names():
    assert tuple(pretext.OBJECTIVES) == OBJECTIVES
    assert pretext.Args().run_name == "inverse_d2_s1"
    args = pretext.Args(objective="shuffle", distractors=0, seed=7)
    assert args.run_name == "shuffle_d0_s7"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--objective jigsaw", "--objective"),
        ("--distractors 3", "--distractors"),
        ("--updates 0", "error: --updates must be positive and below 2**31, not 0"),
        ("--beta -1", "error: --beta must be 0 or more and below 2**31, not -1.0"),
        ("--batch-size 1", "error: a contrastive loss needs others: --batch-size of 2 or more"),
        ("--tau 1.1", "error: --tau must not be above 1"),
        ("--updates 1 --out text/run", "error: cannot write to text/run: Not a directory"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("")
    with pytest.raises(SystemExit) as stop:
        pretext.train(pretext.tyro.cli(pretext.Args, args=flags.split()))
    if stop.value.code == 2:  # tyro's own
        assert message in capsys.readouterr().err
    else:
        assert stop.value.code.startswith(message) and "\n" not in stop.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


# --- Short, real learning --------------------------------------------------------------------


def short_run(monkeypatch, tmp_path, **changes):
    """The metrics at the end of it, measured once."""
    assess, probed = pretext.assess, []
    monkeypatch.setattr(pretext, "assess", lambda *args: probed.append(args) or {"r2": 0.0})
    pretext.train(tiny(tmp_path, z_dim=64, **changes))
    return assess(*probed[-1])


def test_forward_alone_collapses(tmp_path, monkeypatch, pictures):
    """From a spread of .108; the loss, 1.7 at first, looks well."""
    few = {"updates": 150, "learning_rate": 2e-2}
    metrics = short_run(monkeypatch, tmp_path, objective="forward", **few)
    assert metrics["z_sd"] < 0.04 and metrics["loss_held_out"] < 0.1


def test_learns_from_contrast(tmp_path, monkeypatch, pictures):
    few = {"updates": 150, "batch_size": 16, "distractors": 0, "learning_rate": 1e-2}
    metrics = short_run(monkeypatch, tmp_path, objective="time_contrast", **few)
    assert metrics["top_1"] > 0.7 and metrics["loss_held_out"] < 1  # guessing: 1/32, 3.47
    assert metrics["r2_target"] > 0.5
