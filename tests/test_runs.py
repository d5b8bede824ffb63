"""What a user may type or meet: bad arguments, folders in use, a diverging run, too little memory,
a full disk, Ctrl-C. Each ends with one line, and nothing that was there is lost."""

import dataclasses
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from matplotlib.figure import Figure

import sprites_env
from sprites_env import SpritesVectorEnv

ROOT = Path(__file__).parent.parent
TINY = {  # the smallest runs that report at least twice
    "rp_pretrain": {"updates": 2, "batch_size": 2, "distractors": 0},
    "ppo_encoder": {"encoder": "oracle", "total_steps": 960, "num_envs": 4, "minibatches": 2},
    "awac": {"episodes": 10, "offline_updates": 20, "total_steps": 40, "num_envs": 1},
    "curl": {"mode": "state", "total_steps": 160, "num_envs": 2, "initial_steps": 20, "updates": 1},
    "rig_td3": {"goals": "oracle", "images": 100, "total_steps": 80, "num_envs": 1},
    "skill_embedding": {"total_steps": 640, "num_envs": 4, "updates": 1, "batch_size": 3},
    "psrl": {"total_steps": 160, "num_envs": 2, "initial_steps": 146, "updates": 1, "hidden": 8}
    | {"flow_updates": 1, "batch_size": 4, "windows": 3},
    "grasp2vec": {"updates": 2, "batch_size": 3},
    "pretext": {"updates": 2, "batch_size": 2, "distractors": 0},
    "cc_rig": {"scenes": 40, "vae_updates": 2, "total_steps": 80, "num_envs": 1, "batch_size": 8}
    | {"context_dim": 5},
}
ALIKE = {"eval_episodes": 4, "torch_threads": 1, "device": "cpu"}
SCRIPTS = list(TINY)
each_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def quick_measures(monkeypatch):
    """Few objects, frames and scenes to measure with, and pictures that are drawn in no time."""
    quick = {
        "psrl": {"PROBE_EPISODES": 8, "draw_flows": lambda *_: Figure()}
        | {"draw_flow_film": lambda *_: [(np.zeros((9, 9, 3), np.uint8),)]},
        "grasp2vec": {"TESTS": 2, "draw_heatmaps": lambda *_: Figure()}
        | {"draw_retrieved": lambda *_: Figure()},
        "pretext": {"PROBES": 40, "FITTED": 30},
        "cc_rig": {"PROBED": 20, "RANDOM_STEPS": 40, "REPORT_EVERY": 40}
        | {"draw_imagined_here": lambda *_: None, "draw_reached": lambda *_: None},
    }
    for script, values in quick.items():
        for name, value in values.items():
            monkeypatch.setattr(importlib.import_module(script), name, value)


def arguments(script, **changes):
    module = importlib.import_module(script)
    names = {field.name for field in dataclasses.fields(module.Args)}
    given = {name: value for name, value in ALIKE.items() if name in names}
    return module.Args(**given | TINY[script] | changes)


def run(script, **changes):
    """As the command line does it, in this process."""
    with sprites_env.one_line_errors():
        return importlib.import_module(script).train(arguments(script, **changes))


