"""skill_embedding.py: equations by hand, what may see and teach what, wiring, bad input."""

import csv
import inspect
import json
import math

import numpy as np
import pytest
import torch

import skill_embedding as se

TINY = {"total_steps": 640, "num_envs": 4, "updates": 2, "batch_size": 3, "eval_episodes": 8}
TINY |= {"transfer_steps": 320, "torch_threads": 1, "device": "cpu"}
FULL = TINY | se.USUAL["library"]  # every argument that `learn` reads
torch.set_num_threads(1)


def run(out, **changes):
    return se.train(se.Args(**TINY | changes, out=str(out)))


def rows(out):
    with open(out / "curve.csv", newline="") as file:
        return list(csv.DictReader(file))


def small_learner(tasks=4, z_dim=3, embedding="gaussian", obs_dim=4, action_dim=2, window=4):
    torch.manual_seed(0)
    return se.SkillLearner(obs_dim, action_dim, tasks, z_dim, embedding, window, 1.5, 0.2)


# --- Equations -------------------------------------------------------------------------------


def retrace(ratios=(9, 0.5, 4), last=0.0, terminated=(0, 0, 0)):
    """The notes' example: gamma .9, r (1, 0, 2), V1 3, V2 1, Q' (2, 4, 1.5)."""
    reward, q = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[2.0, 4.0, 1.5]])
    value = torch.tensor([[7.0, 3.0, 1.0, last]])  # V0 is of no account
    log_ratio = torch.tensor([ratios]).float().log()
    ended = torch.tensor([terminated]).float()
    return se.retrace_targets(reward, ended, value, q, log_ratio, 0.9)[0].tolist()


def test_retrace_by_hand():
    assert retrace() == pytest.approx([2.5075, 1.35, 2])
    assert retrace(last=2) == pytest.approx([3.2365, 2.97, 3.8])  # a time limit: bootstrap
    assert retrace(ratios=(0, 0, 0)) == pytest.approx([3.7, 0.9, 2])  # one step
    assert retrace(ratios=(1, 1, 1)) == pytest.approx([1.315, 1.35, 2])  # all of the return
    assert retrace(ratios=(0.1, 0.5, 4)) == retrace()  # the first action is given
    assert retrace(last=2, terminated=(0, 0, 1)) == pytest.approx([2.5075, 1.35, 2])
    assert retrace(terminated=(0, 1, 0))[:2] == pytest.approx([1 + 0.9 * (3 + 0.5 * (0 - 4)), 0])


def test_retrace_is_the_sum_of_corrected_errors():
    """Munos et al.: G_i = Q_i + sum_j gamma^(j-i) (c_(i+1) ... c_j) (r_j + gamma V_(j+1) - Q_j)."""
    rng, gamma, T = np.random.default_rng(0), 0.95, 7
    r, q, log_ratio = rng.normal(size=(3, 2, T))
    v = rng.normal(size=(2, T + 1))
    expected = np.zeros((2, T))
    for b in range(2):
        for i in range(T):
            product, expected[b, i] = 1.0, q[b, i]
            for j in range(i, T):
                product *= min(1, math.exp(log_ratio[b, j])) if j > i else 1
                error = r[b, j] + gamma * v[b, j + 1] - q[b, j]
                expected[b, i] += gamma ** (j - i) * product * error
    tensors = [torch.tensor(x) for x in (r, np.zeros((2, T)), v, q, log_ratio)]
    np.testing.assert_allclose(se.retrace_targets(*tensors, gamma).numpy(), expected)


