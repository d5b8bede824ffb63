"""Every equation against numbers worked by hand, and against plain float64 loops."""

import math

import numpy as np
import pytest
import torch

import ppo_encoder
import rp_pretrain


def test_reward_prediction_loss_by_hand():
    # B 1, T 2, K 2: errors .5, 0, 1, -2 -> .25 + 0 + 1 + 4
    rewards = torch.tensor([[[0.5, 0.1], [1.0, 0.0]]])
    predicted = torch.tensor([[[0.0, 0.1], [0.0, 2.0]]])
    assert rp_pretrain.reward_prediction_loss(predicted, rewards).item() == pytest.approx(5.25)
    # a second sequence without error halves it: mean over the batch, sum over time and tasks
    both = torch.cat([predicted, rewards]), torch.cat([rewards, rewards])
    assert rp_pretrain.reward_prediction_loss(*both).item() == pytest.approx(2.625)


def test_reconstruction_loss_by_hand():
    frames = torch.zeros(2, 1, 64, 64)
    decoded = torch.zeros(2, 1, 64, 64)
    decoded[0, 0, 3, 4], decoded[1, 0, 0, 0] = (
        2.0,
        -1.0,
    )  # squared errors 4 and 1 among 2 x 4096 pixels
    assert rp_pretrain.reconstruction_loss(decoded, frames).item() == pytest.approx(5 / 8192)


@pytest.mark.parametrize(
    "loss", [rp_pretrain.reward_prediction_loss, rp_pretrain.reconstruction_loss]
)
def test_pretraining_losses_refuse_to_broadcast(loss):
    with pytest.raises(AssertionError):
        loss(torch.zeros(4, 1, 2), torch.zeros(4, 3, 2))


def test_linear_probe():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 3, generator=generator)
    linear = z @ torch.tensor([[1.0], [2.0], [0.0]]) + 5
    noise = torch.randn(400, 1, generator=generator)
    y = torch.cat([linear, noise], dim=1)
    r2 = rp_pretrain.linear_probe(z[:300], y[:300], z[300:], y[300:])
    assert r2[0] == pytest.approx(1, abs=1e-4)
    assert r2[1] == pytest.approx(0, abs=0.1)
    # an affine probe against numpy's least squares, on a quantity that is only partly linear
    y = linear + noise
    a = np.c_[z.double().numpy(), np.ones(400)]
    w = np.linalg.lstsq(a[:300], y[:300].double().numpy(), rcond=None)[0]
    error = y[300:].double().numpy() - a[300:] @ w
    expected = 1 - (error**2).mean() / y[300:].double().numpy().var()
    r2 = rp_pretrain.linear_probe(z[:300], y[:300], z[300:], y[300:])
    assert r2.item() == pytest.approx(expected, abs=1e-4)


