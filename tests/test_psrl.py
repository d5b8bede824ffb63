"""psrl.py: equations by hand, updates on one batch, data, training in miniature, bad input."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import psrl
import sprites_env
from sprites_env import SpritesVectorEnv

TINY = {"total_steps": 160, "num_envs": 2, "initial_steps": 146, "updates": 1, "batch_size": 4}
TINY |= {"windows": 3, "flow_updates": 2, "hidden": 8, "z_dim": 8, "eval_episodes": 2}
TINY |= {"torch_threads": 1, "device": "cpu"}
MODES = psrl.Mode.__args__
PREDICTED = {"aat", "full", "full_shuffled_actions"}  # modes that predict from the action
MOVED = {"cat", "full", "full_shuffled_actions"}  # modes that move features along the flow
MATCHED = MOVED | {"correspondence"}  # modes with a flow
COLUMN, ROW = torch.zeros(4, 1), torch.zeros(4)


@pytest.fixture(autouse=True)
def small_and_seeded(monkeypatch):
    monkeypatch.setattr(psrl, "PROBE_EPISODES", 8)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run(out, **changes):
    return psrl.train(psrl.Args(**TINY | changes, out=str(out)))


def no_pictures(monkeypatch):
    """They take longer than the rest of a small run."""
    figure = SimpleNamespace(suptitle=lambda *_, **__: None, savefig=Path.touch)
    monkeypatch.setattr(sprites_env, "draw_curve", lambda *_: figure)
    monkeypatch.setattr(sprites_env, "save_gif", lambda path, frames: path.touch())
    monkeypatch.setattr(psrl, "draw_flows", lambda *_: figure)
    monkeypatch.setattr(psrl, "draw_flow_film", lambda *_: [])


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


# --- Networks --------------------------------------------------------------------------------


def test_networks_of_soft_actor_critic():
    """Shapes, ranges, and a start at which no signal vanishes. Features see a cell of 4 x 4 pixels
    and the cells around it."""
    frames, action = torch.rand(5, 3, 64, 64), torch.randn(5, 2)
    with torch.no_grad():
        grid, pool = psrl.grid_convolutions(3), psrl.pooling_convolution()
        features = grid(frames)
        by_hand = grid[2](grid[0](frames).relu()).relu()
        torch.testing.assert_close(features, by_hand)
        assert features.shape == (5, 32, 16, 16) and features.mean() > 0.1
        changed = frames.clone()
        changed[:, :, 22, 33] += 1  # in cell (5, 8)
        differs = (grid(changed) - features).abs().sum((0, 1)) > 1e-4
        assert differs.nonzero().tolist() == [[i, j] for i in (4, 5, 6) for j in (7, 8, 9)]
        h = pool(features)
        assert h.shape == (5, 2048) and h.mean() > 0.1
        torch.testing.assert_close(h, pool[0](features).relu().flatten(1))

        head = psrl.code_head(2048, 7)
        z, weight = head(h), head[0].weight
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(7), atol=1e-4, rtol=0)
        assert z.shape == (5, 7) and z.abs().max() < 1 and z.std(1).min() > 0.4
        torch.testing.assert_close(z.atanh().mean(1), torch.zeros(5), atol=1e-5, rtol=0)

        actor, critic = psrl.SquashedActor(7, 16, 2), psrl.TwinCritic(7, 16, 2)
        mean, log_std = actor(z)
        assert mean.abs().max() < 0.1 and (log_std + 4).abs().max() < 0.2
        actor.mlp[-1].weight.mul_(1000)
        x, (mean, log_std) = actor.mlp(z), actor(z)
        torch.testing.assert_close(mean, x[:, :2])
        torch.testing.assert_close(log_std, -10 + 6 * (1 + x[:, 2:].tanh()))
        q = critic(z, action)
    assert q.shape == (2, 5) and not torch.allclose(q[0], q[1])
    one, two, three = critic.heads[1][::2]
    assert all(layer.bias.abs().sum() == 0 for layer in (one, two, three))
    by_hand = three(two(one(torch.cat([z, action], dim=1)).relu()).relu())[:, 0]
    torch.testing.assert_close(q[1], by_hand)


def test_networks_of_paired_similarity():
    """C is bounded by a cell, G sees the action everywhere, ψ is normalised."""
    Z, action = torch.randn(3, 16, 16, 16), torch.tensor([[0.5, -1.0], [0.0, 1.0], [1.0, 0.25]])
    z_a, z_b = torch.rand(2, 3, 32, 16, 16)
    with torch.no_grad():
        C, G = psrl.Correspondence(), psrl.ActionAwareTransform(16, 2)
        C.layers[-1].weight.mul_(20)
        flow, one_two_three = C(z_a, z_b), C.layers[::2]
        volume = psrl.correlation_volume(z_a, z_b)
        x = one_two_three[1](one_two_three[0](volume).relu()).relu()
        torch.testing.assert_close(flow, one_two_three[2](x).tanh())
        assert flow.shape == (3, 2, 16, 16) and flow.abs().max() > 0.9
        assert not torch.allclose(flow, C(z_b, z_a), atol=0.1)

        planes = torch.ones(3, 2, 16, 16) * action.reshape(3, 2, 1, 1)
        expected = G.layers[2](G.layers[0](torch.cat([Z, planes], dim=1)).relu())
        torch.testing.assert_close(G(Z, action), expected)
        assert (G(Z, action) - G(Z, -action)).abs().amin((0, 1)).min() > 0

        local = psrl.LocalFeatures(psrl.grid_convolutions(3))
        weight = local.Z.weight[:, :, 0, 0]
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(16), atol=1e-4, rtol=0)
        y = local.psi(Z)
        assert local.Z(z_a).shape == (3, 16, 16, 16) and y.shape == (3, 64)
        torch.testing.assert_close(y.atanh().mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.atanh().std(1, correction=0), torch.ones(3), rtol=0, atol=1e-3)


def trained_in(mode):
    """Networks that have a place in the first optimiser, by name."""
    names = {"encoder", "critic"} | ({"correspondence"} if mode in MATCHED else set())
    names |= {"Z", "psi", "phi"} if mode in PREDICTED | MOVED else set()
    return names | ({"transform"} if mode in PREDICTED else set())


def networks(agent):
    """All parameters, by name; those of the features are the encoder's."""
    names = "encoder critic actor critic_target slow correspondence transform phi"
    named = {name: list(getattr(agent, name).parameters()) for name in names.split()}
    named |= {name: list(getattr(agent.fast, name).parameters()) for name in ("Z", "psi")}
    return named | {"log_alpha": [agent.log_alpha]}


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_is_in_exactly_one_optimizer(mode):
    """The mode decides what is trained. The actor reads the encoder's convolutions and does not
    train them; slow copies are not trained, and start as what they copy."""
    args = psrl.Args(**TINY | {"mode": mode, "learning_rate": 0.5, "alpha": 0.25, "frame_stack": 2})
    space = psrl.make_env(args, 1).single_observation_space
    agent = psrl.PSRLAgent(space, 2, args, torch.device("cpu"))
    named = networks(agent)
    learnt = [p for name in trained_in(mode) for p in named[name]]
    acting = named["actor"] + [agent.log_alpha]
    for optimizer, parameters in ((agent.optimizer, learnt), (agent.actor_optimizer, acting)):
        (group,) = optimizer.param_groups
        assert len(group["params"]) == len(parameters) and group["lr"] == 0.5
        assert set(group["params"]) == set(parameters)
    assert not {*learnt} & {*acting} and agent.log_alpha.item() == pytest.approx(math.log(0.25))
    assert agent.encoder[0] is agent.convolutions and agent.convolutions[0] is agent.fast.z
    assert agent.encoder[1] is agent.head and agent.fast.z[0].in_channels == 2
    for slow, fast in ((agent.slow, agent.fast), (agent.critic_target, agent.critic)):
        pairs = list(zip(slow.parameters(), fast.parameters(), strict=True))
        assert all(torch.equal(p, q) and p is not q and not p.requires_grad for p, q in pairs)
    assert len(list(agent.slow.parameters())) == 4 + 2 + 4


def test_acting():
    """The mean action, or one of the policy's; frames in [0, 1]."""
    _, agent, _, _ = small("rad")
    stacks = np.random.default_rng(0).integers(256, size=(3, 2, 64, 64), dtype=np.uint8)
    x = torch.from_numpy(stacks / np.float32(255))
    mean, log_std = (x.detach() for x in agent.actor(agent.convolutions(x)))
    torch.manual_seed(1)
    noisy = (mean + log_std.exp() * torch.randn(3, 2)).tanh()
    torch.manual_seed(1)
    np.testing.assert_allclose(agent.act(stacks), mean.tanh(), atol=1e-5)
    np.testing.assert_allclose(agent.act(stacks, noise=True), noisy, atol=1e-5)


