"""What has to fit between checkpoints, what need not, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from know_cli.checkpoints import open_checkpoint, open_trajectory
from know_cli.checkpoints.metadata import Session
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_USAGE, CheckpointError
from know_cli.kinds import only_copied
from tests.support.command import Command, one_line

State = dict[str, Tensor]


def model(k: int) -> State:
    generator = torch.Generator().manual_seed(k)
    return {
        f"{layer}.{kind}": torch.randn(shape, generator=generator)
        for layer in ("encoder.0", "encoder.1", "head")
        for kind, shape in (("weight", (4, 3)), ("bias", (4,)))
    }


def write(folder: Path, trajectory: list[State]) -> list[Path]:
    paths = [folder / f"c{k}.safetensors" for k in range(len(trajectory))]
    for path, state in zip(paths, trajectory, strict=True):
        save_file(state, path, {"format": "pt"})
    return paths


def notices(paths: list[Path]) -> list[str]:
    with open_trajectory(paths, only_copied()) as trajectory:
        return trajectory.notices


# ------------------------------------------------------------------------- prefixes


def wrapped(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


PREFIXES: dict[str, tuple[Callable[[str], str], str]] = {
    "DataParallel": (wrapped("module."), "only a prefix differs: 'module.'"),
    "torch.compile": (wrapped("_orig_mod."), "only a prefix differs: '_orig_mod.'"),
    "both": (wrapped("module._orig_mod."), "only a prefix differs: 'module._orig_mod.'"),
    "another": (wrapped("model.backbone."), "only a prefix differs: 'model.backbone.'"),
    "a part of it compiled": (
        lambda name: name.replace("encoder.", "encoder._orig_mod."),
        "only what wrappers add to names differs (_orig_mod)",
    ),
    "checkpointed": (
        lambda name: name.replace("head.", "head._checkpoint_wrapped_module."),
        "only what wrappers add to names differs (_checkpoint_wrapped_module)",
    ),
}


@pytest.mark.parametrize("case", PREFIXES)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_only_a_prefix_differs(case: str, where: int, tmp_path: Path, know: Command) -> None:
    rename, message = PREFIXES[case]
    trajectory = [model(k) for k in range(3)]
    trajectory[where] = {rename(name): tensor for name, tensor in trajectory[where].items()}
    write(tmp_path, trajectory)
    done = know("predict", "c0..c2", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    line = one_line(done.stderr)
    assert message in line
    assert f"c{where}.safetensors" in line.partition("; only ")[2]
    assert "' is missing in c" in line or "' is only in c" in line


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {f"module.{name}": tensor for name, tensor in list(state.items())[:-1]},
        lambda state: {f"module.{name}": tensor[:2].clone() for name, tensor in state.items()},
        lambda state: {f"m{n}.{name}": tensor for n, (name, tensor) in enumerate(state.items())},
        lambda state: {f"{name}.more": tensor for name, tensor in state.items()},
    ],
)
def test_more_than_a_prefix_is_not_called_one(
    change: Callable[[State], State], tmp_path: Path
) -> None:
    paths = write(tmp_path, [model(0), change(model(1))])
    with pytest.raises(CheckpointError, match="not of one model") as caught:
        open_trajectory(paths, only_copied())
    assert "; only " not in str(caught.value)


# ------------------------------------------------------------------------- what is only copied

COPIED: dict[str, list[State]] = {
    "_extra_state of other lengths": [
        {"layer._extra_state": torch.zeros(size, dtype=torch.uint8)} for size in (5, 9, 0)
    ],
    "position_ids of other lengths": [
        {"embeddings.position_ids": torch.arange(size)[None]} for size in (8, 16, 8)
    ],
    "position_ids that are missing": [{"embeddings.position_ids": torch.arange(8)}, {}, {}],
    "position_ids that come later": [{}, {"embeddings.position_ids": torch.arange(8)}, {}],
    "rotary tables that are missing": [{"rotary.inv_freq": torch.ones(4)}, {}, {"rotary.inv_freq": torch.ones(4)}],
    "a counter in another type": [{"steps": torch.tensor(3)}, {"steps": torch.tensor(3.0)}, {"steps": torch.tensor(3)}],
    "statistics of other lengths": [{"bn.running_mean": torch.ones(size)} for size in (3, 4, 3)],
}  # fmt: skip


@pytest.mark.parametrize("case", COPIED)
def test_what_is_only_copied_has_to_fit_the_first_alone(
    case: str, tmp_path: Path, know: Command
) -> None:
    write(tmp_path, [{**model(k), **more} for k, more in enumerate(COPIED[case])])
    done = know("predict", "c0..c2", "-o", "out", "--method", "linear", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "that is only copied does not fit in all checkpoints" in done.stderr
    out = load_file(tmp_path / "out")
    assert out.keys() == {*model(0), *COPIED[case][0]}
    for name, tensor in COPIED[case][0].items():
        assert torch.equal(out[name], tensor)
    for command in (("verify", "out", "c0..c2", "--full"), ("inspect", "c0..c2")):
        done = know(*command, cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr


def test_kinds_of_the_user_decide_what_is_only_copied(tmp_path: Path, know: Command) -> None:
    write(tmp_path, [{**model(0), "odd.table": torch.ones(3, 2)}, model(1), model(2)])
    command = ("predict", "c0..c2", "-o", "out", "--method", "naive")
    assert know(*command, cwd=tmp_path).returncode == EXIT_CHECKPOINT
    done = know(*command, "--kind", "odd.*=copy", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert know("inspect", "c0..c2", "--kind", "odd.*=copy", cwd=tmp_path).returncode == EXIT_DONE
    # The other way round: what would be copied is to be predicted, and so must be in all.
    write(tmp_path, [{**model(0), "rotary.inv_freq": torch.ones(3)}, model(1), model(2)])
    done = know(*command, "--force", "--kind", "*inv_freq=bias", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "'rotary.inv_freq' is missing in c1.safetensors" in one_line(done.stderr)


@pytest.mark.parametrize("name", ["head.weight", "encoder.0.bias"])
def test_weights_have_to_be_in_all(name: str, tmp_path: Path) -> None:
    trajectory = [model(k) for k in range(3)]
    del trajectory[1][name]
    paths = write(tmp_path, trajectory)
    with pytest.raises(CheckpointError, match=f"{name!r} is missing in .*c1.safetensors"):
        open_trajectory(paths, only_copied())


# ------------------------------------------------------------------------- empty weights


@pytest.mark.parametrize("count", [1, 2, 5])
def test_some_empty_weights_are_named(count: int, tmp_path: Path, know: Command) -> None:
    lost = sorted(model(0))[:count]
    write(
        tmp_path,
        [{n: torch.empty(0) if n in lost else t for n, t in model(k).items()} for k in range(3)],
    )
    done = know("predict", "c0..c2", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"c0.safetensors: {count} of 6 weights" in done.stderr
    assert f"'{lost[0]}'" in done.stderr
    assert "ZeRO-3" in done.stderr


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
@pytest.mark.parametrize(
    "buffers", [{}, {"bn.running_mean": torch.ones(4), "steps": torch.ones(1).int()}]
)
def test_nothing_but_empty_weights(
    shape: tuple[int, ...], buffers: State, tmp_path: Path, know: Command
) -> None:  # fmt: skip
    write(tmp_path, [{**{n: torch.empty(shape) for n in model(0)}, **buffers} for _ in range(2)])
    done = know("predict", "c0..c1", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "all 6 weights are empty" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_empty_in_one_session_only(tmp_path: Path) -> None:
    paths = write(tmp_path, [model(0), {**model(1), "head.weight": torch.empty(0)}])
    with pytest.raises(CheckpointError, match="'head.weight' is 4x3 but 0 in .*ZeRO-3"):
        open_trajectory(paths, only_copied())


def test_widths_of_nothing_are_no_loss(tmp_path: Path) -> None:
    assert notices(write(tmp_path, [{**model(k), "adapter": torch.empty(0, 3)} for k in range(2)])) == []  # fmt: skip


# ------------------------------------------------------------------------- odd sessions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_a_session_in_another_dtype(dtype: torch.dtype, where: int, tmp_path: Path) -> None:
    trajectory = [model(k) for k in range(4)]
    trajectory[where] = {name: tensor.to(dtype) for name, tensor in trajectory[where].items()}
    paths = write(tmp_path, trajectory)
    (notice,) = notices(paths)
    assert notice.startswith(f"warning: {paths[where]}: 6 tensors in another element type")
    assert "not F32" in notice


def test_one_tensor_in_another_dtype(tmp_path: Path) -> None:
    paths = write(tmp_path, [model(0), {**model(1), "head.bias": torch.ones(4).half()}])
    (notice,) = notices(paths)
    assert notice.startswith(f"warning: {paths[1]}: 1 tensor in another")
    assert "'head.bias' (F16, not F32)" in notice


@pytest.mark.parametrize("same", [(0, 1), (1, 3), (0, 3), (0, 1, 2, 3)])
def test_sessions_that_are_the_same(same: tuple[int, ...], tmp_path: Path, know: Command) -> None:
    trajectory = [{**model(k), "steps": torch.tensor(k)} for k in range(4)]
    for k in same:
        trajectory[k] |= model(same[0])
    write(tmp_path, trajectory)
    listing = ", ".join(f"c{k}.safetensors" for k in same)
    for command in (("predict", "c0..c3", "-o", "out", "--method", "naive"), ("inspect", "c0..c3")):
        done = know(*command, cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
        assert f"warning: {listing} have the same weights" in done.stderr


def test_sessions_that_differ_in_one_number_are_not_the_same(tmp_path: Path, know: Command) -> None:
    trajectory = [model(0) for _ in range(3)]
    for k, state in enumerate(trajectory):
        state["head.bias"][2] += k
    write(tmp_path, trajectory)
    done = know("predict", "c0..c2", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE
    assert "same weights" not in done.stderr


@pytest.mark.parametrize("moves", [True, False])
def test_complex_tensors_that_move_are_told(moves: bool, tmp_path: Path, know: Command) -> None:
    spectral = torch.view_as_complex(torch.randn(70, 70, 2))
    trajectory = [{**model(k), "fourier.weight": spectral.clone()} for k in range(3)]
    if moves:  # the last number of many
        trajectory[2]["fourier.weight"][-1, -1] += 1j
    write(tmp_path, trajectory)
    done = know("predict", "c0..c2", "-o", "out", "--method", "linear", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert ("not predicted but copied: 'fourier.weight'" in done.stderr) == moves
    assert torch.equal(load_file(tmp_path / "out")["fourier.weight"], spectral)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("moves", [True, False])
def test_quantised_weights_that_move_are_told(
    moves: bool, dtype: torch.dtype, tmp_path: Path, know: Command
) -> None:
    packed = [torch.randn(8, 8).mul(9).abs().to(dtype) for _ in range(3)]
    trajectory = [
        {**model(k), "q.weight": packed[k if moves else 0].clone(), "q.seen": torch.tensor(k)}
        for k in range(3)
    ]
    write(tmp_path, trajectory)
    for command, *more in (("predict", "-o", "out", "--method", "linear"), ("inspect",)):
        done = know(command, "c0..c2", *more, cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
        assert ("c0.safetensors, beside others that are: 'q.weight';" in done.stderr) == moves
        assert "q.seen" not in done.stderr
    assert load_file(tmp_path / "out")["q.weight"].float().equal(packed[0].float())


def test_checkpoints_without_floats_are_not_called_the_same(tmp_path: Path, know: Command) -> None:
    write(tmp_path, [{"q.weight": torch.full((8, 8), k, dtype=torch.int8)} for k in range(3)])
    done = know("predict", "c0..c2", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "same weights" not in done.stderr
    assert "quantised weights that differ" in done.stderr


# ------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("name", ["attn.causal", "block.7.tril", "window"])
@pytest.mark.parametrize("shape", [(6, 6), (1, 1, 5, 5)])
def test_a_mask_that_never_moves_is_copied_as_it_is(
    name: str, shape: tuple[int, ...], tmp_path: Path, know: Command
) -> None:
    mask = torch.full(shape, float("-inf")).triu(1)
    write(tmp_path, [{**model(k), name: mask.clone()} for k in range(3)])
    done = know("predict", "c0..c2", "-o", "out", "--method", "linear", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert torch.equal(load_file(tmp_path / "out")[name], mask)
    assert f"tensor '{name}' is copied with" in done.stderr
    assert "--allow-nonfinite" not in know("inspect", "c0..c2", cwd=tmp_path).stdout


def test_weights_that_move_must_be_finite(tmp_path: Path, know: Command) -> None:
    trajectory = [model(k) for k in range(3)]
    trajectory[1]["head.weight"][0, 0] = float("nan")
    write(tmp_path, trajectory)
    done = know("predict", "c0..c2", "-o", "out", "--method", "linear", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "c1.safetensors: tensor 'head.weight': has values that are not finite" in one_line(done.stderr)  # fmt: skip
    assert "--allow-nonfinite" in know("inspect", "c0..c2", cwd=tmp_path).stdout


# ------------------------------------------------------------------------- metadata


def without_metadata(path: Path, state: State, null: bool) -> None:
    content = save(state)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].strip()
    if null:
        header = b'{"__metadata__":null,' + header[1:]
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@pytest.mark.parametrize("null", [True, False], ids=["null", "none"])
def test_outputs_say_whose_tensors_they_have(null: bool, tmp_path: Path, know: Command) -> None:
    """transformers 4 refuses files that do not."""
    for k in range(3):
        without_metadata(tmp_path / f"c{k}.safetensors", model(k), null)
    with open_checkpoint(tmp_path / "c0.safetensors") as checkpoint:
        assert checkpoint.metadata == {}
    done = know("predict", "c0..c2", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    with safe_open(tmp_path / "out", framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
    assert know("verify", "out", "c0..c2", "--full", cwd=tmp_path).returncode == EXIT_DONE


@pytest.mark.parametrize("framework", ["tf", "flax", "mlx", "np"])
def test_a_format_that_is_said_stays(framework: str, tmp_path: Path, know: Command) -> None:
    for k in range(2):
        save_file(model(k), tmp_path / f"c{k}.safetensors", {"format": framework})
    assert know("predict", "c0..c1", "-o", "out", "--method", "naive", cwd=tmp_path).returncode == 0
    with safe_open(tmp_path / "out", framework="pt") as opened:
        assert opened.metadata()["format"] == framework


IMPOSSIBLE: dict[str, tuple[dict[str, str], str]] = {
    "a rate of next to nothing": ({"know.rate": "1e-300"}, "a sampling rate of 1e-300"),
    "a small rate": ({"know.rate": "1e-9"}, "a sampling rate of 1e-09"),
    "an index too large": ({"know.session": "5000"}, "session 5000"),
    "an index too small": ({"know.session": "-123456"}, "session -123456"),
    "an index beyond all numbers": ({"know.session": "1" + "0" * 400}, "session 1000"),
    "a share too small": ({"know.fraction": "1e-300"}, "a share of 1e-300"),
    "a share too large": ({"know.fraction": "1e300"}, "a share of 1e+300"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize("where", [0, 1])
def test_sessions_that_cannot_be(case: str, where: int, tmp_path: Path, know: Command) -> None:
    change, message = IMPOSSIBLE[case]
    for k in range(2):
        metadata = Session(k, 0.5**k, 0.5, "t").to_metadata() | (change if k == where else {})
        save_file(model(k), tmp_path / f"c{k}.safetensors", metadata)
    for command in (
        ("predict", "c0..c1", "-o", "out", "--method", "naive", "--steps", 8, "--every-step"),
        ("predict", "c0..c1", "-o", "out", "--method", "logfit"),
        ("inspect", "c0..c1"),
    ):
        done = know(*command, cwd=tmp_path)
        assert done.returncode == EXIT_CHECKPOINT, done.stderr
        line = one_line(done.stderr)
        assert f"c{where}.safetensors: its metadata tell of {message}" in line


@pytest.mark.parametrize(("apart", "rate"), [(200, 0.5), (21, 0.5), (7, 0.1)])
def test_sessions_too_far_apart(apart: int, rate: float, tmp_path: Path, know: Command) -> None:
    for k in range(2):
        session = Session(k * apart, max(rate ** (k * apart), 1e-90), rate, "t")
        save_file(model(k), tmp_path / f"c{k}.safetensors", session.to_metadata())
    done = know("predict", "c0..c1", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert f"recorded {apart} sessions apart, which makes a sampling rate of" in one_line(done.stderr)  # fmt: skip


@settings(max_examples=40)
@given(
    index=st.integers(-(10**30), 10**30) | st.integers(-1100, 1100),
    rate=st.floats(0, 1.5),
    fraction=st.floats(0, 1e308),
)
def test_no_session_breaks_what_is_computed_of_it(index: int, rate: float, fraction: float) -> None:
    session = Session(index, fraction, rate, "t")
    found = Session.from_metadata(session.to_metadata())
    if found is None or found.problem is not None:
        return
    assert found == session
    for step in range(1, 9):
        moved = Session(index - step, fraction / rate**step, rate, "t")
        assert 0 < moved.fraction < float("inf")
        assert rate**-step < float("inf")


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("shrink", "lambda=1e308"),
        ("shrink", "lambda=-1e200"),
        ("task-vector", "alpha=1e308"),
        ("tsv", "alpha=1e31"),
    ],
)
@pytest.mark.parametrize("steps", [1, 8])
def test_options_beyond_all_numbers(
    method: str, option: str, steps: int, tmp_path: Path, know: Command
) -> None:  # fmt: skip
    write(tmp_path, [model(k) for k in range(3)])
    done = know(
        "predict", "c0..c2", "-o", "out", "--method", method, "--option", option, "--steps", steps, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == EXIT_USAGE
    assert f"--option {option.partition('=')[0]}=" in one_line(done.stderr)
    assert "so large that no prediction can be finite" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "option", "code"),
    [("shrink", "lambda=1e30", EXIT_CHECKPOINT), ("task-vector", "alpha=-1e30", EXIT_DONE)],
)
def test_the_largest_option_is_no_bug(
    method: str, option: str, code: int, tmp_path: Path, know: Command
) -> None:
    """What a large option makes infinite is refused by name, or is Θ0's where that is allowed."""
    write(tmp_path, [model(k) for k in range(3)])
    arguments = ["predict", "c0..c2", "-o", "out", "--method", method, "--option", option]
    done = know(*arguments, "--steps", 8, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    if code == EXIT_CHECKPOINT:
        assert "after step 2 is not finite in float32" in done.stderr
        assert not (tmp_path / "out").exists()
    done = know(*arguments, "--steps", 8, "--allow-nonfinite", "--force", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out").values())