def content(folder):
    """Every file below a folder, but for what a lock leaves empty."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(call, *words):
    """One line, and an exit code that is not 0."""
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code not in (0, None)
    text = str(error.value.code).strip()
    assert "\n" not in text and "Traceback" not in text
    for word in words:
        assert word in text
    return text


# --- Arguments -------------------------------------------------------------------------------

BAD = {int: (-1, 2**31), float: (-1.0, math.nan, math.inf, -math.inf)}


def numeric_flags():
    for script in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(script).Args):
            kinds = str(field.type)
            if field.name in ("device", "distractors") or "Literal" in kinds:
                continue
            for kind, values in BAD.items():
                if kind.__name__ in kinds:
                    for value in values:
                        tuples = 3 * (value,) if "tuple" in kinds else value
                        yield script, field.name, tuples


@pytest.mark.parametrize("script, name, value", list(numeric_flags()))
def test_every_number_is_finite_and_positive(script, name, value):
    """Some two hundred and fifty calls."""
    text = refused(lambda: arguments(script, **{name: value}))
    assert text.startswith(f"error: --{name.replace('_', '-')} must be")


@each_script
def test_zero_is_refused_where_nothing_would_happen(script):
    for name in ("batch_size", "learning_rate", "num_envs", "updates", "eval_episodes", "tau"):
        if name in {f.name for f in dataclasses.fields(importlib.import_module(script).Args)}:
            refused(
                lambda name=name: arguments(script, **{name: 0}), "positive and below 2**31, not 0"
            )
    refused(lambda: arguments(script, seed=10_000), "--seed must be in 0 ... 9999")


@each_script
@pytest.mark.parametrize("flags", ["--nonsense 1", "--seed one", "--seed 1.5", "--device tpu",
                                   "--torch-threads", "--seed 1e3", "stray"])  # fmt: skip
def test_what_the_command_line_refuses(script, flags, capsys):
    with pytest.raises(SystemExit) as error:
        tyro.cli(importlib.import_module(script).Args, args=flags.split())
    assert error.value.code == 2 and "Traceback" not in capsys.readouterr().err


# --- Folders ---------------------------------------------------------------------------------


@each_script
def test_folders_that_are_left_alone(script, tmp_path):
    """A finished run; a run of another script, finished or not; a file; a folder in a file."""
    out = tmp_path / "run"
    run(script, out=str(out))
    (tmp_path / "file").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "args.json").write_text(json.dumps({"script": "another"}))
    (other / "checkpoint.pt").write_text("its")
    before = content(tmp_path)
    assert not [path for path in before if path.name.startswith("unfinished_")]
    refused(lambda: run(script, out=str(out)), "holds a finished run", "--overwrite")
    refused(lambda: run(script, out=str(other)), "holds a run of another", "--overwrite")
    refused(lambda: run(script, out=str(tmp_path / "file")), "cannot write")
    refused(lambda: run(script, out=str(tmp_path / "file" / "run")), "cannot write")
    refused(lambda: run(script, out=str(tmp_path / ("long" * 99))), "cannot write")
    assert content(tmp_path) == before
    run(script, out=str(out), overwrite=True)


def test_a_killed_run_can_be_started_again(tmp_path):
    run("awac", out=str(tmp_path))
    (tmp_path / "summary.json").unlink()  # as if it had been killed before the end
    run("awac", out=str(tmp_path))
    rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert len(rows) == len({row.split(",")[0] for row in rows})  # nothing of the first run


def start(script, out, *flags, **options):
    command = [
        sys.executable,
        str(ROOT / f"{script}.py"),
        "--torch-threads",
        "1",
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        [*command, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
        # a background shell ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX")


@posix
def test_two_processes_one_folder(tmp_path):
    """The second one is refused while the first is at work, and after Ctrl-C what was reported is
    there, looks unfinished, and can be started again."""
    out = tmp_path / "run"
    first = start("ppo_encoder", out, "--encoder", "oracle", "--num-envs", "8")
    wait_for(out / "checkpoint.pt", first)
    facts = (out / "args.json").read_bytes()
    refused(lambda: run("ppo_encoder", out=str(out)), "another run is at work")
    refused(lambda: run("ppo_encoder", out=str(out), overwrite=True), "another run is at work")
    assert (out / "args.json").read_bytes() == facts and (out / "checkpoint.pt").exists()
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 1 and "interrupted" in errors and "Traceback" not in errors
    rows = (out / "curve.csv").read_text().splitlines()
    assert len(rows) >= 2 and all(row.count(",") == rows[0].count(",") for row in rows)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] > 0
    assert not (out / "summary.json").exists()
    run("ppo_encoder", out=str(out))
    assert (out / "summary.json").exists()


@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_stopped_at_any_moment(tmp_path, sent):
    """Five moments: nothing looks finished that is not, no half file has a whole one's name."""
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import awac, sprites_env, test_runs
signal.signal(signal.SIGINT, signal.default_int_handler)
save, count, moment = sprites_env.Run.save, 0, 0

