"""Short, real learning: what a broken loss, gradient or bootstrap would not survive."""

import ppo_encoder
import rp_pretrain


def test_oracle_ppo_chases(tmp_path):
    """60,000 steps, seconds. The centre of the frame is worth 31.2, chasing 37.95."""
    args = ppo_encoder.Args(
        encoder="oracle", distractors=1, total_steps=60_000, torch_threads=1, out=str(tmp_path)
    )
    assert ppo_encoder.train(args)["eval_return_mean"] > 38


def test_pretraining_finds_the_target_and_not_the_distractor(tmp_path):
    """800 updates. The variance of the rewards is 0.053: what predicting their mean would leave."""
    args = rp_pretrain.Args(
        updates=800, tasks=("target_x", "target_y"), torch_threads=1, out=str(tmp_path)
    )
    summary = rp_pretrain.train(args)
    assert summary["mse"] < 0.01
    assert min(summary["r2_target_x"], summary["r2_target_y"]) > 0.9
    assert max(summary[f"r2_{k}_{i}"] for k in ("agent", "distractor1") for i in "xy") < 0.4


def test_ppo_learns_from_pixels(tmp_path):
    """40,000 steps: no more than a start, but one that an encoder without gradient misses."""
    args = ppo_encoder.Args(
        encoder="image_scratch",
        distractors=0,
        total_steps=40_000,
        torch_threads=1,
        out=str(tmp_path),
    )
    assert ppo_encoder.train(args)["eval_return_mean"] > 30