# --- Equations: paired similarity ------------------------------------------------------------


def test_an_impulse_peaks_in_the_channel_of_its_shift():
    """(1): from (7, 9) by (1, -1), rows first, is to the third row and first column of 3 x 3."""
    z_a, z_b = torch.zeros(2, 1, 4, 16, 16)
    z_a[0, :, 7, 9] = z_b[0, :, 8, 8] = torch.tensor([1.0, -2.0, 0.5, 3.0])
    V = psrl.correlation_volume(z_a, z_b)
    assert V.shape == (1, 9, 16, 16) and V.nonzero().tolist() == [[0, 3 * 2 + 0, 7, 9]]
    assert V.max().item() == pytest.approx(1)
    torch.testing.assert_close(psrl.correlation_volume(9 * z_a, 0.3 * z_b), V)


def test_correlations_against_a_loop():
    z_a, z_b = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    V, a, b = psrl.correlation_volume(z_a, z_b), z_a.numpy(), z_b.numpy()
    for n, i, j in np.ndindex(2, 5, 5):
        for channel, (di, dj) in enumerate(np.ndindex(3, 3)):
            k, m, expected = i + di - 1, j + dj - 1, 0
            if 0 <= k < 5 and 0 <= m < 5:
                u, v = a[n, :, i, j], b[n, :, k, m]
                expected = u @ v / np.sqrt((u @ u) * (v @ v))
            assert V[n, channel, i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [16, 64])
def test_no_flow_changes_nothing(size):
    """(5): to 1e-6, at each of the two sizes."""
    maps = torch.rand(2, 3, size, size)
    same = psrl.warp(maps, torch.zeros(2, 2, size, size))
    torch.testing.assert_close(same, maps, rtol=0, atol=1e-6 * size / 16)


def test_warp_against_a_loop():
    """(5): bilinear, rows first, at the edge the nearest; every map of a batch by its own flow."""
    maps, flow = torch.rand(2, 3, 6, 6, dtype=torch.float64), torch.empty(2, 2, 6, 6).double()
    flow.uniform_(-2, 2)
    warped = psrl.warp(maps, flow)
    for n, i, j in np.ndindex(2, 6, 6):
        y, x = (np.clip(p + c.item(), 0, 5) for p, c in zip((i, j), flow[n, :, i, j]))
        y0, x0 = min(int(y), 4), min(int(x), 4)
        block, dy, dx = maps[n, :, y0 : y0 + 2, x0 : x0 + 2], y - y0, x - x0
        top = (1 - dx) * block[:, 0, 0] + dx * block[:, 0, 1]
        bottom = (1 - dx) * block[:, 1, 0] + dx * block[:, 1, 1]
        torch.testing.assert_close(warped[n, :, i, j], (1 - dy) * top + dy * bottom)
    down = torch.zeros(1, 2, 6, 6)
    down[:, 0] = 1
    ramp = torch.arange(36.0).reshape(1, 1, 6, 6)  # from 5 rows of the grid on, the last stays
    assert psrl.warp(ramp, down)[0, 0, :5].round().tolist() == ramp[0, 0, 1:].tolist()
    assert psrl.warp(ramp, down)[0, 0, 5].round().tolist() == ramp[0, 0, 5].tolist()


def moved_square(rows, columns):
    """States of a square that moves by so many pixels, and an agent that rests, out of its way."""
    states = np.zeros((1, 2, 4))
    states[0, :, :2] = [[50.5 / 63, 12.5 / 63], [20.5 / 63, 30.5 / 63]]
    next_states = states.copy()
    next_states[0, 1, :2] += [rows / 63, columns / 63]
    return states, next_states, np.array([[1, 0]])


def frames_of(*moments, shapes):
    return [torch.from_numpy(sprites_env.draw(s[..., :2], shapes))[:, None] / 255 for s in moments]


def test_sign_and_order_of_the_flow():
    """Three columns to the right from k to k + 1: c_{k+1→k} is (0, -3) where the square is now, and
    fetches it from frame k; nothing is known beside the objects."""
    *moments, shapes = moved_square(0, 3)
    before, after = frames_of(*moments, shapes=shapes)
    flow, known = psrl.true_flow(*moments, shapes)
    assert flow.shape == (1, 2, 64, 64) and known.dtype == bool
    assert np.array_equal(known, after[:, 0].numpy() > 0)
    square = np.zeros((64, 64), bool)
    square[15:25, 28:38] = True
    assert np.unique(flow[0][:, square], axis=1).tolist() == [[0], [-3]]
    assert not flow[0][:, ~square].any()
    fetched = psrl.warp(before, torch.from_numpy(flow).float()).numpy()[:, 0]
    np.testing.assert_allclose(fetched[known], after[:, 0].numpy()[known], atol=1e-5)
    other_way = psrl.warp(before, -torch.from_numpy(flow).float()).numpy()[:, 0]
    assert abs(other_way - after[:, 0].numpy())[known].mean() > 0.1


def test_true_flow_of_everything_that_moves():
    """Against sprites_env.draw, object by object; where two overlap, nothing is known."""
    rng = np.random.default_rng(0)
    states, shapes = sprites_env.sample_states(rng, 40, 2)
    next_states = sprites_env.move(states)
    flow, known = psrl.true_flow(states, next_states, shapes)
    (before, after) = frames_of(states, next_states, shapes=shapes)
    fetched = psrl.warp(before, torch.from_numpy(flow).float())[:, 0].numpy()
    np.testing.assert_allclose(fetched[known], 1, atol=1e-5)
    drawn = [
        sprites_env.draw(next_states[:, k : k + 1, :2], shapes[:, k : k + 1]) for k in range(4)
    ]
    assert np.array_equal(known, (np.array(drawn) > 0).sum(0) == 1)
    assert known.sum() < (after.numpy() > 0).sum()
    assert 2 < np.abs(flow.transpose(0, 2, 3, 1)[known]).max() <= 4


def test_flow_of_cells_in_pixels():
    """A cell becomes four pixels, also in units, and its value is that of its middle."""
    flow = torch.zeros(1, 2, 16, 16)
    flow[:, 0] = 0.5
    flow[:, 1] = torch.arange(16.0)[:, None] / 16
    pixels = psrl.in_pixels(flow)
    assert pixels.shape == (1, 2, 64, 64) and (pixels[:, 0] == 2).all()
    expected = (torch.arange(2.0, 62) - 1.5) / 16
    torch.testing.assert_close(pixels[0, 1, 2:62, 7], expected)


def test_blur():
    """(3): exp(-d² / 2 / 1.5²) in both directions, black beyond the edge."""
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 30, 1] = 1
    blurred = psrl.blur(image)[0, 0]
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()
    expected = np.zeros((64, 64))
    expected[25:36, :7] = np.outer(weights, weights[4:])
    np.testing.assert_allclose(blurred, expected, atol=1e-6)
    np.testing.assert_allclose(psrl.blur(torch.ones(1, 1, 64, 64))[0, 0, 5:59, 5:59], 1, atol=1e-6)


def test_matching_loss_by_hand():
    """(3), on 4 x 4 pixels: I_a is .1 in column 2 and 0 elsewhere, I_b is 0. The flow has a step of
    3 between the rows 1 and 2, in both directions, then also one of 2 between the columns 1 and 2,
    in one; there, I_a differs by .1."""
    image_a, image_b, flow = (
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2, 2, 4, 4),
    )
    image_a[:, :, :, 2] = 0.1
    nothing_moves = 0.1 * 4 / 16
    assert psrl.matching_loss(image_a, image_b, flow).item() == pytest.approx(nothing_moves)
    assert psrl.matching_loss(image_b, image_a, flow).item() == pytest.approx(nothing_moves)
    flow[:, :, 2:] = 3
    rows = 2 * 4 * 3 / (2 * 3 * 4)  # two directions; no edge of the image between the rows
    loss = psrl.matching_loss(image_a, image_b, flow).item()
    assert loss == pytest.approx(nothing_moves + 0.01 * rows)
    flow[:, 0, :, 2:] += 2
    columns = 4 * 2 * math.exp(-10 * 0.1) / (2 * 4 * 3)
    loss = psrl.matching_loss(image_a, image_b, flow).item()
    assert loss == pytest.approx(nothing_moves + 0.01 * (rows + columns))