def stop(self, name, content):
    global count
    count += 1
    if count == moment:  # the file is written, but not yet renamed
        sprites_env.Path.replace = lambda *_: os.kill(os.getpid(), {int(sent)})
    save(self, name, content)

sprites_env.Run.save = stop
for moment in range(1, 6):
    if os.fork() == 0:
        test_runs.run("awac", out=str(moment))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr and result.returncode == 0
    codes = [int(line) for line in result.stdout.splitlines() if line.strip("-").isdigit()]
    assert codes == [1 if sent == signal.SIGINT else -signal.SIGKILL] * 5
    for moment in range(1, 6):
        out = tmp_path / str(moment)
        assert not (out / "summary.json").exists()
        for path in out.glob("*.json"):
            if not path.name.startswith("unfinished_"):
                json.loads(path.read_text())
        if (out / "checkpoint.pt").exists():
            torch.load(out / "checkpoint.pt", weights_only=True)
    run("awac", out=str(tmp_path / "5"))
    assert (tmp_path / "5" / "summary.json").exists()


@posix
def test_a_full_disk_is_one_line(tmp_path):
    """No file may become larger than 4 kB: args.json and rows fit, a checkpoint does not."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    limit += f"import sys; sys.path.insert(0, {str(ROOT)!r}); import awac, sprites_env\n"
    limit += "with sprites_env.one_line_errors():\n"
    small = {**TINY["awac"], **ALIKE, "out": str(tmp_path / "run")}
    limit += f"    awac.train(awac.Args(**{small!r}))"
    result = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: " in result.stderr
    assert (tmp_path / "run" / "curve.csv").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


# --- What happens on the way -----------------------------------------------------------------


@each_script
def test_a_run_that_diverges_says_so(script, tmp_path):
    refused(lambda: run(script, learning_rate=1e9, out=str(tmp_path)), "diverged")
    assert (tmp_path / "args.json").exists() and not (tmp_path / "summary.json").exists()


TOO_LARGE = [
    ("rp_pretrain", {"batch_size": 2**31 - 1}),
    ("ppo_encoder", {"num_envs": 2**30, "total_steps": 2**31 - 1, "rollout_steps": 1}),
    ("awac", {"batch_size": 2**31 - 1}),
    ("awac", {"episodes": 2**31 - 1}),
    ("curl", {"batch_size": 2**31 - 1}),
    ("psrl", {"batch_size": 2**31 - 1}),
    ("psrl", {"windows": 2**31 - 1}),
    ("rig_td3", {"batch_size": 2**31 - 1}),
    ("skill_embedding", {"batch_size": 2**31 - 1}),
    ("pretext", {"batch_size": 2**31 - 1}),
    ("cc_rig", {"batch_size": 2**31 - 1}),
]  # grasp2vec.py takes 36 grasps at most


@posix
def test_more_memory_than_there_is(tmp_path):
    """In a process that may have 8 GB of addresses, each of these ends with one line."""
    code = f"""
import resource, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import test_runs
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for i, (script, changes) in enumerate(test_runs.TOO_LARGE):
    test_runs.refused(lambda: test_runs.run(script, **changes, out=f"run{{i}}"), "error: ")
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("summary.json"))


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    """The row is kept; `train_return` may be missing, before an episode has ended."""
    args = arguments("awac", out=str(tmp_path))
    log = sprites_env.Run(args, total=10)
    log.report(1, loss=0.5, train_return=math.nan)
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        log.report(2, loss=math.inf, train_return=1.0)
    text = (tmp_path / "curve.csv").read_text().splitlines()
    assert text[0] == "step,seconds,steps_per_second,loss,train_return"
    assert [row.split(",")[3] for row in text[1:]] == ["0.5", "inf"]


