"""The study's plan, its gathering of results, and the figures and tables drawn from them."""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import awac
import curl
import ppo_encoder
import rig_td3
import rp_pretrain
import skill_embedding

ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(monkeypatch, tmp_path):
    """study.py in an empty folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    module = importlib.import_module("study")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmark" / "results")
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def plot(monkeypatch):
    """plot.py, with the committed results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    return importlib.import_module("plot")


def test_plan(study, monkeypatch):
    loaded = []
    monkeypatch.setattr(ppo_encoder, "load_encoder", lambda path, args: loaded.append(path))
    jobs = study.plan(study.Args())
    tables = [job.table for job in jobs]
    assert tables.count("ppo_encoder") == 7 * 3 * 5 and tables.count("rp_pretrain") == 2 * 3 * 5
    assert len({job.out for job in jobs}) == len(jobs)
    for i, job in enumerate(jobs):
        assert not job.needs or job.needs.parent in [earlier.out for earlier in jobs[:i]]
        script = {"ppo_encoder": ppo_encoder, "rp_pretrain": rp_pretrain}[job.table]
        args = script.tyro.cli(script.Args, args=job.command[2:])  # flags that the script knows
        assert args.seed == job.key[2] and args.torch_threads == 1
    assert loaded == [job.needs.as_posix() for job in jobs if job.needs]


def test_plans_of_stacks_and_rounds(study, monkeypatch):
    """Each encoder is made, with as many frames, before it is needed."""
    monkeypatch.setattr(ppo_encoder, "load_encoder", lambda path, args: None)
    made = {}
    for job in study.plan(study.Args(study="stack")) + study.plan(study.Args(study="rounds")):
        script = {"ppo_encoder.py": ppo_encoder, "rp_pretrain.py": rp_pretrain}[job.command[1]]
        args = script.tyro.cli(script.Args, args=job.command[2:])
        if script is rp_pretrain:
            made[job.out / "encoder.pt"] = args
        elif args.encoder.startswith("reward_prediction"):
            source = made[job.needs]
            for name in ("frame_stack", "distractors", "seed"):
                assert getattr(source, name) == getattr(args, name)
            assert source.updates == (24_000 if job.table == "ppo_stack_long" else 8_000)
        else:
            assert not job.needs
    assert len(made) == 9


def test_plans_of_the_other_studies(study):
    scripts = {"single_task": rp_pretrain, "awac": awac, "curl": curl, "rig": rig_td3}
    scripts |= {"skill": skill_embedding, "stitching": awac}
    plans = {name: study.plan(study.Args(study=name)) for name in scripts}
    for name, module in scripts.items():
        jobs = plans[name]
        assert jobs and len({job.out for job in jobs}) == len(jobs)
        for job in jobs:
            assert job.command[1] == f"{module.__name__}.py"
            module.tyro.cli(module.Args, args=job.command[2:])  # flags that the script knows
    assert study.RELABEL["mix"] == " ".join(map(str, rig_td3.Args.goal_fractions))
    for experiment, embedding, alpha2, _ in (job.key for job in plans["skill"]):
        kind = embedding if embedding == "one_hot" else experiment
        assert alpha2 in (0, skill_embedding.USUAL[kind]["alpha2"])
    defaults = [j for j in plans["awac"] if j.table == "awac" and j.key[3]]
    assert {j.key[1] for j in defaults} == {awac.Args.lam}
    assert {j.key[3] for j in defaults} == {awac.Args.total_steps}