def test_the_right_flow_matches_and_the_wrong_one_does_not():
    """(3): the first image is fetched from the second, and not the other way round."""
    image_a, image_b = torch.zeros(2, 1, 1, 64, 64)
    image_a[..., 20:30, 20:30] = image_b[..., 22:32, 19:29] = 1
    flow = torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 64, 64)
    losses = [psrl.matching_loss(image_a, image_b, c).item() for c in (flow, 0 * flow, -flow)]
    assert losses[0] < 1e-5 and losses[2] > losses[1] > 0.01
    assert psrl.matching_loss(image_b, image_a, -flow).item() < 1e-5


def test_cosine_loss():
    """(6): -(0 + 24 / 25) / 2; in [-1, 1], and scale does not matter."""
    y_1, y_2 = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [8.0, 6.0]])
    assert psrl.cosine_loss(y_1, y_2).item() == pytest.approx(-0.48)
    y = torch.randn(5, 64)
    assert psrl.cosine_loss(y, 3 * y).item() == pytest.approx(-1)
    assert psrl.cosine_loss(y, -y).item() == pytest.approx(1)


def test_moved_distance():
    """(7): 1 for the guess that nothing moves, 0 for the truth, whatever the scale."""
    Z, Z_next, Z_hat = torch.randn(3, 4, 16, 16, 16)
    assert psrl.moved_distance(Z, Z_next, Z) == 1
    assert psrl.moved_distance(Z_next, Z_next, Z) == 0
    some = psrl.moved_distance(Z_hat, Z_next, Z).item()
    expected = (Z_hat - Z_next).abs().sum() / (Z_next - Z).abs().sum()
    assert some == pytest.approx(expected.item(), rel=1e-5)
    assert psrl.moved_distance(8 * Z_hat, 8 * Z_next, 8 * Z).item() == pytest.approx(some)
    two = torch.full((1, 1, 2, 2), 2.0)
    assert psrl.moved_distance(0 * two, two, 1.5 * two) == 2


# --- Equations: soft actor critic ------------------------------------------------------------


def test_polyak():
    """(8): with τ .01, new = .99 old + .01 fast."""
    slow, fast = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in fast.parameters()]
    expected = [0.99 * s + 0.01 * f for s, f in zip(slow.parameters(), fast.parameters())]
    psrl.polyak_(slow, fast, 0.01)
    torch.testing.assert_close(list(slow.parameters()), expected)
    assert all(torch.equal(p, old) for p, old in zip(fast.parameters(), before))


def test_soft_actor_critic_by_hand():
    """(9): 1 + .9 * 5, and nothing after a terminal state. (10): (1 + 4) / 2 + (0 + 9) / 2.
    (11): (.5 * -1 - 2 + .5 * 3 - 4) / 2. (12): -.5 (-3 + 1) / 2 for an entropy below its target."""
    y = psrl.td_target(torch.ones(2), torch.tensor([0.0, 1.0]), torch.full((2,), 5.0), 0.9)
    assert y.tolist() == pytest.approx([5.5, 1.0])
    q = torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    assert psrl.critic_loss(q, torch.tensor([1.0, 2.0])).item() == pytest.approx(7.0)
    loss = psrl.soft_actor_loss(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 3.0]), 0.5)
    assert loss.item() == pytest.approx(-2.5)
    log_alpha = torch.tensor(math.log(0.5), requires_grad=True)
    log_prob = torch.tensor([-1.0, 3.0], requires_grad=True)
    loss = psrl.temperature_loss(log_alpha, log_prob, -2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and log_prob.grad is None
    assert log_alpha.grad.item() == pytest.approx(0.5)


def log_density(u, mean, log_std):
    """(13), in float64."""
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    u = u.double()
    return (normal.log_prob(u) - (1 - u.tanh().square()).log()).sum(-1)


def test_samples_and_their_log_prob():
    """(13)"""
    mean, log_std = (0.5 * torch.randn(9999, 2)).requires_grad_(), torch.full((9999, 2), -1.0)
    log_std.requires_grad_()
    a, log_prob = psrl.sample_squashed(mean, log_std)
    deviation = (a.atanh() - mean) / math.exp(-1)
    assert deviation.mean(0).tolist() == pytest.approx([0, 0], abs=0.05)
    assert deviation.std(0).tolist() == pytest.approx([1, 1], abs=0.05)
    expected = log_density(a.atanh(), mean, log_std).float()
    torch.testing.assert_close(log_prob, expected, atol=1e-3, rtol=1e-3)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(a.sum(), (mean, log_std)))
    assert torch.isfinite(
        psrl.squashed_log_prob(torch.full((1, 2), 30.0), 0 * COLUMN, COLUMN)
    ).all()


def test_ridge_by_hand():
    """(14): x = y = -1, 1. G = ((1, -1), (-1, 1)), penalty 2: the prediction is x / 2. Means that
    differ from data to test data count."""
    x = torch.tensor([[-1.0], [1.0]])
    assert psrl.ridge_r2(x, x, x, x, 2.0).tolist() == pytest.approx([0.75])
    # fitted around 5, and m = 3: tested at 6 and 8, prediction 3.5 and 4.5, truth 2 and 4
    test, truth = torch.tensor([[6.0], [8.0]]), torch.tensor([[2.0], [4.0]])
    r2 = psrl.ridge_r2(x + 5, x + 3, test, truth, 2.0)
    assert r2.tolist() == pytest.approx([1 - (1.5**2 + 0.5**2) / 2])


@pytest.mark.parametrize(
    "broadcast",
    [
        lambda: psrl.td_target(ROW, COLUMN, ROW, 0.9),
        lambda: psrl.td_target(ROW, ROW, COLUMN, 0.9),
        lambda: psrl.critic_loss(torch.zeros(2, 4, 1), ROW),
        lambda: psrl.critic_loss(torch.zeros(2, 4), COLUMN),
        lambda: psrl.soft_actor_loss(COLUMN, ROW, 1.0),
        lambda: psrl.correlation_volume(torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4)),
        lambda: psrl.warp(torch.rand(2, 3, 4, 4), torch.zeros(1, 2, 4, 4)),
        lambda: psrl.warp(torch.rand(2, 3, 16, 16), torch.zeros(2, 2, 64, 64)),
        lambda: psrl.matching_loss(
            torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4), torch.zeros(2, 2, 4, 4)
        ),
        lambda: psrl.cosine_loss(torch.rand(4, 3), torch.rand(1, 3)),
        lambda: psrl.moved_distance(*torch.rand(2, 2, 3, 4, 4), torch.rand(1, 3, 4, 4)),
        lambda: psrl.moved_distance(torch.rand(1, 3, 4, 4), *torch.rand(2, 2, 3, 4, 4)),
    ],
)
def test_losses_refuse_to_broadcast(broadcast):
    with pytest.raises(AssertionError):
        broadcast()


# --- Updates ---------------------------------------------------------------------------------


def small(mode, **changes):
    """Arguments, an agent whose networks are all at places of their own, six transitions, and five
    windows of smooth images."""
    args = psrl.Args(**TINY | {"mode": mode, "frame_stack": 2} | changes)
    space = psrl.make_env(args, 1).single_observation_space
    agent = psrl.PSRLAgent(space, 2, args, torch.device("cpu"))
    with torch.no_grad():
        for network in networks(agent).values():
            for p in network:
                p.add_(0.1 * torch.randn_like(p))
    batch = {name: torch.rand(6, 2, 64, 64) for name in ("x", "x_next")}
    batch |= {"a": 2 * torch.rand(6, 2) - 1, "r": torch.randn(6)}
    batch |= {"terminated": torch.tensor([1.0, 0, 0, 1, 0, 0])}
    windows = {"x": torch.rand(5, 3, 2, 64, 64), "a": 2 * torch.rand(5, 2) - 1}
    return args, agent, batch, windows


def flow_loss_by_hand(agent, windows, mode):
    """(4), and c_{k+1→k} in cells. Every pair by itself."""
    now, soon, later = windows["x"].unbind(1)
    fast = [agent.fast.z(x) for x in (now, soon)]
    if mode == "cat":
        fast = [z.detach() for z in fast]
    slow = [agent.slow.z(x).detach() for x in (now, soon, later)]
    I_now, I_soon, I_later = (psrl.blur(x[:, -1:]) for x in (now, soon, later))
    pairs = [(fast[0], fast[1], I_now, I_soon), (slow[1], fast[0], I_soon, I_now)]
    loss, flows = 0, []
    for z_a, z_b, I_a, I_b in (*pairs, (slow[2], fast[1], I_later, I_soon)):
        flows.append(agent.correspondence(z_a, z_b))
        loss = loss + psrl.matching_loss(I_a, I_b, psrl.in_pixels(flows[-1]))
    return loss, flows[1]


