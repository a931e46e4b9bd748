"""LoRA's pairs in averages: the mean of their products, against numpy that forms it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.engine.report import Report
from know_cli.engine.settings import FrozenMode, Settings
from know_cli.errors import EXIT_CHECKPOINT, CheckpointError, UsageError
from know_cli.methods.lora import ProductPredictor, are_factors, average_products
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.verify import verify
from tests.support.command import Command, one_line
from tests.support.folders import digest
from tests.support.ranks import together
from tests.support.trajectories import write_trajectory

Array = np.ndarray[Any, np.dtype[np.float64]]
S = 4
UP, DOWN = "q.lora_B.weight", "q.lora_A.weight"


def trajectory(shapes: dict[str, tuple[int, ...]], count: int = S) -> list[dict[str, Tensor]]:
    """Checkpoints that have something in common, and something of their own."""
    generator = torch.Generator().manual_seed(7)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    common = {name: normal(shape) for name, shape in shapes.items()}
    return [
        {name: values + 0.3 * normal(shapes[name]) for name, values in common.items()}
        for _ in range(count)
    ]


def average(
    paths: list[Path], output: Path, lora: str | None = "exact", **wishes: Any
) -> tuple[dict[str, Tensor], Report]:
    options = wishes.pop("options", {}) | ({"lora": lora} if lora else {})
    resume = wishes.pop("resume", False)
    request = Request(
        paths, output, settings=Settings(**wishes), method="average", options=options,
        device="cpu", force=True, resume=resume,
    )  # fmt: skip
    with open_prediction(request) as prediction:
        report = prediction.execute()
    return load_file(output), report


def mean_product(states: list[dict[str, Tensor]], down: str, up: str) -> Array:
    products = [
        state[up].double().flatten(1).numpy() @ state[down].double().flatten(1).numpy()
        for state in states
    ]
    mean: Array = np.mean(products, axis=0)
    return mean


def product(state: dict[str, Tensor], down: str, up: str) -> Array:
    return mean_product([state], down, up)


NAMES = {
    "peft": (DOWN, UP),
    "peft in a model": ("m.q_proj.lora_A.default.weight", "m.q_proj.lora_B.default.weight"),
    "plain parameters": ("layers.0.lora_A", "layers.0.lora_B"),
    "embedding": ("e.lora_embedding_A.default", "e.lora_embedding_B.default"),
    "kohya": ("lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.lora_up.weight"),
    "diffusers": ("unet.to_q.lora.down.weight", "unet.to_q.lora.up.weight"),
    "torchtune": ("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"),
    "MLX": ("model.layers.0.self_attn.q_proj.lora_b", "model.layers.0.self_attn.q_proj.lora_a"),
    "old diffusers": ("q_proj.lora_linear_layer.down.weight", "q_proj.lora_linear_layer.up.weight"),
    "older diffusers": ("attn1.processor.to_q_lora.down.weight", "attn1.processor.to_q_lora.up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("convention", NAMES)
def test_the_mean_of_the_products_in_every_naming(convention: str, tmp_path: Path) -> None:
    down, up = NAMES[convention]
    states = trajectory({down: (3, 20), up: (15, 3), "q.magnitude.weight": (15,)})
    paths = write_trajectory(tmp_path, states)
    out, report = average(paths, tmp_path / "out", None)  # exact is the default
    wanted = mean_product(states, down, up)
    u, s, v = np.linalg.svd(wanted)
    best = (u[:, :3] * s[:3]) @ v[:3]
    found = product(out, down, up)
    np.testing.assert_allclose(found, best, atol=1e-5)
    error = math.sqrt((s[3:] ** 2).sum() / (s**2).sum())
    assert report.truncations == {down: pytest.approx(error, rel=1e-6)}
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) == pytest.approx(error, rel=1e-4)
    # The product of the means is further away, and magnitudes are averaged as vectors.
    factors, plain = average(paths, tmp_path / "factors", "factors")
    assert np.linalg.norm(product(factors, down, up) - wanted) > np.linalg.norm(found - wanted)
    assert plain.truncations == {}
    for name in states[0]:
        mean = torch.stack([state[name].double() for state in states]).mean(dim=0).float()
        assert torch.equal(factors[name], mean)
    assert torch.equal(out["q.magnitude.weight"], factors["q.magnitude.weight"])


def test_a_convolution_s_factors(tmp_path: Path) -> None:
    down, up = "c.lora_A.weight", "c.lora_B.weight"
    states = trajectory({down: (2, 3, 3, 3), up: (8, 2, 1, 1)})
    out, report = average(write_trajectory(tmp_path, states), tmp_path / "out")
    u, s, v = np.linalg.svd(mean_product(states, down, up))
    np.testing.assert_allclose(product(out, down, up), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    assert report.predicted == 2 * 27 + 16


@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 9),
    st.lists(st.floats(0, 1), min_size=2, max_size=5).filter(lambda c: sum(c) > 0.1),
)  # fmt: skip
@settings(max_examples=60)
def test_factors_of_any_size_are_the_best_of_their_rank(
    rank: int, inputs: int, outputs: int, shares: list[float]
) -> None:
    coefficients = np.array(shares) / sum(shares)
    random = np.random.default_rng(rank + 10 * inputs + 100 * outputs)
    downs = random.standard_normal((len(shares), rank, inputs))
    ups = random.standard_normal((len(shares), outputs, rank))
    down, up, error = average_products(
        torch.from_numpy(downs), torch.from_numpy(ups), coefficients.tolist()
    )
    mean = sum(c * b @ a for c, a, b in zip(coefficients, downs, ups, strict=True))
    u, s, v = np.linalg.svd(mean, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose((up @ down).numpy(), best, atol=1e-10)
    assert error == pytest.approx(np.linalg.norm(mean - best) / np.linalg.norm(mean), abs=1e-7)
    # Balanced: both have the same lengths, √σ; and the signs are settled.
    lengths = np.zeros(rank)
    lengths[: len(s)] = np.sqrt(s[:rank])
    np.testing.assert_allclose(down.norm(dim=1).numpy(), lengths, atol=1e-6)
    np.testing.assert_allclose(up.norm(dim=0).numpy(), lengths, atol=1e-6)
    largest = down.gather(1, down.abs().argmax(dim=1, keepdim=True))
    assert bool((largest >= 0).all())


def test_a_mean_that_has_their_rank_is_kept_whole() -> None:
    down, up = torch.randn(2, 9), torch.randn(7, 2)
    new_down, new_up, error = average_products(
        torch.stack([down, 2 * down]), torch.stack([up, 3 * up]), [0.25, 0.75]
    )
    expected = (0.25 + 0.75 * 6) * up.double() @ down.double()
    torch.testing.assert_close(new_up @ new_down, expected, rtol=1e-6, atol=1e-6)
    assert error < 1e-12
    _, _, nothing = average_products(torch.zeros(2, 2, 9), torch.zeros(2, 7, 2), [0.5, 0.5])
    assert nothing == 0


@pytest.mark.parametrize("frozen", [DOWN, UP])
def test_a_factor_that_does_not_move_is_kept(frozen: str, tmp_path: Path) -> None:
    """Then the mean of the products is the other's mean times it, exactly."""
    states = trajectory({DOWN: (3, 20), UP: (15, 3)})
    for state in states:
        state[frozen] = states[0][frozen]
    out, report = average(write_trajectory(tmp_path, states), tmp_path / "out")
    assert torch.equal(out[frozen], states[0][frozen])
    assert report.truncations == {}
    np.testing.assert_allclose(product(out, DOWN, UP), mean_product(states, DOWN, UP), atol=1e-5)


