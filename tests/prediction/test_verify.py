"""``know verify`` and digests: what was written is recognised, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import open_checkpoint
from know_cli.checkpoints.checksum import check_digest, digest_path, write_digest
from know_cli.checkpoints.reading import as_bytes
from know_cli.engine.parts import sample
from know_cli.engine.plan import Action, Plan, PlannedTensor
from know_cli.engine.settings import NormMode, Settings
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE, CheckpointError
from know_cli.kinds import PREDICTED_KINDS, Kind, Override
from know_cli.known.bundle import save_bundle
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import Verification, _Comparer, verify
from tests.support.bundles import random_bundle
from tests.support.command import Command, one_line
from tests.support.folders import shards
from tests.support.plans import plan_of
from tests.support.trajectories import network, states, write_trajectory


def predict(paths: list[Path], output: Path, **wishes: Any) -> Path:
    known = ("method", "options", "weights", "rate", "every_step", "force", "checksum")
    own = {key: wishes.pop(key) for key in known if key in wishes}
    with open_prediction(
        Request(paths, output, settings=Settings(**wishes), device="cpu", **own)
    ) as opened:
        opened.execute()
    return output


def checked(output: Path, paths: list[Path], **wishes: Any) -> Verification:
    result = verify(output, paths, **wishes)
    result.check(output)
    return result


WISHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {"steps": 3},
    "reset": {"norm": NormMode.RESET},
    "norm predicted": {"norm": NormMode.PREDICT},
    "kinds": {"overrides": (Override("fc.*", Kind.COPY), Override("scale", Kind.FC))},
    "rate": {"rate": 1 / 3, "method": "logfit"},
    "options": {"method": "task-vector", "options": {"alpha": 0.5, "range": "full"}},
    "whole tensors": {"method": "tsv", "steps": 2},
    "random": {"method": "noise"},
    "other threads": {"threads": 2},
}


@pytest.mark.parametrize("case", WISHES)
def test_what_was_written_is_recognised(
    case: str, trajectory_paths: list[Path], tmp_path: Path
) -> None:
    out = predict(trajectory_paths, tmp_path / "out", **WISHES[case])
    whole = checked(out, trajectory_paths, spans=None)
    assert whole.bytes_compared == whole.bytes_total
    assert whole.tensors == whole.tensors_total
    part = checked(out, trajectory_paths, spans=1_000, seed=3, threads=2)
    assert (part.seed, part.tensors) == (3, whole.tensors - part.rescaled)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"ckpt{k}.safetensors" for k in range(5)), "out"
    ]  # fmt: skip


def test_nonfinite_values_that_were_allowed(tmp_path: Path) -> None:
    trajectory = states()
    trajectory[1]["fc.weight"][0, 0] = torch.nan
    trajectory[0]["fc.weight"][0, 1] = torch.inf
    paths = write_trajectory(tmp_path, trajectory)
    out = predict(paths, tmp_path / "out", allow_nonfinite=True)
    assert checked(out, paths, spans=None).bytes_compared > 0


def test_intermediate_steps_and_folders(tmp_path: Path) -> None:
    paths = []
    for k in range(5):
        folder = shards(tmp_path / f"s{k}")
        for number in range(2):
            save_file(
                {f"layer{number}.weight": torch.linspace(0, 1 - 0.1 * k, 12).reshape(3, 4)},
                folder / f"model-{number + 1:05d}-of-00002.safetensors",
                {"format": "pt"},
            )
        paths.append(folder)
    out = predict(paths, tmp_path / "out", steps=2, every_step=True, checksum=True)
    for one in (out, tmp_path / "out.x2"):
        result = checked(one, paths, spans=None)
        assert result.digest == digest_path(one)
        assert result.bytes_compared == result.bytes_total


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """All of them, in a small checkpoint; a sample of all blocks finds what is predicted."""
    state = {"w": torch.randn(3, 4), "n": torch.tensor([3, 4])}
    paths = write_trajectory(
        tmp_path, [{"w": state["w"] * (1 + 0.1 * k), "n": state["n"]} for k in range(2)]
    )
    out = predict(paths, tmp_path / "out", method="linear")
    content = out.read_bytes()
    with open_checkpoint(out) as checkpoint:
        spans = [(e.info.begin, e.info.end) for e in checkpoint.tensors.values()]
    for place in (place for span in spans for place in range(*span)):
        out.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        for wishes in ({"spans": None}, {"spans": 100}):
            with pytest.raises(CheckpointError, match="is not what its provenance gives"):
                checked(out, paths, **wishes)


def test_a_change_of_an_input_is_found(trajectory_paths: list[Path], tmp_path: Path) -> None:
    out = predict(trajectory_paths, tmp_path / "out")
    state = load_file(trajectory_paths[2])
    # In the middle, where no fingerprint looks.
    state["fc.weight"][10, 10] += 0.1
    save_file(state, trajectory_paths[2], {"format": "pt"})
    with pytest.raises(CheckpointError, match="tensor 'fc.weight' differs in 1 places, by at most"):
        checked(out, trajectory_paths)
    state["fc.weight"][0, 0] += 0.1
    save_file(state, trajectory_paths[2], {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not made from .*ckpt2.safetensors in that place"):
        checked(out, trajectory_paths)


def test_other_inputs_are_refused(trajectory_paths: list[Path], tmp_path: Path) -> None:
    out = predict(trajectory_paths, tmp_path / "out", method="linear")
    with pytest.raises(CheckpointError, match="give them in the order"):
        checked(out, trajectory_paths[::-1])
    with pytest.raises(CheckpointError, match="was made from 5 checkpoints, 4 were given"):
        checked(out, trajectory_paths[:4])
    with pytest.raises(CheckpointError, match="was made from 5 checkpoints, 1 was given"):
        checked(out, trajectory_paths[:1])
    # A folder of checkpoints is not one of them.
    with pytest.raises(CheckpointError, match=r"name the file itself, .*ckpt0.safetensors"):
        checked(out, [trajectory_paths[0].parent])
    other = tmp_path / "other"
    other.mkdir()
    smaller = [{"x": torch.ones(2) * k} for k in range(5)]
    with pytest.raises(CheckpointError, match=r"has tensor .*, .*ckpt0.safetensors has not"):
        checked(out, write_trajectory(other, smaller))
    reshaped = [{**state, "fc.weight": state["fc.weight"].reshape(33, 20)} for state in states()]
    with pytest.raises(CheckpointError, match="'fc.weight' has another dtype or shape"):
        checked(out, write_trajectory(other, reshaped))


def rewritten(path: Path, **changes: str | None) -> Path:
    """The same tensors with other metadata."""
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("know.method", None, "has no provenance"),
        ("know.steps", None, "provenance cannot be read"),
        ("know.steps", "9", "provenance cannot be read"),
        ("know.steps", "one", "provenance cannot be read"),
        ("know.rate", "nan", "provenance cannot be read"),
        ("know.norm", "drop", "provenance cannot be read"),
        ("know.frozen", "melt", "provenance cannot be read"),
        ("know.kinds", '["fc"]', "provenance cannot be read"),
        ("know.kinds", "3", "provenance cannot be read"),
        ("know.kinds", "[" * 100_000, "provenance cannot be read"),
        ("know.options", "[]", "provenance cannot be read"),
        ("know.options", '{"alpha": 2.0, "range": "session"}', "is not what its provenance gives"),
        ("know.checkpoints", "many", "provenance cannot be read"),
        ("know.method", "best", "provenance cannot be followed"),
        ("know.options", '{"speed": 11}', "provenance cannot be followed"),
        ("know.kinds", '["nothing=fc"]', "provenance cannot be followed"),
        ("know.steps", "2", "is not what its provenance gives"),
        ("author", "somebody", "metadata is not what it should be: 'author'"),
        ("know.session", "7", "metadata is not what it should be: 'know.session'"),
    ],
)
def test_provenance_from_strangers(
    key: str, value: str | None, message: str, trajectory_paths: list[Path], tmp_path: Path
) -> None:
    out = predict(trajectory_paths, tmp_path / "out", method="task-vector")
    with pytest.raises(CheckpointError, match=message):
        checked(rewritten(out, **{key: value}), trajectory_paths)


def test_another_version_is_told(trajectory_paths: list[Path], tmp_path: Path) -> None:
    out = predict(trajectory_paths, tmp_path / "out", method="linear")
    result = checked(rewritten(out, **{"know.version": "0.0.1"}), trajectory_paths)
    assert "made by version '0.0.1'" in result.notices[0]
    # The first versions told less.
    fewer = dict.fromkeys(("know.inputs", "know.frozen", "know.device"))
    assert checked(rewritten(out, **fewer), trajectory_paths).tensors > 0


def test_the_bundle_must_be_the_one(
    trajectory_paths: list[Path], tmp_path: Path, bundle_path: Path
) -> None:
    out = predict(trajectory_paths, tmp_path / "out", weights=str(bundle_path))
    with pytest.raises(CheckpointError, match="not one of the shipped; say where it is with --wei"):
        checked(out, trajectory_paths)
    save_bundle(random_bundle(seed=1), tmp_path / "another")
    with pytest.raises(CheckpointError, match="another is not"):
        checked(out, trajectory_paths, weights=str(tmp_path / "another"))
    assert checked(out, trajectory_paths, weights=str(bundle_path)).tensors > 0


def test_rounding_is_told_from_damage(trajectory_paths: list[Path], tmp_path: Path) -> None:
    out = predict(trajectory_paths, tmp_path / "out", method="linear")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    state = load_file(out)
    state["fc.weight"] = torch.nextafter(state["fc.weight"], torch.tensor(torch.inf))
    save_file(state, out, metadata)
    with pytest.raises(CheckpointError, match="in 660 places, by at most .* another processor"):
        checked(out, trajectory_paths)
    state["fc.bias"][0] = torch.nan
    state["mask"][0] = False
    save_file(state, out, metadata)
    with pytest.raises(CheckpointError, match="differ") as caught:
        checked(out, trajectory_paths)
    assert "and 2 more tensors differ" in str(caught.value)
    assert "another processor" not in str(caught.value)


def planned(sizes: dict[Kind, list[int]], whole: int, block: int) -> Plan:
    tensors = [
        PlannedTensor(
            f"{kind.value}{n}", kind, Action.PREDICT, "", "F32", (size,), size, 4 * size
        )
        for kind, several in sizes.items()
        for n, size in enumerate(several)
    ]  # fmt: skip
    tensors += [
        PlannedTensor(f"whole{n}", Kind.FC, Action.PREDICT, "", "F32", (5,), 5, 20, whole=True)
        for n in range(whole)
    ]
    return plan_of(tensors, 64, block)


@given(
    st.fixed_dictionaries(
        {kind: st.lists(st.integers(0, 40), max_size=6) for kind in PREDICTED_KINDS}
    ),
    st.integers(1, 16),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(0, 9),
)
@settings(max_examples=200)
def test_a_sample_is_some_of_the_whole_plan_s_blocks(
    sizes: dict[Kind, list[int]], block: int, spans: int, whole: int, seed: int
) -> None:
    plan = planned(sizes, whole, block)
    every = {stream.kind: list(stream.batches(block)) for stream in plan.streams}
    total = sum(map(len, every.values())) + whole
    part = sample(plan, spans, seed)
    blocks = list(part.batches())
    assert len(blocks) + len(part.wholes) == min(spans, total)
    assert len(set(blocks)) == len(blocks)
    # The same blocks as a plan of one block a batch has them, in its order.
    positions = [(PREDICTED_KINDS.index(b.kind), every[b.kind].index(b)) for b in blocks]
    assert positions == sorted(positions)
    assert part.predicted == sum(b.rows for b in blocks) + 5 * len(part.wholes)
    assert sample(plan, spans, seed) == part


# ------------------------------------------------------------------------------------ digests


def test_the_digest_is_sha256sum_s(trajectory_paths: list[Path], tmp_path: Path) -> None:
    out = predict(trajectory_paths, tmp_path / "out.safetensors", checksum=True, method="naive")
    expected = hashlib.sha256(out.read_bytes()).hexdigest()
    assert (tmp_path / "out.safetensors.sha256").read_text() == f"{expected}  out.safetensors\n"
    assert check_digest(out) == tmp_path / "out.safetensors.sha256"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
@pytest.mark.parametrize("name", ["plain", "two words", "back\\slash", "line\nbreak", "größe"])
def test_sha256sum_agrees(name: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / name)
    shutil.copytree(shards(tmp_path / "in"), tmp_path / f"{name}.d")
    for one in (tmp_path / name, tmp_path / f"{name}.d"):
        path = write_digest(one)
        done = subprocess.run(
            ["sha256sum", "-c", path.name], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout
        assert check_digest(one) == path
    theirs = subprocess.run(
        ["sha256sum", name], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert digest_path(tmp_path / name).read_bytes() == theirs


def test_damage_is_found_by_the_digest(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m")
    path = write_digest(folder)
    text = path.read_text()
    assert len(text.splitlines()) == 3
    assert check_digest(folder) == path
    index = folder / "model.safetensors.index.json"
    content = index.read_text()
    index.write_text(content + "\n")
    with pytest.raises(CheckpointError, match=r"index.json: is not what was written"):
        check_digest(folder)
    index.write_text(content)
    path.write_text("".join(text.splitlines(keepends=True)[1:]))
    with pytest.raises(CheckpointError, match=r"which .*m.sha256 does not have"):
        check_digest(folder)
    path.write_text(text + f"{'0' * 64}  m/more\n")
    with pytest.raises(CheckpointError, match=r"m.sha256: has 'm/more'"):
        check_digest(folder)
    for wrong in ("", "what\n", f"{'0' * 63}  m\n", f"{'0' * 64} m\n", "\n"):
        path.write_text(wrong)
        with pytest.raises(CheckpointError, match="is not a file of digests"):
            check_digest(folder)
    path.unlink()
    assert check_digest(folder) is None


def test_a_digest_goes_with_its_output(
    trajectory_paths: list[Path], tmp_path: Path, know: Command
) -> None:
    out, path = tmp_path / "out", tmp_path / "out.sha256"
    command = ["predict", "ckpt0..ckpt4", "-o", "out", "--method"]
    path.write_text("mine")
    done = know(*command, "naive", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "out.sha256: exists already; --force replaces it" in one_line(done.stderr)
    assert not out.exists()
    done = know(*command, "naive", "--force", cwd=tmp_path)
    assert "out.sha256: is where the output's digest goes, but is none" in one_line(done.stderr)
    assert path.read_text() == "mine"
    path.write_text(f"{'0' * 64}  out\n")
    done = know(*command, "naive", "--force", "--checksum", "--json", "r.json", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "wrote out.sha256" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["digests"] == ["out.sha256"]
    assert check_digest(out) == path
    assert know(*command, "last", "--force", "-q", cwd=tmp_path).returncode == EXIT_DONE
    assert not path.exists(), "the digest of what was replaced"
    path.mkdir()
    done = know(*command, "last", "--force", cwd=tmp_path)
    assert "out.sha256: is not a file" in one_line(done.stderr)
    path.rmdir()
    path.hardlink_to(trajectory_paths[1])
    done = know(*command, "last", "--force", cwd=tmp_path)
    assert "out.sha256: is the input" in one_line(done.stderr)
    done = know(*command, "last", "--force", "--json", "out.sha256", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT


# ------------------------------------------------------------------------------ command line


def test_the_command(trajectory_paths: list[Path], tmp_path: Path, know: Command) -> None:
    know("predict", "ckpt0..ckpt4", "-o", "out.safetensors", "--checksum", "-q", cwd=tmp_path)
    done = know("verify", "out", "ckpt0..ckpt4", "--json", "v.json", "--seed", 5, cwd=tmp_path,
                process=True)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "a sample (--seed 5) computed again is the same" in done.stdout
    assert "2 running statistics" in done.stdout
    assert "digest as in out.safetensors.sha256" in done.stdout
    found = json.loads((tmp_path / "v.json").read_text())
    assert (found["seed"], found["differences"]) == (5, [])
    assert found["tensors"] == len(network()) - 3
    done = know("verify", "out", "ckpt0..ckpt4", "--full", cwd=tmp_path)
    assert "everything computed again is the same" in done.stdout
    assert know("verify", "out", "ckpt0..ckpt4", "-q", cwd=tmp_path).stdout == ""
    (tmp_path / "out.safetensors.sha256").unlink()
    content = bytearray((tmp_path / "out.safetensors").read_bytes())
    content[-1] ^= 255
    (tmp_path / "out.safetensors").write_bytes(content)
    done = know("verify", "out", "ckpt0..ckpt4", "--json", "v.json", "--force", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "is not what its provenance gives" in one_line(done.stderr)
    assert done.stdout == ""
    assert len(json.loads((tmp_path / "v.json").read_text())["differences"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("out", EXIT_USAGE, "Missing argument 'CKPT...'"),
        ("nothing ckpt0..ckpt4", EXIT_CHECKPOINT, "nothing: no such file"),
        ("out ckpt0 ckpt1..ckpt9", EXIT_CHECKPOINT, "ckpt1..ckpt9: no such file"),
        ("out ckpt0 ckpt0", EXIT_USAGE, "given twice"),
        ("out ckpt0..ckpt4 --full --seed 3", EXIT_USAGE, "leave one of the two out"),
        ("out ckpt0..ckpt4 --full --spans 256", EXIT_USAGE, "--spans: all is computed with --full"),
        (
            "out ckpt0..ckpt4 --weights continuation",
            EXIT_USAGE,
            "by --method linear without a hyper",
        ),
        ("out ckpt0..ckpt4 --device tpu", EXIT_USAGE, "--device tpu: is none of"),
        ("out ckpt0..ckpt4 --json out", EXIT_OUTPUT, "is an input or an output of this run"),
        ("out ckpt0..ckpt4 --max-memory 1k", EXIT_USAGE, "is too small"),
        ("out ckpt0..ckpt4 --spans 0", EXIT_USAGE, "--spans"),
    ],
)
def test_errors_of_the_command(
    arguments: str, code: int, message: str, trajectory_paths: list[Path], tmp_path: Path, know: Command
) -> None:  # fmt: skip
    predict(trajectory_paths, tmp_path / "out", method="linear")
    done = know("verify", *arguments.split(), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in one_line(done.stderr)


def test_differences_are_counted_whatever_thread_finds_them(tmp_path: Path) -> None:
    """As many at a time as there are workers; none may be lost between two of them."""
    save_file({"w": torch.zeros(64_000)}, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as found, ThreadPoolExecutor(8) as pool:
        comparer = _Comparer(found)
        values = torch.zeros(100)
        values[:3] = torch.tensor([1.0, 4.0, 2.0])
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for job in [
                pool.submit(comparer.write, "w", 400 * part, as_bytes(values))
                for part in range(640)
            ]:
                job.result()
        finally:
            sys.setswitchinterval(interval)
    (difference,) = comparer.differences.values()
    assert (difference.elements, difference.largest, difference.relative) == (3 * 640, 4.0, 1.0)
    assert comparer.nbytes == 256_000


def test_whether_an_output_can_be_read_is_found_out_by_reading_it(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_trajectory(tmp_path, states())
    output = predict(paths, tmp_path / "out", method="naive")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    done = know("verify", output, *paths)
    assert done.returncode == EXIT_DONE, done.stderr
