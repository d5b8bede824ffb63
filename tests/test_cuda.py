"""Each script once on a GPU, where there is one."""

import importlib

import pytest
import torch

RUNS = {  # script: what makes it short
    "rp_pretrain": {"updates": 4, "batch_size": 2},
    "ppo_encoder": {"encoder": "image_scratch", "total_steps": 640, "num_envs": 4},
    "awac": {"episodes": 10, "offline_updates": 20, "total_steps": 80, "num_envs": 1},
    "curl": {"total_steps": 160, "num_envs": 2, "initial_steps": 100, "updates": 1},
    "rig_td3": {"images": 300, "vae_updates": 4, "total_steps": 240, "num_envs": 2}
    | {"finetune_every": 4, "finetune_updates": 2},
    "skill_embedding": {"total_steps": 640, "num_envs": 4, "updates": 2, "eval_episodes": 8},
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", RUNS)
def test_runs_on_cuda(script, tmp_path):
    module = importlib.import_module(script)
    module.train(module.Args(**RUNS[script], device="cuda", out=str(tmp_path)))
    assert (tmp_path / "summary.json").exists()
