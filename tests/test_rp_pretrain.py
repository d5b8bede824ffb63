"""rp_pretrain.py: equations by hand, updates, data, measures, runs in miniature, learning."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import rp_pretrain as rp
import sprites_env

TINY = {"updates": 1, "batch_size": 2, "torch_threads": 1, "device": "cpu"}


def tiny(out="unused", **changes):
    return rp.Args(**TINY | changes, out=str(out))


def rows_of(folder):
    with open(folder / "curve.csv") as file:
        return list(csv.DictReader(file))


# --- Equations -------------------------------------------------------------------------------


def test_reward_prediction_loss_by_hand():
    """B 1, T 2, K 2: errors .5, 0, 1, -2 give .25 + 0 + 1 + 4. A second sequence without error
    halves it: a sum over time and tasks, a mean over the batch."""
    rewards = torch.tensor([[[0.5, 0.1], [1.0, 0.0]]])
    predicted = torch.tensor([[[0.0, 0.1], [0.0, 2.0]]])
    assert rp.reward_prediction_loss(predicted, rewards).item() == pytest.approx(5.25)
    both = torch.cat([predicted, rewards]), torch.cat([rewards, rewards])
    assert rp.reward_prediction_loss(*both).item() == pytest.approx(2.625)


def test_reconstruction_loss_by_hand():
    """Squared errors 4 and 1 among 2 x 4096 pixels."""
    frames, decoded = torch.zeros(2, 2, 1, 64, 64)
    decoded[0, 0, 3, 4], decoded[1, 0, 0, 0] = 2, -1
    assert rp.reconstruction_loss(decoded, frames).item() == pytest.approx(5 / 8192)


def test_losses_against_loops():
    rng = np.random.default_rng(0)
    r, predicted = rng.normal(size=(2, 4, 3, 2))
    total = 0
    for b in range(4):
        for t in range(3):
            for k in range(2):
                total += (r[b, t, k] - predicted[b, t, k]) ** 2 / 4
    got = rp.reward_prediction_loss(torch.from_numpy(predicted), torch.from_numpy(r))
    assert got.item() == pytest.approx(total)
    x, decoded = rng.random((2, 3, 1, 8, 8))
    total = sum((x.flat[i] - decoded.flat[i]) ** 2 for i in range(x.size)) / x.size
    got = rp.reconstruction_loss(torch.from_numpy(decoded), torch.from_numpy(x))
    assert got.item() == pytest.approx(total)


@pytest.mark.parametrize("loss", [rp.reward_prediction_loss, rp.reconstruction_loss])
def test_losses_refuse_to_broadcast(loss):
    with pytest.raises(AssertionError):
        loss(torch.zeros(4, 1, 2), torch.zeros(4, 3, 2))


def test_linear_probe_by_hand():
    """z 1, 3 and y 4, 6: centred both are -1, 1. With ridge 1 the penalty is 1 * M = 2, so the
    weight is 2 / (2 + 2) = .5. At z 3, 1 it reads 5.5, 4.5, where y is 8, 4: the mean squared
    error is (6.25 + .25) / 2 = 3.25, the variance of y there 4, R² 1 - 3.25 / 4."""
    z, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [6.0]])
    z_test, y_test = torch.tensor([[3.0], [1.0]]), torch.tensor([[8.0], [4.0]])
    assert rp.linear_probe(z, y, z_test, y_test, ridge=1).tolist() == pytest.approx([0.1875])


def test_linear_probe_against_least_squares():
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(400, 3)), rng.normal(size=(400, 2))
    y = z @ [[1, 0], [2, 0], [0, 0]] + 5 + noise * [1, 3]  # the second column: noise alone
    a = np.c_[z, np.ones(400)]
    error = y[300:] - a[300:] @ np.linalg.lstsq(a[:300], y[:300], rcond=None)[0]
    expected = 1 - (error**2).mean(0) / y[300:].var(0)
    z, y = torch.from_numpy(z).float(), torch.from_numpy(y).float()
    r2 = rp.linear_probe(z[:300], y[:300], z[300:], y[300:])
    np.testing.assert_allclose(r2, expected, atol=1e-4)
    assert r2[0] > 0.7 and abs(r2[1]) < 0.1
    assert rp.linear_probe(z[:300], z[:300, :1] - 7, z[300:], z[300:, :1] - 7) > 0.9999


# --- Networks --------------------------------------------------------------------------------


def test_prediction_step_by_step():
    """Eq. (1): the codes set the state h of an LSTM, c is 0, no input comes, K heads read h."""
    torch.manual_seed(0)
    predictor = rp.RewardPredictor(z_dim=5, conditioning_frames=2, tasks=3, hidden=7)
    z = torch.randn(4, 2, 5)
    (w,) = predictor.lstm.weight_hh_l0[None]
    bias = predictor.lstm.bias_ih_l0 + predictor.lstm.bias_hh_l0
    h, c = predictor.start(torch.cat([z[:, 0], z[:, 1]], dim=1)), torch.zeros(4, 7)
    expected = torch.zeros(4, 6, 3)
    for t in range(6):
        i, f, g, o = (h @ w.T + bias).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        for k in range(3):
            expected[:, t, k] = predictor.heads[k](h)[:, 0]
    assert torch.allclose(predictor(z, 6), expected, atol=1e-5)


def test_encoder_and_decoder():
    """Shapes; and the signal of an untrained encoder, which PyTorch's default extinguishes."""
    torch.manual_seed(0)
    frames, _ = rp.probe_data(1, "cpu")
    encoder, decoder = rp.Encoder(8), rp.Decoder(8)
    z = encoder(frames[:200])
    assert z.shape == (200, 8) and decoder(z).shape == (200, 1, 64, 64)
    assert encoder.convolutions(frames[:1]).shape == (1, 128, 1, 1)
    assert z.std(0).mean() > 0.02 and (z < 0).any()
    for layer in [m for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        w = layer.weight.flatten(1)
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        assert torch.allclose(gram, 2 * torch.eye(len(gram)), atol=1e-4)  # gain √2
        assert not layer.bias.any()
    assert isinstance(decoder.convolutions[-1], nn.ConvTranspose2d)  # unbounded
    assert decoder.from_z.out_features == 128 and len(decoder.convolutions) == 12
    coarse = rp.Decoder(8, frames=2, channels=(3, 5, 4))  # from 8 x 8 pixels
    assert coarse.from_z.out_features == 3 * 64 and coarse(z).shape == (200, 2, 64, 64)
    assert [layer.out_channels for layer in coarse.convolutions[1::2]] == [5, 4, 2]
    linear = [m for m in rp.mlp(2, 3, 1).modules() if isinstance(m, nn.Linear)]
    assert [layer.weight.shape for layer in linear] == [(3, 2), (3, 3), (1, 3)]


@pytest.mark.parametrize(
    ("objective", "channels", "updates"),
    [("reward_prediction", 128, 8_000), ("image_reconstruction", 128 * 16, 16_000)],
)
def test_what_depends_on_the_objective(objective, channels, updates):
    """A decoder that trains the encoder starts from 4 x 4 pixels, and learns for longer."""
    args = rp.Args(objective=objective)
    model = rp.Model(args, "cpu")
    assert model.decoder.from_z.out_features == channels and args.updates == updates
    assert rp.Args(objective=objective, updates=7).updates == 7


@pytest.mark.parametrize("batch_norm", [False, True])
def test_model(batch_norm):
    """Sizes as in args; each parameter in the optimiser once; what is normalised is z's input."""
    torch.manual_seed(0)
    model = rp.Model(tiny(batch_norm=batch_norm, z_dim=9, tasks=("repel",)), "cpu")
    parts = nn.ModuleList([model.encoder, model.decoder, model.predictor])
    (group,) = model.optimizer.param_groups
    assert sorted(map(id, group["params"])) == sorted(map(id, parts.parameters()))
    assert isinstance(model.optimizer, torch.optim.RAdam)
    assert model.predictor(torch.zeros(2, 3, 9), 4).shape == (2, 4, 1)
    kinds = [type(layer).__name__ for layer in model.encoder.convolutions]
    assert kinds == ["Conv2d", *["BatchNorm2d"] * batch_norm, "ReLU"] * 6
    torch.manual_seed(0)  # it is the same network but for that
    plain = rp.Model(tiny(z_dim=9, tasks=("repel",)), "cpu").encoder
    convolutions = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    for ours, theirs in zip(convolutions, plain.convolutions[::2]):
        assert torch.equal(ours.weight, theirs.weight) and ours.stride == theirs.stride
    reconstruction = rp.Model(tiny(objective="image_reconstruction", z_dim=9), "cpu")
    assert reconstruction.predictor(torch.zeros(2, 1, 9), 4).shape == (2, 4, 4)


# --- Updates: each is compared with one step of gradient descent on a loss written out here -----


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = rp.Model(tiny(z_dim=4, tasks=("repel", "agent_x")), "cpu")  # N 3, K 2
    parameters = model.optimizer.param_groups[0]["params"]
    for p in parameters:
        p.grad = torch.ones_like(p)  # left over from an earlier step
    model.optimizer = torch.optim.SGD(parameters, lr=0.1)
    return model


def after_a_step(model, loss):
    parameters = model.optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [p if g is None else (p - 0.1 * g).detach() for p, g in zip(parameters, gradients)]


def check_step(model, expected, moving):
    parameters = model.optimizer.param_groups[0]["params"]
    for p, target in zip(parameters, expected):
        torch.testing.assert_close(p.detach(), target.detach(), atol=1e-6, rtol=1e-4)
    for name in ("encoder", "decoder", "predictor"):
        gradients = [p.grad is not None and p.grad.any() for p in getattr(model, name).parameters()]
        assert any(gradients) == (name in moving), name


def test_update_reward_prediction(model):
    """The predictor gets the three frames of a sequence together; the decoder stays."""
    frames, rewards = torch.rand(6, 1, 64, 64), torch.rand(2, 5, 2)
    z = model.encoder(frames)
    predicted = model.predictor(torch.stack([z[:3], z[3:]]), 5)
    loss = sum((rewards[b] - predicted[b]).square().sum() for b in range(2)) / 2
    expected = after_a_step(model, loss)
    got, got_z = rp.update_reward_prediction(model, frames, rewards)
    check_step(model, expected, moving=("encoder", "predictor"))
    assert got.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(got_z, z) and not got_z.requires_grad and not got.requires_grad


@pytest.mark.parametrize("encoder_learns", [False, True])
def test_update_reconstruction(model, encoder_learns):
    """The decoder, and the encoder unless z comes without gradient; never the predictor."""
    frames = torch.rand(3, 1, 64, 64)
    z = model.encoder(frames) if encoder_learns else model.encoder(frames).detach()
    loss = ((model.decoder(z) - frames) ** 2).mean()
    expected = after_a_step(model, loss)
    z = model.encoder(frames) if encoder_learns else model.encoder(frames).detach()
    got = rp.update_reconstruction(model, z, frames)
    check_step(model, expected, ("encoder", "decoder") if encoder_learns else ("decoder",))
    assert got.item() == pytest.approx(loss.item(), rel=1e-5) and not got.requires_grad


def test_stacks_are_seen_and_drawn():
    model, frames = rp.Model(tiny(frame_stack=3), "cpu"), torch.rand(2, 3, 64, 64)
    assert model.decoder(model.encoder(frames)).shape == frames.shape


def test_learning_rate_by_hand():
    """8,000 updates: a warm-up over a twentieth, 400. 1,000: over 200. Times (1 + cos) / 2."""
    long, short = tiny(updates=8000), tiny(updates=1000, learning_rate=1.0)
    assert rp.learning_rate(1, long) == pytest.approx(4e-3 / 400)
    assert rp.learning_rate(401, long) == pytest.approx(4e-3 * 0.993844, rel=1e-5)
    assert rp.learning_rate(4001, long) == pytest.approx(2e-3)
    assert 0 < rp.learning_rate(8000, long) < 1e-9
    assert rp.learning_rate(101, short) == pytest.approx(101 / 200 * 0.975528, rel=1e-5)
    assert rp.learning_rate(251, short) == pytest.approx(0.853553, rel=1e-5)


# --- Data and measures -----------------------------------------------------------------------


def test_sample_batch():
    """Frame n of sequence b is row b N + n, and shows what the rewards of step n tell."""
    args = tiny(tasks=("target_y", "follow", "target_x"), distractors=2, conditioning_frames=2)
    frames, rewards = rp.sample_batch(np.random.default_rng(5), 4, args, "cpu")
    assert frames.shape == (8, 1, 64, 64) and rewards.shape == (4, 10, 3)
    assert frames.dtype == rewards.dtype == torch.float32
    assert frames.unique().tolist() == [0, 1]
    trajectories = sprites_env.sample_trajectories(np.random.default_rng(5), 4, 10, 2)
    for b in range(4):
        for n in range(2):
            expected = torch.from_numpy(trajectories[0][b, n] / 255)
            assert torch.equal(frames[2 * b + n, 0].double(), expected)
            i, j = (63 * rewards[b, n, [2, 0]]).int().tolist()
            assert frames[2 * b + n, 0, i - 5 : i + 5, j - 5 : j + 5].all()  # the square
    assert torch.equal(rewards[..., 1], torch.from_numpy(trajectories[2]["follow"]))
    stacked = tiny(distractors=2, conditioning_frames=2, frame_stack=3)
    stacks, rewards = rp.sample_batch(np.random.default_rng(5), 4, stacked, "cpu")
    trajectories = sprites_env.sample_trajectories(np.random.default_rng(5), 4, 12, 2)
    for b in range(4):  # the first reward belongs to the newest frame of the first stack
        for n in range(2):
            expected = torch.from_numpy(trajectories[0][b, n : n + 3] / 255)
            assert torch.equal(stacks[2 * b + n].double(), expected)
    expected = np.stack([trajectories[2][name][:, 2:] for name in rp.POSITIONS], axis=-1)
    assert torch.equal(rewards, torch.from_numpy(expected))
    once = tiny(objective="image_reconstruction")
    assert rp.sample_batch(np.random.default_rng(5), 4, once, "cpu")[0].shape == (4, 1, 64, 64)


def test_probe_data():
    """Positions x, y of agent, target, distractors, and frames that show the target there."""
    frames, positions = rp.probe_data(2, "cpu")
    assert frames.shape == (3000, 1, 64, 64) and positions.shape == (3000, 8)
    assert frames.unique().tolist() == [0, 1] and len(positions[:, 0].unique()) == 3000
    for n in range(20):
        for k, half in ((0, 2), (1, 5)):  # well inside circle and square
            i, j = (63 * positions[n, 2 * k : 2 * k + 2]).int().tolist()
            assert frames[n, 0, i - half : i + half, j - half : j + half].all()
    stacks, newest = rp.probe_data(2, "cpu", 2)  # a step later
    assert stacks.shape == (3000, 2, 64, 64) and torch.equal(stacks[:, 0], frames[:, 0])
    moved = (newest - positions).abs()
    assert 0 < moved.max() <= 0.05 + 1e-9 and (stacks[:, 1] != stacks[:, 0]).any()
    i, j = (63 * newest[7, 2:4]).int().tolist()
    assert stacks[7, 1, i - 5 : i + 5, j - 5 : j + 5].all()
    _, other = rp.sample_batch(np.random.default_rng(10**9), 500, tiny(), "cpu")
    assert not torch.isin(positions[:, 0].float(), other[:, 0, 0]).any()  # nor the held-out ones


def test_to_tensor():
    """Frames in [0, 1]; the caller's own are left alone."""
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert rp.to_tensor(frames, "cpu").tolist() == pytest.approx([0, 0.2, 1])
    assert frames.tolist() == [0, 51, 255]
    states = np.array([51.0, -1.0])
    assert rp.to_tensor(states, "cpu").tolist() == [51, -1]
    assert rp.to_tensor(states, "cpu").dtype == torch.float32


class Watched(nn.Flatten):
    """z = the pixels themselves, if called as it should be."""

    def forward(self, frames):
        assert not self.training and not torch.is_grad_enabled()
        return super().forward(frames)


@pytest.mark.parametrize("objective", rp.Objective.__args__)
def test_measures_by_hand(objective):
    """Frames of 1 x 2 pixels. The predictor is off by 1 in the first task and step, by 2 in the
    second task, by 0 elsewhere; the decoder by .5 in each pixel."""
    generator = torch.Generator().manual_seed(0)
    error = torch.tensor([[1.0, 2.0], [0.0, 2.0]])  # (T, K)
    frames = torch.rand(1200, 1, 1, 2, generator=generator)
    rewards = frames.view(600, 2, 2)  # whose sequence b is told by its own two frames
    model = SimpleNamespace(encoder=Watched().train(), decoder=lambda z: z[:, None, None] + 0.5)
    model.predictor = lambda z, steps: z[:, :steps] + error
    args = tiny(objective=objective, tasks=("repel", "agent_x"), conditioning_frames=2, horizon=2)
    probe = torch.rand(3000, 1, 1, 2, generator=generator)
    z, y = probe.flatten(1), torch.rand(3000, 6, generator=generator)
    y[:, 1] += z[:, 0]
    y[:2000, 2], y[2000:, 3] = z[:2000, 1], z[2000:, 1]
    y[:, 4] = z[:, 0] - z[:, 1]
    metrics = rp.measure(model, (frames, rewards), (probe, y), args)
    objects = ("agent", "target", "distractor1")
    r2 = rp.linear_probe(z[:2000], y[:2000], z[2000:], y[2000:]).tolist()
    expected = {f"r2_{name}": x for name, x in zip([f"{k}_{i}" for k in objects for i in "xy"], r2)}
    expected["mse_image"] = 0.25
    if objective == "reward_prediction":
        expected |= {"mse": 9 / 4, "mse_first_step": 5 / 2, "mse_repel": 1 / 2, "mse_agent_x": 4}
    assert metrics == pytest.approx(expected, abs=1e-5)
    assert model.encoder.training  # as before


# --- Runs ------------------------------------------------------------------------------------


def by_hand(args):
    """`train` once more, in fewer words: the model, and the loss of each update."""
    torch.manual_seed(args.seed)
    model, rng, losses = rp.Model(args, "cpu"), np.random.default_rng(args.seed), []
    for update in range(1, args.updates + 1):
        frames, rewards = rp.sample_batch(rng, args.batch_size, args, "cpu")
        model.optimizer.param_groups[0]["lr"] = rp.learning_rate(update, args)
        if args.objective == "image_reconstruction":
            losses.append(rp.update_reconstruction(model, model.encoder(frames), frames).item())
            continue
        loss, z = rp.update_reward_prediction(model, frames, rewards)
        losses.append(loss.item())
        if update % 4 == 0:
            first = [b * args.frames for b in range(args.batch_size)]
            rp.update_reconstruction(model, z[first], frames[first])
    return model, losses


def held_out_data(args):
    sequences = rp.sample_batch(np.random.default_rng(10**9), 500, args, "cpu")
    return sequences, rp.probe_data(args.distractors, "cpu")


@pytest.fixture
def pictures(monkeypatch):
    """What is to be drawn; blank figures are drawn instead."""
    drawn = {}

    def draw_curve(rows, panels, *others):
        drawn["panels"], drawn["others"] = panels, others
        return Figure()

    def draw_images(rows):
        drawn["images"] = rows
        return Figure()

    monkeypatch.setattr(sprites_env, "draw_curve", draw_curve)
    monkeypatch.setattr(sprites_env, "draw_images", draw_images)
    return drawn


@pytest.mark.parametrize(
    "changes",
    [{"batch_norm": True, "seed": 2, "z_dim": 5}, {"objective": "image_reconstruction"}],
    ids=["reward_prediction", "image_reconstruction"],
)
def test_each_update_of_a_run(tmp_path, monkeypatch, pictures, changes):
    """A run ends with the weights that its updates give one after the other, tells the loss of the
    last batch, twenty times, and measures on data that it has not seen in training."""
    measured = []
    monkeypatch.setattr(rp, "measure", lambda *args: measured.append(args) or {"mse": 1, "r2": 2})
    args = tiny(tmp_path, updates=21, learning_rate=0.1, **changes)
    summary = rp.train(args)
    assert summary == {"mse": 1, "r2": 2, "updates": 21, "minutes": summary["minutes"]}

    model, losses = by_hand(args)
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(2, 22))
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses[1:], rel=1e-5)
    assert list(rows[0]) == ["step", "seconds", "steps_per_second", "loss", "mse", "r2"]
    checkpoint, encoder = (
        torch.load(tmp_path / f"{name}.pt") for name in ("checkpoint", "encoder")
    )
    exactly = {"atol": 1e-7, "rtol": 1e-5}
    for name in ("encoder", "decoder", "predictor"):
        after = dict(getattr(model, name).state_dict())
        torch.testing.assert_close(checkpoint.pop(name), after, **exactly)
    torch.testing.assert_close(encoder.pop("encoder"), dict(model.encoder.state_dict()))
    expected = {"objective": args.objective, "tasks": list(args.tasks), "z_dim": args.z_dim}
    expected |= {"batch_norm": args.batch_norm, "distractors": 1, "update": 21, "frame_stack": 1}
    assert checkpoint == encoder == expected

    assert len(measured) == 20
    _, held_out, probe, _ = measured[0]
    for ours, theirs in zip((*held_out, *probe), sum(held_out_data(args), ())):
        assert torch.equal(ours, theirs)
    model.encoder.eval()  # running statistics
    images, (frames, _) = pictures["images"], probe
    assert torch.equal(torch.as_tensor(images["true"]), frames[:8, 0])
    decoded = model.decoder(model.encoder(frames[:8]))[:, 0]
    torch.testing.assert_close(torch.as_tensor(images["decoded"]), decoded.detach())
    (_, (error, mse), (probed, r2)), (x_label, *_) = (None, *pictures["panels"]), pictures["others"]
    assert "error" in error and mse == ["mse"] and "R²" in probed and r2 == ["r2"]
    assert x_label == "updates"


