"""rig_td3.py: equations by hand, the details that matter, wiring, learning, bad input."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import rig_td3
import sprites_env

TINY = {"images": 300, "vae_updates": 4, "total_steps": 240, "num_envs": 2, "batch_size": 16}
TINY |= {"finetune_every": 4, "finetune_updates": 2, "eval_episodes": 3, "torch_threads": 1}
TINY |= {"device": "cpu"}


def run(out, **changes):
    return rig_td3.train(rig_td3.Args(**TINY | changes, out=str(out)))


# --- Equations -------------------------------------------------------------------------------


def test_kl_by_hand():
    """mu (1, 0), variance (1, .25): (1 + 1 - 0 - 1) / 2 + (0 + .25 + ln 4 - 1) / 2 = .8181."""
    mean, log_var = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, math.log(0.25)]])
    assert rig_td3.kl_divergence(mean, log_var).item() == pytest.approx(0.8181, abs=1e-4)
    p, q = torch.distributions.Normal(mean, (0.5 * log_var).exp()), torch.distributions.Normal(0, 1)
    expected = torch.distributions.kl_divergence(p, q).sum().item()
    assert rig_td3.kl_divergence(mean, log_var).item() == pytest.approx(expected)


def test_vae_loss_sums_over_pixels():
    """Detail 1. An agent of 50 pixels that is missed (logit -3 everywhere): each costs 3 more than
    if it were black, so the image 150; KL .8181 counts beta times."""
    mean, log_var = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, math.log(0.25)]] * 2)
    logits, black = torch.full((2, 1, 64, 64), -3.0), torch.zeros(2, 1, 64, 64)
    empty = 4096 * math.log1p(math.exp(-3)) + 2 * 0.8181
    assert rig_td3.vae_loss(logits, black, mean, log_var, 2).item() == pytest.approx(
        empty, abs=0.01
    )
    agent = black.clone()
    agent.view(2, -1)[:, :50] = 1
    missed = rig_td3.vae_loss(logits, agent, mean, log_var, 2).item()
    assert missed == pytest.approx(empty + 150, abs=0.01)
    one = rig_td3.vae_loss(logits[:1], agent[:1], mean[:1], log_var[:1], 2)
    assert one.item() == pytest.approx(missed, rel=1e-6)  # a mean over images


def test_prior_fit_by_hand():
    """Detail 8: {0, 2} has mean 1 and standard deviation 1; a dimension asleep stays asleep."""
    mean, sd = rig_td3.fit_prior(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    assert mean.tolist() == [1, 5] and sd.tolist() == [1, 0]


def test_reward_is_the_distance_not_squared():
    """Detail 3: from (3, 4) to the origin -5."""
    reached, goal = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert rig_td3.goal_reward(reached, goal).tolist() == [-5, 0]


def test_relabel_by_hand():
    practised, prior, future = torch.zeros(3, 2), torch.ones(3, 2), torch.full((3, 2), 2.0)
    chosen = rig_td3.relabel(practised, prior, future, torch.tensor([2, 0, 1]))
    assert chosen.tolist() == [[2, 2], [0, 0], [1, 1]]


def test_smoothed_action_by_hand():
    """Noise .9 counts as .5, and the action stays in the box."""
    action, noise = torch.tensor([[0.2, 0.8, -1.0]]), torch.tensor([[0.9, 0.4, -0.1]])
    assert rig_td3.smoothed(action, noise).tolist() == [pytest.approx([0.7, 1.0, -1.0])]


def test_losses_refuse_to_broadcast():
    column, row = torch.zeros(4, 1), torch.zeros(4)
    for f in (
        lambda: rig_td3.goal_reward(torch.zeros(4, 2), torch.zeros(2)),
        lambda: rig_td3.relabel(column, column, row, torch.zeros(4, dtype=int)),
        lambda: rig_td3.vae_loss(row, column, column, column, 1.0),
        lambda: rig_td3.critic_loss(torch.zeros(2, 4, 1), row),
        lambda: rig_td3.td_target(row, column, row, 0.9),
    ):
        with pytest.raises(AssertionError):
            f()


# --- Networks, data --------------------------------------------------------------------------


def test_decoder_draws_each_patch_in_its_place():
    """A head that draws its own input, four by four: rows of places, columns within a patch."""
    decoder = rig_td3.BroadcastDecoder(3, hidden=2)
    with torch.no_grad():
        decoder.from_z.weight.zero_()
        decoder.from_place.weight.copy_(torch.eye(2))
        for i, expected in enumerate(("rows", "columns")):
            decoder.head = torch.nn.Linear(2, 16)
            decoder.head.weight.zero_()
            decoder.head.weight[:, i] = 1
            decoder.head.bias.copy_(torch.arange(16) / 1000)
            image = decoder(torch.randn(5, 3))
            assert image.shape == (5, 1, 64, 64)
            place = torch.linspace(-1.7, 1.7, 16).repeat_interleave(4)
            place = place[:, None] if expected == "rows" else place[None]
            within = (torch.arange(16).view(4, 4) / 1000).tile(16, 16)
            assert torch.allclose(image[3, 0], place + within, atol=1e-6)


def test_images_are_of_many_scenes_and_of_what_random_actions_do():
    env = sprites_env.SpritesVectorEnv(4, task="push", horizon=5)
    images, positions = rig_td3.collect_images(env, 90, np.random.default_rng(0), seed=0)
    assert images.shape == (90, 1, 64, 64) and positions.shape == (90, 4)
    drawn = sprites_env.draw(positions.reshape(-1, 2, 2), np.array([[1, 0]] * 90))
    assert np.array_equal(images[:, 0], drawn)
    scenes = positions[:80].reshape(4, 5, 4, 2, 2)  # (scene, frame, environment, object, 2)
    steps = np.diff(scenes[..., 0, :], axis=1)
    assert 0.02 < np.abs(steps).mean() < 0.03  # uniform in -1 ... 1, times .05
    square = scenes[..., 1, :]
    assert (square.std(1).max(-1) < 1e-9).mean() > 0.6  # at rest, unless pushed
    assert len(np.unique(square[:, 0].reshape(-1, 2), axis=0)) == 16


def test_future_goals_stay_in_their_episode():
    """Detail 5: every later step occurs, the last too, and none before."""
    space = sprites_env.SpritesVectorEnv(1).single_observation_space
    replay = rig_td3.EpisodeReplay(6, 5, space, 2, 3)
    for k in range(2):
        z = (10 * (2 * k + np.arange(2)))[:, None, None] + np.arange(6)[None, :, None] + np.zeros(3)
        replay.add(np.zeros((2, 6, 1, 64, 64)), np.zeros((2, 5, 2)), 0, np.zeros((2, 3)), z)
    assert replay.size == 4
    e, t, h = replay.sample(np.random.default_rng(0), 3000)
    assert set(e) == {0, 1, 2, 3} and set(t) == {0, 1, 2, 3, 4}
    assert {(a, b) for a, b in zip(t, h)} == {(a, b) for a in range(5) for b in range(a + 1, 6)}
    assert np.array_equal(replay.z[e, h, 0] // 10, e) and np.array_equal(replay.z[e, h, 0] % 10, h)


@pytest.mark.parametrize("task", ["reach", "push"])
def test_goals_are_the_same_scene_with_something_elsewhere(task):
    env = sprites_env.SpritesVectorEnv(50, distractors=1, observation="state", task=task)
    start, goal, shapes = rig_td3.draw_goals(env, seed=5)
    differs = (start[..., :2] != goal[..., :2]).any(-1).mean(0)
    assert differs.tolist() == ([1, 0, 0] if task == "reach" else [1, 1, 0])
    assert np.array_equal(rig_td3.draw_goals(env, seed=5)[1], goal)
    env.reset(options={"state": goal, "shapes": shapes})  # possible: nothing overlaps


def test_probe():
    """A linear map is found, noise is not, even where there is enough of it to fit."""
    torch.manual_seed(0)
    z, z_new = torch.randn(60, 30), torch.randn(500, 30)
    weights = torch.randn(30, 2).double()
    y, y_new = (
        torch.cat([x @ weights + 1, torch.randn(len(x), 2)], 1)
        for x in (z.double(), z_new.double())
    )
    r2 = rig_td3.position_probe(z, y, z_new, y_new)
    assert r2[0] == pytest.approx(1) and r2[1] < 0.1


@pytest.mark.parametrize("task", ["reach", "push"])
def test_reach_follows_the_policy_from_the_given_start(task):
    env = sprites_env.SpritesVectorEnv(40, 1, "state", task=task, horizon=41)
    start, goal, shapes = rig_td3.draw_goals(env, seed=5)
    env.reset()  # whatever happened in between
    places = goal[:, 0, :2]

    def straight(obs, goals):
        return sprites_env.toward(obs.reshape(-1, 3, 4).astype(float), goals)

    path = rig_td3.reach(straight, env, start, shapes, places, 40)
    assert path.shape == (41, 40, 3, 2) and np.array_equal(path[0], start[..., :2])
    assert np.array_equal(env.shapes, shapes)
    left = np.linalg.norm(path[-1, :, 0] - places, axis=-1)
    assert (left < 0.01).mean() > (0.99 if task == "reach" else 0.6)  # the square is in the way
    path = rig_td3.reach(lambda obs, goals: np.zeros((40, 2)), env, start, shapes, places, 40)
    assert np.array_equal(path[-1], start[..., :2])


# --- Runs ------------------------------------------------------------------------------------


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task": "push", "z_dim": 5},
        {"goals": "oracle"},
        {"goals": "oracle", "task": "push", "distractors": 1},
        {"goals": "pixel"},
        {"goal_fractions": (1.0, 0.0, 0.0), "distractors": 2},
        {"finetune_every": 0},
    ],
    ids=lambda changes: "_".join(map(str, changes.values())) or "default",
)
def test_runs_and_is_deterministic(tmp_path, changes):
    summary, again = run(tmp_path / "a", **changes), run(tmp_path / "b", **changes)
    assert untimed_rows(tmp_path / "a") == untimed_rows(tmp_path / "b")
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())
    expected = {"final_agent_distance", "final_block_distance", "success_rate", "minutes"}
    expected |= {"untouched_agent_distance", "untouched_block_distance", "eval_episodes"}
    pictures = {"curve.png", "reached.png", "rollout.gif"}
    if changes.get("goals") != "oracle":
        expected |= {"probe_r2", "probe_r2_agent", "probe_r2_square", "vae_minutes"}
        pictures |= {"imagined_goals.png", "latent_walk.png"}
    assert summary.keys() == again.keys() == expected
    for name in expected - {"minutes", "vae_minutes"}:
        assert summary[name] == again[name]
    saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in saved["actor"].values())
    assert all((tmp_path / "a" / name).stat().st_size > 100 for name in pictures)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A run whose buffer, images and calls are looked at: a list of (arguments, result) by name."""
    seen = {}

    def watch(owner, name, key=None):
        f = getattr(owner, name)

        def call(*args):
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            flags = [isinstance(a, torch.Tensor) and a.requires_grad for a in args]
            result = f(*args)
            seen.setdefault(key or name, []).append((copies, result, flags))
            return result

        monkeypatch.setattr(owner, name, call)

    sample = rig_td3.EpisodeReplay.sample

    def watched_sample(self, rng, batch):
        e, t, h = sample(self, rng, batch)
        batch = {"z": self.z[e, t], "z_next": self.z[e, t + 1], "future": self.z[e, h]}
        batch |= {"next_frame": self.observations[e, t + 1], "action": self.actions[e, t]}
        seen.setdefault("batch", []).append({**batch, "practised": self.goals[e], "t": t})
        return e, t, h

    monkeypatch.setattr(rig_td3.EpisodeReplay, "sample", watched_sample)
    for name in ("relabel", "goal_reward", "td_target", "smoothed", "polyak_", "collect_images"):
        watch(rig_td3, name)
    watch(rig_td3.TwinCritic, "forward", "critic")
    watch(rig_td3.GoalActor, "forward", "actor")
    watch(rig_td3.BroadcastDecoder, "forward", "decoder")
    watch(rig_td3.EpisodeReplay, "add")

    def start(**changes):
        seen["summary"] = run(tmp_path, **changes)
        seen["saved"] = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        seen["replay"] = seen["add"][0][0][0]
        return seen

    return start