def finish(job, returns):
    """Pretend that a PPO job has run."""
    job.out.mkdir(parents=True)
    (job.out / "args.json").write_text(json.dumps({"git_commit": "abcdef0123456789"}))
    with open(job.out / "curve.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "seconds", "steps_per_second", "eval_return"])
        writer.writerows([[1000 * (i + 1), i, 1, r] for i, r in enumerate(returns)])
    summary = {"eval_return_mean": returns[-1], "steps": 1000 * len(returns), "minutes": 1.0}
    (job.out / "summary.json").write_text(json.dumps(summary))


def test_gathering_is_complete_and_happens_once(study):
    jobs = [j for j in study.plan(study.Args(encoders=("oracle", "cnn"), seeds=(1, 2)))]
    for job in jobs[:3]:
        finish(job, [30.123456, 31.0])
    study.gather(jobs)
    assert study.finished("ppo_encoder") == {tuple(map(str, job.key)) for job in jobs[:3]}
    rows = study.read(study.RESULTS / "ppo_encoder.csv")
    assert [row["eval_return"] for row in rows] == ["30.123", "31"] * 3
    before = (study.RESULTS / "ppo_encoder.csv").read_text()
    study.gather(jobs)
    assert (study.RESULTS / "ppo_encoder.csv").read_text() == before
    finish(jobs[3], [1.0])
    study.gather(jobs)
    assert len(study.finished("ppo_encoder")) == 4


@pytest.mark.parametrize("flags", [["--encoders", "nonsense"], ["--distractors", "3"]])
def test_bad_choices_are_refused(study, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        study.tyro.cli(study.Args, args=flags)
    assert stop.value.code == 2 and flags[1] in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--jobs"):
        study.main(study.Args(jobs=0))


END = "<!-- end -->\n"


def test_figures_and_tables(study, plot, monkeypatch, tmp_path, capsys):
    jobs = [j for j in study.plan(study.Args(seeds=(1, 2))) if j.table == "ppo_encoder"]
    for i, job in enumerate(jobs):
        finish(job, [30.0, 35.0 + 0.01 * i])
    study.gather(jobs)
    names = ["agent_x", "agent_y", "target_x", "target_y"]
    with open(study.RESULTS / "rp_pretrain_final.csv", "w") as file:
        file.write("objective,distractors,seed,mse,mse_image,minutes,")
        file.write(",".join(f"r2_{name}" for name in names) + "\n")
        file.write("reward_prediction,0,1,0.001,0.1,2,.9,.9,.9,.9\n")
        file.write("reward_prediction,0,2,0.003,0.1,2,.8,.8,.8,.8\n")
    (study.RESULTS / "rp_pretrain.csv").write_text("objective,distractors,seed,step\n")
    returns, pretraining = (f"<!-- table: {name} -->\n" for name in ("returns", "pretraining"))
    pages = {"README.md": f"a\n{returns}old\n{END}b\n"}  # each gets the tables that it has marks of
    pages["benchmark/README.md"] = f"c\n{pretraining}{END}d\n{returns}\nold\n\n{END}"
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    film = study.RUNS / "ppo_encoder" / "reward_prediction_d2_s1_n250000" / "rollout.gif"
    film.write_bytes(b"film")
    for module in (plot, sys.modules["rows"]):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    plot.main()
    short, long = (tmp_path / name for name in pages)
    for page in (short, long):
        assert "old" not in page.read_text()
        assert "| `oracle` | 35.11 [35.00, 35.21]" in page.read_text()  # seeds: 35.00 and 35.21
    assert short.read_text().startswith("a\n") and short.read_text().endswith(END + "b\n")
    assert long.read_text().startswith("c\n") and END + "d\n" in long.read_text()
    assert "0.0020 ± 0.0014" in long.read_text() and "0.850 ± 0.071" in long.read_text()
    assert "0.0020" not in short.read_text()
    for name in ("learning_curves.png", "comparisons.png"):
        assert (study.RESULTS / name).stat().st_size > 10_000
    assert (study.RESULTS / "rollout.gif").read_bytes() == b"film"
    assert "decoder_probe.png stays as it is" in capsys.readouterr().out

    before = {page: page.read_bytes() for page in (short, long)}
    tables = {
        name: made[name] for made in plot.STUDIES.values() for name in made if "." not in name
    }
    monkeypatch.setattr(plot, "STUDIES", {"ppo_encoder": {"returns": tables["returns"]}})
    plot.main()
    assert {page: page.read_bytes() for page in before} == before


def test_decoders_are_drawn(plot, monkeypatch, tmp_path):
    """From checkpoints of rp_pretrain.py, into one figure: four rows of six frames, twice."""
    kinds = ("rp_single_task/agent_x", "rp_pretrain/reward_prediction")
    for kind in (*kinds, "rp_pretrain/image_reconstruction"):
        for distractors in (0, 2):
            folder = tmp_path / plot.RUNS / f"{kind}_d{distractors}_s1"
            folder.mkdir(parents=True)
            drawn = "reconstruction" in kind
            objective = "image_reconstruction" if drawn else "reward_prediction"
            model = rp_pretrain.Model(rp_pretrain.Args(objective=objective), "cpu")
            states = {k: getattr(model, k).state_dict() for k in ("encoder", "decoder")}
            torch.save(states | {"objective": objective}, folder / "checkpoint.pt")
    for module in (plot, sys.modules["rows"]):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    figure = plot.decoder_probe([], [])
    assert [len(axis.images) for axis in figure.axes] == [1] * 48
    assert figure.axes[12].get_ylabel() == "agent's x"


def test_a_study_that_is_told_to_end_ends_its_runs(tmp_path):
    """By Ctrl-C or by a batch system. The run is a stand-in that sleeps."""
    (tmp_path / "benchmark").mkdir()
    shutil.copy(ROOT / "benchmark" / "study.py", tmp_path / "benchmark")
    sleeper = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    (tmp_path / "ppo_encoder.py").write_text(sleeper)
    command = [sys.executable, "benchmark/study.py", "--study=rounds", "--jobs=1"]
    study = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "pid").exists)
    pid = int(wait_until((tmp_path / "pid").read_text))
    study.send_signal(signal.SIGTERM)
    assert "the same command goes on" in study.communicate(timeout=10)[1]

    def gone():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True

    assert wait_until(gone)