def test_progress_and_facts(tmp_path, capsys):
    args = arguments("awac", out=str(tmp_path), seed=3)
    log = sprites_env.Run(args, total=8)
    assert torch.initial_seed() == 3 and torch.get_num_threads() == 1
    log.start -= 10  # as if ten seconds had passed
    log.report(2, loss=0.5)
    assert capsys.readouterr().out.strip() == "2/8  0/s  30 s left  loss 0.5"
    assert log.rows[0]["seconds"] == pytest.approx(10, abs=0.5)
    facts = json.loads((tmp_path / "args.json").read_text())
    assert facts["script"] == "awac" and facts["arguments"]["seed"] == 3
    assert {"git_commit", "python", "torch", "numpy", "gymnasium", "threads"} <= facts.keys()
    summary = log.finish({"score": 1.0}, [("loss", ["loss"])], "updates")
    assert summary["score"] == 1 and 0.16 < summary["minutes"] < 1
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_an_encoder_is_not_lost(tmp_path):
    """An encoder with nan is refused; --out may not be an encoder's folder."""
    run("rp_pretrain", out=str(tmp_path / "rp"))
    before = content(tmp_path)
    path, out = str(tmp_path / "rp" / "encoder.pt"), str(tmp_path / "rp")
    chosen = {"encoder": "reward_prediction", "encoder_path": path}
    refused(lambda: run("ppo_encoder", **chosen, out=out, overwrite=True), "would be emptied")
    assert content(tmp_path) == before
    saved = torch.load(path)
    saved["encoder"]["to_z.weight"][0, 0] = math.nan
    torch.save(saved, path)
    refused(lambda: run("ppo_encoder", **chosen, out=str(tmp_path / "ppo")), "not finite")
    assert not (tmp_path / "ppo").exists()


# --- Every flag counts ------------------------------------------------------------------------