def test_one_checkpoint_is_passed_on_as_it_is(tmp_path: Path) -> None:
    states = trajectory({DOWN: (3, 20), UP: (15, 3)})
    out, report = average(write_trajectory(tmp_path, states), tmp_path / "out", options={"last": 1})
    assert all(torch.equal(out[name], tensor) for name, tensor in states[0].items())
    assert report.truncations == {}


def test_checkpoints_that_are_not_averaged_do_not_count(tmp_path: Path) -> None:
    states = trajectory({DOWN: (3, 20), UP: (15, 3)})
    paths = write_trajectory(tmp_path, states)
    out, _ = average(paths, tmp_path / "out", options={"last": 2})
    two, _ = average(paths[:2], tmp_path / "two")
    assert all(torch.equal(out[name], tensor) for name, tensor in two.items())


def test_what_is_no_pair_is_averaged_factor_by_factor(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "mid.lora_down.weight": (2, 8), "mid.lora_up.weight": (8, 2), "mid.lora_mid.weight": (2, 2),
        "odd.lora_A.weight": (2, 8), "odd.lora_B.weight": (8, 3),
        "scaled.lora_down.weight": (2, 8), "scaled.lora_up.weight": (8, 2),
        "lone.lora_A.weight": (2, 8),
        "mlp.experts.base_layer.lora_A.weight": (8, 6), "mlp.experts.base_layer.lora_B.weight": (6, 8),
        "same.lora_down.weight": (2, 8), "same.lora_up.weight": (8, 2),
    }  # fmt: skip
    states = trajectory(shapes)
    for k, state in enumerate(states):
        state["scaled.alpha"] = torch.tensor(1.0 + k)
        state["same.alpha"] = torch.tensor(4.0)
    out, report = average(write_trajectory(tmp_path, states), tmp_path / "out")
    assert list(report.truncations) == ["same.lora_down.weight"]
    for name in shapes:
        mean = torch.stack([state[name].double() for state in states]).mean(dim=0).float()
        assert torch.equal(out[name], mean) is not name.startswith("same"), name
    (warning,) = [notice for notice in report.notices if notice.startswith("warning: LoRA")]
    assert "'mid.lora_down.weight' and 3 more: averaged factor by factor" in warning