@pytest.mark.parametrize(
    "changes, drawn",
    [
        ({"distractors": 2}, True),
        ({"tasks": ("target_x",), "conditioning_frames": 2, "horizon": 2}, False),
        ({"batch_norm": True}, False),
        ({"objective": "image_reconstruction", "distractors": 0}, False),
    ],
    ids=["default", "one_task", "batch_norm", "image_reconstruction"],
)
def test_pretraining(tmp_path, request, changes, drawn):
    """What is reported is what can be measured afterwards; done twice, it gives the same."""
    if not drawn:
        request.getfixturevalue("pictures")
    args = tiny(tmp_path, **changes)
    summary = rp.train(args)
    model, _ = by_hand(args)
    expected = rp.measure(model, *held_out_data(args), args)
    assert summary == pytest.approx(expected | {"updates": 1, "minutes": summary["minutes"]})
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    (row,) = rows_of(tmp_path)
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    for picture in ("curve.png", "decoded.png"):
        with Image.open(tmp_path / picture) as image:
            image.load()
    assert not list(tmp_path.glob("unfinished_*"))


def test_starting_over_takes_away_the_old_encoder(tmp_path, monkeypatch, pictures):
    rp.train(tiny(tmp_path))
    monkeypatch.setattr(rp, "sample_batch", lambda *args: 1 / 0)  # it dies early
    with pytest.raises(ZeroDivisionError):
        rp.train(tiny(tmp_path, overwrite=True))
    assert not [*tmp_path.glob("*.pt"), *tmp_path.glob("summary.json")]


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "reward_prediction_d1_s1"),
        ({"tasks": ("repel", "agent_x")}, "reward_prediction_repel+agent_x_d1_s1"),
        ({"batch_norm": True, "distractors": 2}, "reward_prediction_batch_norm_d2_s1"),
        ({"objective": "image_reconstruction", "tasks": ("repel",), "seed": 7},)
        + ("image_reconstruction_d1_s7",),
    ],
)
def test_run_name(changes, name):
    assert rp.Args(**changes).run_name == name


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tasks smell", "--tasks"),
        ("--distractors 3", "--distractors"),
        ("--tasks agent_x agent_x", "error: --tasks needs at least one task, each named once"),
        ("--tasks", "error: --tasks needs at least one task, each named once"),
        ("--updates -1", "error: --updates must be positive and below 2**31, not -1"),
        ("--learning-rate nan", "error: --learning-rate must be positive and below 2**31, not nan"),
        ("--conditioning-frames 11", "error: --horizon must reach over the --conditioning-frames"),
        ("--seed 10000", "error: --seed must be in 0 ... 9999, not 10000"),
        ("--updates 1 --out text/run", "error: cannot write to text/run: Not a directory"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("")
    with pytest.raises(SystemExit) as stop:
        rp.train(rp.tyro.cli(rp.Args, args=flags.split()))
    if stop.value.code == 2:  # tyro's own
        assert message in capsys.readouterr().err
    else:
        assert stop.value.code.startswith(message) and "\n" not in stop.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_pretraining_finds_the_target_and_not_the_distractor(tmp_path, monkeypatch, pictures):
    """Short, real learning. Predicting the mean of the rewards would leave their variance, .053."""
    measure = rp.measure
    monkeypatch.setattr(rp, "measure", lambda *args: {"mse": 0.0, "r2": 0.0})  # once is enough
    short = {"updates": 350, "batch_size": 32, "conditioning_frames": 1, "horizon": 3}
    args = tiny(tmp_path, **short, tasks=("target_x", "target_y"))
    rp.train(args)
    model, saved = rp.Model(args, "cpu"), torch.load(tmp_path / "checkpoint.pt")
    for name in ("encoder", "decoder", "predictor"):
        getattr(model, name).load_state_dict(saved[name])
    metrics = measure(model, *held_out_data(args), args)
    assert metrics["mse"] < 0.02
    assert min(metrics["r2_target_x"], metrics["r2_target_y"]) > 0.5
    assert max(metrics[f"r2_{k}_{i}"] for k in ("agent", "distractor1") for i in "xy") < 0.3
