"""Short, real learning, with thresholds that neither blind nor half-broken agents reach."""

import ppo_encoder
import rp_pretrain

ALIKE = {"torch_threads": 1, "device": "cpu"}


def test_oracle_ppo_chases(tmp_path):
    """60,000 steps, seconds. Chasing is worth 37.95; without the bootstrap at the time limit or
    without the critic's gradient it stays below 38."""
    args = ppo_encoder.Args(
        encoder="oracle", distractors=1, total_steps=60_000, **ALIKE, out=str(tmp_path)
    )
    assert ppo_encoder.train(args)["eval_return_mean"] > 38


def test_pretraining_finds_the_target_and_not_the_distractor(tmp_path):
    """800 updates. The variance of the rewards is 0.053: what predicting their mean would leave."""
    args = rp_pretrain.Args(updates=800, tasks=("target_x", "target_y"), **ALIKE, out=str(tmp_path))
    summary = rp_pretrain.train(args)
    assert summary["mse"] < 0.01
    assert min(summary["r2_target_x"], summary["r2_target_y"]) > 0.9
    assert max(summary[f"r2_{k}_{i}"] for k in ("agent", "distractor1") for i in "xy") < 0.4


def test_ppo_learns_from_pixels(tmp_path):
    """60,000 steps, above what waiting in the centre is worth (31.2): the target has been seen."""
    args = ppo_encoder.Args(
        encoder="image_scratch",
        distractors=0,
        total_steps=60_000,
        **ALIKE,
        out=str(tmp_path),
    )
    assert ppo_encoder.train(args)["eval_return_mean"] > 32