def test_divergence_and_entropy_by_hand():
    mean, sd = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[1.0], [1.0], [2.0]])
    kl = se.divergences(se.gaussian(mean, sd))
    assert kl[0, 1].item() == pytest.approx(0.5)
    assert kl[0, 2].item() == pytest.approx(0.318, abs=1e-3)
    assert kl[2, 0].item() == pytest.approx(0.807, abs=1e-3)
    assert kl.diagonal().tolist() == [0, 0, 0]
    assert se.gaussian(mean, sd).entropy()[0].item() == pytest.approx(1.4189, abs=1e-4)
    two = se.gaussian(torch.zeros(2), torch.ones(2))
    assert two.entropy().item() == pytest.approx(2 * 1.4189, abs=1e-4)
    assert se.bernoulli(torch.zeros(2)).entropy().item() == pytest.approx(math.log(4))
    log_p = se.gaussian(torch.zeros(2), torch.ones(2)).log_prob(torch.tensor([1.0, 0.0]))
    assert log_p.item() == pytest.approx(-0.5 - math.log(2 * math.pi))


def test_skill_reward_by_hand():
    r_hat = se.skill_reward(*torch.tensor([[[1.0, 1.0]], [[2.0, -9.0]], [[4.0, 4.0]]]), 0.1, 0.01)
    assert r_hat.tolist() == [[pytest.approx(1.24), pytest.approx(1 - 0.3 + 0.04)]]


def test_actor_loss_by_hand():
    q, entropy, entropy_z = torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[5.0]])
    mean = torch.tensor([[[1.0, -2.0]]])
    loss = se.actor_loss(q, mean, entropy, entropy_z, 0.1, 0.01)
    assert loss.item() == pytest.approx(-2 - 0.03 - 0.5 + 0.03 * 5)


def test_windows_by_hand_and_without_leaks():
    obs, actions = torch.arange(5.0).view(1, 5, 1), 10 * torch.arange(1, 5.0).view(1, 4, 1)
    seen = se.windows(obs, actions, 2)[0].tolist()
    assert seen == [[0, 0, 0, 10], [0, 0, 1, 20], [0, 1, 2, 30], [1, 2, 3, 40]]
    assert se.windows(obs, actions, 0)[0].tolist() == [[0, 10], [1, 20], [2, 30], [3, 40]]


def test_bits_pass_gradients_straight_through():
    """dz/dlogit is that of the mean, p (1 - p); the value is a bit; Gaussians are shifted noise."""
    logits = torch.tensor([0.0, math.log(3)], requires_grad=True)
    z = se.straight_through(se.bernoulli(logits))
    z.sum().backward()
    assert set(z.tolist()) <= {0, 1} and logits.grad.tolist() == pytest.approx([0.25, 0.1875])
    mean = torch.zeros(2, requires_grad=True)
    se.straight_through(se.gaussian(mean, torch.ones(2))).sum().backward()
    assert mean.grad.tolist() == [1, 1]


def test_identified():
    log_q = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0], [4.0, 0.0, 3.0]])
    assert se.identified(log_q) == pytest.approx(1 / 3)  # the first one only


# --- Tasks -----------------------------------------------------------------------------------


def place(tasks, x, y):
    """Put every agent at (x, y) and let it rest for a step."""
    states = np.zeros((tasks.num_envs, 2, 4))
    states[..., :2] = x, y
    tasks.env.reset(options={"state": states})
    return tasks.step(np.zeros((tasks.num_envs, 2)))


def test_goals_are_on_the_circle():
    expected = [[0.8, 0.5], [0.5, 0.8], [0.2, 0.5], [0.5, 0.2]]
    np.testing.assert_allclose(se.GOALS, expected, atol=1e-12)
    np.testing.assert_allclose(se.NEW_TASKS["interpolation"][0, 0], 0.5 + 0.3 / math.sqrt(2))
    assert (se.TASKS["generality"][0] == se.TASKS["generality"][2]).all()


def test_rewards_and_what_is_seen():
    tasks = se.GoalTasks(2, se.TASKS["library"])
    obs = tasks.reset(np.random.default_rng(0), np.array([0, 1]))
    assert obs.shape == (2, 4) and np.abs(obs[:, :2]).max() <= 0.05 / 0.25 and not obs[:, 2:].any()
    assert obs[:, :2].std() > 0.02
    obs, reward, terminated = place(tasks, 0.8, 0.5)
    np.testing.assert_allclose(obs, [[1.2, 0, 0, 0]] * 2, atol=1e-6)
    np.testing.assert_allclose(reward, [1, math.exp(-0.18 / 0.045)])
    assert not terminated.any()
    any_goal = se.GoalTasks(1, se.TASKS["versatility"])
    any_goal.reset(np.random.default_rng(0), np.array([0]))
    assert place(any_goal, 0.5, 0.65)[1] == pytest.approx(math.exp(-0.5))
    assert any_goal.nearest.tolist() == [1]