def test_z_is_the_mean_of_the_present_encoder(watched):
    """Details 2 and 7: no noise in what is stored, also after fine-tuning; the prior is fitted
    again; goals practised before are carried over, later ones are not."""
    seen = watched()
    encoder = rig_td3.GridEncoder(16)
    encoder.load_state_dict(seen["saved"]["encoder"])
    replay = seen["replay"]
    with torch.no_grad():
        frames = torch.as_tensor(replay.observations).flatten(0, 1) / 255
        z = encoder(frames)[:, :8].view(replay.z.shape)
        images = encoder(torch.as_tensor(seen["collect_images"][0][1][0]) / 255)[:, :8]
    assert replay.size == 6
    assert torch.allclose(z, torch.as_tensor(replay.z), atol=1e-5)
    mean, sd = rig_td3.fit_prior(images)
    assert torch.allclose(mean, seen["saved"]["prior_mean"], atol=1e-5)
    assert torch.allclose(sd, seen["saved"]["prior_sd"], atol=1e-5)
    practised = torch.cat([args[4] for args, *_ in seen["add"]])  # fine-tuned after four episodes
    drawn = next(r for a, r, _ in seen["decoder"] if torch.equal(a[1], practised[:4]))
    with torch.no_grad():
        carried = encoder(drawn.sigmoid().mul(255).round().byte() / 255)[:, :8]
    assert torch.allclose(carried, torch.as_tensor(replay.goals[:4]), atol=1e-5)
    assert torch.equal(practised[4:], torch.as_tensor(replay.goals[4:]))


