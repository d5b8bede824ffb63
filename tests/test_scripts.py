"""All scripts as programs, the README's example, and what a run writes down and tells. (Arguments,
folders in use and accidents: test_runs.py.)"""

import csv
import importlib
import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import sprites_env

ROOT = Path(__file__).parent.parent
SHORT = {  # a short run of each script
    "rp_pretrain": {"updates": 2, "batch_size": 2},
    "ppo_encoder": {"encoder": "image_scratch", "total_steps": 240, "num_envs": 4}
    | {"rollout_steps": 20, "minibatches": 2, "epochs": 2, "eval_episodes": 3},
    "awac": {"episodes": 10, "offline_updates": 20, "total_steps": 80, "num_envs": 1}
    | {"eval_episodes": 3},
    "curl": {"total_steps": 160, "num_envs": 2, "initial_steps": 100, "updates": 1}
    | {"batch_size": 4, "eval_episodes": 3},
    "rig_td3": {"images": 300, "vae_updates": 4, "total_steps": 240, "num_envs": 2}
    | {"finetune_every": 4, "finetune_updates": 2, "eval_episodes": 3, "batch_size": 4},
    "skill_embedding": {"total_steps": 640, "num_envs": 4, "updates": 2, "eval_episodes": 8},
    "psrl": {"total_steps": 160, "num_envs": 2, "initial_steps": 100, "updates": 1}
    | {"flow_updates": 1, "batch_size": 4, "windows": 3, "eval_episodes": 3},
    "grasp2vec": {"updates": 2, "batch_size": 3},
    "pretext": {"updates": 2, "batch_size": 2},
    "cc_rig": {"scenes": 40, "vae_updates": 2, "total_steps": 120, "num_envs": 1}
    | {"eval_episodes": 3, "batch_size": 8, "context_dim": 5},
}
each_script = pytest.mark.parametrize("script", SHORT)


def flags_of(script, **more):
    return [f"--{k.replace('_', '-')}={v}" for k, v in (SHORT[script] | more).items()]


def run_as_program(monkeypatch, path, *flags):
    """`python path flags`, but in this process."""
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    runpy.run_path(str(path), run_name="__main__")


def rows_of(folder):
    with open(folder / "curve.csv") as file:
        return list(csv.DictReader(file))


# --- All scripts -----------------------------------------------------------------------------


@each_script
def test_an_interrupted_run_keeps_what_was_reported(tmp_path, monkeypatch, script):
    """Ctrl-C while the second checkpoint is being written: the first one is still whole. (This
    short, rig_td3.py and cc_rig.py report only once.)"""
    save, count, at = torch.save, [], 1 if script in ("rig_td3", "cc_rig") else 2

    def interrupted(content, file):
        save(content, file)
        count.append(file.name)
        if count.count("unfinished_checkpoint.pt") == at:
            file.write_bytes(file.read_bytes()[:99])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    flags = flags_of(script, device="cpu", torch_threads=1, out=tmp_path / "run")
    with pytest.raises(SystemExit, match="interrupted: curve.csv and checkpoint.pt hold what"):
        run_as_program(monkeypatch, ROOT / f"{script}.py", *flags)
    rows, checkpoint = rows_of(tmp_path / "run"), tmp_path / "run" / "checkpoint.pt"
    assert len(rows) == at and checkpoint.exists() == (at == 2)
    if at == 2:
        name = "update" if script in ("rp_pretrain", "awac", "grasp2vec", "pretext") else "step"
        assert torch.load(checkpoint)[name] == int(rows[0]["step"])
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_script
def test_runs_on_cuda(script, tmp_path):
    module = importlib.import_module(script)
    module.train(module.Args(**SHORT[script], device="cuda", out=str(tmp_path)))
    assert (tmp_path / "summary.json").exists()


