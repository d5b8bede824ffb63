"""curl.py: equations by hand, data, wiring of the six modes, learning, bad input."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import curl
import sprites_env

TINY = {"total_steps": 160, "num_envs": 2, "initial_steps": 100, "updates": 1, "batch_size": 8}
TINY |= {"hidden": 8, "z_dim": 8, "eval_episodes": 3, "torch_threads": 1}
TINY |= {"device": "cpu"}
MODES = curl.Mode.__args__


def run(out, **changes):
    return curl.train(curl.Args(**TINY | changes, out=str(out)))


@pytest.fixture
def quick(monkeypatch):
    """A smaller probe and no pictures."""
    monkeypatch.setattr(curl, "PROBE_EPISODES", 8)
    for name in ("plot_curve", "plot_neighbours", "save_gif"):
        monkeypatch.setattr(curl, name, lambda *_: None)


def watch(monkeypatch, name):
    """The arguments of every call of one of curl's functions."""
    calls, function = [], getattr(curl, name)
    monkeypatch.setattr(curl, name, lambda *args: calls.append(args) or function(*args))
    return calls


# --- Equations -------------------------------------------------------------------------------


def random_views(seed=0, batch=5, size=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, size), (batch, size), (size, size)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def test_bilinear_logits_and_loss_by_hand():
    """Rows of q W are (1, 2) and (0, 2); products (3, 2) and (2, 2); minus the row's maximum."""
    q, k = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 1], [0, 1]])
    logits = curl.bilinear_logits(q, k, torch.tensor([[1.0, 2], [0, 1]]))
    assert logits.tolist() == [[0, -1], [0, 0]]
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert curl.info_nce_loss(logits).item() == pytest.approx(expected)
    # the second column wins the first row, the first the second: nobody finds its key
    assert curl.info_nce_loss(torch.tensor([[0.0, 2], [1, 0]])).item() == pytest.approx(
        (math.log(1 + math.exp(2)) + math.log(1 + math.exp(1))) / 2
    )


def test_a_loss_that_knows_nothing_is_log_b():
    q, k, _ = random_views(batch=7)
    logits = curl.bilinear_logits(q, k, torch.zeros(3, 3, dtype=torch.float64))
    assert curl.info_nce_loss(logits).item() == pytest.approx(math.log(7), abs=1e-12)


def test_the_row_maximum_changes_neither_loss_nor_gradient():
    views = random_views()
    loss = curl.info_nce_loss(curl.bilinear_logits(*views))
    q, k, W = views
    plain = torch.nn.functional.cross_entropy(q @ W @ k.T, torch.arange(5))
    assert loss.item() == pytest.approx(plain.item(), abs=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, views), torch.autograd.grad(plain, views)):
        assert torch.allclose(ours, theirs, atol=1e-12) and ours.abs().sum() > 0


def test_loss_does_not_depend_on_the_order_of_the_pairs():
    q, k, W = random_views()
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = curl.info_nce_loss(curl.bilinear_logits(q, k, W)).item()
    shuffled = curl.info_nce_loss(curl.bilinear_logits(q[order], k[order], W)).item()
    assert loss == pytest.approx(shuffled, abs=1e-12)
    wrong = curl.info_nce_loss(curl.bilinear_logits(q, k[order], W)).item()
    assert abs(loss - wrong) > 0.01


def test_top_1_accuracy():
    logits = torch.tensor([[0.0, -1, -2], [0, -1, -2], [-1, -1, 0]])
    assert curl.top_1_accuracy(logits).item() == pytest.approx(2 / 3)


def test_soft_actor_critic_by_hand():
    r, terminated, value = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.full((2,), 5.0)
    assert curl.td_target(r, terminated, value, 0.9).tolist() == pytest.approx([5.5, 1.0])
    q = torch.tensor([[2.0, 0.0], [1.0, 5.0]])  # (1 + 4) / 2 + (0 + 9) / 2
    assert curl.critic_loss(q, torch.tensor([1.0, 2.0])).item() == pytest.approx(7.0)
    loss = curl.soft_actor_loss(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 3.0]), 0.5)
    assert loss.item() == pytest.approx(-2.5)  # (.5 * -1 - 2 + .5 * 3 - 4) / 2