def paired_similarity_by_hand(agent, windows, args):
    """(4) and (7) with their weights, and metrics."""
    loss, expected, Z_hats = 0, {}, {}
    if args.mode in MATCHED:
        flow_loss, flow = flow_loss_by_hand(agent, windows, args.mode)
        loss, expected["flow_loss"] = args.flow_weight * flow_loss, flow_loss.item()
    Z = agent.fast.Z(agent.fast.z(windows["x"][:, 0]))
    if args.mode in MOVED:
        Z_hats["tr"] = psrl.warp(Z, flow.detach())
    if args.mode in PREDICTED:
        Z_hats["pr"] = agent.transform(Z, windows["a"])
    Z_bar, Z_bar_next = (agent.slow.Z(agent.slow.z(windows["x"][:, i])).detach() for i in (0, 1))
    y = agent.slow.psi(Z_bar_next).detach()
    for name, Z_hat in Z_hats.items():
        y_hat = agent.phi(agent.fast.psi(Z_hat))
        cosine = ((y_hat * y).sum(1) / y_hat.norm(dim=1) / y.norm(dim=1)).mean()
        distance = (Z_hat - Z_bar_next).abs().mean() / (Z_bar_next - Z_bar).abs().mean()
        loss = loss + args.similarity_weight * (distance - cosine)
        expected |= {f"cosine_{name}": cosine.item(), f"distance_{name}": distance.item()}
        expected["sd_y"] = y.std(0).mean().item()
    return loss, expected


def check_step(loss, optimizer, update, still):
    """From stale gradients, `update` takes one step of Adam down `loss`, and leaves the parameters
    `still`, and those that the loss does not reach, alone. Returns what it returns, and what the
    loss reaches."""
    moving = optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss, moving, allow_unused=True)
    before = [p.detach().clone() for p in (*moving, *still)]
    for p in moving:
        p.grad = torch.full_like(p, 9.0)
    torch.manual_seed(1)
    result = update()
    for p, old, gradient in zip(moving, before, gradients):
        if gradient is None:
            assert p.grad is None and torch.equal(p, old)
            continue
        scale = gradient.abs().max().item()
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5 + 1e-3 * scale)
        clear, step = gradient.abs() > 1e-4, optimizer.param_groups[0]["lr"] * gradient.sign()
        clear &= gradient.abs() > 0.05 * scale
        assert clear.any()
        torch.testing.assert_close(p.detach()[clear], (old - step)[clear], rtol=0, atol=2e-5)
    assert all(torch.equal(p, old) for p, old in zip(still, before[len(moving) :]))
    return result, {p for p, gradient in zip(moving, gradients) if gradient is not None}


def sample_action(agent, h):
    """As the update will, from the same noise."""
    torch.manual_seed(1)
    mean, log_std = agent.actor(h)
    u = mean + log_std.exp() * torch.randn_like(mean)
    return u.tanh(), log_density(u, mean, log_std)


@pytest.mark.parametrize("mode", MODES)
def test_update_critic_and_features(mode):
    """Critic and encoder descend on (10), with a target (9) of the slow critic; with windows also
    on (4) and (7), as far as the mode has them, and the mode's other networks with them."""
    args, agent, batch, windows = small(
        mode, gamma=0.5, alpha=0.2, flow_weight=0.7, similarity_weight=1.3
    )
    for given in (None, windows) if mode != "rad" else (None,):
        with torch.no_grad():
            a_next, log_prob = sample_action(agent, agent.convolutions(batch["x_next"]))
            q_next = agent.critic_target(agent.encoder(batch["x_next"]), a_next).double().numpy()
            h = agent.convolutions(batch["x"])
        value = np.minimum(*q_next) - agent.log_alpha.exp().item() * log_prob.numpy()
        y = batch["r"].numpy() + 0.5 * np.where(batch["terminated"], 0, value)
        q, y = agent.critic(agent.encoder(batch["x"]), batch["a"]), torch.from_numpy(y).float()
        loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
        expected = {"critic_loss": loss.item(), "entropy": -log_prob.mean().item()}
        trained = {"encoder", "critic"}
        if given:
            more, more_expected = paired_similarity_by_hand(agent, windows, args)
            loss, expected, trained = loss + more, expected | more_expected, trained_in(mode)
        named = networks(agent)
        still = [p for name, ps in named.items() if name not in trained_in(mode) for p in ps]

        def update():
            return psrl.update_critic_and_features(agent, batch, given, args)  # noqa: B023

        (metrics, h_again), reached = check_step(loss, agent.optimizer, update, still)
        assert reached == {p for name in trained for p in named[name]}
        assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=1e-3)
        assert torch.equal(h_again, h) and not h_again.requires_grad
        assert not any(metric.requires_grad for metric in metrics.values())
        assert all(p.grad is None for p in still)
        for group in agent.optimizer.param_groups:  # a new start for the second round
            agent.optimizer = torch.optim.Adam(group["params"], lr=args.learning_rate)


@pytest.mark.parametrize("mode", sorted(MATCHED))
def test_update_flow(mode):
    """C, and of the others the features alone, descend on (4); in mode cat not even these. The
    weight of (4) does not count here."""
    args, agent, _, windows = small(mode, flow_weight=0.1)
    loss, _ = flow_loss_by_hand(agent, windows, mode)
    still = [p for name in ("actor", "critic_target", "slow") for p in networks(agent)[name]]

    def update():
        return psrl.update_flow(agent, windows, args)

    told, reached = check_step(loss, agent.optimizer, update, still)
    assert told.item() == pytest.approx(loss.item(), rel=1e-4) and not told.requires_grad
    features = set() if mode == "cat" else {*agent.fast.z.parameters()}
    assert reached == {*agent.correspondence.parameters()} | features
    assert all(p.grad is None for p in still)


def test_what_the_losses_do_not_reach():
    """(7) does not train C, which would warp to please ψ; its targets, from slow networks, have no
    gradient, nor do slow features in (4)."""
    args, agent, _, windows = small("full", flow_weight=0.0)
    for p in agent.slow.parameters():
        p.requires_grad_()  # even then
    loss, metrics = psrl.paired_similarity(agent, windows, args)
    loss.backward()
    assert not any(p.grad.any() for p in agent.correspondence.parameters())
    for network in (agent.fast.z, agent.fast.Z, agent.fast.psi, agent.phi, agent.transform):
        assert all(p.grad.any() for p in network.parameters())
    flow_loss, _ = psrl.flow_loss(agent, windows, *psrl.features_of(agent, windows), args)
    flow_loss.backward()
    assert all(p.grad is None for p in agent.slow.parameters())
    assert all(p.grad.any() for p in agent.correspondence.parameters())
    assert not any(value.requires_grad for value in metrics.values())


def test_sd_y_tells_a_collapse():
    """It is 0 when all y are equal."""
    args, agent, _, windows = small("cat")
    assert psrl.paired_similarity(agent, windows, args)[1]["sd_y"] > 0.05
    torch.nn.init.zeros_(agent.slow.psi[1].weight)
    assert psrl.paired_similarity(agent, windows, args)[1]["sd_y"] == 0


def test_update_actor_and_temperature():
    """The actor descends on (11), by way of its actions, α on (12); encoder and critic do not."""
    _, agent, batch, _ = small("full", alpha=0.2)
    h = agent.convolutions(batch["x"]).detach()
    a, log_prob = sample_action(agent, h)
    alpha = agent.log_alpha.exp()
    q = torch.minimum(*agent.critic(agent.encoder(batch["x"]).detach(), a))
    loss = (alpha.item() * log_prob - q).mean() - alpha * (log_prob.mean().item() - 2)

    def update():
        return psrl.update_actor_and_temperature(agent, h)

    trained = ("actor", "log_alpha")
    still = [p for name, ps in networks(agent).items() if name not in trained for p in ps]
    check_step(loss, agent.actor_optimizer, update, still)
    assert all(p.grad is None for p in agent.encoder.parameters())