def test_gaussian_log_prob_by_hand():
    # standard normal at its mean: -ln sqrt(2 pi) per dimension; one sd off: -1/2 more
    mean, log_std = torch.zeros(2, 2), torch.zeros(2)
    actions = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    log_prob = ppo_encoder.gaussian_log_prob(actions, mean, log_std)
    constant = -math.log(2 * math.pi)
    np.testing.assert_allclose(log_prob, [constant, constant - 0.5], rtol=1e-6)
    log_std = torch.tensor([0.3, -0.7])
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    got = ppo_encoder.gaussian_log_prob(actions, mean, log_std)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_advantages_by_hand():
    """gamma .5, lambda .5; the episode of environment 0 is cut by the time limit after step 1.

    delta = r + .5 V' - V: 1 + .5 * 4 - 2 = 1;  0 + .5 * 6 - 4 = -1;  2 + .5 * 2 - 1 = 2
    A2 = 2;  A1 = -1 (trace cut, but V' = 6 of the final observation counts);  A0 = 1 - .25 = .75
    Environment 1 has no end: A1 = -1 + .25 * 2 = -.5;  A0 = 1 - .125 = .875
    Environment 2 terminates instead: V' = 0, delta1 = -4, A1 = -4, A0 = 1 - 1 = 0"""
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 0], [2, 2, 2]])
    values = torch.tensor([[2.0, 2, 2], [4, 4, 4], [1, 1, 1]])
    next_values = torch.tensor([[4.0, 4, 4], [6, 6, 0], [2, 2, 2]])
    ended = torch.tensor([[0.0, 0, 0], [1, 0, 1], [0, 0, 0]])
    advantages = ppo_encoder.generalized_advantages(rewards, values, next_values, ended, 0.5, 0.5)
    expected = [[0.75, 0.875, 0], [-1, -0.5, -4], [2, 2, 2]]
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_advantages_against_a_sum_over_time():
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, up to the end of the episode."""
    rng = np.random.default_rng(0)
    r, v, v_next = rng.normal(size=(3, 12, 5))
    ended = (rng.random((12, 5)) < 0.2).astype(float)
    gamma, lam = 0.9, 0.8
    expected = np.zeros((12, 5))
    for n in range(5):
        for t in range(12):
            for k in range(t, 12):
                delta = r[k, n] + gamma * v_next[k, n] - v[k, n]
                expected[t, n] += (gamma * lam) ** (k - t) * delta
                if ended[k, n]:
                    break
    arrays = (torch.from_numpy(x) for x in (r, v, v_next, ended))
    got = ppo_encoder.generalized_advantages(*arrays, gamma, lam)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_clipped_objective_by_hand():
    """clip .2, ratios 2, 2, .5, .5, 1.1 with advantages 1, -1, 1, -1, 3:
    min(2, 1.2) = 1.2; min(-2, -1.2) = -2; min(.5, .8) = .5; min(-.5, -.8) = -.8; 3.3; mean .44"""
    old = torch.zeros(5)
    log_prob = torch.tensor([2, 2, 0.5, 0.5, 1.1]).log().requires_grad_()
    advantage = torch.tensor([1.0, -1, 1, -1, 3])
    objective = ppo_encoder.clipped_objective(log_prob, old, advantage, 0.2)
    assert objective.item() == pytest.approx(0.44)
    objective.backward()  # no gradient where the clip holds, ratio * advantage / 5 elsewhere
    np.testing.assert_allclose(log_prob.grad, [0, -0.4, 0.1, 0, 0.66], atol=1e-6)


def test_value_loss_by_hand():
    value = torch.tensor([1.0, 2.0, -1.0])
    target = torch.tensor([0.0, 2.0, 1.0])
    assert ppo_encoder.value_loss(value, target).item() == pytest.approx(5 / 3)


def test_ppo_losses_refuse_to_broadcast():
    column = torch.zeros(4, 1)
    with pytest.raises(AssertionError):
        ppo_encoder.value_loss(column, torch.zeros(4))
    with pytest.raises(AssertionError):
        ppo_encoder.clipped_objective(torch.zeros(4), column, torch.zeros(4), 0.2)


def test_standardize():
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0]])  # sd sqrt(2) and 0: a constant is not blown up
    layer = ppo_encoder.Standardize(x)
    np.testing.assert_allclose(layer(x)[:, 0], [-1 / math.sqrt(2), 1 / math.sqrt(2)], rtol=1e-6)
    assert layer(x)[:, 1].abs().max() == 0 and layer.sd[1] > 0.05
    np.testing.assert_allclose(layer.inverse(layer(x)), x, rtol=1e-6)


def test_to_float_scales_a_copy():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert rp_pretrain.to_float(frames, "cpu").tolist() == pytest.approx([0, 0.2, 1])
    already = torch.tensor([51.0])
    assert rp_pretrain.to_float(already, "cpu").item() == pytest.approx(0.2)
    assert already.item() == 51  # the caller's own frames are left alone
