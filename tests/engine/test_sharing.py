"""Parts of a plan: every byte is one rank's, and what parts add up to is the whole."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from know_cli.engine.parts import sample, share
from know_cli.engine.plan import Action, Plan, PlannedTensor
from know_cli.engine.report import Report
from know_cli.engine.running_statistics import ChannelSums
from know_cli.engine.settings import NormMode, Settings
from know_cli.errors import CheckpointError, UsageError
from know_cli.kinds import Kind
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.ranks.alone import Ranks
from tests.support.plans import plan_of as planned
from tests.support.ranks import together
from tests.support.trajectories import drift, write_trajectory

SIZES = {"F32": 4, "F64": 8, "BF16": 2}
BLOCK = 8
MIB = 1 << 20


def tensor(
    name: str, action: Action, kind: Kind, dtype: str, count: int, **more: Any
) -> PlannedTensor:
    return PlannedTensor(
        name, kind, action, "", dtype, (count,), count, count * SIZES[dtype], **more
    )


def plan_of(tensors: list[PlannedTensor], batch_rows: int) -> Plan:
    return planned(tensors, batch_rows, BLOCK)


def parts(plan: Plan, size: int) -> list[Plan]:
    return [share(plan, rank, size) for rank in range(size)]


PREDICTED = st.tuples(
    st.sampled_from([Kind.CONV, Kind.FC, Kind.BIAS]),
    st.sampled_from(sorted(SIZES)),
    st.integers(0, 200),
    st.booleans(),
)


@given(st.lists(PREDICTED, max_size=12), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=60)
def test_every_row_is_predicted_by_one_rank_in_its_block(
    wanted: list[tuple[Kind, str, int, bool]], size: int, blocks: int
) -> None:
    tensors = [
        tensor(str(n), Action.PREDICT, kind, dtype, count, whole=whole)
        for n, (kind, dtype, count, whole) in enumerate(wanted)
    ]
    plan = plan_of(tensors, blocks * BLOCK)
    position = {}
    for stream in plan.streams:
        row = 0
        for one in stream.tensors:
            position[one.name] = row
            row += one.elements
    seen = {one.name: np.zeros(one.elements, int) for one in tensors}
    bytes_of = []
    for part in parts(plan, size):
        nbytes = rows = 0
        for batch in part.batches():
            assert batch.rows <= plan.batch_rows
            first = batch.segments[0]
            # Blocks are those that one process computes.
            assert (position[first.tensor.name] + first.start) % BLOCK == 0
            for segment in batch.segments:
                seen[segment.tensor.name][segment.start : segment.start + segment.count] += 1
                nbytes += segment.count * SIZES[segment.tensor.dtype]
            rows += batch.rows
        for batch in part.whole_tensors():
            (segment,) = batch.segments
            assert (segment.start, segment.count) == (0, segment.tensor.elements)
            seen[segment.tensor.name] += 1
            rows += batch.rows
        assert part.predicted == rows
        bytes_of.append(nbytes)
    assert all((times == 1).all() for times in seen.values())
    # Each kind is cut at the nearest block, twice a rank.
    fair = sum(bytes_of) / size
    assert all(abs(nbytes - fair) <= 3 * 2 * BLOCK * 8 for nbytes in bytes_of)


@given(st.lists(st.integers(0, 5 * MIB), max_size=8), st.integers(1, 5))
@settings(max_examples=60)
def test_every_byte_is_copied_by_one_rank(counts: list[int], size: int) -> None:
    tensors = [
        tensor(str(n), Action.COPY, Kind.FC, "BF16", count) for n, count in enumerate(counts)
    ]
    plan = plan_of(tensors, BLOCK)
    runs: dict[str, list[tuple[int, int]]] = {one.name: [] for one in tensors}
    bytes_of = []
    for part in parts(plan, size):
        copies = part.copies
        for copy in copies:
            assert copy.nbytes or size == 1
            runs[copy.tensor.name].append((copy.start, copy.start + copy.nbytes))
        bytes_of.append(sum(copy.nbytes for copy in copies))
    for one in tensors:
        position = 0
        for start, stop in runs[one.name]:
            assert start == position
            assert start % MIB == 0
            position = stop
        assert position == one.nbytes
    assert max(bytes_of) - min(bytes_of) <= 2 * MIB


MIXED = st.lists(
    st.tuples(
        st.sampled_from([Action.PREDICT, Action.COPY]),
        st.sampled_from([Kind.CONV, Kind.FC, Kind.BIAS]),
        st.sampled_from(sorted(SIZES)),
        st.integers(0, 200),
        st.booleans(),
    ),
    max_size=12,
)


def pieces_of(plan: Plan) -> list[tuple[str, int]]:
    """Every element that is predicted, and every byte that is copied, with its tensor."""
    batches = [*plan.batches(), *plan.whole_tensors()]
    rows = [
        (s.tensor.name, s.start + k) for b in batches for s in b.segments for k in range(s.count)
    ]
    return sorted(
        rows + [(c.tensor.name, c.start + k) for c in plan.copies for k in range(c.nbytes)]
    )


@given(MIXED, st.integers(1, 5), st.integers(0, 40), st.integers(0, 99))
@settings(max_examples=100)
def test_shares_and_samples_compose(
    wanted: list[tuple[Action, Kind, str, int, bool]], size: int, spans: int, seed: int
) -> None:
    """A part of a part is a part: what all ranks do of a sample is the sample."""
    tensors = [
        tensor(str(n), action, kind, dtype, count, whole=whole and action is Action.PREDICT)
        for n, (action, kind, dtype, count, whole) in enumerate(wanted)
    ]
    plan = plan_of(tensors, 2 * BLOCK)
    chosen = sample(plan, spans, seed)
    shares = [share(chosen, rank, size) for rank in range(size)]
    assert sorted(piece for part in shares for piece in pieces_of(part)) == pieces_of(chosen)
    assert sum(part.predicted for part in shares) == chosen.predicted
    # And a sample of a share has nothing that is not the rank's.
    for rank in range(size):
        part = share(plan, rank, size)
        assert set(pieces_of(sample(part, spans, seed))) <= set(pieces_of(part))
    whole = sample(plan, 10**6, seed)
    assert pieces_of(whole) == pieces_of(plan)


def test_whole_tensors_are_shared_out_by_bytes() -> None:
    tensors = [
        tensor(str(n), Action.PREDICT, Kind.FC, "F32", count, whole=True)
        for n, count in enumerate([10, 1000, 10, 10, 990])
    ]
    found = [
        [batch.segments[0].tensor.name for batch in part.whole_tensors()]
        for part in parts(plan_of(tensors, BLOCK), 2)
    ]
    assert found == [["0", "1"], ["2", "3", "4"]]


@given(st.integers(1, 40), st.integers(1, 60), st.lists(st.integers(0, 300), max_size=4),
       st.integers(0, 2**32 - 1))  # fmt: skip
@settings(max_examples=60)
def test_sums_of_ranks_join_to_the_last_bit(
    channels: int, size: int, cuts: list[int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    before, after = random.standard_normal((2, channels * size)) * 10.0 ** random.integers(-9, 9)
    grid = 4
    rows = [0, *sorted(grid * cut for cut in cuts if grid * cut < channels * size), channels * size]

    def gather(sums: ChannelSums, begin: int, end: int) -> ChannelSums:
        for row in range(begin, end, 3 * grid):  # as chunks of a batch come
            stop = min(row + 3 * grid, end)
            sums.add(row, *sums.measured(row, row, before[row:stop], after[row:stop]))
        return sums

    whole = gather(ChannelSums(channels, size, grid), 0, channels * size)
    joined = ChannelSums(channels, size, grid)
    for begin, end in pairwise(rows):
        part = gather(ChannelSums(channels, size, grid), begin, end)
        sent = json.loads(json.dumps([part.sums.tolist(), part.leading]))
        joined.join(np.array(sent[0]), sent[1])
    assert joined.sums.tobytes() == whole.sums.tobytes()


# ---------------------------------------------------------------------- whole predictions


def trajectory(seed: int = 0) -> list[dict[str, Tensor]]:
    """Layers whose channels are cut by ranks, statistics to be rescaled, values to be copied."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    state: dict[str, Tensor] = {}
    for name, (out, into) in {"stem": (30, 65), "body": (5, 900)}.items():
        state |= {
            f"{name}.conv1.weight": normal(out, into, 3, 3),
            f"{name}.conv1.bias": normal(out),
            f"{name}.bn1.weight": 1 + normal(out),
            f"{name}.bn1.bias": normal(out),
            f"{name}.bn1.running_mean": normal(out),
            f"{name}.bn1.running_var": normal(out).abs() + 0.5,
            f"{name}.bn1.num_batches_tracked": torch.tensor(7),
        }
    state |= {
        "fc.weight": normal(200, 111),
        "fc.bias": normal(200),
        "half.weight": normal(90, 33).half(),
        "frozen.weight": normal(1000, 700),
        "ids": torch.arange(600_000),
        "empty.weight": torch.empty(0, 4),
    }
    states = [state]
    for k in range(1, 5):
        states.append(drift(states[-1], seed + k, 0.02 * 0.5**k))
    states[3]["fc.weight"][7, :5] = math.nan
    states[0]["stem.conv1.weight"][2, 3] = math.inf
    states[0]["stem.bn1.running_mean"][1] = math.nan
    return states


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_trajectory(tmp_path_factory.mktemp("shared"), trajectory())