def test_shuffled_actions_raise_the_loss():
    """The next frame is as bright as the action says, this one tells nothing. A G that has learnt
    it is lost with actions of others; one that learnt from those is no better than with its own."""
    action = torch.linspace(-1, 1, 16)[:, None] * torch.tensor([1.0, -1.0])
    x = torch.full((16, 3, 1, 64, 64), 0.5)
    x[:, 1:] = (1 + action[:, :1, None, None, None]) / 2
    order = torch.roll(torch.arange(16), 5)
    for shuffled in (False, True):
        torch.manual_seed(0)
        args, agent, batch, _ = small("aat", frame_stack=1, learning_rate=1e-2)
        batch = {name: value[:, :1] if value.ndim == 4 else value for name, value in batch.items()}
        for _ in range(40):
            a = action[torch.randperm(16)] if shuffled else action
            psrl.update_critic_and_features(agent, batch, {"x": x, "a": a}, args)
        true, wrong = (
            psrl.paired_similarity(agent, {"x": x, "a": a}, args)[1]["distance_pr"].item()
            for a in (action, action[order])
        )
        if shuffled:
            assert true > 0.7 * wrong
        else:
            assert true < 0.5 * wrong


# --- Data ------------------------------------------------------------------------------------


def test_random_shift():
    """A pixel at (10, 20) moves by pad - offset, in all frames of a stack alike; what comes in is
    black."""
    stacks = np.zeros((2, 2, 64, 64), np.uint8)
    stacks[:, :, 10, 20] = stacks[:, 1, 63, 0] = 255
    shifted = psrl.random_shift(stacks, np.array([[0, 3], [0, 6]]), 4)
    assert shifted.dtype == np.uint8
    assert [np.argwhere(x).tolist() for x in shifted[:, 0]] == [[[14, 24]], [[11, 18]]]
    assert shifted[:, 1].sum() == 2 * 255  # row 63 left upwards, column 0 to the left


def test_transitions_are_shifted_and_rewards_standardised():
    """Stacks with one bright pixel, at (30, 30) at first, then at (20, 25)."""
    args, agent, _, _ = small("full", pad=3, batch_size=300)
    stacks, successors = np.zeros((2, 300, 2, 64, 64), np.uint8)
    stacks[:, :, 30, 30] = successors[:, :, 20, 25] = 255
    a, r, terminated = np.zeros((300, 2)), np.arange(300.0), np.arange(300) % 2 == 0
    asked = []

    def sample(rng, batch):
        asked.append(batch)
        return stacks, a, r, successors, terminated

    replay = SimpleNamespace(sample=sample, reward_mean=3.0, reward_sd=2.0)
    batch = psrl.sample_transitions(replay, np.random.default_rng(0), agent, args)
    assert asked == [300] and {x.dtype for x in batch.values()} == {torch.float32}
    assert batch.keys() == {"x", "x_next", "a", "r", "terminated"}
    assert torch.equal(batch["a"], torch.zeros(300, 2))
    assert torch.equal(batch["r"], (torch.arange(300.0) - 3) / 2)
    assert torch.equal(batch["terminated"], (torch.arange(300) % 2 == 0).float())
    shifts = []
    for name, start in (("x", [[30], [30]]), ("x_next", [[20], [25]])):
        assert batch[name].max() == 1 and (batch[name].sum((2, 3)) == 1).all()
        at = np.stack(np.unravel_index(batch[name].flatten(2).argmax(-1).numpy(), (64, 64)))
        assert np.array_equal(at[..., 0], at[..., 1])
        shifts += list(at[..., 0] - start)
    assert all(set(x) == set(range(-3, 4)) for x in shifts)
    assert np.abs(np.corrcoef(shifts) - np.eye(4)).max() < 0.3


