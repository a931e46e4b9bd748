"""Branches: recorded, resumed, put in order, and averaged without the Θ0 that they go on from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints import open_trajectory
from know_cli.checkpoints.metadata import Branch, Session, TrajectoryKind
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_USAGE, CheckpointError, UsageError
from know_cli.forgetting import BranchRecorder, Recorder, nested_subsets
from know_cli.forgetting.recorder import TrainingSession
from tests.support.command import Command, one_line

TRAIN = """
import torch
size = 40
def train(session):
    if session.index == 2 and session.options.get("fail"):
        raise RuntimeError("no power")
    torch.manual_seed(session.seed % 2**31)
    start = torch.zeros(3) if session.start is None else session.start["w.bias"]
    return {"w.bias": start + torch.rand(3) + len(session.indices)}, {"samples": len(session.indices)}
"""


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


# ---------------------------------------------------------------------- recording


def test_know_forget_records_branches(script: Path, know: Command) -> None:
    done = know("forget", "train.py:train", "run", "--branches", "3", cwd=script)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "4 models trained" in done.stdout
    assert "branch 2" in done.stderr
    run = script / "run"
    assert sorted(path.name for path in run.glob("*.safetensors")) == [
        "branch1.safetensors", "branch2.safetensors", "branch3.safetensors", "ckpt0.safetensors",
    ]  # fmt: skip
    start = load_file(run / "ckpt0.safetensors")["w.bias"]
    branches = [load_file(run / f"branch{k}.safetensors")["w.bias"] for k in (1, 2, 3)]
    assert all(bool(((b - start) >= 40).all()) for b in branches)  # from Θ0, on all samples
    assert len({tuple(b.tolist()) for b in branches}) == 3  # in orders of their own
    found = [Branch.from_metadata(header(run / f"branch{k}.safetensors")) for k in (1, 2, 3)]
    recorded = [branch for branch in found if branch is not None]
    assert [branch.index for branch in recorded] == [1, 2, 3]
    assert {branch.fraction for branch in recorded} == {1.0}
    assert len({branch.seed for branch in recorded}) == 3
    assert header(run / "ckpt0.safetensors")["know.trajectory-kind"] == "branches"
    record = json.loads((run / "branches.json").read_text())
    assert record["recorded"]["2"]["seed"] == recorded[1].seed

    done = know("predict", "run/branch3..branch1", "run/ckpt0", "-o", "out", cwd=script)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "3 branches of run/ckpt0.safetensors, average" in done.stdout
    assert "put in the order of the branches, Θ0 first: run/ckpt0.safetensors, run/branch1" in (
        done.stderr
    )
    expected = torch.stack(branches).double().mean(dim=0).float()
    torch.testing.assert_close(load_file(script / "out")["w.bias"], expected)
    made = header(script / "out")
    assert made["know.trajectory-kind"] == "branches"
    assert not {"know.branch", "know.seed", "know.fraction", "know.rate", "know.trajectory"} & made.keys()  # fmt: skip
    for order in (
        "run/ckpt0 run/branch1..branch3",
        "run/branch2 run/ckpt0 run/branch1 run/branch3",
    ):
        again = know("verify", "out", *order.split(), "--full", cwd=script)
        assert again.returncode == EXIT_DONE, again.stderr


def test_an_interrupted_recording_continues(script: Path, know: Command) -> None:
    whole = know("forget", "train.py:train", "whole", "--branches", "3", cwd=script)
    assert whole.returncode == EXIT_DONE
    few = know("forget", "train.py:train", "run", "--branches", "1", cwd=script)
    assert few.returncode == EXIT_DONE
    before = (script / "run" / "branch1.safetensors").stat().st_mtime_ns
    # Branches can be added later.
    done = know("forget", "train.py:train", "run", "--branches", "3", cwd=script)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "2 models trained" in done.stdout
    assert "2 kept" in done.stdout
    assert (script / "run" / "branch1.safetensors").stat().st_mtime_ns == before
    for name in ("ckpt0", "branch1", "branch2", "branch3"):
        one, two = (script / folder / f"{name}.safetensors" for folder in ("whole", "run"))
        assert one.read_bytes() == two.read_bytes()
    failing = know("forget", "train.py:train", "broken", "--branches", "3", "--option", "fail=1",
                   cwd=script)  # fmt: skip
    assert failing.returncode == EXIT_USAGE
    assert "broken, branch 2: RuntimeError: no power" in failing.stderr
    assert sorted(p.stem for p in (script / "broken").glob("*.safetensors")) == ["branch1", "ckpt0"]
    other = know("forget", "train.py:train", "run", "--branches", "3", "--seed", "1", cwd=script)
    assert other.returncode == EXIT_USAGE
    assert "is of another trajectory" in one_line(other.stderr)


def test_branches_without_their_start_are_refused(script: Path, know: Command) -> None:
    arguments = ("forget", "train.py:train", "run", "--branches", "2")
    assert know(*arguments, cwd=script).returncode == EXIT_DONE
    (script / "run" / "branch1.safetensors").unlink()  # from which nothing goes on
    assert know(*arguments, cwd=script).returncode == EXIT_DONE
    (script / "run" / "ckpt0.safetensors").unlink()
    refused = know(*arguments, cwd=script)
    assert refused.returncode == EXIT_CHECKPOINT
    assert one_line(refused.stderr) == (
        f"know: error: {script}/run/ckpt0.safetensors: is missing, and what was trained from it is there: "
        "branch1.safetensors, branch2.safetensors; put it back, or remove these as well, so that "
        "they are trained again"
    )


def test_branches_of_a_start_on_parts_of_the_data(script: Path, know: Command) -> None:
    save_file({"w.bias": torch.full((3,), 7.0)}, script / "base.safetensors")
    done = know("forget", "train.py:train", "run", "--branches", "2", "--rate", "0.25",
                "--from", "base.safetensors", cwd=script)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    run = script / "run"
    assert sorted(p.stem for p in run.glob("*.safetensors")) == ["branch1", "branch2"]
    values = load_file(run / "branch2.safetensors")["w.bias"]
    assert bool(((values >= 17) & (values < 18)).all())  # 7 and 10 of 40 samples
    assert header(run / "branch2.safetensors")["know.fraction"] == "0.25"
    # A Θ0 of its own may have any metadata, or none.
    done = know("predict", "run/branch2", "base", "run/branch1", "-o", "out", cwd=script)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "2 branches of base.safetensors" in done.stdout
    done = know("predict", "run/branch2", "run/branch1", "-o", "other", cwd=script)
    assert done.returncode == EXIT_CHECKPOINT
    assert "nothing tells which checkpoint is Θ0" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sessions", "3"], "--sessions: is for a forgetting"),
        (["--before", "1"], "--before: is for a forgetting"),
        (["--rate", "2"], "--rate 2: write a number"),
        (["--rate", "0.3..0.9"], "a range needs --trajectories"),
        (["--trajectory", "forgetting"], "--branches: is for branches"),
        (["--trajectory", "run"], "--trajectory run: a run needs no sessions"),
    ],
)
def test_options_that_branches_do_not_have(
    options: list[str], message: str, script: Path, know: Command
) -> None:
    done = know("forget", "train.py:train", "run", "--branches", "2", *options, cwd=script)
    assert done.returncode == EXIT_USAGE
    assert message in one_line(done.stderr)
    assert not (script / "run").exists()


def test_what_to_record_can_be_said(script: Path, know: Command) -> None:
    for kind, names in (("branches", 5), ("forgetting", 5)):
        done = know("forget", "train.py:train", kind, "--trajectory", kind, cwd=script)
        assert done.returncode == EXIT_DONE, done.stderr
        assert len(list((script / kind).glob("*.safetensors"))) == names
        assert (script / kind / "branch4.safetensors").exists() == (kind == "branches")


def test_several_recordings_of_branches(script: Path, know: Command) -> None:
    done = know("forget", "train.py:train", "run", "--branches", "1", "--trajectories", "2",
                "--rate", "0.5..0.9", cwd=script)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    shares = [header(script / "run" / f"000{k}" / "branch1.safetensors")["know.fraction"] for k in (0, 1)]  # fmt: skip
    assert len(set(shares)) == 2


def fill(session: TrainingSession) -> dict[str, Tensor]:
    return {"w": torch.full((2,), float(session.index))}


def test_subsets_are_independent_and_keep_the_classes(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    recorder = BranchRecorder(tmp_path, 60, branches=3, rate=0.5, labels=labels)
    seen = []
    for session in recorder:
        if session.is_branch:
            seen.append(session.indices)
            assert np.bincount(labels[session.indices]).tolist() == [10, 10, 10]
            assert session.fraction == 0.5
        recorder.save(session, fill(session))
    for one, two in pairwise(seen):
        assert 0 < len(np.intersect1d(one, two)) < 30
    assert recorder.done == [0, 1, 2, 3]
    assert recorder.measurements(1) == {}


def test_numbers_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"branches": 0}, {"branches": 1, "rate": 1.5}, {"branches": 1, "seed": -1}):
        with pytest.raises(UsageError):
            BranchRecorder(tmp_path / "run", 10, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="1000 branches: at most 999 can be recorded"):
        BranchRecorder(tmp_path / "run", 10, branches=1000)
    with pytest.raises(UsageError, match="10 samples are too few for rate 0.04: a branch would"):
        BranchRecorder(tmp_path / "run", 10, branches=2, rate=0.04)
    # A forgetting's folder is not one for branches, whose Θ0 would have the same name.
    made = Recorder(tmp_path / "run", nested_subsets(10, 0.5, 1, 0), rate=0.5)
    for session in made:
        made.save(session, fill(session))
    with pytest.raises(UsageError, match="ckpt0.safetensors: is of another trajectory"):
        BranchRecorder(tmp_path / "run", 10, branches=1)


# ---------------------------------------------------------------------- branches on other tasks


def value(*shape: int, of: float) -> Tensor:
    """Around a value, so that nothing is whole numbers throughout."""
    rows = torch.arange(float(shape[0])).view(-1, *[1] * (len(shape) - 1)) / 64
    return rows.expand(shape).contiguous() + of


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """A base with a head for its own task, and fine-tunes with heads of theirs."""
    base = {
        "body.weight": value(8, 8, of=1.0),
        "pool.weight": value(2, 2, of=1.0),
        "lm.weight": value(3, 4, of=9.0),
    }
    save_file(base, tmp_path / "base.safetensors", Session(0, 1.0, 0.5, "x").to_metadata())
    for name, number, classes in (("mnli", 4.0, 3), ("sst2", 2.0, 2), ("qqp", 9.0, 2)):
        tensors = {
            "body.weight": value(8, 8, of=number),
            "head.weight": value(classes, 4, of=number),
        }
        if name != "qqp":
            tensors["pool.weight"] = value(2, 2, of=number)
        if name == "sst2":
            tensors["lm.weight"] = value(5, 4, of=0.0)  # of another size
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path  # fmt: skip


FUSE = ("predict", "base", "mnli", "sst2", "qqp", "--trajectory", "branches", "-o", "out")


def test_fine_tunes_of_other_tasks_are_fused(team: Path, know: Command) -> None:
    done = know(*FUSE, cwd=team)
    assert done.returncode == EXIT_DONE, done.stderr
    notices = done.stderr.splitlines()
    assert "1 tensor that base.safetensors does not have is left out, such as 'head.weight' in mnli.safetensors" in notices  # fmt: skip
    assert "1 tensor is not in all branches as in base.safetensors, such as 'pool.weight' (not in qqp.safetensors): taken from those that have it" in notices  # fmt: skip
    assert "1 tensor is in no branch as in base.safetensors, such as 'lm.weight': copied from there" in notices  # fmt: skip
    out = load_file(team / "out")
    assert out.keys() == {"body.weight", "pool.weight", "lm.weight"}
    assert out["body.weight"].equal(value(8, 8, of=5.0))  # (4 + 2 + 9) / 3, without the base
    assert out["pool.weight"].equal(value(2, 2, of=3.0))  # (4 + 2) / 2
    assert out["lm.weight"].equal(value(3, 4, of=9.0))
    # The base may have been a session of a forgetting; the output is none.
    assert not {"know.session", "know.trajectory"} & header(team / "out").keys()
    names = ["base", "mnli", "sst2", "qqp"]
    assert know("verify", "out", *names, "--full", cwd=team).returncode == EXIT_DONE
    again = know(*FUSE[:-1], "other", "--frozen", "predict", "--max-memory", "64M", cwd=team)
    assert again.returncode == EXIT_DONE, again.stderr
    other = load_file(team / "other")
    assert all(other[name].equal(tensor) for name, tensor in out.items())


@pytest.mark.parametrize(
    ("method", "code", "message"),
    [
        ("naive", EXIT_DONE, ""),
        ("shrink", EXIT_DONE, ""),
        ("linear", EXIT_USAGE, "is for forgettings and runs, and these checkpoints are of branches; take --method average"),
        ("tsv", EXIT_USAGE, "is for forgettings, and"),
        ("known", EXIT_USAGE, "no KNOWN that was taught on branches is shipped"),
    ],
)  # fmt: skip
def test_other_methods_on_branches(
    method: str, code: int, message: str, team: Path, know: Command
) -> None:
    done = know(*FUSE, "--method", method, cwd=team)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    if method == "naive":
        base = load_file(team / "base.safetensors")
        assert all(base[name].equal(tensor) for name, tensor in load_file(team / "out").items())


def test_inspecting_branches(team: Path, know: Command) -> None:
    done = know("inspect", "base", "mnli", "sst2", "qqp", "--trajectory", "branches", "--json",
                "found", cwd=team)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "3 branches of base.safetensors" in done.stdout
    assert "distance from Θ0" in done.stdout
    assert "cosine of branches" in done.stdout
    total = json.loads((team / "found").read_text())["total"]
    # Of the body alone, which all have: 64 parameters that moved by 3, 1 and 8.
    assert total["distances"] == pytest.approx([24.0, 8.0, 64.0])
    assert total["cosines"] == [[pytest.approx(1.0)] * 3] * 3


def test_what_is_no_branch(team: Path, know: Command) -> None:
    save_file({"model.body.weight": torch.ones(8, 8), "model.pool.weight": torch.ones(2, 2),
               "model.lm.weight": torch.ones(3, 4)}, team / "wrapped.safetensors")  # fmt: skip
    done = know(*FUSE[:2], "wrapped", *FUSE[5:], cwd=team)
    assert done.returncode == EXIT_CHECKPOINT
    line = one_line(done.stderr)
    assert "wrapped.safetensors: has only 0 of the 80 parameters of base.safetensors" in line
    assert "only a prefix differs: 'model.'" in line
    save_file({"body.weight": torch.ones(8, 8, dtype=torch.int8)}, team / "packed.safetensors")
    done = know(*FUSE[:2], "packed", *FUSE[5:], cwd=team)
    assert done.returncode == EXIT_CHECKPOINT
    assert "packed.safetensors: 'body.weight' is I8 but F32 in base.safetensors" in done.stderr


def batch_norm(mean: float, variance: float, step: float) -> dict[str, Tensor]:
    return {
        "conv.weight": value(4, 3, 1, 1, of=step),
        "bn.weight": value(4, of=1.0), "bn.bias": value(4, of=0.5),
        "bn.running_mean": value(4, of=mean), "bn.running_var": value(4, of=variance),
        "bn.num_batches_tracked": torch.tensor(7),
    }  # fmt: skip


def test_running_statistics_that_a_branch_lacks(tmp_path: Path, know: Command) -> None:
    """Those of the others together: the mean of means, and of variances plus that of the means."""
    every = {
        "base": (9.0, 9.0, 1.0),
        "a": (1.0, 2.0, 4.0),
        "b": (3.0, 4.0, 2.0),
        "c": (0.0, 1.0, 9.0),
    }
    for name, numbers in every.items():
        tensors = batch_norm(*numbers)
        if name == "c":
            tensors = {"conv.weight": tensors["conv.weight"]}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    done = know("predict", *every, "--trajectory", "branches", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    out = load_file(tmp_path / "out")
    torch.testing.assert_close(out["conv.weight"], value(4, 3, 1, 1, of=5.0))
    torch.testing.assert_close(out["bn.running_mean"], value(4, of=2.0))
    torch.testing.assert_close(out["bn.running_var"], value(4, of=3.0 + 1.0))
    assert int(out["bn.num_batches_tracked"]) == 7
    assert know("verify", "out", *every, "--full", cwd=tmp_path).returncode == EXIT_DONE
    # What no branch has is the base's.
    some = know("predict", "base", "c", "--trajectory", "branches", "-o", "one", cwd=tmp_path)
    assert some.returncode == EXIT_DONE, some.stderr
    one = load_file(tmp_path / "one")
    base = batch_norm(*every["base"])
    assert all(one[name].equal(base[name]) for name in base if name != "conv.weight")
    assert one["conv.weight"].equal(value(4, 3, 1, 1, of=9.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_branches_that_lack_tensors_of_any_type(
    dtype: torch.dtype, tmp_path: Path, know: Command
) -> None:
    """In many small tensors that share batches, whatever the memory and the threads."""
    generator = torch.Generator().manual_seed(0)
    states = []
    for k in range(4):
        tensors = {
            f"layer{n}.weight": torch.randn(n % 5 + 1, 3, generator=generator, dtype=torch.float64)
            for n in range(30)
        }
        lacking = {} if k == 0 else {f"layer{n}.weight" for n in range(30) if n % 7 == k}
        states.append({name: t.to(dtype) for name, t in tensors.items() if name not in lacking})
        save_file(states[-1], tmp_path / f"s{k}.safetensors")
    for out, more in (("a", []), ("b", ["--threads", "3", "--max-memory", "16M"])):
        done = know("predict", "s0..s3", "--trajectory", "branches", "-o", out, *more, cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, tensor in load_file(tmp_path / "a").items():
        there = [state[name].double() for state in states[1:] if name in state]
        torch.testing.assert_close(tensor, (sum(there) / len(there)).to(dtype))  # type: ignore[union-attr,operator]


# ---------------------------------------------------------------------- order


def named(folder: Path, **metadata: dict[str, str]) -> list[Path]:
    paths = []
    for k, (name, entries) in enumerate(metadata.items()):
        paths.append(folder / f"{name}.safetensors")
        save_file({"w": torch.full((2,), float(k))}, paths[-1], {"format": "pt", **entries})
    return paths


def branch(index: int, trajectory: str = "t") -> dict[str, str]:
    return Branch(index, 1.0, index, trajectory).to_metadata()


def order(paths: list[Path], kind: TrajectoryKind | None = None) -> tuple[list[str], list[str]]:
    with open_trajectory(paths, kind=kind) as opened:
        assert opened.kind is TrajectoryKind.BRANCHES
        return [c.path.stem for c in opened.checkpoints], opened.notices


def test_the_order_of_branches(tmp_path: Path) -> None:
    recorded = named(tmp_path, b2=branch(2), b0=branch(0), b1=branch(1))
    names, (notice,) = order(recorded)
    assert names == ["b0", "b1", "b2"]
    assert notice.startswith("checkpoints were put in the order of the branches, Θ0 first: ")
    foreign = named(tmp_path, x2=branch(2), run={"know.trajectory-kind": "run"}, x1=branch(1))
    assert order(foreign)[0] == ["run", "x1", "x2"]
    plain = named(tmp_path, q={}, p={}, o={})
    assert order(plain, TrajectoryKind.BRANCHES) == (["q", "p", "o"], [])
    # What was made of branches is a start like any other.
    fused = {"know.trajectory-kind": "branches", "know.method": "average"}
    with open_trajectory(named(tmp_path, fused=fused, tuned={})) as opened:
        assert opened.kind is TrajectoryKind.FORGETTING
    assert order(named(tmp_path, t1=branch(1), again=fused))[0] == ["again", "t1"]
    several = named(tmp_path, s0=branch(0), s2=branch(1, "u"), s1=branch(1))
    names, notices = order(several)
    assert names == ["s0", "s1", "s2"]
    assert "from several recordings" in notices[-1]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (branch(0), branch(0, "u"), "both recorded as Θ0"),
        (branch(1), branch(1), "recorded as the same branch"),
    ],
)
def test_branches_that_contradict_each_other(
    first: dict[str, str], second: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        order(named(tmp_path, a=first, b=second, c=branch(7)))


def test_only_the_start_may_be_of_another_trajectory(tmp_path: Path) -> None:
    """What is of a run is no branch, where another checkpoint is recorded as Θ0."""
    run = {"know.trajectory-kind": "run", "know.training-step": "7"}
    with pytest.raises(CheckpointError, match="is recorded as of a run, and .* as of branches"):
        order(named(tmp_path, a=branch(0), b=branch(1), run=run))
    recorded = named(tmp_path, c=branch(0), own={}, other=run)
    assert order(recorded[:2])[0] == ["c", "own"]
    assert order(recorded, TrajectoryKind.BRANCHES) == (["c", "own", "other"], [])