def test_temperature_by_hand():
    """alpha .5, log pi (-1, 3), target entropy -2: -.5 (-3 + 1) / 2. The entropy, -1, is above its
    target: descending lowers alpha."""
    log_alpha = torch.tensor(math.log(0.5), requires_grad=True)
    log_prob = torch.tensor([-1.0, 3.0], requires_grad=True)
    loss = curl.temperature_loss(log_alpha, log_prob, -2)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    assert log_alpha.grad.item() == pytest.approx(0.5) and log_prob.grad is None


def test_squashed_log_prob():
    """u = .5 under N(0, 1): -.9189 - .125 - log(1 - tanh(.5)^2) = -1.0439 + .2402."""
    zero, half = torch.zeros(1, 1), torch.full((1, 1), 0.5)
    assert curl.squashed_log_prob(half, zero, zero).item() == pytest.approx(-0.8037, abs=1e-4)
    a = torch.linspace(-0.9999, 0.9999, 20_001, dtype=torch.float64)[:, None]  # a density
    mean, log_std = torch.full_like(a, 0.3), torch.full_like(a, -0.5)
    density = curl.squashed_log_prob(a.atanh(), mean, log_std).exp()
    assert torch.trapezoid(density, a[:, 0]).item() == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(curl.squashed_log_prob(60 * half, zero, zero)).all()


def test_polyak():
    slow, fast = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    before = slow.weight.item()
    curl.polyak_(slow, fast, 0.05)
    assert slow.weight.item() == pytest.approx(0.05 * fast.weight.item() + 0.95 * before)


def test_ridge_by_hand():
    """x = y = -1, 1: K = ((1, -1), (-1, 1)); with lambda 2 the prediction is x / 2."""
    x = torch.tensor([[-1.0], [1.0]])
    assert curl.ridge_r2(x, x, x, x, 2.0).tolist() == pytest.approx([0.75])
    generator = torch.Generator().manual_seed(0)
    x, y, x_test = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((20, 4), (20, 2), (10, 4))
    )
    y_test = torch.cat([x_test[:, :1], x_test[:, 1:2] ** 2], dim=1)
    a = x - x.mean(0)
    w = torch.linalg.solve(
        a.T @ a + 0.1 * a.square().sum() / 20 * torch.eye(4), a.T @ (y - y.mean(0))
    )
    error = y_test - (x_test - x.mean(0)) @ w - y.mean(0)
    expected = 1 - error.square().mean(0) / y_test.var(0, correction=0)
    assert torch.allclose(curl.ridge_r2(x, y, x_test, y_test, 0.1), expected)


def test_losses_refuse_to_broadcast():
    column, row = torch.zeros(4, 1), torch.zeros(4)
    for f in (
        lambda: curl.td_target(row, column, row, 0.9),
        lambda: curl.critic_loss(torch.zeros(2, 4, 1), row),
        lambda: curl.soft_actor_loss(column, row, 1.0),
        lambda: curl.info_nce_loss(torch.zeros(4, 3)),
        lambda: curl.bilinear_logits(torch.zeros(4, 3), torch.zeros(5, 3), torch.eye(3)),
    ):
        with pytest.raises(AssertionError):
            f()


# --- Data ------------------------------------------------------------------------------------


def test_random_shift():
    """A pixel at (10, 20) moves by pad - offset, in all frames of a stack alike; what leaves the
    frame is gone, what comes in is black."""
    stacks = np.zeros((4, 2, 64, 64), np.uint8)
    stacks[:, :, 10, 20] = stacks[:, 1, 63, 0] = 255
    shifted = curl.random_shift(stacks, np.array([[4, 0, 8, 3], [4, 0, 8, 6]]), 4)
    assert shifted.dtype == np.uint8 and np.array_equal(shifted[0], stacks[0])
    for moved, (x, y) in zip(shifted[1:], ((14, 24), (6, 16), (11, 18))):
        assert np.argwhere(moved[0]).tolist() == [[x, y]] and moved[1, x, y]
    assert shifted[2, 1].sum() == 255  # row 63 went to 59, but column 0 left
    assert shifted[1, 1].sum() == 255