def test_solved_takes_the_last_five_steps():
    tasks = se.GoalTasks(1, se.TASKS["library"])
    tasks.reset(np.random.default_rng(0), np.array([2]))
    for count in range(1, 7):
        place(tasks, 0.2, 0.59)
        assert tasks.solved.tolist() == [count >= 5]
    place(tasks, 0.2, 0.61)
    assert not tasks.solved.any()
    place(tasks, 0.2, 0.5)
    tasks.reset(np.random.default_rng(0), np.array([2]))
    assert tasks.near.tolist() == [0] and len(tasks.path) == 1  # nothing leaks across a reset


def test_goals_in_order():
    tasks = se.GoalTasks(1, se.NEW_TASKS["sequencing"], in_order=True)
    obs = tasks.reset(np.random.default_rng(0), np.array([0]))
    assert obs[0, 4:].tolist() == [1, 0]
    assert place(tasks, 0.2, 0.5)[1] == 0  # the last one first: nothing
    obs, reward, _ = place(tasks, 0.8, 0.59)
    assert reward == 0 and obs[0, 4:].tolist() == [0, 1]  # on to the next
    assert place(tasks, 0.8, 0.5)[1] == 0
    assert place(tasks, 0.2, 0.41)[1] == 1 and place(tasks, 0.2, 0.39)[1] == 0
    obs = tasks.reset(np.random.default_rng(0), np.array([0]))
    assert obs[0, 4:].tolist() == [1, 0]


def test_skills_as_actions():
    """One z, within its range, for `hold` steps of the mean action; rewards add up; the skill does
    not see the phase."""
    seen = []

    class Policy(torch.nn.Linear):
        def forward(self, obs, z):
            seen.append((obs, z))
            return se.gaussian(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2))

    inner = se.GoalTasks(1, se.NEW_TASKS["sequencing"], in_order=True)
    tasks = se.SkillTasks(inner, Policy(1, 1), z_dim=3, hold=5)
    assert (tasks.steps, tasks.action_dim, tasks.obs_dim, tasks.num_envs) == (8, 3, 6, 1)
    start = tasks.reset(np.random.default_rng(0), np.array([0]))
    obs, reward, _ = tasks.step(np.array([[0.5, -2.0, 0.0]], np.float32))
    assert len(seen) == 5 and all(o.shape == (1, 4) for o, _ in seen)
    assert seen[0][1].tolist() == [[0.5 * se.Z_RANGE, -se.Z_RANGE, 0]]
    assert obs[0, 0] - start[0, 0] == pytest.approx(5 * 0.05 / 0.25, abs=1e-5) and reward == 0
    place(inner, 0.8, 0.5)
    for _ in range(6):
        place(inner, 0.2, 0.5)
    assert tasks.solved.all()
    inner.env.reset(options={"state": np.array([[[0.16, 0.5, 0, 0], [0.5, 0.5, 0, 0]]])})
    assert tasks.step(np.zeros((1, 3), np.float32))[1] == 2  # x .21, .26 (near), .31 and on


# --- What may see and teach what --------------------------------------------------------------


def test_policy_and_inference_never_see_the_task():
    assert list(inspect.signature(se.SkillPolicy.forward).parameters) == ["self", "obs", "z"]
    assert list(inspect.signature(se.SkillInference.forward).parameters) == ["self", "window"]


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_value_teaches_policy_and_embedding(kind):
    """dQ/da reaches the policy, and dQ/dz the embedding, of the task in question only."""
    learner = small_learner(embedding=kind)
    t, obs = torch.full((2, 5), 1), torch.randn(2, 5, 4)
    z = se.straight_through(learner.embedding(t))
    learner.critic(obs, learner.policy(obs, z).rsample(), z, t).mean().backward()
    assert learner.policy.mlp[0].weight.grad.abs().sum() > 0
    gradient = learner.embedding.place.grad.abs().sum(1)
    assert gradient[1] > 0 and gradient[[0, 2, 3]].sum() == 0


