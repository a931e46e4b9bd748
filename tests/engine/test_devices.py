"""Devices: which there are, what runs on them, and how blocks are handed out among their lanes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from know_cli.engine.devices import choose_devices
from know_cli.engine.lanes import CudaQueue, DevicePredictor, Direct, Lane
from know_cli.engine.plan import Block
from know_cli.engine.predictor import Predictors
from know_cli.engine.settings import Settings
from know_cli.errors import EXIT_USAGE, UsageError
from know_cli.kinds import Kind
from know_cli.known import devices, torch_kernel
from know_cli.known.bundle import Bundle
from know_cli.known.devices import open_devices, open_lanes, torch_kernels
from know_cli.known.module import Preparation
from know_cli.methods import known
from know_cli.methods.inputs import Inputs
from know_cli.methods.known import KnownPredictor
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.bundles import random_bundle
from tests.support.command import Command, one_line
from tests.support.plans import batch_of, block_of
from tests.support.trajectories import states, write_trajectory

CPU = torch.device("cpu")
BLOCK = 100


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Operations this small only wait for one another in several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------- which there are


def pretend(patch: pytest.MonkeyPatch, cuda: list[str], mps: bool = False, xpu: int = 0) -> None:
    """Have torch see other devices than there are."""
    patch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    patch.setattr(torch.cuda, "device_count", lambda: len(cuda))
    patch.setattr(torch.cuda, "get_device_name", lambda index: cuda[index])
    patch.setattr(torch.backends.mps, "is_available", lambda: mps)
    patch.setattr(torch.xpu, "is_available", lambda: bool(xpu))
    patch.setattr(torch.xpu, "device_count", lambda: xpu)


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ["H100", "H100", "H100"], mps=True, xpu=2)
    names = {
        "auto": ["cuda"], "cpu": ["cpu"], "cuda": ["cuda"], "cuda:2": ["cuda:2"], "mps": ["mps"],
        "xpu": ["xpu"], "cuda:all": ["cuda:0", "cuda:1", "cuda:2"],
    }  # fmt: skip
    for name, expected in names.items():
        assert [str(device) for device in choose_devices(name)] == expected
    # Processes that share a prediction share the devices out, unless they are told which to take.
    taken = [str(*choose_devices("cuda", local_rank)) for local_rank in range(4)]
    assert taken == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert [str(*choose_devices(name, 1)) for name in ("auto", "cuda:2", "cpu")] == [
        "cuda:1", "cuda:2", "cpu",
    ]  # fmt: skip
    pretend(monkeypatch, [])
    assert choose_devices("auto") == choose_devices("auto", 1) == (CPU,)


@pytest.mark.parametrize(
    ("name", "cuda", "words"),
    [
        ("cuda", [], "--device cuda: torch sees no CUDA devices here; use cpu"),
        ("cuda:1", ["H100"], "--device cuda:1: torch sees 1 CUDA device here; use cpu"),
        ("cuda:99999999999", ["A", "B"], "torch sees 2 CUDA devices here; use cpu"),
        ("cuda:all", [], "--device cuda:all: torch sees no CUDA devices here; use cpu"),
        ("cuda:all", ["H100", "A100"], "different models, H100, A100; choose one, such as cuda:0"),
        ("mps", ["H100"], "--device mps: torch sees no MPS devices here; use cpu"),
        ("xpu", ["H100"], "--device xpu: torch sees no XPU devices here; use cpu"),
        ("tpu", ["H100"], "--device tpu: is none of auto, cpu, cuda, cuda:0 …, cuda:all, mps, xpu"),
        ("cuda:", ["H100"], "--device cuda:: is none of"),
        ("cpu:0", ["H100"], "--device cpu:0: is none of"),
        ("", ["H100"], "is none of"),
    ],
)
def test_devices_that_are_not(
    name: str,
    cuda: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    know: Command,
) -> None:
    pretend(monkeypatch, cuda)
    with pytest.raises(UsageError) as error:
        choose_devices(name)
    assert words in str(error.value)
    paths = write_trajectory(tmp_path)
    for arguments in (["predict", *paths, "-o", "out"], ["verify", paths[0], *paths]):
        done = know(*arguments, "--device", name, cwd=tmp_path)
        # What was not made by the command cannot be verified anyhow.
        if arguments[0] == "predict" or "is none of" in words:
            assert done.returncode == EXIT_USAGE
            assert words in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- what runs on them


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes of any device are opened on the CPU."""

    def opened(bundle: Bundle, steps: int, _: torch.device, kernels: Callable, rows: int = 256) -> list[Lane]:  # type: ignore[type-arg]  # fmt: skip
        return open_lanes(bundle, steps, CPU, kernels, rows)

    monkeypatch.setattr(devices, "open_lanes", opened)


