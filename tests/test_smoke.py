"""Every script runs to the end in miniature, is deterministic, and answers bad input in a line."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ppo_encoder
import rp_pretrain
import sprites_env

ROOT = Path(__file__).parent.parent
TINY_PRETRAINING = {"updates": 4, "batch_size": 2, "distractors": 1}
TINY_PRETRAINING |= {"torch_threads": 1, "device": "cpu"}
TINY_PPO = {"total_steps": 240, "num_envs": 4, "rollout_steps": 20, "eval_episodes": 3}
TINY_PPO |= {"minibatches": 2, "epochs": 2, "torch_threads": 1, "device": "cpu"}
INPUTS = ppo_encoder.Input.__args__


def pretrain(out, **changes):
    return rp_pretrain.train(rp_pretrain.Args(**TINY_PRETRAINING | changes, out=str(out)))


def ppo(out, **changes):
    return ppo_encoder.train(ppo_encoder.Args(**TINY_PPO | changes, out=str(out)))


def untimed_rows(folder):
    with open(folder / "curve.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["step", "seconds", "steps_per_second"]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.parametrize(
    "changes",
    [{}, {"tasks": ("target_x",)}, {"batch_norm": True}, {"objective": "image_reconstruction"}],
    ids=["default", "one_task", "batch_norm", "image_reconstruction"],
)
def test_pretraining(tmp_path, changes):
    a, b = tmp_path / "a", tmp_path / "b"
    summary, again = pretrain(a, **changes), pretrain(b, **changes)
    again["minutes"] = summary["minutes"]
    assert summary == again and untimed_rows(a) == untimed_rows(b)
    assert json.loads((a / "summary.json").read_text()).keys() == summary.keys()
    assert {"mse_image", "r2_agent_x", "r2_distractor1_y", "minutes"} <= summary.keys()
    assert json.loads((a / "args.json").read_text())["arguments"]["updates"] == 4
    saved = torch.load(a / "encoder.pt", weights_only=True)
    encoder = rp_pretrain.Encoder(saved["z_dim"], saved["batch_norm"])
    encoder.load_state_dict(saved["encoder"])
    for picture in ("curve.png", "decoded.png"):
        with Image.open(a / picture) as image:
            image.load()
    assert not list(a.glob("unfinished_*"))


@pytest.mark.parametrize("encoder", INPUTS)
def test_ppo(tmp_path, monkeypatch, encoder):
    monkeypatch.chdir(tmp_path)  # the hand-off: an encoder of the default name is found
    if "prediction" in encoder or "reconstruction" in encoder:
        objective = encoder.removesuffix("_finetune")
        pretrain(f"runs/rp_pretrain/{objective}_d1_s1", objective=objective)
    a, b = tmp_path / "a", tmp_path / "b"
    summary, again = ppo(a, encoder=encoder), ppo(b, encoder=encoder)
    again["minutes"] = summary["minutes"]
    assert summary == again and untimed_rows(a) == untimed_rows(b)
    assert {"eval_return_mean", "eval_return_std", "eval_episodes", "score"} <= summary.keys()
    checkpoint = torch.load(a / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in checkpoint["model"].values())
    with Image.open(a / "curve.png") as image, Image.open(a / "rollout.gif") as film:
        image.load()
        assert film.n_frames == 40 and film.size[0] > 4 * 256


def test_ppo_pretrains_when_the_encoder_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    real_run = subprocess.run

    def run(command, **options):
        if command[0] == "git":
            return real_run(command, **options)
        commands.append(command)
        pretrain(command[command.index("--out") + 1], seed=5)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ppo_encoder.subprocess, "run", run)
    ppo("out", encoder="reward_prediction_finetune", seed=5)
    (command,) = commands
    assert command[0] == sys.executable and Path(command[1]).name == "rp_pretrain.py"
    text = " ".join(command)
    for part in ("--objective reward_prediction ", "--distractors 1", "--seed 5"):
        assert part in text
    assert "reward_prediction_d1_s5" in text
    args = rp_pretrain.tyro.cli(rp_pretrain.Args, args=command[2:])  # they are flags it knows
    assert args.distractors == 1 and args.seed == 5


def test_frozen_encoders_stay_and_finetuned_ones_move(tmp_path):
    pretrain(tmp_path / "encoder")
    path = tmp_path / "encoder" / "encoder.pt"
    before = torch.load(path)["encoder"]
    for encoder, moves in (("reward_prediction", False), ("reward_prediction_finetune", True)):
        ppo(tmp_path / encoder, encoder=encoder, encoder_path=str(path))
        after = torch.load(tmp_path / encoder / "checkpoint.pt")["model"]
        changed = [not torch.equal(v, after[f"encoder.{k}"]) for k, v in before.items()]
        assert all(changed) if moves else not any(changed)


def test_an_encoder_of_another_objective_is_refused(tmp_path):
    pretrain(tmp_path / "encoder")
    path = str(tmp_path / "encoder" / "encoder.pt")
    with pytest.raises(SystemExit, match="its objective was reward_prediction"):
        ppo(tmp_path / "run", encoder="image_reconstruction", encoder_path=path)
    assert not (tmp_path / "run").exists()


def test_acting_and_learning_see_the_same_policy(tmp_path):
    """Before the first gradient step all ratios are 1: batch normalisation would break this if it
    used the batch's statistics."""
    pretrain(tmp_path / "encoder", batch_norm=True)
    path = str(tmp_path / "encoder" / "encoder.pt")
    whole = {"epochs": 1, "minibatches": 1}
    ppo(tmp_path / "run", encoder="reward_prediction_finetune", encoder_path=path, **whole)
    for row in untimed_rows(tmp_path / "run"):
        assert abs(float(row["kl"])) < 1e-6 and float(row["clip_fraction"]) == 0