def test_bounds_of_the_embedding():
    learner = small_learner()
    with torch.no_grad():
        learner.embedding.place.mul_(1000)
        learner.embedding.width.fill_(1000)
    p = learner.embedding(torch.arange(4))
    assert p.mean.abs().max() <= se.Z_RANGE and p.stddev.max().item() == pytest.approx(0.2)


def spied(monkeypatch, tasks=None, **changes):
    """What skill_reward and retrace_targets are given in each update of a short `learn`."""
    rewards, targets = [], []
    skill_reward, retrace_targets = se.skill_reward, se.retrace_targets

    def reward_spy(*inputs):
        rewards.append((*inputs, skill_reward(*inputs)))
        return rewards[-1][-1]

    def target_spy(*inputs):
        targets.append(inputs)
        return retrace_targets(*inputs)

    monkeypatch.setattr(se, "skill_reward", reward_spy)
    monkeypatch.setattr(se, "retrace_targets", target_spy)
    tasks = tasks or se.GoalTasks(4, se.TASKS["library"])
    learner = small_learner(tasks.num_tasks, 3, "gaussian", tasks.obs_dim, tasks.action_dim)
    args = se.Args(**FULL | changes)
    list(se.learn(tasks, learner, 320, 2, args, np.random.default_rng(0), torch.device("cpu")))
    monkeypatch.undo()
    return rewards, targets


def test_after_collection_all_ratios_are_one(monkeypatch):
    """In the first update the policy is the behaviour; later it has moved away: E_b log π/b < 0.
    Targets carry no gradient."""
    _, targets = spied(monkeypatch, learning_rate=0.03)
    log_ratio = [update[4] for update in targets]
    assert log_ratio[0].abs().max() < 1e-5 and log_ratio[1].mean() < -1e-4
    for update in targets:
        assert not any(x.requires_grad for x in update if isinstance(x, torch.Tensor))


def test_rewards_are_made_anew(monkeypatch):
    """What Retrace is given is eq. (1) with the present log q, and with weights that fall in the
    second half."""
    rewards, targets = spied(monkeypatch, learning_rate=0.03)
    assert len(rewards) == len(targets) == 4  # two rounds of two updates
    for (_, log_q, _, _, _, r_hat), target in zip(rewards, targets):
        assert log_q.std() > 0 and torch.equal(r_hat, target[0])
    weights = [(alpha2, alpha3) for *_, alpha2, alpha3, _ in rewards]
    assert weights == [(0.2, 0.06)] * 4
    rewards, _ = spied(monkeypatch, num_envs=1, tasks=se.GoalTasks(1, se.TASKS["versatility"]))
    weights = [(alpha2, alpha3) for *_, alpha2, alpha3, _ in rewards[::2]]
    left = np.minimum(1, 2 - 2 * np.arange(8) / 8)
    np.testing.assert_allclose(weights, np.stack([0.2 * (1 + 3 * left) / 4, 0.06 * left], 1))


def test_z_ratio_is_an_option(monkeypatch):
    """It adds log p(z|t) / b(z|t) to all log-ratios of an episode, one number for its z."""
    changes = {"learning_rate": 0.03, "updates": 3, "batch_size": 8}
    _, without = spied(monkeypatch, **changes)
    _, having = spied(monkeypatch, z_ratio=True, **changes)
    extra = having[1][4] - without[1][4]
    assert extra.abs().max() > 1e-3 and extra.std(1).max() < 1e-3
    add = se.TrajectoryReplay.add

    def add_likelier(self, episodes):  # as if b had been e times p
        add(self, episodes | {"log_b_z": episodes["log_b_z"] + 1})

    monkeypatch.setattr(se.TrajectoryReplay, "add", add_likelier)
    _, having = spied(monkeypatch, z_ratio=True, **changes)
    torch.testing.assert_close(having[0][4], torch.full_like(having[0][4], -1.0))