def test_replay_rebuilds_stacks_within_episodes():
    """An observation says where it belongs: 1000 episode + 100 environment + time."""
    space = sprites_env.SpritesVectorEnv(1, 0, "state").single_observation_space
    replay = curl.FrameReplay(rounds=2, num_envs=3, horizon=5, space=space, action_dim=2, frames=3)
    for episode in range(2):
        for t in range(5):
            now = 1000 * episode + 100 * np.arange(3)[:, None] + np.full((3, 8), t)
            replay.add(now, now[:, :2], now[:, 0], now + 1, np.full(3, t == 4))
    assert replay.size == 30
    stacks, actions, rewards, successors, terminated = replay.sample(np.random.default_rng(0), 2000)
    assert stacks.shape == successors.shape == (2000, 24)
    start, t = rewards // 100 * 100, rewards % 100
    assert len(set(rewards)) == 30 and np.array_equal(terminated, t == 4)
    assert np.array_equal(actions[:, 1], rewards)
    for i in range(3):
        assert np.array_equal(stacks[:, 8 * i], start + np.maximum(t - 2 + i, 0))
        assert np.array_equal(successors[:, 8 * i], start + np.maximum(t - 1 + i, 0))


def test_replay_stores_a_frame_once():
    space = sprites_env.SpritesVectorEnv(1).single_observation_space
    replay = curl.FrameReplay(rounds=3, num_envs=2, horizon=40, space=space, action_dim=2, frames=3)
    assert replay.observations.nbytes == 3 * 2 * 41 * 4096


def test_a_policy_remembers_what_the_replay_would_show():
    seen = []
    policy = curl.remembering(seen.append, 3)
    for t in range(4):
        policy(np.full((2, 1, 1, 1), t))
    assert [x[0, :, 0, 0].tolist() for x in seen] == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_probe_reads_states_off_states():
    stacks, states, shapes = curl.random_stacks(sprites_env.SpritesVectorEnv(40, 1), 3)
    assert stacks.shape == (40, 10, 3, 64, 64) and states.shape == (40, 10, 3, 4)
    newest = sprites_env.draw(states[:, 3, :, :2], shapes)
    assert np.array_equal(stacks[:, 3, 2], newest) and not np.array_equal(stacks[:, 3, 1], newest)
    r2 = curl.probe(torch.from_numpy(states.reshape(40, 10, 12)).float(), states)
    assert r2.keys() == {"agent", "target", "relative_position", "target_velocity", "distractors"}
    assert min(r2[n] for n in r2 if n != "target_velocity") > 0.95  # velocities are small: shrunk
    noise = torch.randn(40, 10, 300, generator=torch.Generator().manual_seed(0))
    assert max(curl.probe(noise, states).values()) < 0.1


# --- Runs ------------------------------------------------------------------------------------


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize("mode", MODES)
def test_runs_and_is_deterministic(tmp_path, monkeypatch, mode, capsys):
    monkeypatch.setattr(curl, "PROBE_EPISODES", 8)
    distractors = MODES.index(mode) % 3
    summary = run(tmp_path / "a", mode=mode, distractors=distractors)
    assert f"{2 * 2 * 41 * (32 if mode == 'state' else 4096):,} bytes" in capsys.readouterr().out
    for name in ("plot_curve", "plot_neighbours", "save_gif"):
        monkeypatch.setattr(curl, name, lambda *_: None)
    again = run(tmp_path / "b", mode=mode, distractors=distractors)
    again["minutes"] = summary["minutes"]
    assert summary == again and untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())
    expected = {"eval_return_mean", "eval_return_std", "eval_episodes", "score"}
    expected |= {"updates", "minutes"}
    if mode in curl.CONTRASTIVE:
        expected |= {"contrastive_accuracy"}
    if mode != "state":
        expected |= {"probe_r2", "probe_r2_random_encoder", "probe_r2_pixels"}
        assert len(summary["probe_r2"]) == 4 + bool(distractors)
    assert summary.keys() == expected and summary["updates"] == 31
    saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in saved["actor"].values())
    pictures = ["curve.png", "rollout.gif"] + ["neighbours.png"] * (mode != "state")
    assert all((tmp_path / "a" / name).stat().st_size > 100 for name in (*pictures, "args.json"))