def test_the_watching_decoder_leaves_the_encoder_alone(tmp_path, monkeypatch):
    pretrain(tmp_path / "a", updates=8)
    loss = rp_pretrain.reconstruction_loss
    monkeypatch.setattr(rp_pretrain, "reconstruction_loss", lambda *args: 100 * loss(*args))
    pretrain(tmp_path / "b", updates=8)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt") for name in "ab")
    assert all(torch.equal(a["encoder"][k], b["encoder"][k]) for k in a["encoder"])
    assert not all(torch.equal(a["decoder"][k], b["decoder"][k]) for k in a["decoder"])


@pytest.mark.parametrize("terminal", [False, True])
def test_what_follows_the_end_of_an_episode(tmp_path, monkeypatch, terminal):
    """At a time limit V(final_obs) is bootstrapped, at a terminal state 0; elsewhere the next V.

    V is replaced by a quantity one can look up: 1 + the agent's x."""
    seen, final = [], []
    step, gae = sprites_env.SpritesVectorEnv.step, ppo_encoder.generalized_advantages

    def watched_step(env, actions):
        obs, reward, terminated, truncated, info = step(env, actions)
        final.append(info["final_obs"][:, 0] if "final_obs" in info else None)
        if terminal:
            terminated, truncated = truncated, terminated
        return obs, reward, terminated, truncated, info

    def watched_gae(rewards, values, next_values, ended, gamma, lam):
        seen.append((values, next_values, ended))
        return gae(rewards, values, next_values, ended, gamma, lam)

    monkeypatch.setattr(sprites_env.SpritesVectorEnv, "step", watched_step)
    monkeypatch.setattr(ppo_encoder, "generalized_advantages", watched_gae)
    monkeypatch.setattr(ppo_encoder, "evaluate", lambda *args: np.zeros(2))
    monkeypatch.setattr(ppo_encoder, "save_gif", lambda *args: None)
    monkeypatch.setattr(ppo_encoder.ActorCritic, "features", lambda model, x: x)
    monkeypatch.setattr(ppo_encoder.ActorCritic, "value", lambda model, z: 1 + z[:, 0])
    ppo(tmp_path, encoder="oracle", rollout_steps=30, total_steps=30 * 4 * 2)
    values, next_values, ended = seen[-1]  # steps 31 to 60: the episode ends with step 40
    assert ended.nonzero()[:, 0].unique().tolist() == [9]
    expected = 0 if terminal else 1 + torch.from_numpy(final[39])
    assert torch.equal(next_values[9], expected * torch.ones(4))
    assert not torch.equal(next_values[9], values[10])
    others = [t for t in range(29) if t != 9]
    assert torch.equal(next_values[others], values[[t + 1 for t in others]])