@pytest.mark.parametrize("goals", ["latent", "pixel"])
def test_one_update(watched, goals):
    """Details 3, 4 and 6, and TD3: the reward is that of the *next* state and of the relabelled
    goal, which is the goal before and after the step; the target takes the smaller of the target
    critic's values at a smoothed action of the target actor; the actor moves every second time, and
    the target networks with it; a time limit does not end the bootstrap."""
    seen = watched(goals=goals, goal_fractions=(0.2, 0.5, 0.3))
    assert len(seen["batch"]) == len(seen["relabel"]) == len(seen["td_target"]) == 240
    critics, kinds, noise, priors = iter(seen["critic"]), [], [], []
    actors = iter([call for call in seen["actor"] if len(call[0][1]) == 16])
    drawn = iter([call for call in seen["decoder"] if len(call[0][1]) == 16])
    for i, batch in enumerate(seen["batch"]):
        (practised, prior, future, which), goal, _ = seen["relabel"][i]
        kinds.append(which)
        priors.append(prior)
        assert np.array_equal(practised, batch["practised"])
        assert np.array_equal(future, batch["future"])
        (reached, wanted), reward, _ = seen["goal_reward"][i]
        if goals == "latent":
            assert np.array_equal(reached, batch["z_next"]) and torch.equal(wanted, goal)
        else:
            (_, decoded), logits, _ = next(drawn)
            assert torch.equal(decoded, goal) and torch.equal(wanted, logits.sigmoid().flatten(1))
            assert np.allclose(reached, batch["next_frame"].reshape(16, -1) / 255)
            reward = 0.2 * reward
        (target_actor, after), chosen, _ = next(actors)
        (clean, epsilon), smooth, _ = seen["smoothed"][i]
        assert torch.equal(clean, chosen)
        noise.append(epsilon)
        (target_critic, after_too, taken), values, _ = next(critics)
        assert torch.equal(taken, smooth) and torch.equal(after, after_too)
        assert np.array_equal(after[:, :8], batch["z_next"]) and torch.equal(after[:, 8:], goal)
        (critic, before, executed), *_ = next(critics)
        assert critic is not target_critic
        assert np.array_equal(before[:, :8], batch["z"]) and torch.equal(before[:, 8:], goal)
        assert np.array_equal(executed, batch["action"])
        if i % 2 == 0:  # the actor's turn
            (actor, seen_by_actor), action, _ = next(actors)
            (_, improved, tried), _, (_, _, differentiable) = next(critics)
            assert actor is not target_actor and torch.equal(seen_by_actor, before)
            assert torch.equal(improved, before) and differentiable
            assert torch.equal(tried, action.detach())
        (paid, terminated, value, gamma), *_ = seen["td_target"][i]
        assert torch.equal(paid, reward) and torch.equal(value, values.amin(0)) and gamma == 0.9
        assert (terminated == 0).all()
    assert any((b["t"] == 39).any() for b in seen["batch"])
    assert next(critics, None) is None and next(actors, None) is None
    shares = torch.bincount(torch.cat(kinds), minlength=3) / (240 * 16)
    assert shares.tolist() == pytest.approx([0.2, 0.5, 0.3], abs=0.03)
    assert torch.cat(noise).std().item() == pytest.approx(0.2, abs=0.01)
    last = torch.cat(priors[-80:])  # after the last fine-tuning
    deviation = (last - seen["saved"]["prior_mean"]) / seen["saved"]["prior_sd"]
    assert deviation.mean(0).abs().max() < 0.15 and (deviation.std(0) - 1).abs().max() < 0.15
    assert [args[2] for args, *_ in seen["polyak_"]] == [0.01] * 240
    assert {type(args[0]) for args, *_ in seen["polyak_"]} == {
        rig_td3.GoalActor,
        rig_td3.TwinCritic,
    }