def test_values_are_those_of_the_slow_critic(monkeypatch):
    """Made to follow once an update, it is asked for V at sampled actions and for Q̄ at stored."""

    def follow(slow, fast, tau):
        assert tau == se.TAU and slow is not fast
        slow.forward = lambda obs, action, z, task: 100 + action[..., 0]

    monkeypatch.setattr(se, "polyak_", follow)
    _, targets = spied(monkeypatch)
    assert len(targets) == 4 and targets[0][2].abs().max() < 50
    for _, _, value, q_bar, *_ in targets[1:]:
        for x in (value, q_bar):
            assert abs(x.mean() - 100) < 0.5 and x.std() > 0.3


def test_held_skills_are_discounted_as_one_step(monkeypatch):
    inner = se.GoalTasks(4, se.NEW_TASKS["sequencing"], in_order=True)
    tasks = se.SkillTasks(inner, se.SkillPolicy(4, 2, 2), z_dim=2, hold=5)
    rewards, targets = spied(monkeypatch, tasks=tasks)
    assert len(targets) == 4 and {update[5] for update in targets} == {0.9**5}
    assert targets[0][0].shape == (3, 8)  # eight choices, and as many environment steps as ever


def test_inference_learns_to_tell(monkeypatch):
    """The likelihood of the skills in the replay rises."""
    rewards, _ = spied(monkeypatch, updates=80, learning_rate=0.003)
    log_q = [update[1].mean() for update in rewards]
    assert sum(log_q[-10:]) / 10 > sum(log_q[:10]) / 10 + 0.3


def test_three_optimizers_whose_rates_fall(monkeypatch):
    """Every parameter is in exactly one; in the last of four rounds half the rate is left."""
    made, adam = [], torch.optim.Adam
    spy = lambda *args, **options: made.append(adam(*args, **options)) or made[-1]  # noqa: E731
    monkeypatch.setattr(torch.optim, "Adam", spy)
    tasks, learner = se.GoalTasks(4, se.TASKS["library"]), small_learner()
    args = se.Args(**FULL | {"learning_rate": 0.01})
    list(se.learn(tasks, learner, 640, 1, args, np.random.default_rng(0), torch.device("cpu")))
    stepped = [p for optimizer in made for p in optimizer.param_groups[0]["params"]]
    assert len(stepped) == len({*stepped}) == len([*learner.parameters()])
    assert [optimizer.param_groups[0]["lr"] for optimizer in made] == [0.005] * 3


def test_learn_trains_every_network():
    tasks, learner = se.GoalTasks(4, se.TASKS["library"]), small_learner()
    before = {name: value.clone() for name, value in learner.named_parameters()}
    args = se.Args(**FULL | {"updates": 1})
    progress = se.learn(tasks, learner, 320, 2, args, np.random.default_rng(0), torch.device("cpu"))
    assert [step for step, _ in progress] == [160, 320]
    for name, value in learner.named_parameters():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("alpha, moves", [("alpha1", "embedding"), ("alpha3", "policy")])
def test_entropies_widen(alpha, moves):
    """With nothing but its entropy to gain, p(z|t) (or the policy) gets wider."""
    tasks, learner = se.GoalTasks(4, se.TASKS["library"]), small_learner()
    weights = {"alpha1": 0.0, "alpha2": 0.0, "alpha3": 0.0} | {alpha: 1000.0}
    args = se.Args(**FULL | weights | {"updates": 5})
    t, obs = torch.arange(4), torch.zeros(4, 4)

    def width():
        p = learner.embedding(t) if moves == "embedding" else learner.policy(obs, torch.zeros(4, 3))
        return p.stddev.mean().item()

    before = width()
    list(se.learn(tasks, learner, 320, 2, args, np.random.default_rng(0), torch.device("cpu")))
    assert width() > before * 1.001


