"""The study's plan, its gathering of results, and the figures and tables drawn from them."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest

import awac
import curl
import ppo_encoder
import rig_td3
import rp_pretrain
import skill_embedding

ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    module = importlib.import_module("study")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return module


def test_plan(study):
    jobs = study.plan(study.Args())
    tables = [job.table for job in jobs]
    assert tables.count("ppo_encoder") == 7 * 3 * 5 and tables.count("rp_pretrain") == 2 * 3 * 5
    assert len({job.out for job in jobs}) == len(jobs)
    for i, job in enumerate(jobs):
        assert not job.needs or job.needs.parent in [earlier.out for earlier in jobs[:i]]
        script = {"ppo_encoder": ppo_encoder, "rp_pretrain": rp_pretrain}[job.table]
        args = script.tyro.cli(script.Args, args=job.command[2:])  # flags that the script knows
        assert args.seed == job.key[2] and args.torch_threads == 1


def test_plans_of_the_other_studies(study):
    scripts = {"single_task": rp_pretrain, "awac": awac, "curl": curl, "rig": rig_td3}
    scripts |= {"skill": skill_embedding}
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
    assert {j.key[1] for j in defaults} == {awac.Args.temperature}
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


def test_figures_and_tables(study, monkeypatch, tmp_path):
    jobs = [j for j in study.plan(study.Args(seeds=(1, 2))) if j.table == "ppo_encoder"]
    for i, job in enumerate(jobs):
        finish(job, [30.0, 35.0 + 0.01 * i])
    study.gather(jobs)
    with open(study.RESULTS / "rp_pretrain_final.csv", "w") as file:
        names = ["agent_x", "agent_y", "target_x", "target_y"]
        file.write("objective,distractors,seed,mse,mse_image,minutes,")
        file.write(",".join(f"r2_{name}" for name in names) + "\n")
        file.write("reward_prediction,0,1,0.001,0.1,2,.9,.9,.9,.9\n")
        file.write("reward_prediction,0,2,0.003,0.1,2,.8,.8,.8,.8\n")
    end = "<!-- end -->\n"
    text = f"a\n<!-- table: returns -->\nold\n{end}b\n<!-- table: pretraining -->\n{end}"
    (tmp_path / "README.md").write_text(text)
    sys.modules.pop("plot", None)
    plot = importlib.import_module("plot")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "RESULTS", study.RESULTS)
    plot.main()
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme and readme.startswith("a\n") and "\nb\n" in readme
    assert "| `oracle` | 35.11 [35.00, 35.21]" in readme  # seeds 1 and 2: 35.00 and 35.21
    assert "0.0020 ± 0.0014" in readme and "0.850 ± 0.071" in readme
    for name in ("learning_curves.png", "comparisons.png"):
        assert (study.RESULTS / name).stat().st_size > 10_000


def test_interval():
    sys.path.insert(0, str(ROOT / "benchmark"))
    plot = importlib.import_module("plot")
    mean, low, high = plot.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and 1.6 < low < 2.1 and 3.9 < high < 4.4
    assert plot.interval([2.0, 2.0]) == (2, 2, 2)


def test_short_numbers(study):
    row = {"a": 1.23456789, "b": "two", "n": 3, "r2": {"agent": 0.123456, "target": 1}}
    expected = {"a": "1.2346", "b": "two", "n": "3", "r2_agent": "0.12346", "r2_target": "1"}
    assert study.short(row) == expected


def test_runs_are_told_apart(study):
    plot = importlib.import_module("plot")
    columns = ("kind", "seed", "step", "y")
    table = [("a", 1, 20, 2.0), ("b", 1, 10, 9.0), ("a", 2, 10, 3.0), ("a", 1, 10, 1.0)]
    table.append(("a", 2, 20, 4.0))
    runs = plot.runs_of([dict(zip(columns, row)) for row in table], kind="a")
    assert plot.values_of(runs, "y").tolist() == [[1, 2], [3, 4]]  # by seed, in order of steps


def test_the_readme_shows_what_was_gathered(study, monkeypatch):
    """Both tables of skills are those of the committed results, and all scratch runs are shown."""
    plot = importlib.import_module("plot")
    monkeypatch.setattr(plot, "RESULTS", ROOT / "benchmark" / "results")
    readme = (ROOT / "README.md").read_text()
    library, transfer = plot.skill_tables(plot.read("skill_final.csv"))
    for line in library + transfer:
        assert line in readme
    (line,) = [line for line in transfer if line.startswith("| sequencing | from scratch")]
    assert line.split("|")[4].count(";") == 5