# --- As programs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, code, message", [("--clip -1", 1, "error: --clip must"), ("--task fly", 2, "--task")]
)
def test_bad_input_on_the_command_line(tmp_path, flags, code, message):
    command = [sys.executable, str(ROOT / "ppo_encoder.py"), "--encoder", "oracle", *flags.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == code and message in result.stderr and not result.stdout
    assert "Traceback" not in result.stderr and (code == 2 or result.stderr.count("\n") == 1)
    assert not list(tmp_path.iterdir())


def test_copied_next_to_the_environment_it_runs(tmp_path):
    for name in ("ppo_encoder.py", "sprites_env.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "ppo_encoder.py", *flags_of("ppo_encoder", torch_threads=1)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)
    facts = json.loads((tmp_path / "runs/ppo_encoder/image_scratch_d1_s1/args.json").read_text())
    assert facts["script"] == "ppo_encoder" and facts["git_commit"] is None


def example(script, number):
    """The script, with the lines changed that a diff of the README changes; they must be there."""
    diff = (ROOT / "README.md").read_text().split("```diff\n")[number].split("```")[0]
    source = (ROOT / f"{script}.py").read_text().split("\n")
    for line in diff.splitlines():
        assert line[0] in "-+"
        if line[0] == "-":
            assert source.count(line[1:]) == 1, line
            at = source.index(line[1:])
            del source[at]
        else:
            source.insert(at, line[1:])
            at += 1
    return "\n".join(source)


@pytest.mark.parametrize("name", ["Pendulum-v1", "Reacher-v5"])
def test_the_example_of_the_readme(tmp_path, monkeypatch, name):
    """The lines that the README changes for another environment are there, and work."""
    if name == "Reacher-v5":
        pytest.importorskip("mujoco", reason="MuJoCo is not one of the project's six packages")
    source = example("ppo_encoder", 1)
    assert source.count("Pendulum-v1") == 1 and name in (ROOT / "README.md").read_text()
    (tmp_path / "elsewhere.py").write_text(source.replace("Pendulum-v1", name))
    flags = flags_of("ppo_encoder", encoder="oracle", device="cpu", torch_threads=1)
    monkeypatch.chdir(tmp_path)
    run_as_program(monkeypatch, "elsewhere.py", *flags, "--out=run")
    summary = json.loads(Path("run/summary.json").read_text())
    assert -2000 < summary["eval_return_mean"] < 0 and "score" not in summary
    assert len(rows_of(Path("run"))) == 2


@pytest.mark.filterwarnings("default")  # of other people's packages
@pytest.mark.parametrize("mode", ["rad", "state"])
def test_the_example_with_images(tmp_path, monkeypatch, capsys, mode):
    """The lines of curl.py that the README changes for DeepMind Control are there, and work; what
    is saved acts again as it did."""
    source = example("curl", 2)
    pytest.importorskip("dm_control", reason="dm_control is not one of the six packages")
    (tmp_path / "elsewhere.py").write_text(source)
    flags = flags_of("curl", mode=mode, device="cpu", total_steps=250, eval_episodes=1)
    flags += ["--past-actions=2", "--patch=8"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmark" / "outside")
    run_as_program(monkeypatch, "elsewhere.py", *flags, "--out=run")
    summary = json.loads(Path("run/summary.json").read_text())
    assert 0 < summary["eval_return_mean"] < 1000 and "score" not in summary
    with Image.open("run/rollout.gif") as film:
        assert film.n_frames > 50

    import evaluate

    capsys.readouterr()
    evaluate.main(evaluate.Args(Path("run"), episodes=1))
    mean = float(capsys.readouterr().out.split()[1])
    assert abs(mean - summary["eval_return_mean"]) < 0.1


@pytest.mark.filterwarnings("default")
def test_what_the_wrapper_of_deepmind_control_shows(monkeypatch):
    """The red of the frame; states, with noise of the given size."""
    pytest.importorskip("dm_control", reason="dm_control is not one of the six packages")
    monkeypatch.syspath_prepend(ROOT / "benchmark" / "outside")
    import dmc

    env = dmc.make_vec("ball_in_cup", 2, "image")
    obs, _ = env.reset(seed=[3, 4])
    assert env.horizon == 250 and obs.shape == (2, 1, 64, 64) and obs.dtype == np.uint8
    red = env.render()[0][..., 0].astype(float).reshape(64, 2, 64, 2).mean((1, 3))
    assert np.abs(obs[0, 0] - red).max() <= 0.5 and np.ptp(red) > 50

    states = []
    for noise in (0.0, np.array([0, 0, 0, 0, 1e-3])):
        env = dmc.make_vec("cartpole", 12, "state", noise=noise)
        states.append(env.reset(seed=1)[0])
    difference = states[1] - states[0]
    assert (difference[:, :4] == 0).all() and 4e-4 < difference[:, 4].std() < 2e-3


# --- The run's folder, and what is told meanwhile --------------------------------------------


@dataclass(frozen=True)
class Args:
    """What a run needs to know."""

    seed: int = 3
    device: str = "cpu"
    torch_threads: int = 0
    out: str | None = None
    overwrite: bool = False
    run_name: str = "a_name"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_new_run(here, monkeypatch):
    """Its folder, its random numbers, and what it writes down about itself."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run = sprites_env.Run(Args(), total=9)
    assert run.folder == Path("runs/test_scripts/a_name") and threads == []
    assert torch.initial_seed() == 3 and run.device.type == "cpu"
    facts = json.loads((run.folder / "args.json").read_text())
    expected = {"seed": 3, "device": "cpu", "torch_threads": 0, "out": None, "overwrite": False}
    assert facts["arguments"] == expected | {"run_name": "a_name"}
    assert facts["torch"] == torch.__version__ and facts["numpy"] == np.__version__
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert facts["git_commit"] == (git.stdout.strip() or None)
    assert facts["threads"] == torch.get_num_threads() and facts["device"] == "cpu"
    assert sprites_env.Run(Args(out="elsewhere", torch_threads=7), 9).folder == Path("elsewhere")
    assert threads == [7]


@pytest.mark.parametrize("device, there", [("auto", True), ("cuda", True), ("auto", False)])
def test_device(here, monkeypatch, device, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    run = sprites_env.Run(Args(device=device), 9)
    assert run.device.type == ("cuda" if there else "cpu")


def test_a_run_starts_over(here):
    """Without the last run's rows, results and weights, but with what others put there."""
    run = sprites_env.Run(Args(), total=2)
    for step in (1, 2):
        run.report(step, loss=5.0)
    run.save("checkpoint.pt", {"step": 2})
    run.save("mine.json", {})
    run.finish({"loss": 5.0}, [("loss", ["loss"])], "steps")
    with pytest.raises(SystemExit, match="holds a finished run"):
        sprites_env.Run(Args(), total=2)
    assert len(rows_of(run.folder)) == 2
    again = sprites_env.Run(Args(overwrite=True), total=2)
    names = sorted(path.name for path in again.folder.iterdir())
    assert names == ["args.json", "curve.csv", "curve.png", "mine.json"]
    again.report(2, loss=4.0)
    assert [row["loss"] for row in rows_of(run.folder)] == ["4.0"]
    sprites_env.Run(Args(), total=2)  # an unfinished one needs no --overwrite


@pytest.mark.parametrize(
    "content, reason", [(None, "Not a directory"), ("{", "Expecting property name")]
)
def test_a_folder_that_cannot_be_used(here, content, reason):
    """A file in place of the folder, or an args.json that is none."""
    if content is None:
        Path("run").write_text("")
    else:
        Path("run").mkdir()
        Path("run/args.json").write_text(content)
    with pytest.raises(SystemExit, match=f"error: cannot write to run(/in)?: {reason}"):
        sprites_env.Run(Args(out="run/in" if content is None else "run"), 9)


@pytest.mark.parametrize("terminal", [False, True])
def test_reports(here, monkeypatch, capsys, terminal):
    """Rows are there at once. Two of eight steps in ten seconds leave thirty."""
    times = iter([100, 110, 140])
    monkeypatch.setattr(sprites_env.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    run = sprites_env.Run(Args(), total=8)
    run.report(2, a=1.5, b=-0.25, c=12345.678, d=0, e=7)
    header, row = (run.folder / "curve.csv").read_text().splitlines()
    assert header == "step,seconds,steps_per_second,a,b,c,d,e"
    assert row == "2,10,0.2,1.5,-0.25,12345.678,0,7"
    first = "2/8  0/s  30 s left  a 1.5  b -0.25  c 1.235e+04  d 0"
    last = "8/8  0/s  0 s left  a 2  b 3"
    run.report(8, a=2, b=3, c=4, d=5, e=6)
    assert (run.folder / "curve.csv").read_text().splitlines()[2:] == ["8,40,0.2,2,3,4,5,6"]
    told = capsys.readouterr().out
    if terminal:  # one line, written over
        assert told == f"\r\033[K{first}\r\033[K{last}  c 4  d 5\n"
    else:
        assert told == f"{first}\n{last}  c 4  d 5\n"


def test_files_are_written_whole_or_not_at_all(here, monkeypatch):
    run = sprites_env.Run(Args(), total=8)
    image = np.zeros((9, 9, 3), np.uint8)
    contents = {"a.json": {"x": 1}, "a.pt": {"x": torch.ones(2)}, "a.png": Figure()}
    for name, content in (contents | {"a.gif": [(image,), (image + 200,)]}).items():
        run.save(name, content)
    assert json.loads((run.folder / "a.json").read_text()) == {"x": 1}
    assert torch.load(run.folder / "a.pt")["x"].tolist() == [1, 1]
    with Image.open(run.folder / "a.png") as png, Image.open(run.folder / "a.gif") as gif:
        assert png.format == "PNG" and gif.n_frames == 2
    assert not list(run.folder.glob("unfinished_*"))
    for name, content in (("a.json", {"x": object()}), ("a.png", None), ("a.gif", [(1,)])):
        before = (run.folder / name).read_bytes()
        with pytest.raises((TypeError, AttributeError, ValueError)):
            run.save(name, content)
        assert (run.folder / name).read_bytes() == before

    def full(content, file):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*a.pt: is the disk full"):
        run.save("a.pt", {})
    assert torch.load(run.folder / "a.pt")["x"].tolist() == [1, 1]


def test_the_end_of_a_run(here, monkeypatch):
    """The summary is returned, written last, and tells the minutes."""
    drawn = []

    def draw_curve(*what):
        drawn.extend(what)
        assert not (run.folder / "summary.json").exists()
        return Figure()

    monkeypatch.setattr(sprites_env, "draw_curve", draw_curve)
    run = sprites_env.Run(Args(), total=8)
    run.report(8, loss=1.0)
    run.start -= 90
    panels, levels = [("loss", ["loss"])], [("chance", 3)]
    summary = run.finish({"loss": 1.0}, panels, "steps", levels, offline=5)
    assert summary == {"loss": 1.0, "minutes": pytest.approx(1.5, abs=0.1)}
    assert json.loads((run.folder / "summary.json").read_text()) == summary
    assert drawn == [run.rows, panels, "steps", levels, 5]
    with Image.open(run.folder / "curve.png") as image:
        image.load()


@pytest.mark.parametrize(
    "error, line",
    [
        (KeyboardInterrupt(), "interrupted: curve.csv and checkpoint.pt hold what was reported"),
        (FloatingPointError("loss is\nnot finite"), "error: loss is not finite"),
        (MemoryError("Unable to allocate"), "error: Unable to allocate"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (RuntimeError("CUDA out of memory. " + 300 * "x"), None),
    ],
)
def test_errors_a_user_may_meet(error, line):
    with pytest.raises(SystemExit) as stop:
        with sprites_env.one_line_errors():
            raise error
    text = stop.value.code.lstrip("\n")
    assert "\n" not in text and len(text) < 220
    assert text == line or line is None and text.startswith("error: CUDA out of memory. xxx")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), KeyError("x")])
def test_mistakes_in_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)):
        with sprites_env.one_line_errors():
            raise error