CHANGES = {  # another value for each flag that must change what is learnt
    "rp_pretrain": {"objective": "image_reconstruction", "tasks": ("target_x",), "distractors": 1}
    | {"updates": 3, "batch_size": 3, "conditioning_frames": 2, "horizon": 5, "seed": 2}
    | {"learning_rate": 1e-3, "z_dim": 8, "batch_norm": True, "frame_stack": 2},
    "ppo_encoder": {
        "distractors": 0,
        "task": "repel",
        "total_steps": 1280,
        "num_envs": 5,
        "seed": 2,
    }
    | {"rollout_steps": 30, "epochs": 1, "minibatches": 3, "learning_rate": 1e-3, "gamma": 0.5}
    | {"gae_lambda": 0.5, "clip": 0.01, "value_coefficient": 0.1, "max_grad_norm": 0.1},
    "awac": {"algorithm": "bc", "lam": 1.0, "weighting": "softmax", "switch_every": 3}
    | {
        "mixture": (0.5, 0.5, 0.0),
        "episodes": 12,
        "distractors": 2,
        "offline_updates": 21,
        "seed": 2,
    }
    | {"total_steps": 120, "batch_size": 8, "learning_rate": 1e-4, "gamma": 0.5, "tau": 0.5}
    | {"hidden": 16, "num_envs": 2},
    "curl": {"distractors": 1, "total_steps": 240, "num_envs": 1, "initial_steps": 40, "updates": 2}
    | {"batch_size": 8, "learning_rate": 1e-4, "gamma": 0.5, "tau": 0.5, "alpha": 0.1}
    | {"hidden": 16, "seed": 2},
    "psrl": {"mode": "cat", "distractors": 1, "total_steps": 240, "num_envs": 1, "windows": 4}
    | {"initial_steps": 120, "flow_updates": 2, "updates": 2, "batch_size": 8, "hidden": 16}
    | {"flow_weight": 0.1, "similarity_weight": 0.1, "learning_rate": 1e-4, "gamma": 0.5}
    | {"tau": 0.5, "alpha": 0.1, "frame_stack": 2, "pad": 2, "z_dim": 12, "seed": 2},
    "rig_td3": {"task": "push", "goal_fractions": (1.0, 0.0, 0.0), "distractors": 1, "noise": 0.5}
    | {"total_steps": 120, "num_envs": 2, "batch_size": 8, "learning_rate": 1e-4, "gamma": 0.5}
    | {"tau": 0.5, "seed": 2, "images": 200},
    "skill_embedding": {"experiment": "generality", "embedding": "one_hot", "z_dim": 3}
    | {"spread": 0.5, "z_sd": 0.5, "alpha1": 1.0, "alpha2": 0.5, "alpha3": 0.5, "window": 2}
    | {"z_ratio": True, "gamma": 0.5, "total_steps": 800, "num_envs": 8, "updates": 2}
    | {"batch_size": 4, "learning_rate": 1e-2, "seed": 2},
    "grasp2vec": {"objective": "reconstruction", "same_place": True, "jitter": 0, "lam": 0.1}
    | {"updates": 3, "batch_size": 4, "learning_rate": 1e-3, "seed": 2},
    "pretext": {"objective": "time_contrast", "distractors": 1, "updates": 3, "batch_size": 3}
    | {"learning_rate": 1e-3, "z_dim": 8, "seed": 2},
    "cc_rig": {"context": "none", "appearances": "4", "z_dim": 3, "context_dim": 6, "seed": 2}
    | {"beta": 2.0, "beta_start": 5.0, "scenes": 50, "vae_updates": 3, "vae_learning_rate": 1e-3}
    | {"total_steps": 120, "num_envs": 2, "goal_fractions": (1.0, 0.0, 0.0), "noise": 0.5}
    | {"batch_size": 9, "learning_rate": 1e-4, "gamma": 0.5, "tau": 0.5},
}
BASIS = {"rig_td3": {"total_steps": 80}, "curl": {"tau": 0.05}, "awac": {"total_steps": 80}}
FIRST = {  # flags of one variant only
    "ppo_encoder": {"frame_stack": ({"encoder": "cnn"}, 2)},
    "awac": {"alpha": ({"algorithm": "sac_from_buffer"}, 0.5)},
    "pretext": {
        "contrast": ({"objective": "shuffle"}, 0.5),
        "beta": ({"objective": "beta_vae"}, 0.5),
        "tau": ({"objective": "forward_slow_target", "learning_rate": 0.1}, 0.5),
    },
}
PIXELS = {"mode": "curl", "z_dim": 8, "hidden": 8, "batch_size": 4}
IN_CURL = {"encoder_tau": 0.9, "frame_stack": 2, "pad": 2, "z_dim": 12, "mode": "rad"}
IN_CURL |= {"patch": 8, "past_actions": 2}


def weights(script, out, **changes):
    """All numbers of the last checkpoint."""
    run(script, out=str(out), **BASIS.get(script, {}) | changes)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    networks = [part for part in saved.values() if isinstance(part, dict)]
    return [x.flatten().tolist() for part in networks for x in part.values()
            if isinstance(x, torch.Tensor)]  # fmt: skip


@pytest.fixture
def no_pictures(monkeypatch):
    import matplotlib.figure

    for name in ("save_gif", "film"):
        monkeypatch.setattr(sprites_env, name, lambda *_: None)
    for name in ("draw_curve", "draw_images"):
        monkeypatch.setattr(sprites_env, name, lambda *_: Figure())
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file: file.touch())
    monkeypatch.setattr(sprites_env.Path, "replace", lambda self, _: self.rename(_)
                        if self.exists() else None)  # fmt: skip