def test_the_agent_pursues_the_goals_that_it_stores(watched):
    """Observations, actions and goals of an episode are those that were seen, done and aimed at;
    the last observation is that of the old episode, not of the next; random actions come first."""
    seen = watched(goals="oracle", task="push", total_steps=1120, noise=0.0)
    assert seen["td_target"][0][0][3] == 0.98  # push looks further ahead
    acted = [call for call in seen["actor"] if len(call[0][1]) == 2]
    assert len(seen["add"]) == 14 and len(acted) == 560
    for k, ((_, observations, actions, ends, goals, _), *_) in enumerate(seen["add"]):
        assert observations.shape == (2, 41, 8) and actions.shape == (2, 40, 2) and not ends.any()
        states = observations[:, :-1].reshape(-1, 2, 4).astype(float)
        after = sprites_env.act(states, actions.reshape(-1, 2), "push").reshape(2, 40, 8)
        assert np.allclose(after, observations[:, 1:], atol=1e-5)
        pursued = acted[40 * k : 40 * k + 40]
        assert all(torch.equal(args[1][:, 4:], goals) for args, *_ in pursued)
        chosen = torch.stack([result for _, result, _ in pursued], 1)
        assert np.allclose(chosen, actions, atol=1e-6) == (k >= 10)  # 10 rounds: 800 steps
        if k < 7:
            assert 0.5 < actions.std() < 0.65 and abs(actions.mean()) < 0.15
    last_z = seen["add"][-1][0][-1]
    spread = (last_z[0, 1:, 0] - last_z[0, :-1, 0]) / torch.as_tensor(
        np.diff(observations[0, :, 0])
    )
    assert (1 / spread).nanmedian().item() == pytest.approx(0.23, abs=0.03)  # standard deviations