def test_replay_keeps_whole_episodes():
    """Rows stay together, the oldest leave first, and z stays with what it did."""
    replay = se.TrajectoryReplay(room=5)
    for i in range(4):
        number = torch.full((2,), 2.0 * i) + torch.arange(2)
        replay.add({"obs": number[:, None, None].expand(2, 3, 1), "z": number[:, None]})
    batch = replay.sample(np.random.default_rng(0), 100)
    assert batch["obs"].shape == (100, 3, 1) and set(batch["z"].flatten().tolist()) == {
        3,
        4,
        5,
        6,
        7,
    }
    assert (batch["obs"] == batch["z"][:, None]).all()


def test_one_skill_for_a_whole_episode():
    """roll_out: the same z at every step, and log_b is what the policy says of its actions."""
    tasks, learner = se.GoalTasks(3, se.TASKS["library"]), small_learner()
    t, z = torch.arange(3), torch.randn(3, 3)
    episodes = se.roll_out(tasks, learner.policy, np.random.default_rng(0), t, z)
    shapes = {name: tuple(tensor.shape) for name, tensor in episodes.items()}
    assert shapes == {
        "obs": (3, 41, 4), "action": (3, 40, 2), "reward": (3, 40), "terminated": (3, 40),
        "log_b": (3, 40), "task": (3,), "z": (3, 3),
    }  # fmt: skip
    with torch.no_grad():
        pi = learner.policy(episodes["obs"][:, :-1], z[:, None])
    assert torch.allclose(pi.log_prob(episodes["action"]), episodes["log_b"], atol=1e-5)
    mean = se.roll_out(tasks, learner.policy, np.random.default_rng(0), t, z, noise=False)
    with torch.no_grad():
        assert torch.allclose(learner.policy(mean["obs"][:, 3], z).mean, mean["action"][:, 3])


def test_evaluation_by_hand(monkeypatch):
    """A skill that moves by z, and an inference network that reads z off the action, identify every
    episode; shares, the worst task and solutions are those of what was solved."""
    tasks, learner = se.GoalTasks(64, se.TASKS["versatility"]), small_learner(1, 2)
    learner.policy.forward = lambda obs, z: se.gaussian(0.2 * z, torch.ones_like(z))
    reads = lambda w: se.gaussian(5 * w[..., -2:], 0.01 * torch.ones_like(w[..., -2:]))  # noqa: E731
    learner.inference.forward = reads
    assert se.evaluate_skills(tasks, learner, 4)[0]["identifiability_top1"] == 1
    learner.inference.forward = lambda w: reads(-w)
    assert se.evaluate_skills(tasks, learner, 4)[0]["identifiability_top1"] < 0.2

    def planted(*arguments, **options):
        tasks.near = np.where(np.arange(64) < 32, 5, 0)
        tasks.nearest = np.where(np.arange(64) < 16, 0, 3)
        return episodes

    episodes = se.evaluate_skills(tasks, learner, 4)[1]
    monkeypatch.setattr(se, "roll_out", planted)
    metrics, _ = se.evaluate_skills(tasks, learner, 4)
    assert metrics["success_rate"] == metrics["worst_task"] == 0.5 and metrics["solved_goals"] == 0
    assert metrics["solutions_found"] == 2 and metrics["goal_entropy_bits"] == 1