@each_script
def test_every_flag_counts(script, tmp_path, no_pictures, monkeypatch):
    import rig_td3
    import rp_pretrain

    monkeypatch.setattr(rig_td3, "RANDOM_STEPS", 40)
    monkeypatch.setattr(rp_pretrain, "measure", lambda *_: {"mse": 1.0, "r2": 1.0})
    no_probe = lambda _, device, frames: (torch.zeros(8, frames, 64, 64), None)  # noqa: E731
    monkeypatch.setattr(rp_pretrain, "probe_data", no_probe)
    before = weights(script, tmp_path / "before")
    assert weights(script, tmp_path / "again") == before
    for name, value in CHANGES[script].items():
        assert weights(script, tmp_path / name, **{name: value}) != before, name
    for name, (variant, value) in FIRST.get(script, {}).items():
        first = weights(script, tmp_path / f"first_{name}", **variant)
        assert weights(script, tmp_path / f"then_{name}", **variant, **{name: value}) != first, name
    silent = {"device", "torch_threads", "out", "overwrite", "eval_episodes"}
    silent |= {"encoder", "encoder_path", "dataset", "save_dataset", "observation"}  # see elsewhere
    silent |= {"goals", "z_dim", "library", "hold", "transfer_steps", "vae_learning_rate"}
    silent |= {"beta", "beta_start", "vae_updates", "finetune_every", "finetune_updates"}
    flags = {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    named = {*CHANGES[script], *FIRST.get(script, {}), *(IN_CURL if script == "curl" else {})}
    assert flags <= named | silent


def test_every_flag_of_pixels_counts(tmp_path, no_pictures, monkeypatch):
    import curl

    monkeypatch.setattr(curl, "PROBE_EPISODES", 8)
    before = weights("curl", tmp_path / "before", **PIXELS)
    for name, value in IN_CURL.items():
        assert weights("curl", tmp_path / name, **PIXELS | {name: value}) != before, name


def test_every_flag_of_the_vae_counts(tmp_path, no_pictures, monkeypatch):
    import rig_td3

    collect = rig_td3.collect_images
    few = lambda env, count, rng, seed: collect(env, 100, rng, seed)  # noqa: E731
    monkeypatch.setattr(rig_td3, "collect_images", few)
    basis = {"goals": "latent", "vae_updates": 3, "total_steps": 160, "num_envs": 2}
    basis |= {"finetune_every": 2, "finetune_updates": 2}
    changes = {"z_dim": 4, "beta": 2.0, "beta_start": 5.0, "vae_updates": 4, "finetune_every": 0}
    changes |= {"finetune_updates": 1, "vae_learning_rate": 1e-4, "goals": "pixel"}
    before = weights("rig_td3", tmp_path / "before", **basis)
    for name, value in changes.items():
        assert weights("rig_td3", tmp_path / name, **basis | {name: value}) != before, name


@pytest.mark.parametrize("script", ["curl", "awac", "psrl"])
def test_environments_that_a_replay_of_episodes_cannot_take(script, tmp_path, monkeypatch):
    class Strong(SpritesVectorEnv):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.single_action_space = gym.spaces.Box(*self.bounds, (2,))

    class Endless(SpritesVectorEnv):
        horizon = property(lambda self: None, lambda self, steps: None)

    monkeypatch.setattr(sprites_env, "SpritesVectorEnv", Strong)
    for Strong.bounds in ((-3, 1), (-1, 3)):
        with pytest.raises(SystemExit, match=r"^error: actions must be in \[-1, 1\]"):
            run(script, out=str(tmp_path / "strong"))
    monkeypatch.setattr(sprites_env, "SpritesVectorEnv", Endless)
    with pytest.raises(SystemExit, match="^error: give the environment an attribute `horizon`"):
        run(script, out=str(tmp_path / "endless"))


def test_a_renderer_that_fails_costs_the_film_only(tmp_path, monkeypatch, capsys):
    def render(self):
        raise RuntimeError("no display")

    monkeypatch.setattr(SpritesVectorEnv, "render", render)
    run("ppo_encoder", out=str(tmp_path / "run"))
    (tmp_path / "run" / "rollout.gif").write_text("of the run before")
    run("ppo_encoder", out=str(tmp_path / "run"), overwrite=True)
    assert "no film: RuntimeError('no display')" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "rollout.gif").exists()