class Broken:
    """A kernel whose answers are not numbers."""

    def predict(self, block: Block, history: Tensor, out: Tensor) -> None:
        out.fill_(torch.nan)


@pytest.mark.usefixtures("on_the_cpu")
def test_without_triton_the_torch_kernel_runs_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "know_cli.known.triton_kernel", None)
    bundle = random_bundle()
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    predictor = open_devices(bundle, 2, gpus)
    (notice,) = predictor.notices
    assert notice == "Triton is not installed; KNOWN runs through plain torch operations"
    assert predictor.kernel == "torch"
    history = a_history(bundle, 70, 2)
    list(predictor.predict(batch_of(Kind.FC, 70), history[:, :70]))
    assert torch.equal(history, in_threads(bundle, a_history(bundle, 70, 2), 2, Kind.FC))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        ("broken", "its answers are not those of torch's kernel"),
        ("no compiler", "Failed to find C compiler"),
    ],
)
def test_where_triton_fails_the_torch_kernel_runs_and_it_is_said(
    kernels: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def triton_kernels(*_: object) -> dict[Kind, Broken]:
        if kernels == "broken":
            return dict.fromkeys(Kind, Broken())
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(devices, "triton_kernels", triton_kernels)
    predictor = open_devices(random_bundle(), 1, [torch.device("cuda")])
    (notice,) = predictor.notices
    assert notice.startswith(f"Triton's kernel does not work on cuda ({reason}")
    assert predictor.kernel == "torch"
    assert "\n" not in notice


@pytest.mark.usefixtures("on_the_cpu")
def test_all_devices_run_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's and torch's round differently, and bytes must not tell who did which block."""
    bundle, gpus = random_bundle(), [torch.device("cuda", 0), torch.device("cuda", 1)]
    working = dict.fromkeys(gpus, torch_kernels)
    opened: list[str] = []

    def open_one(bundle: Bundle, steps: int, device: torch.device, kernels: Callable, rows: int = 256) -> list[Lane]:  # type: ignore[type-arg]  # fmt: skip
        if kernels is devices.triton_kernels:
            opened.append(f"triton on {device}")
            if device not in working:
                raise RuntimeError("no such instruction")
        return open_lanes(bundle, steps, CPU, torch_kernels, rows)

    monkeypatch.setattr(devices, "open_lanes", open_one)
    assert open_devices(bundle, 1, gpus).kernel == "triton"
    assert opened == ["triton on cuda:0", "triton on cuda:1"] * 2
    del working[gpus[1]]
    opened.clear()
    predictor = open_devices(bundle, 1, gpus)
    assert predictor.kernel == "torch"
    assert predictor.notices[0].startswith("Triton's kernel does not work on cuda:1 (no such")
    assert opened == ["triton on cuda:0", "triton on cuda:1"]


@pytest.mark.usefixtures("on_the_cpu")
def test_other_devices_run_the_torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mps", "xpu"):
        assert open_devices(random_bundle(), 1, [torch.device(name)]).notices == ()


@pytest.mark.usefixtures("on_the_cpu")
def test_notices_are_shown_before_a_prediction(
    trajectory_paths: list[Path], bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ["H100", "H100"])
    monkeypatch.setitem(sys.modules, "know_cli.known.triton_kernel", None)
    request = Request(trajectory_paths, tmp_path / "out", str(bundle_path), device="cuda:all")
    with open_prediction(request) as opened:
        assert next(iter(opened.notices)).startswith("Triton is not installed;")
        assert opened.describe()["kernel"] == "torch"
        assert opened.outputs[0].metadata["know.device"] == "cuda"
        opened.execute()


# ---------------------------------------------------------------------- lanes


def a_history(bundle: Bundle, rows: int, steps: int) -> Tensor:
    """``[S + steps, rows]``, of which the predictions are not there yet."""
    generator = torch.Generator().manual_seed(rows)
    history = torch.full((bundle.checkpoints + steps, rows), torch.nan)
    history[: bundle.checkpoints] = torch.randn(bundle.checkpoints, rows, generator=generator) * 0.1
    return history


def in_threads(bundle: Bundle, history: Tensor, steps: int, kind: Kind) -> Tensor:
    """What the CPU's own way fills in, a block after the other."""
    predictor, size = KnownPredictor(bundle, CPU), bundle.checkpoints
    for start in range(0, history.shape[1], predictor.block_rows):
        block = history[:, start : start + predictor.block_rows]
        for step in range(steps):
            predictor.predict(
                block_of(kind, block.shape[1]), step + 1, block[: size + step], block[size + step]
            )
            out = block[size + step]
            out.copy_(torch.where(torch.isfinite(out), out, block[size - 1]))
    return history


class SlowLane:
    """A device that does nothing until it is waited for, or does it in a thread of its own.

    It fails if it is given a block before the one before is finished, and where ``failing`` says.
    """

    def __init__(
        self, lane: Lane, log: list[str], name: str, pool: ThreadPoolExecutor | None = None, failing: str = ""
    ) -> None:  # fmt: skip
        self.device = torch.device("cuda", int(name))
        self.block_rows, self.overlaps = lane.block_rows, False
        self._lane, self._log, self._name, self._pool = lane, log, name, pool
        self._failing, self._blocks = failing, 0
        self._work: Callable[[], object] | None = None

    def start(self, block: Block, window: Tensor, out: Tensor) -> None:
        assert self._work is None, "a block is still there"
        self._blocks += 1
        self._log.append(f"start {self._name}")
        if self._failing == f"start {self._blocks}":
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

        def compute() -> None:
            self._lane.start(block, window, out)
            self._lane.finish()

        if self._pool is None:
            self._work = compute
        else:
            future: Future[None] = self._pool.submit(compute)
            self._work = future.result

    def finish(self) -> None:
        self._log.append(f"finish {self._name}")
        work, self._work = self._work, None
        if work is not None:
            work()
        if self._failing == f"finish {self._blocks}":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def slow_lanes(
    bundle: Bundle, steps: int, number: int, log: list[str], pool: ThreadPoolExecutor | None = None, failing: str = ""
) -> list[SlowLane]:  # fmt: skip
    """The last one fails."""
    result = []
    for index in range(number):
        lane = open_lanes(bundle, steps, CPU, torch_kernels, BLOCK)[0]
        last = failing if index == number - 1 else ""
        result.append(SlowLane(lane, log, str(index), pool, last))
    return result


@given(
    st.integers(1, 5), st.integers(0, 7 * BLOCK), st.integers(1, 3), st.booleans(), st.integers(2, 5),
    st.sampled_from(list(Preparation)),
)  # fmt: skip
@settings(max_examples=25)
def test_predictions_do_not_depend_on_the_lanes(
    number: int, rows: int, steps: int, threads: bool, checkpoints: int, preparation: Preparation
) -> None:
    bundle = random_bundle(checkpoints, preparation=preparation)
    # The kernels of all lanes take blocks of the same size, whose results are the same bytes.
    (one, _) = open_lanes(bundle, steps, CPU, torch_kernels, BLOCK)
    expected, actual = a_history(bundle, rows, steps), a_history(bundle, rows, steps)
    list(DevicePredictor([one], checkpoints, "torch").predict(batch_of(Kind.CONV, rows), expected))
    torch.testing.assert_close(
        expected, in_threads(bundle, a_history(bundle, rows, steps), steps, Kind.CONV), atol=1e-6, rtol=0
    )  # fmt: skip
    with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        lanes = slow_lanes(bundle, steps, number, [], pool if threads else None)
        predictor = DevicePredictor(lanes, checkpoints, "torch")  # type: ignore[arg-type]
        blocks = []
        for block in predictor.predict(batch_of(Kind.CONV, rows), actual):
            # What is said to be done is done.
            assert torch.equal(actual[:, block], expected[:, block])
            blocks.append(block)
    assert torch.equal(actual, expected)
    assert blocks == [slice(a, min(a + BLOCK, rows)) for a in range(0, rows, BLOCK)]


def test_lanes_take_turns_and_are_filled_before_the_first_is_waited_for() -> None:
    bundle, log = random_bundle(2), []
    lanes = slow_lanes(bundle, 1, 2, log)
    predictor = DevicePredictor(lanes, 2, "torch")  # type: ignore[arg-type]
    assert [str(device) for device in predictor.devices] == ["cuda:0", "cuda:1"]
    list(predictor.predict(batch_of(Kind.FC, 4 * BLOCK), a_history(bundle, 4 * BLOCK, 1)))
    assert log == [
        "start 0", "start 1", "finish 0", "start 0", "finish 1", "start 1", "finish 0", "finish 1",
    ]  # fmt: skip


@pytest.mark.parametrize("failing", ["start 1", "start 3", "finish 1", "finish 2", "finish 4"])
def test_a_device_that_fails_is_named_and_all_others_come_to_rest(failing: str) -> None:
    bundle, log = random_bundle(2), []
    lanes = slow_lanes(bundle, 1, 3, log, failing=failing)
    predictor = DevicePredictor(lanes, 2, "torch")  # type: ignore[arg-type]
    with pytest.raises(UsageError) as error:
        list(predictor.predict(batch_of(Kind.FC, 12 * BLOCK), a_history(bundle, 12 * BLOCK, 1)))
    text = str(error.value)
    assert text.startswith("--device cuda:2: the device failed: CUDA error: ")
    assert text.endswith("; try another, such as cpu")
    assert "\n" not in text
    assert all(lane._work is None for lane in lanes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_devices_come_to_rest_before_memory_is_used_again(error: type[BaseException]) -> None:
    bundle = random_bundle(2)
    lanes = slow_lanes(bundle, 1, 3, [])
    predictor = DevicePredictor(lanes, 2, "torch")  # type: ignore[arg-type]
    with (
        pytest.raises(error),
        closing(predictor.predict(batch_of(Kind.FC, 900), a_history(bundle, 900, 1))) as blocks,
    ):
        for number, _ in enumerate(blocks):
            if number == 2:
                raise error
    assert all(lane._work is None for lane in lanes)


class Watched:
    """A queue of a device, of which only what is told to it is known."""

    overlaps = True

    def __init__(self, log: list[str]) -> None:
        self._log = log

    @contextmanager
    def filling(self) -> Iterator[None]:
        self._log.append("fill")
        yield
        self._log.append("filled")

    def wait(self) -> None:
        self._log.append("wait")


def test_all_that_a_lane_does_goes_into_its_queue() -> None:
    log: list[str] = []

    class Sum:
        def predict(self, block: Block, history: Tensor, out: Tensor) -> None:
            log.append("compute")
            assert (history.shape, out.shape) == ((3, 4), (2, 4))
            out.copy_(torch.stack([history.sum(0), history.prod(0)]))

    lane = Lane(dict.fromkeys(Kind, Sum()), 3, 2, 6, CPU, Watched(log))
    history = torch.arange(60.0).reshape(5, 12)
    expected = history.clone()
    expected[3, 5:9] = history[:3, 5:9].sum(0)
    expected[4, 5:9] = history[:3, 5:9].prod(0)
    lane.start(block_of(Kind.FC, 4), history[:3, 5:9], history[3:, 5:9])
    assert log == ["fill", "compute", "filled"]
    lane.finish()
    assert log[3:] == ["wait"]
    assert torch.equal(history, expected)
    assert DevicePredictor([lane], 3, "torch").pinned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lane_widens_and_rounds_16_bits(dtype: torch.dtype) -> None:
    class Third:
        def predict(self, block: Block, history: Tensor, out: Tensor) -> None:
            assert history.dtype == out.dtype == torch.float32
            out.copy_(history[2:] / 3)

    lane = Lane(dict.fromkeys(Kind, Third()), 3, 1, 6, CPU, Direct())
    window = torch.arange(12).reshape(3, 4).to(dtype)
    out = torch.empty(1, 4, dtype=dtype)
    lane.start(block_of(Kind.FC, 4), window, out)
    lane.finish()
    assert torch.equal(out, (window[2:].float() / 3).to(dtype))


def test_a_cuda_queue_is_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a torch that has none, so that this much of it is tried."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            log.append(f"new on {device}")

        def synchronize(self) -> None:
            log.append("synchronize")

    @contextmanager
    def current(stream: object) -> Iterator[None]:
        assert isinstance(stream, Stream)
        log.append("enter")
        yield
        log.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    queue = CudaQueue(torch.device("cuda", 3))
    with queue.filling():
        log.append("work")
    queue.wait()
    assert log == ["new on cuda:3", "enter", "work", "leave", "synchronize"]


# ---------------------------------------------------------------------- in the engine


def run_on(
    lanes_of: Callable[[Inputs], list[SlowLane]],
    paths: list[Path],
    bundle: Path,
    output: Path,
    patch: pytest.MonkeyPatch,
    **wishes: int,
) -> None:
    def predictors(inputs: Inputs) -> Predictors:
        lanes: list[Lane] = lanes_of(inputs)  # type: ignore[assignment]
        return Predictors(DevicePredictor(lanes, inputs.checkpoints, "torch"))

    with patch.context() as inside:
        inside.setattr(known, "predictors", predictors)
        request = Request(
            paths, output, str(bundle), Settings(**wishes), device="cpu", force=True
        )  # fmt: skip
        with open_prediction(request) as opened:
            opened.execute()


@pytest.mark.parametrize("steps", [1, 3])
def test_several_devices_write_the_bytes_of_one(
    steps: int, tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = states()
    # Raw windows so large that some predictions are not finite.
    for k, state in enumerate(trajectory):
        state["fc.weight"][3] = 3e38 * (1 - 0.01 * k)
    paths = write_trajectory(tmp_path, trajectory)
    chance = random.Random(steps)
    contents = set()
    for number in (1, 2, 3, 7):
        with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            run_on(
                lambda inputs, number=number, pool=pool: slow_lanes(  # type: ignore[misc]
                    inputs.bundle_of(Bundle), inputs.steps, number, [], pool
                ),
                paths, bundle_path, tmp_path / "out", monkeypatch, steps=steps,
                max_memory=chance.randint(4, 20) << 20, allow_nonfinite=True,
            )  # fmt: skip
        contents.add((tmp_path / "out").read_bytes())
    assert len(contents) == 1
    # Blocks of that size on the CPU's own way give the same bytes.
    monkeypatch.setattr("know_cli.known.torch_kernel.CPU_BLOCK_ROWS", BLOCK)
    wishes = Settings(steps=steps, allow_nonfinite=True)
    request = Request(
        paths, tmp_path / "own", str(bundle_path), wishes, device="cpu", kernel="torch"
    )
    with open_prediction(request) as opened:
        report = opened.execute()
    assert report.replaced > 0
    assert (tmp_path / "own").read_bytes() in contents


@pytest.mark.parametrize("case", ["bfloat16", "float16", "overflow", "not finite", "another type"])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_stored_in_16_bits_travels_so(
    case: str, steps: int, tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes of float32, also where a prediction does not fit into 16 bits."""
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float16
    trajectory = [
        {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        for state in states()
    ]
    for k, state in enumerate(trajectory):
        if case == "overflow":  # some predictions go on from what float16 would not hold
            state["fc.weight"][3] = 60_000 - 9_000 * k
        if case == "not finite" and k == 2:
            state["fc.weight"][3, 3] = torch.inf
        if case == "another type" and k == 2:
            trajectory[k] = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    paths = write_trajectory(tmp_path, trajectory)
    types: list[torch.dtype] = []
    start = SlowLane.start

    def recorded(self: SlowLane, block: Block, window: Tensor, out: Tensor) -> None:
        assert out.dtype == window.dtype
        types.append(window.dtype)
        start(self, block, window, out)

    monkeypatch.setattr(SlowLane, "start", recorded)
    run_on(
        lambda inputs: slow_lanes(inputs.bundle_of(Bundle), inputs.steps, 2, []),
        paths, bundle_path, tmp_path / "out", monkeypatch, steps=steps, allow_nonfinite=True,
    )  # fmt: skip
    expected = {
        "bfloat16": {dtype}, "float16": {dtype}, "overflow": {dtype, torch.float32},
        "not finite": {dtype, torch.float32}, "another type": {torch.float32},
    }  # fmt: skip
    assert set(types) == expected[case]
    monkeypatch.setattr("know_cli.known.torch_kernel.CPU_BLOCK_ROWS", BLOCK)
    wishes = Settings(steps=steps, allow_nonfinite=True)
    request = Request(
        paths, tmp_path / "own", str(bundle_path), wishes, device="cpu", kernel="torch"
    )
    with open_prediction(request) as opened:
        opened.execute()
    assert (tmp_path / "own").read_bytes() == (tmp_path / "out").read_bytes()


def test_devices_take_three_batches_however_many_cores_there_are(
    tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the memory of a lane does not depend on how many threads take turns with it."""
    memory = set()
    workspaces: list[object] = []
    create = torch_kernel._Workspace.__init__

    def counted(self: object, *arguments: object) -> None:
        workspaces.append(self)
        create(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_kernel._Workspace, "__init__", counted)
    trajectory = [{"w": state["fc.weight"].repeat(40, 1)} for state in states()]
    paths = write_trajectory(tmp_path, trajectory)

    def predictors(inputs: Inputs) -> Predictors:
        lanes: Any = slow_lanes(inputs.bundle_of(Bundle), inputs.steps, 2, [])
        return Predictors(DevicePredictor(lanes, inputs.checkpoints, "torch"))

    monkeypatch.setattr(known, "predictors", predictors)
    for threads in (1, 4, 96):
        workspaces.clear()
        settings = Settings(threads=threads, max_memory=5_000_000)
        request = Request(
            paths, tmp_path / "out", str(bundle_path), settings, device="cpu", force=True
        )
        with open_prediction(request) as opened:
            memory.add(opened.plan.memory)
            opened.execute()
        assert len(workspaces) == 2
    assert len(memory) == 1


@pytest.mark.parametrize("failing", ["start 2", "finish 1"])
def test_a_device_that_fails_ends_the_run_cleanly(
    failing: str, tmp_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_trajectory(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    lanes: list[SlowLane] = []

    def lanes_of(inputs: Inputs) -> list[SlowLane]:
        lanes.extend(slow_lanes(inputs.bundle_of(Bundle), inputs.steps, 2, [], failing=failing))
        return lanes

    with pytest.raises(UsageError, match="--device cuda:1: the device failed: CUDA error"):
        run_on(lanes_of, paths, bundle_path, tmp_path / "out", monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert all(lane._work is None for lane in lanes)


def test_page_locked_memory_counts_twice(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch takes it in powers of two, so that it may be nearly twice what was asked for."""
    rows, memory = {}, 5_000_000
    for overlaps in (False, True):

        def predictors(inputs: Inputs, overlaps: bool = overlaps) -> Predictors:
            lanes = slow_lanes(inputs.bundle_of(Bundle), inputs.steps, 1, [])
            lanes[0].overlaps = overlaps
            return Predictors(DevicePredictor(lanes, inputs.checkpoints, "torch"))  # type: ignore[arg-type]

        monkeypatch.setattr(known, "predictors", predictors)
        trajectory = [{"w": state["fc.weight"].repeat(40, 1)} for state in states()]
        request = Request(
            write_trajectory(tmp_path, trajectory), tmp_path / "out", str(bundle_path),
            Settings(max_memory=memory), device="cpu",
        )  # fmt: skip
        with open_prediction(request) as opened:
            assert opened.plan.memory <= memory
            rows[overlaps] = opened.plan.batch_rows
    assert 2 * rows[True] <= rows[False] <= 2 * rows[True] + BLOCK


def test_batches_are_page_locked_where_devices_copy_by_themselves(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only the three that hold batches, whose size is bounded."""
    sizes: list[object] = []
    empty = torch.empty

    def recorded(*shape: object, pin_memory: bool = False, **options: object) -> Tensor:
        sizes.extend([shape] * pin_memory)
        return empty(*shape, **options)  # type: ignore[call-overload, no-any-return]

    def lanes_of(inputs: Inputs) -> list[SlowLane]:
        lanes = slow_lanes(inputs.bundle_of(Bundle), inputs.steps, 2, [])
        for lane in lanes:
            lane.overlaps = True
        return lanes

    paths = write_trajectory(tmp_path)
    run_on(lambda inputs: slow_lanes(inputs.bundle_of(Bundle), inputs.steps, 2, []), paths, bundle_path,
           tmp_path / "out", monkeypatch, steps=2)  # fmt: skip
    expected = (tmp_path / "out").read_bytes()
    monkeypatch.setattr(torch, "empty", recorded)
    run_on(lanes_of, paths, bundle_path, tmp_path / "out", monkeypatch, steps=2)
    # The longest kind is fc, of 1010 parameters: 11 blocks of 100.
    assert sizes == [(5 + 2, 11 * BLOCK)] * 2 * 3  # in 32 bits and in 16
    assert (tmp_path / "out").read_bytes() == expected