def test_transfer_has_the_actors_it_names(tmp_path, monkeypatch):
    """Skills choose z and hold it, scratch acts; both have the new tasks, goals in order; and the
    policy that acts for the skills is the library's, before and after."""
    run(tmp_path / "library")
    seen, original = [], se.learn

    def spy(tasks, learner, total_steps, *rest):
        seen.append((tasks, total_steps))
        return original(tasks, learner, total_steps, *rest)

    monkeypatch.setattr(se, "learn", spy)
    checkpoint = tmp_path / "library" / "checkpoint.pt"
    run(tmp_path / "new", experiment="transfer", library=str(checkpoint), hold=4)
    assert [type(tasks) for tasks, _ in seen] == [se.SkillTasks, se.GoalTasks] * 2
    saved = torch.load(checkpoint, weights_only=True)["networks"]
    for i, (tasks, steps) in enumerate(seen):
        assert tasks.in_order and tasks.num_envs == 4 and steps == 320
        expected = list(se.NEW_TASKS.values())[i // 2]
        np.testing.assert_array_equal(tasks.goals, expected)
        if i % 2 == 0:
            assert tasks.hold == 4
            for name, value in tasks.policy.state_dict().items():
                assert torch.equal(value, saved[f"policy.{name}"])


def test_evaluation_leaves_the_random_streams_alone():
    tasks, learner = se.GoalTasks(8, se.TASKS["library"]), small_learner()
    before = torch.random.get_rng_state()
    first, _ = se.evaluate_skills(tasks, learner, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert se.evaluate_skills(tasks, learner, 4)[0] == first


def test_learns():
    """One goal, twelve seconds: what a broken loss would not reach."""
    torch.manual_seed(1)
    goals = se.GOALS[None, [1]]
    learner = small_learner(tasks=1, z_dim=2)
    args = se.Args(**FULL | {"num_envs": 16, "updates": 20, "batch_size": 16, "alpha2": 0.0})
    rng = np.random.default_rng(1)
    list(se.learn(se.GoalTasks(16, goals), learner, 9_600, 1, args, rng, torch.device("cpu")))
    metrics, _ = se.evaluate_skills(se.GoalTasks(64, goals), learner, 4)
    assert metrics["success_rate"] > 0.5 and metrics["eval_return_mean"] > 25, metrics


# --- Runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", ["library", "versatility", "generality"])
@pytest.mark.parametrize("embedding", ["gaussian", "bernoulli", "one_hot"])
def test_smoke(experiment, embedding, tmp_path):
    summary = run(tmp_path, experiment=experiment, embedding=embedding, eval_episodes=64)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    names = "args.json curve.csv curve.png skills.png rollout.gif checkpoint.pt summary.json"
    assert {path.name for path in tmp_path.iterdir()} == set(names.split())
    expected = {"success_rate", "solved_goals", "identifiability_top1", "eval_return_mean"}
    expected |= {"solutions_found", "goal_entropy_bits"} if experiment == "versatility" else set()
    if experiment == "generality" and embedding == "gaussian":
        expected |= {"kl_duplicate", "kl_others"}
        last = rows(tmp_path)[-1]
        assert float(last["kl_1_3"]) == pytest.approx(summary["kl_duplicate"])
        others = min(float(last["kl_1_2"]), float(last["kl_1_4"]))
        assert others == pytest.approx(summary["kl_others"])
    assert expected <= set(summary) and 0 <= summary["identifiability_top1"] <= 1
    assert int(rows(tmp_path)[-1]["step"]) == 640
    learner = se.load_skills(tmp_path / "checkpoint.pt", torch.device("cpu"))
    tasks = se.GoalTasks(64, se.TASKS[experiment])
    metrics, _ = se.evaluate_skills(tasks, learner, 4)
    assert metrics["eval_return_mean"] == pytest.approx(summary["eval_return_mean"], rel=1e-5)


def test_same_seed_same_curve(tmp_path):
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 2}}.items():
        run(tmp_path / name, **changes)
    timing = {"seconds", "steps_per_second"}
    a, b, c = ([{k: v for k, v in row.items() if k not in timing} for row in rows(tmp_path / n)]
               for n in "abc")  # fmt: skip
    assert a == b != c


