"""Short, real learning: what a broken loss, gradient or bootstrap would not survive."""

import numpy as np
import torch

import ppo_encoder
import rp_pretrain


def test_oracle_ppo_chases(tmp_path):
    """100,000 steps, seconds; the centre of the frame is worth 31.2, chasing 37.95."""
    args = ppo_encoder.Args(
        encoder="oracle", distractors=1, total_steps=100_000, torch_threads=1, out=str(tmp_path)
    )
    assert ppo_encoder.train(args)["eval_return_mean"] > 37.5


def test_pretraining_finds_the_target_and_not_the_distractor(tmp_path):
    args = rp_pretrain.Args(
        updates=600, distractors=1, tasks=("target_x", "target_y"), out=str(tmp_path)
    )
    summary = rp_pretrain.train(args)
    assert summary["mse"] < 0.01  # the variance of the rewards is 0.053
    assert min(summary["r2_target_x"], summary["r2_target_y"]) > 0.9
    assert max(summary["r2_distractor1_x"], summary["r2_agent_x"]) < 0.4


def test_ppo_learns_from_pixels_faster_than_chance(tmp_path):
    """A plain regression check of the whole image path: the critic learns to see the distance."""
    torch.set_num_threads(1)
    args = ppo_encoder.Args(
        encoder="image_scratch",
        distractors=0,
        total_steps=60_000,
        torch_threads=1,
        out=str(tmp_path),
    )
    result = ppo_encoder.train(args)
    assert np.isfinite(result["eval_return_mean"]) and result["eval_return_mean"] > 30