def run(request: Request, size: int) -> Report:
    """Predict as so many ranks; rank 0's report."""

    def work(ranks: Ranks) -> Report:
        with open_prediction(request, ranks) as opened:
            return opened.execute()

    return together(size, work)[0]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


SETTINGS = Settings(steps=2, allow_nonfinite=True)


@pytest.fixture(scope="module")
def alone(
    paths: list[Path], bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, Report]:
    output = tmp_path_factory.mktemp("alone") / "out"
    report = run(Request(paths, output, str(bundle_path), SETTINGS, device="cpu"), 1)
    return output.read_bytes(), report


@pytest.fixture(scope="module")
def least_memory(paths: list[Path], bundle_path: Path) -> dict[int, int]:
    """Threads → the bytes that they need at least, as a run says itself that is given fewer."""
    needed = {}
    for threads in (1, 2, 3):
        few = replace(SETTINGS, threads=threads, max_memory=1)
        with pytest.raises(UsageError) as refused:
            run(Request(paths, Path("none"), str(bundle_path), few, device="cpu"), 1)
        found = re.search(r"one block needs (\d+) bytes", str(refused.value))
        assert found is not None, refused.value
        needed[threads] = int(found[1])
    return needed


@given(st.integers(2, 6), st.integers(1, 3), st.one_of(st.just(0), st.integers(0, 36 * MIB)))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_ranks_writes_the_same(
    paths: list[Path],
    bundle_path: Path,
    alone: tuple[bytes, Report],
    least_memory: dict[int, int],
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    threads: int,
    more: int,
) -> None:
    output = tmp_path_factory.mktemp("ranks") / "out"
    changed = replace(SETTINGS, threads=threads, max_memory=least_memory[threads] + more)
    report = run(Request(paths, output, str(bundle_path), changed, device="cpu"), size)
    expected, one = alone
    assert output.read_bytes() == expected
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert "rescale: running statistics, rescaled to the change of the layer before" in (
        report.reasons
    )
    assert (report.replaced, report.nonfinite) == (one.replaced, one.nonfinite)
    assert report.nonfinite > 0
    assert sorted(report.notices) == sorted(one.notices)
    assert report.bytes_written == one.bytes_written
    for kind in Kind:
        found, wanted = report.kinds[kind], one.kinds[kind]
        assert (found.tensors, found.predicted) == (wanted.tensors, wanted.predicted)
        assert found.absolute_change == pytest.approx(wanted.absolute_change, rel=1e-9)
        assert found.squared_norm == pytest.approx(wanted.squared_norm, rel=1e-9)