def test_transfer_freezes_what_it_loads(tmp_path):
    run(tmp_path / "library")
    checkpoint = tmp_path / "library" / "checkpoint.pt"
    changes = {"experiment": "transfer", "library": str(checkpoint)}
    summary = run(tmp_path / "transfer", **changes)
    for task in se.NEW_TASKS:
        for name in ("success_random", "success_skills", "success_scratch"):
            assert 0 <= summary[f"{name}_{task}"] <= 1
    assert set(summary["transfer_steps_ratio"]) == set(se.NEW_TASKS)
    saved = torch.load(tmp_path / "transfer" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 320 and "policy.mlp.0.weight" in saved["skills_sequencing"]
    assert int(rows(tmp_path / "transfer")[-1]["step"]) == 320
    assert (tmp_path / "transfer" / "rollout.gif").exists()
    assert not (tmp_path / "transfer" / "library").exists()


def test_transfer_learns_a_library_first(tmp_path):
    run(tmp_path, experiment="transfer")
    assert (tmp_path / "library" / "summary.json").exists() and (tmp_path / "curve.csv").exists()
    (tmp_path / "summary.json").unlink()  # as if it had been interrupted
    run(tmp_path, experiment="transfer")


def test_what_is_evaluated_does_not_change_what_is_learnt(tmp_path):
    run(tmp_path / "library")
    changes = {"experiment": "transfer", "library": str(tmp_path / "library" / "checkpoint.pt")}
    saved = []
    for episodes in (8, 16):
        out = tmp_path / str(episodes)
        run(out, eval_episodes=episodes, **changes)
        saved.append(torch.load(out / "checkpoint.pt", weights_only=True))
    for name in ("skills_interpolation", "scratch_sequencing"):
        for a, b in zip(saved[0][name].values(), saved[1][name].values()):
            assert torch.equal(a, b)


def test_ratio_of_steps():
    """Steps to 80 %: the first report that has it. If scratch never does, the budget stands in."""
    curve = [{"step": s, "skills_a": x, "scratch_a": y} for s, x, y in
             ((10, 0.1, 0), (20, 0.8, 0.5), (30, 0.7, 0.79), (40, 1, 0.9))]  # fmt: skip
    assert se.steps_to_solve(curve, "a") == (20, 40, 2.0)
    assert se.steps_to_solve(curve[:3], "a") == (20, None, 1.5)
    assert se.steps_to_solve(curve[:1], "a") == (None, None, None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gamma": 1.0}, "--gamma"),
        ({"spread": -1.0}, "--spread"),
        ({"alpha2": -1.0}, "--alpha2"),
        ({"window": -1}, "--window"),
        ({"total_steps": 100}, "at least 160"),
        ({"hold": 7}, "--hold must divide 40"),
        ({"z_dim": 0}, "--z-dim"),
        ({"embedding": "one_hot", "z_dim": 4}, "--z-dim"),
        ({"library": "x.pt"}, "--library is for"),
        ({"experiment": "transfer", "library": "missing.pt"}, "missing.pt"),
        ({"seed": -1}, "--seed"),
        ({"num_envs": 6}, "multiples of 4"),
        ({"eval_episodes": 2}, "multiples of 4"),
        ({"experiment": "transfer", "embedding": "bernoulli"}, "bits"),
    ],
)
def test_bad_input(changes, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, **changes)


def test_a_library_that_is_none(tmp_path):
    files = {"a.pt": b"no checkpoint", "b.pt": b"", "c.csv": b"step,seconds", "d.gif": b"GIF89a"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match="is no checkpoint of skills"):
            run(tmp_path / "out", experiment="transfer", library=str(tmp_path / name))
    torch.save({"networks": {}}, tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="is no checkpoint of skills"):
        run(tmp_path / "out", experiment="transfer", library=str(tmp_path / "c.pt"))


def test_bits_are_no_library(tmp_path):
    run(tmp_path / "bits", embedding="bernoulli")
    with pytest.raises(SystemExit, match="bits"):
        checkpoint = str(tmp_path / "bits" / "checkpoint.pt")
        run(tmp_path / "out", experiment="transfer", library=checkpoint)
    assert not (tmp_path / "out").exists()


def test_finished_runs_are_kept(tmp_path):
    run(tmp_path)
    with pytest.raises(SystemExit, match="--overwrite"):
        run(tmp_path)
