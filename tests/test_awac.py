"""awac.py: equations by hand, data, wiring, learning, bad input."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import awac
import sprites_env

TINY = {"episodes": 10, "offline_updates": 20, "total_steps": 80, "num_envs": 1, "batch_size": 8}
TINY |= {"eval_episodes": 3, "hidden": 8, "torch_threads": 1, "device": "cpu"}


def run(out, **changes):
    return awac.train(awac.Args(**TINY | changes, out=str(out)))


def dataset(counts=(2, 3, 1)):
    env = sprites_env.SpritesVectorEnv(sum(counts), 1, "state")
    return awac.collect_dataset(env, [n / sum(counts) for n in counts], seed=3)


# --- Equations -------------------------------------------------------------------------------


def test_closed_form_by_hand():
    """Eq. (2): three actions, pi_beta (.5, .3, .2), A (1, 0, -1), lambda 1. The flipped sign would
    give (.179, .292, .529)."""
    behaviour, advantage = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 0.0, -1.0])
    improved = behaviour * awac.awac_weights(advantage, 1.0)
    assert (improved / improved.sum()).tolist() == pytest.approx([0.7844, 0.1731, 0.0425], abs=1e-4)


def test_weights_by_hand():
    advantage = torch.tensor([1.0, 0.0, -1.0])
    assert awac.awac_weights(advantage, 1.0).tolist() == pytest.approx([2.718, 1, 0.368], abs=5e-4)
    softmax = awac.awac_weights(advantage, 1.0, "softmax")
    assert softmax.tolist() == pytest.approx([1.996, 0.734, 0.270], abs=5e-4)
    assert softmax.mean().item() == pytest.approx(1)
    assert awac.awac_weights(advantage, 0.5).tolist() == pytest.approx(
        [math.exp(2), 1, math.exp(-2)]
    )
    assert awac.awac_weights(advantage, 0.01).max() == 100  # clipped


@pytest.mark.parametrize("weighting", ["exp", "softmax"])
def test_equal_advantages_are_plain_cloning(weighting):
    log_prob = torch.tensor([-1.0, -2.0, 0.5], requires_grad=True)
    weights = awac.awac_weights(torch.zeros(3), 0.1, weighting)
    awac.weighted_cloning_loss(log_prob, weights).backward()
    assert log_prob.grad.tolist() == pytest.approx([-1 / 3] * 3)


def test_weighted_maximum_likelihood_by_hand():
    """Actions (-.8, 0, .8) with A (1, 0, -1), lambda .5: the best Gaussian has mean -.681 and sd
    .319, the moments of the weighted data."""
    actions, advantage = torch.tensor([[-0.8], [0.0], [0.8]]), torch.tensor([1.0, 0.0, -1.0])
    mean, log_std = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.02)
    for _ in range(1500):
        log_prob = awac.gaussian_log_prob(actions, mean.expand(3, 1), log_std)
        weights = awac.awac_weights(advantage, 0.5)
        optimizer.zero_grad()
        awac.weighted_cloning_loss(log_prob, weights).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(-0.681, abs=1e-3)
    assert log_std.exp().item() == pytest.approx(0.319, abs=1e-3)


def test_weights_carry_no_gradient():
    advantage = torch.ones(3, requires_grad=True)
    for weighting in ("exp", "softmax"):
        assert not awac.awac_weights(advantage, 1.0, weighting).requires_grad


def test_td_target_by_hand():
    """1 + .9 * 5 for an episode that goes on; termination ends the bootstrap."""
    r, terminated, value = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.full((2,), 5.0)
    assert awac.td_target(r, terminated, value, 0.9).tolist() == pytest.approx([5.5, 1.0])


def test_critic_loss_by_hand():
    """Errors (1, -2) and (0, 3): (1 + 4) / 2 + (0 + 9) / 2 = 7."""
    q = torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    assert awac.critic_loss(q, torch.tensor([1.0, 2.0])).item() == pytest.approx(7.0)


def test_soft_actor_loss_by_hand():
    """(.5 * -1 - 2 + .5 * 3 - 4) / 2."""
    loss = awac.soft_actor_loss(torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 3.0]), 0.5)
    assert loss.item() == pytest.approx(-2.5)


def test_effective_sample_size():
    assert awac.effective_sample_size(torch.full((8,), 3.0)).item() == pytest.approx(1)
    assert awac.effective_sample_size(torch.tensor([5.0, 0, 0, 0])).item() == pytest.approx(0.25)
    # advantages of sd .3 at lambda .3: exp(N(0, 1)), (E w)^2 / E w^2 = e / e^2 = .37 for large B
    q = 0.3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    size = awac.effective_sample_size(awac.awac_weights(q, 0.3))
    assert size.item() == pytest.approx(math.exp(-1), abs=0.02)


def test_normalized_score():
    assert awac.normalized_score(28.2) == pytest.approx(0)
    assert awac.normalized_score(37.95) == pytest.approx(100)


def test_losses_refuse_to_broadcast():
    column, row = torch.zeros(4, 1), torch.zeros(4)
    for f in (
        lambda: awac.awac_weights(column, 1.0),
        lambda: awac.weighted_cloning_loss(column, row),
        lambda: awac.critic_loss(torch.zeros(2, 4, 1), row),
        lambda: awac.soft_actor_loss(column, row, 1.0),
        lambda: awac.td_target(row, column, row, 0.9),
    ):
        with pytest.raises(AssertionError):
            f()


# --- Data ------------------------------------------------------------------------------------


def test_dataset_is_what_the_behaviours_did():
    data = dataset(counts=(2, 3, 1))
    assert list(data) == list(awac.COLUMNS) and len(data["rewards"]) == 6 * 40
    assert data["observations"].shape == (240, 12) and data["observations"].dtype == np.float32
    assert not data["terminated"].any()
    assert np.flatnonzero(data["truncated"]).tolist() == [39, 79, 119, 159, 199, 239]
    within = ~data["truncated"]
    assert np.array_equal(
        data["next_observations"][within], data["observations"][np.roll(within, 1)]
    )
    states = data["observations"].astype(np.float64).reshape(6, 40, 3, 4)
    actions = data["actions"].reshape(6, 40, 2)
    for episodes, goal in (((0, 1), 1), ((2, 3, 4), 2)):  # the target, the first distractor
        for e in episodes:
            expected = sprites_env.toward(states[e], states[e, :, goal, :2])
            assert np.allclose(actions[e], expected, atol=1e-5)
    assert abs(actions[5].mean()) < 0.2 and 0.5 < actions[5].std() < 0.65  # uniform: .577
    # rewards and successors are those of the environment
    moved = sprites_env.act(states[:, :-1].reshape(-1, 3, 4), actions[:, :-1].reshape(-1, 2))
    assert np.allclose(moved.reshape(6, 39, 3, 4), states[:, 1:], atol=1e-5)
    after = data["next_observations"].astype(np.float64).reshape(-1, 3, 4)
    assert np.allclose(data["rewards"], sprites_env.reward(after), atol=1e-5)


def test_mixture_gives_the_stated_returns():
    """20 % chase, 40 % follow a distractor, 40 % random: about .2 * 37.95 + .8 * 28.3."""
    returns = dataset(counts=(100, 200, 200))["rewards"].reshape(500, 40).sum(1)
    assert returns.mean() == pytest.approx(30.2, abs=0.5)
    assert returns[:100].mean() == pytest.approx(37.9, abs=0.4)
    assert returns[100:300].mean() == pytest.approx(28.4, abs=1.0)


def test_best_episodes():
    data = dataset(counts=(1, 4, 5))
    best = awac.best_episodes(data, 0.1)
    assert np.array_equal(best["actions"], data["actions"][:40])  # the only expert


def test_replay_keeps_the_data_and_adds_to_it():
    data = dataset(counts=(1, 0, 0))
    replay = awac.Replay(data, room=80)
    assert replay.size == 40
    replay.add(*(column[:30] for column in data.values()))
    assert replay.size == 70
    for name, column in data.items():
        assert np.array_equal(replay.columns[name][:40], column)
        assert np.array_equal(replay.columns[name][40:70], column[:30])
    rewards = {r for _ in range(50) for r in replay.sample(np.random.default_rng(0), 64)[2]}
    assert rewards <= set(data["rewards"])  # nothing of the empty room


def test_save_and_load(tmp_path):
    path = tmp_path / "data.npz"
    run(tmp_path / "a", save_dataset=str(path))
    env = sprites_env.SpritesVectorEnv(1, 1, "state")
    spaces = env.single_observation_space, env.single_action_space
    loaded = awac.load_dataset(path, *spaces)
    assert len(loaded["rewards"]) == 400
    run(tmp_path / "b", dataset=str(path))
    assert untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    with pytest.raises(SystemExit, match="exists"):
        run(tmp_path / "c", save_dataset=str(path))
    with pytest.raises(SystemExit, match="cannot write"):
        run(tmp_path / "c", save_dataset=str(tmp_path / "nowhere" / "data.npz"))
    assert not (tmp_path / "c").exists()


# --- Runs ------------------------------------------------------------------------------------


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "changes",
    [{"algorithm": name} for name in awac.Algorithm.__args__]
    + [
        {"weighting": "softmax", "value_estimate": "sample"},
        {"observation": "image"},
        {"distractors": 0, "mixture": (0.5, 0.0, 0.5)},
        {"offline_updates": 0},
        {"total_steps": 0},
    ],
    ids=lambda changes: "_".join(map(str, changes.values())),
)
def test_runs_and_is_deterministic(tmp_path, changes):
    summary, again = run(tmp_path / "a", **changes), run(tmp_path / "b", **changes)
    again["minutes"] = summary["minutes"]
    assert summary == again and untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())
    expected = {"eval_return_mean", "eval_return_std", "eval_episodes", "score", "minutes"}
    algorithm = changes.get("algorithm", "awac")
    offline = algorithm != "sac" and changes.get("offline_updates", 20)
    online = algorithm not in awac.CLONING and changes.get("total_steps", 80)
    expected |= {"offline_score"} if offline else set()
    expected |= {"online_score"} if online else set()
    expected |= {"worst_online_dip"} if offline and online else set()
    expected |= {"bc_score"} if algorithm in awac.CLONING else set()
    assert expected | {"updates"} == summary.keys()
    saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in saved["policy"].values())
    for name in ("curve.png", "rollout.gif", "args.json"):
        assert (tmp_path / "a" / name).stat().st_size > 100


def test_critic_target(tmp_path, monkeypatch):
    """y = r + gamma (1 - terminated) min of the *target* critic at (s', the policy's a'), and the
    target critic follows by a share tau: all with a fake policy, a = the agent's position, and a
    fake critic, Q_i = the sum of a + i + a trained bias."""
    data = dataset(counts=(10, 0, 0))
    data["terminated"][::3] = True
    np.savez(tmp_path / "data.npz", **data)
    batches, critics, targets, sample = [], [], [], awac.Replay.sample

    def watched_sample(self, rng, batch):
        batches.append([torch.as_tensor(x) for x in sample(self, rng, batch)])
        return [x.numpy() for x in batches[-1]]

    def critic(self, obs, action):
        bias = self.heads[0][-1].bias
        critics.append((self, bias.item()))
        return torch.stack([action.sum(-1) + i + bias for i in (0, 1)])

    def critic_loss(q, target, loss=awac.critic_loss):
        targets.append(target)
        return loss(q, target)

    monkeypatch.setattr(awac.Replay, "sample", watched_sample)
    monkeypatch.setattr(awac.TwinCritic, "forward", critic)
    monkeypatch.setattr(awac, "critic_loss", critic_loss)

    def policy(self, obs):
        return obs[:, :2] + 0 * self.mlp[0].bias[0], 0 * self.log_std - 20

    monkeypatch.setattr(awac.GaussianPolicy, "forward", policy)
    run(tmp_path / "run", dataset=str(tmp_path / "data.npz"), tau=0.3, gamma=0.5)
    online = critics[1][0]
    trained = [bias for who, bias in critics if who is online]
    slow = [bias for who, bias in critics if who is not online]
    assert len(targets) == len(batches) == len(slow) == 100 and len(trained) == 300
    for k, (_, _, r, s_next, terminated) in enumerate(batches):
        value = s_next[:, :2].sum(-1) + slow[k]
        assert torch.allclose(targets[k], torch.where(terminated, r, r + 0.5 * value), atol=1e-5)
        if k + 1 < len(slow):  # after its step k the trained critic is next asked for advantages
            expected = slow[k] + 0.3 * (trained[3 * k + 1] - slow[k])
            assert slow[k + 1] == pytest.approx(expected, abs=1e-6)
    assert any(t.any() for *_, t in batches) and trained[-1] != trained[0]


def test_online_episodes_join_the_data(tmp_path, monkeypatch):
    """What was executed is stored, with the last state of an episode as its successor, and a time
    limit is no termination."""
    added, add = [], awac.Replay.add
    monkeypatch.setattr(
        awac.Replay, "add", lambda self, *c: added.append((self.size, c)) or add(self, *c)
    )
    run(tmp_path)
    assert [size for size, _ in added] == list(range(400, 480))  # behind the dataset
    for i in range(79):
        same = np.array_equal(added[i][1][3], added[i + 1][1][0])
        assert same == (i != 39)  # where the first episode ended, its last state was stored
    assert [c[5][0] for _, c in added] == [i % 40 == 39 for i in range(80)]
    assert not any(c[4].any() for _, c in added)
    assert all(np.abs(c[1]).max() <= 1 for _, c in added)


def test_policy_update_leaves_the_critic_alone(tmp_path, monkeypatch):
    """With a critic that learns nothing from its own loss, it stays what it was."""
    critics = []

    class Watched(awac.TwinCritic):
        def __init__(self, *args):
            super().__init__(*args)
            critics.append((self, [p.detach().clone() for p in self.parameters()]))

    monkeypatch.setattr(awac, "TwinCritic", Watched)
    monkeypatch.setattr(awac, "critic_loss", lambda q, target: 0 * q.sum())
    for algorithm in ("awac", "sac_from_buffer"):
        run(tmp_path / algorithm, algorithm=algorithm)
    assert len(critics) == 2
    for critic, before in critics:
        assert all(torch.equal(p, b) for p, b in zip(critic.parameters(), before))


def test_sigma_stays_in_its_range_and_can_leave_the_bounds(tmp_path):
    """It starts at its upper bound, where a clamp in `forward` would keep it for good."""
    for algorithm in ("awac", "sac_from_buffer"):
        run(tmp_path / algorithm, algorithm=algorithm, offline_updates=300, learning_rate=1e-2)
        saved = torch.load(tmp_path / algorithm / "checkpoint.pt", weights_only=True)
        log_std = saved["policy"]["log_std"]
        assert (log_std <= 0).all() and (log_std < -0.02).any()


@pytest.mark.parametrize(
    ("algorithm", "updates", "least"),
    [("awac", 2000, 85), ("filtered_bc", 1500, 85), ("sac_from_buffer", 2500, 70)],
)
def test_learns_from_the_default_mixture(tmp_path, algorithm, updates, least):
    """Seconds. Plain cloning reaches about 10, and the flipped sign less."""
    args = awac.Args(
        algorithm=algorithm,
        offline_updates=updates,
        total_steps=1000,
        device="cpu",
        out=str(tmp_path),
    )
    assert awac.train(args)["offline_score"] > least


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"mixture": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"mixture": (1.5, -0.5, 0.0)}, "add up to 1"),
        ({"mixture": (math.nan, 0.0, 0.0)}, "add up to 1"),
        ({"total_steps": 39}, "--total-steps at least 40"),
        ({"distractors": 0}, "nobody can follow one"),
        ({"gamma": 1.0}, "--gamma"),
        ({"algorithm": "bc", "offline_updates": 0}, "not both nothing"),
        ({"algorithm": "sac", "total_steps": 0}, "not both nothing"),
        ({"dataset": "missing.npz"}, "missing.npz"),
        ({"seed": -1}, "--seed"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "_".join(map(str, x)),
)
def test_bad_input_ends_with_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rewards"), "rewards is not a file in the archive; needed are"),
        (lambda d: d.update(terminated=d["terminated"].astype(float)), "terminated is of type"),
        (lambda d: d.update(rewards=np.float32(3)), "has shape"),
        (lambda d: d.update(rewards=d["rewards"].astype(str)), "rewards is of type"),
        (lambda d: d.update(actions=2 * d["actions"]), "actions must be in"),
        (lambda d: d["rewards"].fill(np.nan), "not finite"),
        (lambda d: d.update(observations=d["observations"][:, :8]), "has shape (80, 8), not"),
        (lambda d: d.update(terminated=d["terminated"][:-1]), "terminated has shape"),
        (lambda d: d.update({k: v[:0] for k, v in d.items()}), "fewer than two"),
    ],
)
def test_bad_datasets(tmp_path, change, message):
    data = dataset(counts=(1, 1, 0))
    change(data)
    path = tmp_path / "data.npz"
    np.savez(path, **data)
    with pytest.raises(SystemExit, match=message.replace("(", r"\(").replace(")", r"\)")):
        run(tmp_path / "a", dataset=str(path))


def test_finished_runs_are_kept(tmp_path):
    run(tmp_path)
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path)