def told_replay():
    """Two rounds of five steps of two environments, of which eight steps are stored. A frame tells
    at (30, 33) where it belongs: 100 round + 10 t + environment + 1, the next one's t for what
    followed; actions say the same, twice."""
    space = SpritesVectorEnv(1).single_observation_space
    replay = psrl.FrameReplay(rounds=2, num_envs=2, horizon=5, space=space, action_dim=2, frames=2)
    for step in range(8):
        frames = np.zeros((2, 2, 1, 64, 64), np.uint8)
        code = 100 * (step // 5) + 10 * (step % 5) + np.array([1, 2])
        frames[0, :, 0, 30, 33], frames[1, :, 0, 30, 33] = code, code + 10
        rewards = code.astype(float)
        if step == 3:
            replay.measure_rewards()
        replay.add(frames[0], np.stack([code, code], 1), rewards, frames[1], code == 42)
    return replay


def test_replay_rebuilds_stacks_within_episodes():
    """Rewards are measured once, when they are asked for."""
    replay = told_replay()
    assert replay.size == 16 and replay.observations.nbytes == 2 * 6 * 2 * 4096
    assert replay.reward_mean == pytest.approx(11.5)
    assert replay.reward_sd == pytest.approx(np.std([1, 2, 11, 12, 21, 22]))
    sample = replay.sample(np.random.default_rng(0), 500)
    stacks, actions, rewards, successors, terminated = sample
    assert stacks.shape == successors.shape == (500, 2, 64, 64) and len(set(rewards)) == 16
    assert np.array_equal(actions, np.stack([rewards, rewards], 1))
    assert np.array_equal(terminated, rewards == 42)
    assert np.array_equal(stacks[:, 1, 30, 33], rewards)
    before = np.where(rewards % 100 < 10, rewards, rewards - 10)
    assert np.array_equal(stacks[:, 0, 30, 33], before)
    assert np.array_equal(successors[:, 0, 30, 33], rewards)
    assert np.array_equal(successors[:, 1, 30, 33], rewards + 10)


@pytest.mark.parametrize("mode", ["full", "full_shuffled_actions"])
def test_windows(mode):
    """Three successive steps of one episode, of what is stored; one shift for all; the action is
    that after the first step, but in the mode that gives it to another window."""
    args, agent, _, _ = small(mode, pad=3, windows=400)
    windows = psrl.sample_windows(told_replay(), np.random.default_rng(0), agent, args)
    x, a = windows["x"], windows["a"]
    assert x.shape == (400, 3, 2, 64, 64) and a.shape == (400, 2) and x.dtype == torch.float32
    codes = (255 * x.amax((3, 4))).round().int().numpy()  # (400, 3, 2)
    first = codes[:, 0, 1]
    # t up to 3 of the first round, as what followed its last step is stored; up to 1 of the second
    allowed = [1, 2, 11, 12, 21, 22, 31, 32, 101, 102, 111, 112]
    assert sorted(set(first)) == allowed
    newest = first[:, None] + np.array([0, 10, 20])
    assert np.array_equal(codes[:, :, 1], newest)
    before = np.where(newest % 100 < 10, newest, newest - 10)
    assert np.array_equal(codes[:, :, 0], before)

    at = np.stack(np.unravel_index(x.flatten(3).argmax(-1).numpy(), (64, 64)))  # (2, 400, 3, 2)
    assert (at == at[:, :, :1, :1]).all() and (x.sum((3, 4)) == x.amax((3, 4))).all()
    shifts = at[:, :, 0, 0] - np.array([[30], [33]])
    assert all(set(row) == set(range(-3, 4)) for row in shifts)
    assert abs(np.corrcoef(shifts)[0, 1]) < 0.3

    a = a.numpy()
    assert np.array_equal(a[:, 0], a[:, 1])
    if mode == "full":
        assert np.array_equal(a[:, 0], first)
    else:
        assert np.array_equal(np.sort(a[:, 0]), np.sort(first))
        assert (a[:, 0] == first).mean() < 0.3


def test_a_window_needs_three_observations():
    """Two steps and what followed the second are enough."""
    args, agent, _, _ = small("full", pad=0, windows=20)
    replay = told_replay()
    replay.size = 4
    x = psrl.sample_windows(replay, np.random.default_rng(0), agent, args)["x"]
    codes = (255 * x[:, :, 1].amax((2, 3))).round().int().tolist()
    assert sorted(set(map(tuple, codes))) == [(1, 11, 21), (2, 12, 22)]


def test_a_policy_remembers_what_the_replay_would_show():
    policy = psrl.remembering(lambda stacks: stacks[0, :, 0, 0].tolist(), 3)
    seen = [policy(np.full((2, 1, 1, 1), t)) for t in range(4)]
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


# --- Measures --------------------------------------------------------------------------------


def test_steps_of():
    """Every step from where a stack is full, with the states that its last frame shows, in episodes
    that are not those of the evaluation; the actions are those for the stacks."""
    seen, rng = [], np.random.default_rng(0)

    def act(stacks):
        seen.append(stacks)
        return rng.uniform(-1, 1, (3, 2))

    stacks, states, shapes = psrl.steps_of(act, SpritesVectorEnv(3, 1), 4)
    assert stacks.shape == (3, 37, 4, 64, 64) and states.shape == (3, 37, 3, 4)
    env, rng = SpritesVectorEnv(3, 1), np.random.default_rng(0)
    env.reset(seed=10**9 + 50_000)
    assert np.array_equal(shapes, env.shapes)
    drawn = []
    for t in range(40):
        drawn.append(sprites_env.draw(env.states[..., :2], shapes))
        if t >= 3:
            assert np.array_equal(states[:, t - 3], env.states)
            assert np.array_equal(stacks[:, t - 3], np.stack(drawn[-4:], axis=1))
            assert np.array_equal(seen[t], stacks[:, t - 3])
        env.step(rng.uniform(-1, 1, (3, 2)))


def scripted_agent(flow):
    """An agent whose slow features tell the next stack apart from the last, and whose C answers
    with `flow` in cells, if it is asked about the next one and then the last."""

    def correspondence(z_next, z):
        assert z_next[0] == "slow" and z[0] == "fast"
        assert z_next[1].shape == z[1].shape and z_next[1].ndim == 4
        return flow if isinstance(flow, torch.Tensor) else flow(z_next[1], z[1])

    fast, slow = (SimpleNamespace(z=lambda x, name=name: (name, x)) for name in ("fast", "slow"))
    parts = {"fast": fast, "slow": slow, "correspondence": correspondence}
    return SimpleNamespace(**parts, device=torch.device("cpu"))


def test_estimated_flow():
    """c_{k+1→k} in pixels, and what it fetches from the blurred newest frame of k."""
    agent = scripted_agent(torch.tensor([0.0, -0.75]).reshape(1, 2, 1, 1).expand(1, 2, 16, 16))
    *moments, shapes = moved_square(0, 3)
    before, after = frames_of(*moments, shapes=shapes)
    empty = torch.zeros_like(before)
    flow, fetched = psrl.estimated_flow(
        agent, torch.cat([empty, before], 1), torch.cat([before, after], 1)
    )
    assert flow.shape == (1, 2, 64, 64) and (flow[:, 0] == 0).all() and (flow[:, 1] == -3).all()
    right = (slice(None), slice(5, 40))  # of the square; the agent rests, and is fetched wrongly
    torch.testing.assert_close(fetched[right], psrl.blur(after)[:, 0][right], rtol=0, atol=1e-5)


def test_flow_errors():
    """Two moments of four count: the first and the fifth. In the first the square moves by two rows
    and -1 column, its C says 2, 0; in the other all rests, and C says so of everything."""
    states, moved, shapes = moved_square(2, -1)
    states = np.stack([states, moved, moved, moved, moved, moved], axis=1)  # (1, 6, 2, 4)
    frames = np.stack([sprites_env.draw(s[None, :, :2], shapes) for s in states[0]], axis=1)
    stacks = np.stack([0 * frames, frames], axis=2)  # (1, 6, 2, 64, 64)

    def C(x_next, x):
        moving = 0.0 if torch.equal(x_next, x) else -0.5
        return torch.tensor([moving, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 16, 16)

    errors = psrl.flow_errors(scripted_agent(C), stacks, states, shapes)
    square = 100
    circle = (sprites_env.draw(moved[:, :1, :2], shapes[:, :1]) > 0).sum()
    total = 2 * (square + circle)
    assert errors["flow_error"] == pytest.approx((square * 1 + circle * 2) / total)
    assert errors["flow_error_zero"] == pytest.approx(square * math.sqrt(5) / total)
    before, after = (psrl.blur(torch.from_numpy(x[None, None] / 255)) for x in frames[0, :2])
    known = psrl.true_flow(states[:, 0], states[:, 1], shapes)[1]
    down = torch.tensor([-2.0, 0]).double().reshape(1, 2, 1, 1).expand(1, 2, 64, 64)
    for name, guess in (("residual", psrl.warp(before, down)), ("residual_zero", before)):
        expected = (guess - after).abs()[0].numpy()[known].sum() / total
        assert errors[name] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert list(errors) == ["flow_error", "flow_error_zero", "residual", "residual_zero"]


def test_probe():
    """Codes that hold one quantity are good for that one, in episodes not fitted to."""
    states = np.random.default_rng(0).random((40, 10, 4, 4))
    agent, target = states[:, :, 0, :2], states[:, :, 1, :2]
    quantities = {"agent": agent, "target": target, "relative_position": target - agent}
    quantities["target_velocity"] = states[:, :, 1, 2:]
    quantities["distractors"] = np.concatenate([states[:, :, 2, :2], states[:, :, 3, :2]], axis=-1)
    for name, quantity in quantities.items():
        r2 = psrl.probe(torch.from_numpy(quantity).float(), states)
        assert r2.keys() == quantities.keys() and r2[name] > 0.99
        assert all(value < 0.6 for other, value in r2.items() if other != name)
    assert "distractors" not in psrl.probe(torch.randn(40, 10, 3), states[:, :, :2])
    assert max(psrl.probe(torch.randn(40, 10, 300), states).values()) < 0.1


def test_examine(monkeypatch):
    """In episodes of random actions: probes of code, features, and features of the start, at every
    fourth step; flow errors of all; a picture of six moments of the middle."""
    args, agent, _, _ = small("full", distractors=2)
    other = small("full")[1].fast.z
    rng = np.random.default_rng(0)
    stacks, states, shapes = psrl.steps_of(
        lambda _: rng.uniform(-1, 1, (8, 2)), SpritesVectorEnv(8, 2), 2
    )
    frames, expected = torch.from_numpy(stacks[:, 1::4] / np.float32(255)), {}
    for name, encoder in (("", agent.encoder), ("_features", agent.fast.z), ("_random", other)):
        codes = encoder(frames.flatten(0, 1)).detach().reshape(8, frames.shape[1], -1)
        expected[name] = psrl.probe(codes, states[:, 1::4])
    saved = {}
    monkeypatch.setattr(psrl, "draw_flows", lambda *parts: parts)
    place = SimpleNamespace(save=saved.__setitem__, device=torch.device("cpu"))
    summary = psrl.examine(place, agent, other, args)
    errors = psrl.flow_errors(agent, stacks, states, shapes)
    assert {name: summary.pop(name) for name in errors} == pytest.approx(errors)
    assert summary.keys() == {"probe_r2", "probe_r2_features", "probe_r2_random_features"}
    assert summary["probe_r2"] == pytest.approx(expected[""], abs=5e-3)
    assert summary["probe_r2_features"] == pytest.approx(expected["_features"], abs=5e-3)
    assert summary["probe_r2_random_features"] == pytest.approx(expected["_random"], abs=5e-3)
    assert summary["probe_r2"].keys() >= {"agent", "distractors", "target_velocity"}
    _, *drawn = saved["flow.png"]
    middle = slice(18, 20)
    for part, whole in zip(drawn, (stacks[:6, middle], states[:6, middle], shapes[:6])):
        assert np.array_equal(part, whole)


# --- Pictures --------------------------------------------------------------------------------


def test_pictures():
    """Arrows point to where the object went, three times as far; a film has a frame for a step."""
    axis = Figure().subplots()
    known = np.zeros((64, 64), bool)
    known[8:16, 20:24] = True  # two cells, with the centres (10, 22) and (14, 22)
    flow = np.zeros((2, 64, 64))
    flow[0], flow[1] = -1, 2  # came from a row above, two columns to the right
    psrl.draw_motion(axis, np.zeros((64, 64)), flow, known)
    (arrows,) = (part for part in axis.collections if hasattr(part, "U"))
    assert arrows.XY.tolist() == [[22, 10], [22, 14]]
    assert arrows.U.tolist() == [-2, -2] and arrows.V.tolist() == [1, 1]
    assert arrows.scale == 1 / 3 and arrows.angles == arrows.scale_units == "xy"
    assert axis.yaxis_inverted()  # rows go downwards

    _, agent, _, _ = small("full")
    stacks, states, shapes = psrl.steps_of(lambda _: np.zeros((2, 2)), SpritesVectorEnv(2), 2)
    film = psrl.draw_flow_film(agent, stacks[:, :3], states[:, :3], shapes)
    assert len(film) == 2 and film[0][0].shape == (128, 480, 3) and film[0][0].std() > 10
    figure = psrl.draw_flows(agent, stacks[:, 4:6], states[:, 4:6], shapes)
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert len(pictures) == 10
    for i in (0, 1):
        x, x_next = (torch.from_numpy(stacks[i : i + 1, t] / np.float32(255)) for t in (4, 5))
        _, fetched = psrl.estimated_flow(agent, x, x_next)
        left = psrl.blur(x_next[:, -1:])[0, 0] - fetched[0]
        shown = [x[0, -1], x_next[0, -1], x_next[0, -1], fetched[0], left]
        for picture, expected in zip(pictures[i::2], shown):
            np.testing.assert_allclose(picture, expected, atol=1e-5)


# --- Training --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_files_columns_and_keys(tmp_path, monkeypatch, mode, capsys):
    """What the mode has; one run is drawn."""
    distractors, draw = MODES.index(mode) % 3, psrl.draw_flow_film
    if mode != "full":
        no_pictures(monkeypatch)
    monkeypatch.setattr(psrl, "draw_flow_film", lambda a, x, s, k: draw(a, x[:, :3], s[:, :3], k))
    if mode == "rad":
        monkeypatch.setattr(psrl, "sample_windows", None)  # it does without
    summary = run(tmp_path, mode=mode, distractors=distractors)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    expected = {"eval_return_mean", "eval_return_std", "eval_episodes", "score"}
    expected |= {"updates", "minutes", "probe_r2", "probe_r2_features", "probe_r2_random_features"}
    files = {"args.json", "checkpoint.pt", "curve.csv", "curve.png", "rollout.gif", "summary.json"}
    columns = {"step", "eval_return", "train_return", "alpha", "critic_loss", "entropy"}
    if mode in MATCHED:
        expected |= {"flow_error", "flow_error_zero", "residual", "residual_zero"}
        files |= {"flow.png", "flow.gif"}
        columns |= {"flow_loss"}
    columns |= {"cosine_tr", "distance_tr", "sd_y"} if mode in MOVED else set()
    columns |= {"cosine_pr", "distance_pr", "sd_y"} if mode in PREDICTED else set()
    assert summary.keys() == expected and summary["updates"] == 8
    assert len(summary["probe_r2"]) == 4 + bool(distractors)
    assert untimed_rows(tmp_path)[0].keys() == columns
    assert {path.name for path in tmp_path.iterdir()} == files
    if mode == "full":
        assert all((tmp_path / name).stat().st_size > 100 for name in files)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in saved["actor"].values())


def test_one_seed_one_curve_and_nothing_but_rad_without_the_new_losses(tmp_path, monkeypatch):
    """Mode full twice; and without weights and flow updates the same numbers as mode rad."""
    no_pictures(monkeypatch)
    off = {"flow_weight": 0.0, "similarity_weight": 0.0, "flow_updates": 0}
    runs = {"full": {}, "again": {}, "rad": {"mode": "rad"}, "off": off}
    rows, summaries = {}, {}
    for name, changes in runs.items():
        summaries[name] = run(tmp_path / name, **changes) | {"minutes": 0}
        rows[name] = untimed_rows(tmp_path / name)
    assert summaries["full"] == summaries["again"]
    assert rows["full"] == rows["again"] and len(rows["rad"]) == len(rows["off"]) > 1
    shared = rows["rad"][0].keys()
    assert {"eval_return", "critic_loss", "alpha", "entropy"} < shared
    assert [{k: row[k] for k in shared} for row in rows["off"]] == rows["rad"]
    assert rows["full"][-1]["critic_loss"] != rows["rad"][-1]["critic_loss"]
    weights = [
        torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("rad", "off")
    ]
    for name in ("encoder", "actor"):
        torch.testing.assert_close(*(dict(w[name]) for w in weights), rtol=0, atol=0)


class Terminal(SpritesVectorEnv):
    """Its episodes end in a final state, not at a time limit."""

    def step(self, actions):
        obs, rewards, terminated, truncated, info = super().step(actions)
        return obs, rewards, truncated, terminated, info


class Watched(psrl.FrameReplay):
    """It can be looked at after a run."""

    def __init__(self, *args):
        super().__init__(*args)
        Watched.last = self


class Puppet(psrl.PSRLAgent):
    """An agent that acts .5 with noise and -.25 without, and remembers what it saw."""

    def __init__(self, *args):
        super().__init__(*args)
        Puppet.last, self.seen = self, {True: [], False: []}

    def act(self, obs, noise=False):
        self.seen[noise].append(obs)
        return np.full((len(obs), 2), 0.5 if noise else -0.25)


PUPPETS = {"initial_steps": 99, "updates": 3, "seed": 3, "eval_episodes": 5, "tau": 0.3}
PUPPETS |= {"learning_rate": 0.1, "total_steps": 239, "z_dim": 5, "flow_updates": 7, "mode": "cat"}


@pytest.fixture(scope="module", params=[SpritesVectorEnv, Terminal])
def puppets(request, tmp_path_factory):
    """80 steps of 2 environments, the first 50 at random, then seven updates of the flow, and three
    updates after each step, 93 in all. The updates only count: the n-th sets a bias of critic and
    features, α and the metrics to n."""
    seen = SimpleNamespace(seeds=set(), rates=[], acting=[], terminal=request.param is Terminal)
    seen.flow, seen.windows, seen.film = [], [], []
    reset, seen.folder = SpritesVectorEnv.reset, tmp_path_factory.mktemp("run")

    def watched_reset(env, seed=None, options=None):
        seen.seeds.add((env.num_envs, seed))
        return reset(env, seed=seed)

    def update_flow(agent, windows, args):
        assert windows["x"].shape == (3, 3, 3, 64, 64) and args.flow_updates == 7
        seen.flow.append((len(seen.rates), Watched.last.size))

    def update_critic_and_features(agent, batch, windows, args):
        optimizers = agent.optimizer, agent.actor_optimizer
        seen.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        n = len(seen.rates)
        torch.nn.init.constant_(agent.critic.heads[0][-1].bias, n)
        torch.nn.init.constant_(agent.fast.z[0].bias, n)
        assert len(batch["x"]) == 4
        metrics = {"critic_loss": torch.tensor(n)}
        if windows:
            assert windows["x"].shape == (3, 3, 3, 64, 64)
            seen.windows.append(n)
            metrics["distance_tr"] = torch.tensor(n)
        return metrics, n

    def update_actor_and_temperature(agent, h):
        seen.acting.append(h)
        torch.nn.init.constant_(agent.log_alpha, math.log(h))

    with pytest.MonkeyPatch.context() as patch:
        no_pictures(patch)
        patch.setattr(psrl, "draw_flow_film", lambda *parts: seen.film.extend(parts))
        patch.setattr(psrl, "PROBE_EPISODES", 8)
        patch.setattr(sprites_env, "SpritesVectorEnv", request.param)
        patch.setattr(SpritesVectorEnv, "reset", watched_reset)
        patch.setattr(psrl, "FrameReplay", Watched)
        patch.setattr(psrl, "PSRLAgent", Puppet)
        for update in (update_flow, update_critic_and_features, update_actor_and_temperature):
            patch.setattr(psrl, update.__name__, update)
        seen.summary = run(seen.folder, **PUPPETS)
    seen.agent, seen.replay = Puppet.last, Watched.last
    seen.rows = [{k: float(v) for k, v in row.items()} for row in untimed_rows(seen.folder)]
    return seen


def test_updates_in_their_order(puppets):
    """The flow first; rates fall; windows at every fourth update; the actor moves, and slow copies
    follow, at every second one."""
    assert puppets.flow == [(0, 100)] * 7
    assert puppets.summary["updates"] == len(puppets.rates) == 93
    expected = 0.1 * (1 - np.arange(93) / 93)
    np.testing.assert_allclose(puppets.rates, np.stack([expected, expected], axis=1))
    assert puppets.windows == list(range(1, 94, 4)) and puppets.acting == list(range(2, 93, 2))
    slow = 0
    for n in puppets.acting:
        slow += 0.3 * (n - slow)
    agent = puppets.agent
    assert agent.critic_target.heads[0][-1].bias.item() == pytest.approx(slow)
    assert agent.slow.z[0].bias[0].item() == pytest.approx(slow)


def test_what_is_seen_done_and_stored(puppets):
    """At random, then with noise. A stack starts anew with its episode, an episode's last frame is
    stored as its own, a time limit is no termination. Evaluation and measures have their seeds."""
    seeds = {(2, 300_000), (5, 10**9), (4, 10**9), (8, 10**9 + 50_000), (2, 10**9 + 50_000)}
    assert puppets.seeds == seeds
    replay, stacks = puppets.replay, puppets.agent.seen[True]
    assert replay.size == len(stacks) * 2 == 160
    actions = replay.actions.reshape(80, 2, 2)
    assert (actions[50:] == 0.5).all() and 0.5 < actions[:50].std() < 0.65
    assert np.abs(actions[:50]).max() > 0.95 and not (actions[:50] == 0.5).any()
    episodes = sprites_env.Episodes(SpritesVectorEnv(2), 300_000)
    for t in range(80):
        if t % 40 == 0:
            frames = [episodes.obs] * 3
        assert np.array_equal(stacks[t], np.concatenate(frames[-3:], axis=1))
        successors, rewards, _, truncated = episodes.step(actions[t])
        stored = replay.observations[t // 40, t % 40 : t % 40 + 2]
        assert np.array_equal(stored, [frames[-1], successors])
        frames.append(successors)
        new = slice(2 * t, 2 * t + 2)
        assert replay.rewards[new] == pytest.approx(rewards)
        assert np.array_equal(replay.terminated[new], truncated & puppets.terminal)
    mean = 0 if puppets.terminal else replay.rewards[:100].mean()
    assert replay.reward_mean == pytest.approx(mean)
    assert replay.reward_sd == pytest.approx(replay.rewards[:100].std())


def test_reports(puppets):
    """At the first update, then at every twentieth of the run: metrics of the last update that had
    them, the last episode of each environment, and the acting without noise."""
    rows, summary = puppets.rows, puppets.summary
    steps = [50, *range(52, 81, 4)]
    updates = [3 * (step - 49) for step in steps]
    assert [row["step"] for row in rows] == [2 * step for step in steps]
    assert [row["critic_loss"] for row in rows] == updates
    assert [row["distance_tr"] for row in rows] == [(n - 1) // 4 * 4 + 1 for n in updates]
    assert [row["alpha"] for row in rows] == pytest.approx([n // 2 * 2 for n in updates])
    returns = puppets.replay.rewards.reshape(2, 40, 2).sum(1).mean(1)
    expected = [returns[step // 80] for step in steps]
    assert [row["train_return"] for row in rows] == pytest.approx(expected)

    returns = sprites_env.evaluate(lambda obs: np.full((5, 2), -0.25), SpritesVectorEnv(5))
    assert [row["eval_return"] for row in rows] == pytest.approx([returns.mean()] * 9)
    expected = {"eval_return_mean": returns.mean(), "eval_return_std": returns.std()}
    expected |= {"eval_episodes": 5, "score": (returns.mean() - 28.2) / 10.7}
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    stacks = puppets.agent.seen[False]
    assert [len(x) for x in stacks] == [5] * 9 * 40 + [4] * 40 + [2] * 40
    fresh = [(x[:, 0] == x[:, 2]).all() for x in stacks]
    assert all(fresh[::40]) and sum(fresh) == 11


def test_checkpoint_film_and_features_of_the_start(puppets):
    saved = torch.load(puppets.folder / "checkpoint.pt", weights_only=True)
    assert saved.keys() == {"encoder", "actor", "step"} and saved["step"] == 160
    for name in ("encoder", "actor"):
        expected = dict(getattr(puppets.agent, name).state_dict())
        torch.testing.assert_close(saved[name], expected, rtol=0, atol=0)
    agent, stacks, states, _ = puppets.film
    assert agent is puppets.agent and stacks.shape == (2, 38, 3, 64, 64)
    velocity = states[:, 1:, 0, 2:]  # the policy's own, as far as no wall was in its way
    assert (np.abs(velocity) == pytest.approx(0.0125)) and states.shape == (2, 38, 2, 4)

    torch.manual_seed(3)
    args, space = psrl.Args(**TINY | PUPPETS), SpritesVectorEnv().single_observation_space
    agent, rng = psrl.PSRLAgent(space, 2, args, torch.device("cpu")), np.random.default_rng(0)
    random = lambda _: rng.uniform(-1, 1, (8, 2))  # noqa: E731
    stacks, states, _ = psrl.steps_of(random, SpritesVectorEnv(8), 3)
    codes = psrl.encode_stacks(agent.fast.z, stacks[:, 1::4], agent.device)
    assert codes.shape == (8, 10, 32 * 16 * 16)
    expected = psrl.probe(codes, states[:, 1::4])
    assert puppets.summary["probe_r2_random_features"] == pytest.approx(expected, abs=5e-3)


def test_an_episode_that_ends_alone_is_refused(tmp_path, monkeypatch):
    """Stacks are rebuilt from episodes of equal length."""

    class Uneven(SpritesVectorEnv):
        def step(self, actions):
            obs, rewards, terminated, truncated, info = super().step(actions)
            terminated[0] = True
            return obs, rewards, terminated, truncated, {"final_obs": obs}

    monkeypatch.setattr(sprites_env, "SpritesVectorEnv", Uneven)
    with pytest.raises(SystemExit, match="error: all episodes must have 40 steps"):
        run(tmp_path, mode="rad")


def test_the_flow_learns_from_frames_alone():
    """Seconds: 120 updates, and it errs by less than half of what no flow does, on pixels of other
    episodes; of what differs between blurred frames less than half is left there."""
    rng, space = np.random.default_rng(0), SpritesVectorEnv().single_observation_space
    args = psrl.Args(num_envs=10, total_steps=1200, windows=8, mode="full", torch_threads=1)
    agent = psrl.PSRLAgent(space, 2, args, torch.device("cpu"))
    replay = psrl.FrameReplay(1, 10, 40, space, 2, 3)
    episodes = sprites_env.Episodes(psrl.make_env(args, 10), 5)
    for _ in range(40):
        obs, action = episodes.obs, rng.uniform(-1, 1, (10, 2))
        successors, reward, terminated, _ = episodes.step(action)
        replay.add(obs, action, reward, successors, terminated)
    for _ in range(120):
        psrl.update_flow(agent, psrl.sample_windows(replay, rng, agent, args), args)
    random = lambda _: rng.uniform(-1, 1, (8, 2))  # noqa: E731
    errors = psrl.flow_errors(agent, *psrl.steps_of(random, psrl.make_env(args, 8), 3))
    assert errors["flow_error"] < 0.5 * errors["flow_error_zero"]
    assert errors["residual"] < 0.5 * errors["residual_zero"]
    windows = psrl.sample_windows(replay, rng, agent, args)
    loss, _ = psrl.flow_loss(agent, windows, *psrl.features_of(agent, windows), args)
    images = [psrl.blur(x[:, -1:]) for x in windows["x"].unbind(1)]
    pairs = ((0, 1), (1, 0), (2, 1))
    still = sum((images[i] - images[j]).abs().mean() for i, j in pairs)
    assert loss < 0.45 * still


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 79}, "--total-steps must be at least 160, in rounds of 80"),
        ({"total_steps": 79, "initial_steps": 10}, "--total-steps must be at least 80"),
        ({"initial_steps": 170}, "--total-steps must be at least 240"),
        ({"frame_stack": 40}, "--frame-stack must be less than the 40"),
        ({"batch_size": 0}, "--batch-size must be positive"),
        ({"windows": 0}, "--windows must be positive"),
        ({"gamma": 1.0}, "--gamma"),
        ({"tau": 1.5}, "--tau"),
        ({"alpha": 0.0}, "--alpha must be positive"),
        ({"pad": -1}, "--pad"),
        ({"flow_updates": -1}, "--flow-updates must be 0 or more"),
        ({"flow_weight": -0.5}, "--flow-weight must be 0 or more"),
        ({"similarity_weight": math.inf}, "--similarity-weight must be 0 or more"),
        ({"frame_stack": 0}, "--frame-stack must be positive"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive"),
        ({"seed": 10_000}, "--seed"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "_".join(map(str, x)),
)
def test_bad_input_ends_with_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_names_and_what_is_allowed():
    args = psrl.Args(mode="rad", distractors=2, seed=7)
    assert args.run_name == "rad_d2_s7" and args.first_update == 20
    assert args.environment == {"distractors": 2, "observation": "image"}
    off = {"flow_weight": 0.0, "similarity_weight": 0.0, "flow_updates": 0, "pad": 0, "gamma": 0.0}
    args = psrl.Args(**off, batch_size=1, windows=1, initial_steps=1, frame_stack=39, tau=1.0)
    assert args.first_update == 3  # a window needs three steps
    assert psrl.Args(initial_steps=101, num_envs=25).first_update == 5