def test_what_is_shifted(tmp_path, monkeypatch, quick):
    """Views per update: two for soft actor critic, in rad, and a key; apart from that the query's.
    Every stack has an offset of its own, every view too, and both extremes occur."""
    calls = watch(monkeypatch, "random_shift")
    counts = {"state": 0, "pixel": 0, "rad": 2, "curl": 3}
    counts |= {"curl_unaugmented_sac": 2, "contrastive_only": 3}
    for mode in MODES:
        calls.clear()
        run(tmp_path / mode, mode=mode)
        assert len(calls) == 31 * counts[mode], mode
    offsets = np.stack([offsets for _, offsets, _ in calls])
    assert offsets.shape == (93, 2, 8) and {pad for *_, pad in calls} == {4}
    for axis in (0, 1):
        assert set(offsets[:, axis].ravel()) == set(range(9))
    assert np.abs(np.corrcoef(offsets.transpose(1, 2, 0).reshape(16, 93)) - np.eye(16)).max() < 0.5
    for i, j in ((0, 1), (0, 2), (1, 2)):  # frame, next frame, key
        assert not any(np.array_equal(a, b) for a, b in zip(offsets[i::3], offsets[j::3]))
    stacks = [stacks for stacks, *_ in calls[:3]]
    assert np.array_equal(stacks[0], stacks[2]) and not np.array_equal(stacks[0], stacks[1])


@pytest.mark.parametrize("mode", curl.CONTRASTIVE)
def test_keys_come_from_the_slow_encoder(tmp_path, monkeypatch, quick, mode):
    """Without shifts the views are the same, and so are the codes wherever encoder and key encoder
    are: at the start, and with tau' = 1 after each second update."""
    calls = watch(monkeypatch, "bilinear_logits")
    run(tmp_path, mode=mode, pad=0, encoder_tau=1.0)
    for i, (query, keys, W) in enumerate(calls):
        assert query.requires_grad and W.requires_grad and not keys.requires_grad
        assert torch.allclose(query, keys, atol=1e-5) == (i % 2 == 0)
    assert not torch.equal(calls[-1][2], torch.eye(8))  # W is learnt


def parameters_before_and_after(tmp_path, monkeypatch, mode, zero):
    """What of encoder, critic and actor changes in a run in which some losses are made zero."""
    made = []

    def watched(name):
        make = getattr(curl, name)

        def wrapped(*args):
            module = make(*args)
            made.append((name, module, [p.detach().clone() for p in module.parameters()]))
            return module

        monkeypatch.setattr(curl, name, wrapped)

    for name in ("patch_convolutions", "code_head", "TwinCritic", "SquashedActor"):
        watched(name)
    for name in zero:
        function = getattr(curl, name)
        monkeypatch.setattr(curl, name, lambda *args, f=function: 0 * f(*args))
    run(tmp_path, mode=mode)
    names = ["convolutions", "head", "critic", "actor_head", "actor"]
    return {
        name
        for name, (_, module, before) in zip(names, made, strict=True)
        if not all(torch.equal(p, b) for p, b in zip(module.parameters(), before))
    }


ALL_LOSSES = ["critic_loss", "info_nce_loss", "soft_actor_loss"]