def test_evaluation_does_not_disturb_training(tmp_path):
    ppo(tmp_path / "a", encoder="oracle", eval_episodes=2)
    ppo(tmp_path / "b", encoder="oracle", eval_episodes=5)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def command_line(script, *flags, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("ppo_encoder.py", "--encoder resnet", "--encoder"),
        ("ppo_encoder.py", "--distractors 9", "--distractors"),
        ("ppo_encoder.py", "--total-steps -5", "--total-steps"),
        ("ppo_encoder.py", "--encoder oracle --total-steps 300", "--total-steps"),
        ("ppo_encoder.py", "--encoder oracle --gamma 1", "--gamma"),
        ("ppo_encoder.py", "--encoder oracle --clip -1", "--clip"),
        ("ppo_encoder.py", "--encoder oracle --num-envs 1 --minibatches 21", "--minibatches"),
        ("ppo_encoder.py", "--encoder oracle --encoder-path text.pt", "--encoder-path"),
        ("ppo_encoder.py", "--encoder oracle --seed -1", "--seed"),
        ("ppo_encoder.py", "--encoder oracle --device cuda", "--device cuda"),
        ("ppo_encoder.py", f"--encoder oracle --out {'long' * 99}", "long"),
        ("ppo_encoder.py", "--encoder-path nowhere.pt", "nowhere.pt"),
        ("ppo_encoder.py", "--encoder-path foreign.pt", "foreign.pt"),
        ("ppo_encoder.py", "--encoder-path text.pt", "text.pt"),
        ("ppo_encoder.py", "--encoder oracle --out text.pt/run", "text.pt"),
        ("rp_pretrain.py", "--tasks smell", "--tasks"),
        ("rp_pretrain.py", "--tasks agent_x agent_x", "--tasks"),
        ("rp_pretrain.py", "--updates -1", "--updates"),
        ("rp_pretrain.py", "--conditioning-frames 11", "--horizon"),
        ("rp_pretrain.py", "--updates 2 --out text.pt/run", "text.pt"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, script, flags, message):
    torch.save({"encoder": {"weight": torch.zeros(3)}, "z_dim": 64}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = sorted(tmp_path.rglob("*"))
    result = command_line(script, *flags.split(), cwd=tmp_path)
    assert result.returncode in (1, 2)
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") == (result.returncode == 1)
    assert result.returncode == 2 or result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing written


def test_starting_over_takes_away_its_own_files_only(tmp_path, monkeypatch):
    """An encoder that lies in the folder stays, unless it is pretraining that starts over."""
    pretrain(tmp_path)
    ppo(tmp_path, encoder="oracle", overwrite=True)
    assert (tmp_path / "encoder.pt").exists()
    monkeypatch.setattr(rp_pretrain, "Log", lambda *args: 1 / 0)  # it dies early
    with pytest.raises(ZeroDivisionError):
        pretrain(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".pt"} == set()
    assert not (tmp_path / "summary.json").exists()


def test_a_finished_run_is_not_overwritten(tmp_path):
    pretrain(tmp_path / "p")
    ppo(tmp_path / "q", encoder="oracle")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for again in (lambda: pretrain(tmp_path / "p"), lambda: ppo(tmp_path / "q", encoder="oracle")):
        with pytest.raises(SystemExit, match="holds a finished run"):
            again()
    assert all(path.read_bytes() == content for path, content in before.items())
    ppo(tmp_path / "q", encoder="oracle", overwrite=True)


def test_copied_next_to_the_environment_it_runs(tmp_path):
    for name in ("ppo_encoder.py", "sprites_env.py"):
        shutil.copy(ROOT / name, tmp_path)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY_PPO.items()]
    command = [sys.executable, "ppo_encoder.py", "--encoder", "image_scratch", *flags]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    assert (tmp_path / "runs/ppo_encoder/image_scratch_d1_s1/summary.json").exists()
    command[3] = "reward_prediction"
    result = subprocess.run(command, cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert result.returncode == 1 and "rp_pretrain.py: copy it, too" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize(
    "script", ["ppo_encoder.py --encoder oracle", "rp_pretrain.py --updates 2000"]
)
def test_interrupted_run_keeps_its_rows_and_checkpoint(tmp_path, script):
    script, *flags = script.split()
    command = [sys.executable, str(ROOT / script), *flags, "--torch-threads", "1", "--out", "run"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # a background shell ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in errors and "Traceback" not in errors
    assert len(untimed_rows(tmp_path / "run")) >= 1
    assert torch.load(checkpoint)["step" if script == "ppo_encoder.py" else "update"] > 0
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_example_of_the_readme(tmp_path):
    """The lines that the README changes for another environment are there, and work."""
    readme = (ROOT / "README.md").read_text()
    diff = readme.split("```diff\n")[1].split("```")[0].splitlines()
    source = (ROOT / "ppo_encoder.py").read_text().split("\n")
    at = 0
    for line in diff:
        if line[0] == "-":
            assert source.count(line[1:]) == 1, line
            at = source.index(line[1:])
            del source[at]
        else:
            source.insert(at, line[1:])
            at += 1
    (tmp_path / "pendulum.py").write_text("\n".join(source))
    shutil.copy(ROOT / "sprites_env.py", tmp_path)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY_PPO.items()]
    command = [sys.executable, "pendulum.py", "--encoder", "oracle", "--out", "run", *flags]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert -2000 < summary["eval_return_mean"] < 0