def test_evaluation_does_not_disturb_training(tmp_path):
    run(tmp_path / "a", goals="oracle", eval_episodes=3)
    run(tmp_path / "b", goals="oracle", eval_episodes=5)
    a, b = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True)["actor"] for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_oracle_learns_to_reach(tmp_path):
    """Ten seconds. Doing nothing leaves .40."""
    args = {"goals": "oracle", "total_steps": 2000, "torch_threads": 1, "device": "cpu"}
    assert rig_td3.train(rig_td3.Args(**args, out=str(tmp_path)))["final_agent_distance"] < 0.1


def test_vae_learns_where_things_are(tmp_path):
    """Fifteen seconds: with beta 20 at first and 4 at the end, the square's place is in z."""
    args = {"images": 3000, "vae_updates": 300, "beta": 4.0, "total_steps": 80}
    assert run(tmp_path, **args, task="push")["probe_r2_square"] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal_fractions": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"goal_fractions": (math.nan, 0.5, 0.5)}, "add up to 1"),
        ({"total_steps": 79}, "--total-steps must be at least 80"),
        ({"total_steps": 0}, "--total-steps must be at least 80"),
        ({"finetune_every": -1}, "--finetune-every"),
        ({"gamma": 1.0}, "--gamma"),
        ({"beta": 0.0}, "--beta must be positive"),
        ({"images": 4}, "--images at least 10"),
        ({"seed": -1}, "--seed"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "_".join(map(str, x)),
)
def test_bad_input_ends_with_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_finished_runs_are_kept(tmp_path):
    run(tmp_path)
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path)