@pytest.mark.parametrize(
    ("mode", "loss", "changes"),
    [
        ("curl", "soft_actor_loss", {"actor_head", "actor"}),
        ("curl", "critic_loss", {"convolutions", "head", "critic"}),
        ("curl", "info_nce_loss", {"convolutions", "head"}),
        ("rad", "critic_loss", {"convolutions", "head", "critic"}),
        ("pixel", "critic_loss", {"convolutions", "head", "critic"}),
        ("curl_unaugmented_sac", "critic_loss", {"convolutions", "head", "critic"}),
        ("contrastive_only", "soft_actor_loss", {"actor_head", "actor"}),
        ("rad", "info_nce_loss", set()),
        ("curl_unaugmented_sac", "info_nce_loss", {"convolutions", "head"}),
        ("contrastive_only", "critic_loss", {"critic"}),
        ("contrastive_only", "info_nce_loss", {"convolutions", "head"}),
    ],
)
def test_which_loss_trains_what(tmp_path, monkeypatch, quick, mode, loss, changes):
    zero = [name for name in ALL_LOSSES if name != loss]
    assert parameters_before_and_after(tmp_path, monkeypatch, mode, zero) == changes


def test_critic_target(tmp_path, monkeypatch, quick):
    """y = r + gamma (1 - terminated) (min of the *target* critic at (s', a') - alpha log pi), with
    the target critic following by a share tau at every second update: all with a fake actor, a =
    tanh of the agent's position, log pi = 7, and a fake critic, Q_i = the sum of a + i + bias."""
    batches, critics, targets, sample = [], [], [], curl.FrameReplay.sample

    def watched_sample(self, rng, batch):
        *rest, terminated = sample(self, rng, batch)
        assert not terminated.any()  # a time limit is no termination
        terminated = np.arange(batch) % 3 == 0
        random = self.rewards[:100]  # of the first hundred transitions
        batches.append((rest[2], rest[3], terminated, random.mean(), random.std()))
        return *rest, terminated

    def critic(self, obs, action):
        bias = self.heads[0][-1].bias
        critics.append((self, bias.item()))
        return torch.stack([action.sum(-1) + i + bias for i in (0, 1)])

    def critic_loss(q, target, loss=curl.critic_loss):
        targets.append(target)
        return loss(q, target)

    monkeypatch.setattr(curl.FrameReplay, "sample", watched_sample)
    monkeypatch.setattr(curl.TwinCritic, "forward", critic)
    monkeypatch.setattr(curl, "critic_loss", critic_loss)
    monkeypatch.setattr(curl, "temperature_loss", lambda log_alpha, *_: 0 * log_alpha)
    monkeypatch.setattr(curl, "squashed_log_prob", lambda u, *_: 0 * u.sum(-1) + 7)
    monkeypatch.setattr(
        curl.SquashedActor,
        "forward",
        lambda self, h: (h[:, :2] + 0 * self.mlp[0].bias[0], torch.full_like(h[:, :2], -20)),
    )
    run(tmp_path, mode="state", tau=0.3, gamma=0.5, temperature=0.1, learning_rate=1e-2)
    online = critics[1][0]
    slow = [bias for who, bias in critics if who is not online]
    assert len(targets) == len(batches) == len(slow) == 31
    low, high = np.array([0.1, 0.1]), np.array([0.9, 0.9])
    for k, (r, s_next, terminated, mean, sd) in enumerate(batches):
        a = np.tanh(2 * (s_next[:, :2] - low) / (high - low) - 1)
        value = a.sum(-1) + slow[k] - 0.1 * 7
        y = (r - mean) / sd + 0.5 * (1 - terminated) * value
        assert np.allclose(targets[k], y, atol=1e-4), k
    assert slow[0] == slow[1] != slow[2] == slow[3]  # every second update
    trained = [bias for who, bias in critics if who is online]
    assert slow[2] == pytest.approx(0.7 * slow[0] + 0.3 * trained[2], abs=1e-6)


@pytest.mark.parametrize(("log_prob", "rises"), [(3.0, True), (0.0, False)])
def test_temperature_holds_the_entropy(tmp_path, monkeypatch, quick, log_prob, rises):
    """The target is -2: alpha rises where the entropy is -3, and falls where it is 0."""
    monkeypatch.setattr(curl, "squashed_log_prob", lambda u, *_: 0 * u.sum(-1) + log_prob)
    run(tmp_path, mode="state")
    alpha = [float(row["temperature"]) for row in untimed_rows(tmp_path)]
    assert (alpha[-1] > 0.0101) if rises else (alpha[-1] < 0.0099)