@pytest.mark.parametrize(
    "factors",
    [["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], ["lokr_w1", "lokr_w2"],
     ["lokr_w1_a.default", "lokr_w1_b.default"]],
)  # fmt: skip
def test_other_products_are_averaged_factor_by_factor_and_told(
    factors: list[str], tmp_path: Path
) -> None:
    states = trajectory({f"layers.0.q_proj.{factor}": (4, 4) for factor in factors})
    paths = write_trajectory(tmp_path, states)
    _, report = average(paths, tmp_path / "out")
    (warning,) = [notice for notice in report.notices if notice.startswith("warning: LoRA")]
    assert f"'layers.0.q_proj.{factors[0]}': averaged factor by factor" in warning
    _, plain = average(paths, tmp_path / "factors", "factors")
    assert not [notice for notice in plain.notices if notice.startswith("warning: LoRA")]


def test_pairs_that_some_branches_do_not_have_are_told(tmp_path: Path) -> None:
    """Factors are averaged over the branches that have them, which need not be the same ones."""
    states = trajectory({
        f"{module}.{leaf}.weight": (2, size) if leaf == "lora_A" else (size, 2)
        for module, size in (("all", 80), ("some", 8), ("half", 8), ("one", 8), ("none", 8))
        for leaf in ("lora_A", "lora_B")
    })  # fmt: skip
    del states[2]["some.lora_A.weight"], states[2]["some.lora_B.weight"]
    del states[3]["half.lora_B.weight"]
    for k in (1, 2, 3):
        for module in ("none", *(["one"] if k > 1 else [])):
            del states[k][f"{module}.lora_A.weight"], states[k][f"{module}.lora_B.weight"]
    paths = write_trajectory(tmp_path, states)
    request = Request(
        paths, tmp_path / "out", method="average", device="cpu", trajectory=TrajectoryKind.BRANCHES
    )
    with open_prediction(request) as prediction:
        report = prediction.execute()
    out = load_file(tmp_path / "out")
    assert list(report.truncations) == ["all.lora_A.weight"]
    for name, k in (("one", 1), ("none", 0)):
        for leaf in ("lora_A", "lora_B"):
            full = f"{name}.{leaf}.weight"
            assert torch.equal(out[full], states[k][full])
    (warning,) = [notice for notice in report.notices if notice.startswith("warning: LoRA")]
    assert "'half.lora_A.weight' and 1 more: averaged factor by factor" in warning
    assert warning.endswith("are not in all branches")


@pytest.mark.parametrize(
    "dtypes", ["int64", "int32", "uint8", "float64", "int64 float16 bfloat16 int8"]
)
def test_a_scale_may_be_an_integer(dtypes: str, tmp_path: Path) -> None:
    """Whose type need not be the same in all checkpoints, as that of what is only copied."""
    shapes = {"a.lora_down.weight": (2, 8), "a.lora_up.weight": (8, 2),
              "b.lora_down.weight": (2, 8), "b.lora_up.weight": (8, 2)}  # fmt: skip
    states = trajectory(shapes)
    for k, state in enumerate(states):
        dtype = getattr(torch, dtypes.split()[k % len(dtypes.split())])
        state["a.alpha"] = torch.tensor(8 if k else 16).to(dtype)
        state["b.alpha"] = torch.tensor([8]).to(dtype)
    out, report = average(write_trajectory(tmp_path, states), tmp_path / "out")
    assert list(report.truncations) == ["b.lora_down.weight"]
    for name in shapes:
        mean = torch.stack([state[name].double() for state in states]).mean(dim=0).float()
        assert torch.equal(out[name], mean) is name.startswith("a"), name
    (warning,) = [notice for notice in report.notices if notice.startswith("warning: LoRA")]
    assert "'a.lora_down.weight': averaged factor by factor" in warning


def test_shapes_that_have_a_product() -> None:
    assert are_factors((8, 64), (32, 8))
    assert are_factors((8, 4, 3), (32, 8, 1))
    for down, up in (
        ((8, 64), (32, 4)), ((8, 64), (32, 8, 1)), ((8,), (8,)), ((8, 4, 3, 3), (9, 8, 3, 3)),
        ((0, 4), (9, 0)), ((8, 64), (0, 8)), ((), ()),
    ):  # fmt: skip
        assert not are_factors(down, up)


# ------------------------------------------------------------------------- the same bytes

MANY: dict[str, tuple[int, ...]] = {
    **{f"h.{n}.lora_A.weight": (4, 30 + n) for n in range(5)},
    **{f"h.{n}.lora_B.weight": (40, 4) for n in range(5)},
    "norm.weight": (30,), "head.weight": (12, 30),
}  # fmt: skip


def test_bytes_depend_on_nothing_but_the_inputs(tmp_path: Path) -> None:
    paths = write_trajectory(tmp_path, trajectory(MANY))
    _, one = average(paths, tmp_path / "one")
    _, two = average(paths, tmp_path / "two", threads=3, max_memory=64 << 20)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert one.truncations == two.truncations
    request = Request(paths, tmp_path / "ranks", method="average", device="cpu")

    def work(ranks: Any) -> Report:
        with open_prediction(request, ranks) as prediction:
            return prediction.execute()

    shared, *_ = together(3, work)
    assert digest(tmp_path / "one") == digest(tmp_path / "ranks")
    assert shared.truncations == one.truncations
    assert len(one.truncations) == 5
    for spans in (None, 3):
        verify(tmp_path / "one", paths, spans=spans).check(tmp_path / "one")


def test_a_run_that_is_resumed_knows_the_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_trajectory(tmp_path, trajectory(MANY))
    _, whole = average(paths, tmp_path / "whole")
    real, calls = ProductPredictor.predict, []

    def dying(self: ProductPredictor, *arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(ProductPredictor, "predict", dying)
    with pytest.raises(KeyboardInterrupt):
        average(paths, tmp_path / "out", resume=True)
    _, resumed = average(paths, tmp_path / "out", resume=True)
    assert len(calls) == 4 + 2  # three pairs were in the journal
    assert resumed.truncations == whole.truncations
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_sixteen_bits_and_kinds_of_both_factors(tmp_path: Path) -> None:
    """A pair's tensors may differ in dtype and kind; each is cast and counted as its own."""
    shapes: dict[str, tuple[int, ...]] = {"c.lora_A.weight": (2, 3, 3, 3), "c.lora_B.weight": (8, 2, 1, 1)}  # fmt: skip
    states = trajectory(shapes)
    for state in states:
        state["c.lora_B.weight"] = state["c.lora_B.weight"].bfloat16()
        state["bias"] = torch.randn(3)
    out, report = average(write_trajectory(tmp_path, states), tmp_path / "out", overrides=())
    assert out["c.lora_B.weight"].dtype is torch.bfloat16
    u, s, v = np.linalg.svd(mean_product(states, "c.lora_A.weight", "c.lora_B.weight"))
    found = product(out, "c.lora_A.weight", "c.lora_B.weight")
    np.testing.assert_allclose(found, (u[:, :2] * s[:2]) @ v[:2], rtol=0, atol=0.02 * s[0])
    assert report.predicted == 54 + 16 + 3
    assert sum(numbers.squared_change > 0 for numbers in report.kinds.values()) == 2


# ------------------------------------------------------------------------------- limits


def test_a_pair_beyond_the_memory_is_refused_by_name(tmp_path: Path) -> None:
    states = trajectory({DOWN: (8, 12000), UP: (12000, 8)})
    paths = write_trajectory(tmp_path, states)
    with pytest.raises(UsageError, match=f"needs tensor '{DOWN}', with '{UP}', whole"):
        average(paths, tmp_path / "out", max_memory=8 << 20)
    assert not (tmp_path / "out").exists()
    average(paths, tmp_path / "out", "factors", max_memory=8 << 20)


def test_a_pair_with_values_that_are_not_finite_is_copied_whole(tmp_path: Path) -> None:
    states = trajectory({DOWN: (3, 20), UP: (15, 3)})
    states[2][UP][4, 1] = math.inf
    paths = write_trajectory(tmp_path, states)
    with pytest.raises(CheckpointError, match=f"ckpt2.safetensors: tensor '{UP}': has values"):
        average(paths, tmp_path / "out")
    out, report = average(paths, tmp_path / "out", allow_nonfinite=True)
    assert all(torch.equal(out[name], tensor) for name, tensor in states[0].items())
    assert report.nonfinite == 60 + 45
    assert report.truncations == {}


def test_pairs_of_which_nothing_moves(tmp_path: Path) -> None:
    states = trajectory({DOWN: (3, 20), UP: (15, 3)}, 1) * S
    paths = write_trajectory(tmp_path, states)
    out, report = average(paths, tmp_path / "out", frozen=FrozenMode.PREDICT)
    np.testing.assert_allclose(product(out, DOWN, UP), product(states[0], DOWN, UP), atol=1e-5)
    assert report.truncations[DOWN] < 1e-6


# -------------------------------------------------------------------------- the command


def test_the_error_is_told_and_recorded(tmp_path: Path, know: Command) -> None:
    paths = write_trajectory(tmp_path, trajectory(MANY))
    arguments = ["--method", "average", "--lora", "exact", "--json", tmp_path / "report.json"]
    done = know("predict", *paths, "-o", tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["truncations"]
    errors = report["of"]
    worst = max(errors, key=lambda name: errors[name])
    assert report["groups"] == len(errors) == 5
    assert report["mean"] == pytest.approx(np.mean(list(errors.values())))
    assert (report["largest"], report["largest_of"]) == (errors[worst], worst)
    assert 0 < report["largest"] < 1
    expected = (
        f"products of 5 LoRA pairs averaged: what their rank does not hold is "
        f"{report['mean']:.2%} of them on average, {errors[worst]:.2%} at most ({worst})"
    )
    assert expected in done.stdout
    assert (
        "LoRA: the mean of the products B·A is taken, not the product of the means" in done.stderr
    )
    again = know("predict", *paths, "-o", tmp_path / "factors", "--method", "average", "--lora", "factors")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "LoRA" not in again.stderr + again.stdout


def test_a_word_that_is_none_is_refused(tmp_path: Path, know: Command) -> None:
    paths = write_trajectory(tmp_path, trajectory(MANY))
    done = know("predict", *paths, "-o", tmp_path / "out", "--method", "average", "--lora", "x")
    assert done.returncode == 2
    assert "exact" in one_line(done.stderr)


def write_adapters(folder: Path, configs: list[dict[str, Any] | str | None]) -> list[Path]:
    """Adapters as PEFT writes them, each with its configuration."""
    states = trajectory({DOWN: (4, 6), UP: (5, 4)}, len(configs))
    paths = []
    for k, (state, config) in enumerate(zip(states, configs, strict=True)):
        paths.append(folder / f"adapter{k}")
        paths[-1].mkdir()
        save_file(state, paths[-1] / "adapter_model.safetensors")
        if config is not None:
            text = config if isinstance(config, str) else json.dumps(config)
            (paths[-1] / "adapter_config.json").write_text(text)
    return paths


@pytest.mark.parametrize(
    ("configs", "what"),
    [
        ([{"lora_alpha": 8, "r": 4}, {"lora_alpha": 16, "r": 4}], "lora_alpha is 16 but 8 in"),
        ([None, {"lora_alpha": 16}, {}], "lora_alpha is 8 but 16 in"),
        ([{}, "no JSON", {"use_rslora": True}], "use_rslora is true but false in"),
        ([{"alpha_pattern": {"q": 2}}, {}], 'alpha_pattern is {} but {"q": 2} in'),
        (
            [
                {"lora_alpha": 8, "r": 4},
                {"lora_alpha": 8, "use_rslora": None, "alpha_pattern": None},
                "[]",
                None,
            ],
            None,
        ),
    ],
)
@pytest.mark.parametrize("files", [False, True])
def test_adapters_of_other_scales_are_refused(
    configs: list[dict[str, Any] | str | None], what: str | None, files: bool, tmp_path: Path,
    know: Command,
) -> None:  # fmt: skip
    paths = write_adapters(tmp_path, configs)
    given = [path / "adapter_model.safetensors" if files else path for path in paths]
    done = know("predict", *given, "-o", "out", "--method", "average", "-q", cwd=tmp_path)
    if what is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == EXIT_CHECKPOINT
    assert what in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [20.0, 10.0, None])
def test_adapters_of_mlx_have_their_scale_elsewhere(
    scale: float | None, tmp_path: Path, know: Command
) -> None:
    parameters = {"rank": 4, "dropout": 0.0}
    first: dict[str, Any] = {"lora_parameters": {**parameters, "scale": 20.0}}
    second: dict[str, Any] = {"lora_parameters": parameters | ({"scale": scale} if scale else {})}
    for path in write_adapters(tmp_path, [first, second]):
        (path / "adapter_model.safetensors").rename(path / "adapters.safetensors")
    words = ("predict", "adapter0", "adapter1", "-o", "out", "--method", "average", "-q")
    done = know(*words, cwd=tmp_path)
    if scale == 10.0:
        assert done.returncode == EXIT_CHECKPOINT
        assert "lora_parameters.scale is 10.0 but 20.0 in" in one_line(done.stderr)
    else:
        assert done.returncode == 0, done.stderr