def wait_until(true):
    """What it gives once that is not empty."""
    for _ in range(200):
        if found := true():
            return found
        time.sleep(0.05)


def test_interval(plot):
    mean, low, high = plot.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and 1.7 < low < 1.95 and 4.05 < high < 4.3
    assert plot.interval([2.0, 2.0]) == (2, 2, 2)


def test_short_numbers(study):
    row = {"a": 1.23456789, "b": "two", "n": 3, "r2": {"agent": 0.123456, "target": 1}}
    expected = {"a": "1.2346", "b": "two", "n": "3", "r2_agent": "0.12346", "r2_target": "1"}
    assert study.short(row) == expected


def test_runs_are_told_apart(plot):
    columns = ("kind", "seed", "step", "y")
    table = [("a", 1, 20, 2.0), ("b", 1, 10, 9.0), ("a", 2, 10, 3.0), ("a", 1, 10, 1.0)]
    table.append(("a", 2, 20, 4.0))
    rows = [dict(zip(columns, row)) for row in table]
    runs = plot.runs_of(plot.where(rows, kind="a"))
    assert plot.values_of(runs, "y").tolist() == [[1, 2], [3, 4]]  # by seed, in order of steps


def test_the_pages_show_what_was_gathered(plot):
    """Every table is that of the committed results, benchmark/README.md has them all, and all
    scratch runs are shown."""
    tables = plot.make(figures=False)
    marked = {}
    for page in plot.PAGES:
        text = (ROOT / page).read_text()
        marked[page] = re.findall("<!-- table: (.*) -->", text)
        assert plot.fill(text, tables) == text, f"python benchmark/plot.py changes {page}"
    assert sorted(marked["benchmark/README.md"]) == sorted(tables)
    assert "returns" in marked["README.md"] and set(marked["README.md"]) <= set(tables)
    is_scratch = "| sequencing | from scratch"
    (line,) = [line for line in tables["transfer of skills"] if line.startswith(is_scratch)]
    assert line.split("|")[4].count(";") == 2


def test_links_of_the_results_lead_somewhere():
    """Pictures are there, and the table of contents has every section under GitHub's name."""
    text = (ROOT / "benchmark" / "README.md").read_text()
    titles = re.findall(r"^##+ (.*)$", text, flags=re.M)
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    assert re.findall(r"^ *- \[.*\]\(#(.*)\)$", text, flags=re.M) == anchors
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(pictures) > 10
    assert all((ROOT / "benchmark" / picture).exists() for picture in pictures)


def test_an_interrupted_gathering_goes_on(study):
    """Interrupted between its two files, it does not append the curves twice."""
    jobs = [job for job in study.plan(study.Args(seeds=(1,))) if job.table == "ppo_encoder"][:2]
    for job in jobs:
        finish(job, [30.0, 31.0])
    study.gather(jobs)
    whole = (study.RESULTS / "ppo_encoder.csv").read_text()
    (study.RESULTS / "ppo_encoder_final.csv").unlink()
    study.gather(jobs)
    assert (study.RESULTS / "ppo_encoder.csv").read_text() == whole
    assert len(study.finished("ppo_encoder")) == 2


def test_a_run_that_is_not_whole_stops_no_gathering(study, capsys):
    jobs = [job for job in study.plan(study.Args(seeds=(1,))) if job.table == "ppo_encoder"][:3]
    for job in jobs:
        finish(job, [30.0, 31.0])
    (jobs[0].out / "args.json").unlink()
    (jobs[1].out / "summary.json").write_text("{")
    study.gather(jobs)
    assert study.finished("ppo_encoder") == {tuple(map(str, jobs[2].key))}
    assert capsys.readouterr().out.count("left out: ") == 2


@pytest.mark.parametrize("text", ["", "seed,step\n1\n", "seed,step\n1,2,3\n", 'seed\n"1'])
def test_a_broken_table_is_refused(study, text):
    study.RESULTS.mkdir(parents=True)
    path = study.RESULTS / "awac.csv"
    path.write_text(text)
    with pytest.raises((ValueError, csv.Error)):
        study.read(path)