def test_what_is_stored(tmp_path, monkeypatch, quick):
    """What was executed, with the last state of an episode as its successor."""
    added, add = [], curl.FrameReplay.add
    monkeypatch.setattr(curl.FrameReplay, "add", lambda self, *c: added.append(c) or add(self, *c))
    run(tmp_path, mode="state")
    assert len(added) == 80 and not any(terminated.any() for *_, terminated in added)
    for i, (obs, action, reward, successor, _) in enumerate(added):
        states = obs.astype(np.float64).reshape(2, 2, 4)
        after = sprites_env.act(states, action)
        assert np.allclose(after.reshape(2, 8), successor, atol=1e-5)
        assert np.allclose(sprites_env.reward(after), reward, atol=1e-5)
        if i < 79:
            assert np.array_equal(successor, added[i + 1][0]) == (i != 39)
    assert np.abs([action for _, action, *_ in added[:50]]).max() > 0.9  # random at first


def test_pixels_see_frames_and_the_last_ones(tmp_path, monkeypatch, quick):
    """Acting and evaluating, a stack starts anew with the episode."""
    seen, remembering = [], curl.remembering

    def watched(policy, frames):
        return remembering(lambda stacks: seen.append(stacks) or policy(stacks), frames)

    monkeypatch.setattr(curl, "remembering", watched)
    run(tmp_path, mode="pixel", frame_stack=2, num_envs=3, total_steps=240, eval_episodes=5)
    acting = [x for x in seen if x.shape == (3, 2, 64, 64)]
    starts = [i for i, x in enumerate(acting) if np.array_equal(x[:, 0], x[:, 1])]
    assert starts == [0, 40]
    evaluating = [x for x in seen if x.shape == (5, 2, 64, 64)]
    starts = [i for i, x in enumerate(evaluating) if np.array_equal(x[:, 0], x[:, 1])]
    assert len(evaluating) > 40 and starts == list(range(0, len(evaluating), 40))


def test_evaluation_does_not_disturb_training(tmp_path, quick):
    run(tmp_path / "a", mode="rad", eval_episodes=3)
    run(tmp_path / "b", mode="rad", eval_episodes=5)
    a, b = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in "ab")
    assert all(torch.equal(a["actor"][name], b["actor"][name]) for name in a["actor"])


def test_the_contrastive_loss_learns_from_pixels(tmp_path, quick):
    """Seconds: four hundred updates, and a query finds its key among 32; 1/32 is chance."""
    args = {"total_steps": 2000, "num_envs": 25, "batch_size": 32, "updates": 10, "z_dim": 50}
    summary = run(tmp_path, mode="contrastive_only", learning_rate=1e-3, **args)
    assert summary["contrastive_accuracy"] > 0.5


def test_learns_from_states(tmp_path):
    """Seconds: 28.2 is random, 31.2 needs no eyes."""
    changes = {"mode": "state", "total_steps": 6000, "num_envs": 25, "device": "cpu"}
    args = curl.Args(**changes, out=str(tmp_path))
    assert curl.train(args)["eval_return_mean"] > 37


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 79}, "--total-steps must be at least 160, in rounds of 80"),
        ({"total_steps": 79, "initial_steps": 10}, "--total-steps must be at least 80"),
        ({"initial_steps": 170}, "--total-steps must be at least 240"),
        ({"frame_stack": 40}, "--frame-stack must be less than the 40"),
        ({"batch_size": 1}, "--batch-size"),
        ({"batch_size": 0, "mode": "rad"}, "--batch-size must be positive"),
        ({"gamma": 1.0}, "--gamma"),
        ({"encoder_tau": 1.5}, "--encoder-tau"),
        ({"pad": -1}, "--pad"),
        ({"frame_stack": 0}, "--frame-stack must be positive"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive"),
        ({"seed": -1}, "--seed"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "_".join(map(str, x)),
)
def test_bad_input_ends_with_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_finished_runs_are_kept(tmp_path, quick):
    run(tmp_path, mode="state")
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path, mode="state")