@pytest.mark.parametrize(
    "wishes",
    [
        {"method": "tsv"},
        {"method": "lstsq", "weights": "continuation"},
        {"method": "noise"},
        {"method": "linear", "settings": replace(SETTINGS, steps=3), "every_step": True},
        {"method": "naive", "settings": replace(SETTINGS, norm=NormMode.RESET)},
        {"method": "shrink", "settings": replace(SETTINGS, norm=NormMode.PREDICT)},
        {"method": "average", "checksum": True},
    ],
    ids=lambda wishes: wishes["method"],
)
def test_other_methods_and_wishes_too(
    wishes: dict[str, Any], paths: list[Path], tmp_path: Path
) -> None:
    for name, size in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        request = Request(paths, tmp_path / name / "out", settings=SETTINGS, device="cpu")
        run(replace(request, **wishes), size)
    expected = content(tmp_path / "one")
    assert len(expected) == 1 + 2 * ("every_step" in wishes) + ("checksum" in wishes)
    assert content(tmp_path / "three") == expected


def write_sharded(folder: Path, state: dict[str, Tensor], count: int) -> Path:
    """A folder as Hugging Face writes it, the tensors dealt out to so many shards."""
    folder.mkdir()
    names = {
        f"model-{n + 1:05d}-of-{count:05d}.safetensors": list(state)[n::count] for n in range(count)
    }
    for file, its in names.items():
        save_file({name: state[name] for name in its}, folder / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, its in names.items() for name in its},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def test_shards_may_differ_between_checkpoints(tmp_path: Path) -> None:
    states = trajectory()
    # Θ3 was saved again by something with other shards, and Θ4 as one file.
    folders = [
        write_sharded(tmp_path / f"ckpt{k}", state, 5 if k == 3 else 2)
        for k, state in enumerate(states[:4])
    ]
    folders += write_trajectory(tmp_path, states[4:])
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, inputs, size in (
        ("one", folders, 1),
        ("three", folders, 3),
        ("file", write_trajectory(flat, states), 2),
    ):
        run(Request(inputs, tmp_path / name, settings=SETTINGS, method="linear"), size)
    expected = content(tmp_path / "one")
    assert sorted(expected) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert content(tmp_path / "three") == expected
    from safetensors.torch import load_file

    single = load_file(tmp_path / "file")
    for file in expected:
        if file.endswith(".safetensors"):
            for name, found in load_file(tmp_path / "one" / file).items():
                assert found.numpy().tobytes() == single.pop(name).numpy().tobytes(), name
    assert not single


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("fc.weight", (199, 110), "tensor 'fc.weight': has values that are not finite in float32"),
        ("stem.bn1.running_var", (3,), "tensor 'stem.bn1.running_var': has values that are not"),
    ],
)
def test_values_that_are_not_finite_are_refused_whoever_finds_them(
    name: str, at: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    states = [
        {
            n: torch.nan_to_num(t, 0.5, 0.5, 0.5) if t.is_floating_point() else t
            for n, t in s.items()
        }
        for s in trajectory()
    ]
    for state in states:
        state[name][at] = math.nan
    inputs = write_trajectory(tmp_path, states)
    for size in (1, 3):
        request = Request(inputs, tmp_path / "out", method="linear", settings=Settings())
        with pytest.raises(CheckpointError, match=message):
            run(request, size)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".know-*"))


def test_values_of_copied_tensors_that_are_not_finite_are_told_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    frozen = torch.randn(1000, 700, generator=generator)
    frozen[0, 0] = frozen[999, 699] = math.nan  # in the parts of two ranks
    states = [
        {"frozen.weight": frozen, "fc.weight": torch.randn(4, 4, generator=generator)}
        for _ in range(2)
    ]
    inputs = write_trajectory(tmp_path, states)
    for size in (1, 3):
        request = Request(
            inputs, tmp_path / "out", method="linear", settings=Settings(), force=True
        )
        report = run(request, size)
        assert report.notices == [
            f"{inputs[0]}: tensor 'frozen.weight' is copied with 2 values that are not finite"
        ]
