"""KNOWN and the engine's kernel, against an independent computation in numpy."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from know_cli.kinds import Kind
from know_cli.known.module import Known, Preparation, initialise, penalty
from know_cli.known.torch_kernel import Kernel
from tests.support.bundles import random_bundle
from tests.support.by_hand import by_hand


@pytest.mark.parametrize("preparation", list(Preparation))
@pytest.mark.parametrize("checkpoints", [2, 3, 5, 8])
def test_module_and_kernel_follow_the_formula(checkpoints: int, preparation: Preparation) -> None:
    bundle = random_bundle(checkpoints, seed=checkpoints, preparation=preparation)
    window = torch.randn(200, checkpoints, generator=torch.Generator().manual_seed(1)) * 0.2
    window[7] = 0.05  # nothing moves
    window[8] = 0.0
    for kind, state in bundle.states.items():
        expected = by_hand(state, window.double().numpy(), preparation)
        with torch.no_grad():
            module = bundle.module(kind)(window)
        np.testing.assert_allclose(module.numpy(), expected, atol=1e-6)
        out = torch.empty(200)
        kernel = Kernel(state, checkpoints, preparation, torch.device("cpu"))
        kernel.predict(window.T.contiguous(), out)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("preparation", list(Preparation))
def test_the_kernel_is_the_module_s_equal_in_whole_and_in_part_blocks(
    preparation: Preparation,
) -> None:
    bundle = random_bundle(5, preparation=preparation)
    kernel = Kernel(bundle.states[Kind.CONV], 5, preparation, torch.device("cpu"))
    block = kernel.block_rows
    # The workspace holds what the call before left there.
    for rows in (block, 3, block - 1, 1, block):
        history = torch.randn(5, rows, generator=torch.Generator().manual_seed(rows)) * 0.2
        out = torch.empty(rows)
        kernel.predict(history, out)
        with torch.no_grad():
            expected = bundle.module(Kind.CONV)(history.T.contiguous())
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@given(st.integers(2, 8), st.integers(1, 1536), st.sampled_from(list(Preparation)))
@settings(max_examples=20)
def test_threads_that_share_a_workspace_s_holder_do_not_meet(
    checkpoints: int, rows: int, preparation: Preparation
) -> None:
    bundle = random_bundle(checkpoints, preparation=preparation)
    local = threading.local()
    kernels = [
        Kernel(state, checkpoints, preparation, torch.device("cpu"), local)
        for state in bundle.states.values()
    ]
    generator = torch.Generator().manual_seed(rows)
    histories = [torch.randn(checkpoints, rows, generator=generator) * 0.2 for _ in range(12)]

    def predict(turn: int) -> torch.Tensor:
        out = torch.empty(rows)
        kernels[turn % 3].predict(histories[turn], out)
        return out

    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(predict, range(12)))
        alone = [pool.submit(predict, turn).result() for turn in range(12)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_nothing_moves_nothing_changes_when_prepared_by_spread() -> None:
    known = random_bundle(5, preparation=Preparation.SPREAD).module(Kind.FC)
    window = torch.linspace(-1, 1, 7)[:, None].expand(7, 5)
    assert torch.equal(known(window), window[:, -1])


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
@settings(max_examples=30)
def test_spread_makes_the_prediction_follow_the_scale_of_the_weights(
    scale: float, seed: int
) -> None:
    known = random_bundle(5, preparation=Preparation.SPREAD).module(Kind.CONV)
    window = torch.randn(50, 5, generator=torch.Generator().manual_seed(seed)) * 0.1
    with torch.no_grad():
        scaled = known(window * scale) / scale
        # The scaled values are rounded differently before they are subtracted from one another.
        torch.testing.assert_close(scaled, known(window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpoints", [2, 5, 16])
def test_number_of_parameters(checkpoints: int) -> None:
    known = Known(checkpoints)
    assert sum(p.numel() for p in known.parameters()) == 128 * checkpoints + 8785


def test_change_is_bounded_by_tanh() -> None:
    known = random_bundle(5).module(Kind.BIAS)
    window = torch.randn(1000, 5) * 3
    with torch.no_grad():
        assert (known(window) - window[:, -1]).abs().max() <= 1 + 1e-6


def test_initialisation_is_the_paper_s_and_repeats() -> None:
    one, two = Known(5), Known(5)
    initialise(one, torch.Generator().manual_seed(3))
    initialise(two, torch.Generator().manual_seed(3))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b)
        if name.endswith("bias"):
            assert not a.any()
    limit = (3 * 0.1 / 5) ** 0.5
    assert 0.9 * limit < one.window.input.weight.abs().max() <= limit
    limit = (6 / (8 + 64)) ** 0.5
    assert 0.9 * limit < one.window.rate.weight.abs().max() <= limit


def test_penalty_is_the_paper_s() -> None:
    known = Known(5)
    for parameter in known.parameters():
        torch.nn.init.constant_(parameter, -1.0)
    kernels = (5 + 4) * 64 + 2 * 64 * 32
    biases = 2 * (64 + 32)
    assert penalty(known).item() == pytest.approx(1e-6 * kernels + 0.1 * biases, rel=1e-5)


@given(st.integers(1, 9000), st.integers(0, 8999))
@settings(max_examples=15)
def test_a_row_does_not_depend_on_its_neighbours(rows: int, position: int) -> None:
    bundle = random_bundle(5)
    kernel = Kernel(bundle.states[Kind.FC], 5, Preparation.RAW, torch.device("cpu"))
    rows = min(rows, kernel.block_rows)
    position %= rows
    history = torch.randn(5, rows, generator=torch.Generator().manual_seed(rows)) * 0.1
    out, again = torch.empty(rows), torch.empty(rows)
    kernel.predict(history, out)
    changed = torch.zeros_like(history)
    changed[:, position] = history[:, position]
    kernel.predict(changed, again)
    assert out[position] == again[position]
