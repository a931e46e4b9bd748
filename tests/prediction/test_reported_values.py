"""Situations that people reported, from files to values: all that is named moves in every session.

Which names are of a kind is a matter of ``tests/test_kinds_of_reports.py``; here each kind of fault is
followed through to the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from know_cli.engine.settings import NormMode, Settings
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from tests.support.trajectories import write_trajectory

S = 3


def moving(*shape: int, seed: int = 0, start: float = 0.0) -> Tensor:
    """``[S, …]``, values that move a little from session to session."""
    generator = torch.Generator().manual_seed(seed)
    first, steps = (
        torch.randn(1, *shape, generator=generator),
        torch.randn(S, *shape, generator=generator),
    )
    return start + first + 0.05 * steps


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def packed(*shape: int) -> Tensor:
    return torch.randint(0, 256, (S, *shape), generator=torch.Generator().manual_seed(9)).byte()


def changed(
    folder: Path, tensors: Mapping[str, Tensor], norm: NormMode = NormMode.RESCALE, steps: int = 1
) -> set[str]:
    """Names of the tensors that a prediction of ``[S, …]`` does not copy byte for byte."""
    folder.mkdir(exist_ok=True)
    paths = write_trajectory(
        folder, [{name: t[k].clone() for name, t in tensors.items()} for k in range(S)]
    )
    output = folder / "out.safetensors"
    settings = Settings(norm=norm, steps=steps)
    with open_prediction(Request(paths, output, settings=settings, method="task-vector")) as found:
        found.execute()
    out = load_file(output)
    assert out.keys() == tensors.keys()
    return {
        name for name, t in tensors.items() if not torch.equal(bytes_of(t[0]), bytes_of(out[name]))
    }


PACKED = {
    "NVFP4": {
        "weight": packed(16, 8), "weight_scale": moving(16, 1).to(torch.float8_e4m3fn),
        "weight_global_scale": moving(1), "weight_scale_2": moving(), "input_global_scale": moving(1),
    },
    "scaled fp8": {"weight": moving(8, 8).to(torch.float8_e5m2), "scale_weight": moving()},
    "HQQ": {"W_q": packed(64, 8), "scale": moving(64, 1), "zero": moving(64, 1)},
    "codes": {"codes": packed(8, 4, 2), "codebooks": moving(2, 16, 1, 8), "scales": moving(8, 1, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("form", PACKED)
def test_factors_of_packed_weights_stay_those_of_the_packed_bytes(
    form: str, tmp_path: Path
) -> None:
    tensors = {f"p.{leaf}": values for leaf, values in PACKED[form].items()}
    tensors |= {"p.bias": moving(16), "head.weight": moving(4, 4)}
    assert changed(tmp_path, tensors) == {"p.bias", "head.weight"}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("weight", "vectors"),
    [
        ("conv.weight_orig", ["conv.weight_u", "conv.weight_v"]),
        ("conv.parametrizations.weight.original",
         ["conv.parametrizations.weight.0._u", "conv.parametrizations.weight.0._v"]),
    ],
    ids=["hooks", "parametrizations"],
)  # fmt: skip
def test_singular_vectors_keep_their_length(
    weight: str, vectors: list[str], steps: int, tmp_path: Path
) -> None:
    tensors = {weight: moving(8, 4, 3, 3)}
    for name, size in zip(vectors, (8, 36), strict=True):
        tensors[name] = torch.nn.functional.normalize(moving(size), dim=1)
    assert changed(tmp_path, tensors, steps=steps) == {weight}


def test_statistics_by_other_names_stay(tmp_path: Path) -> None:
    tensors = {
        "n._mean": moving(8), "n._var": moving(8, start=4), "n._count": torch.tensor([900.0, 500.5, 300.2]),
        "rms.running_mean_std.count": torch.tensor([9e4, 5e4, 2.5e4]),
        "vq.embed": moving(16, 4), "vq.cluster_size": moving(16, start=9), "vq.embed_avg": moving(16, 4),
        "vq2.embed_sum": moving(16, 4), "lin.weight_mask": (moving(8, 8) > 0).float(),
        "act.min_val": moving(), "act.max_val": moving(), "moco.queue": moving(8, 16),
        "dino.center": moving(1, 16), "g.w_avg": moving(16), "moe.gate.e_score_correction_bias": moving(8),
        "lin.weight": moving(8, 8),
    }  # fmt: skip
    assert changed(tmp_path, tensors) == {"lin.weight"}


NORMS = {
    "a.q_norm.scale": moving(8), "LayerNorm_0.scale": moving(8), "norm.g": moving(8),
    "rms_1.weight": moving(8), "norm1.alpha": moving(8), "norm2.gamma": moving(1, 8, 1, 1),
    "plane.weight": moving(4, 5, 5), "plane.bias": moving(4, 5, 5), "net.1.weight": moving(16),
    "norm3._orig_mod.weight": moving(8), "norm4.modules_to_save.default.weight": moving(8),
    "input_layernorm._checkpoint_wrapped_module.weight": moving(8),
}  # fmt: skip


@pytest.mark.parametrize("norm", [NormMode.COPY, NormMode.RESCALE, NormMode.PREDICT])
def test_norms_by_other_names_do_what_the_option_says(norm: NormMode, tmp_path: Path) -> None:
    others = {"net.0.weight": moving(16, 8), "net.2.weight": moving(4, 16)}
    predicted = {*others, *(NORMS if norm is NormMode.PREDICT else ())}
    assert changed(tmp_path, {**NORMS, **others}, norm) == predicted


def test_a_mask_within_a_wrapper_stays(tmp_path: Path) -> None:
    mask = torch.tril(torch.ones(6, 6)).expand(S, 1, 1, 6, 6) * torch.arange(1.0, S + 1).reshape(
        -1, 1, 1, 1, 1
    )
    tensors = {"h.attn._orig_mod.bias": mask, "h.attn.c_attn._orig_mod.weight": moving(6, 18)}
    assert changed(tmp_path, tensors) == {"h.attn.c_attn._orig_mod.weight"}


def batchnorm(name: str, width: int, seed: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": moving(width, seed=seed, start=1),
        f"{name}.bias": moving(width, seed=seed + 1),
        f"{name}.running_mean": moving(width, seed=seed + 2),
        f"{name}.running_var": moving(width, seed=seed + 3).square() + 0.5,
    }


def rescaled(names: set[str]) -> set[str]:
    """The BatchNorms among changed tensors; of each, both statistics or neither have changed."""
    means = {name.rpartition(".")[0] for name in names if name.endswith("running_mean")}
    variances = {name.rpartition(".")[0] for name in names if name.endswith("running_var")}
    assert means == variances
    return means


def test_a_source_is_found_through_wrappers(tmp_path: Path) -> None:
    tensors = {
        "module.stem.conv1._orig_mod.weight": moving(8, 3, 3, 3),
        **batchnorm("module.stem.bn1._orig_mod", 8, 20),
    }
    assert rescaled(changed(tmp_path, tensors)) == {"module.stem.bn1._orig_mod"}


@pytest.mark.parametrize("width", [8, 12])
def test_norms_before_convolutions_of_one_width_are_left_alone(width: int, tmp_path: Path) -> None:
    tensors = {"conv1.weight": moving(width, 3, 3, 3), **batchnorm("bn1", width, 20)}
    for block in range(3):
        tensors[f"blocks.{block}.conv1.weight"] = moving(width, width, 3, 3, seed=30 + block)
        tensors |= batchnorm(f"blocks.{block}.bn1", width, 40 + 5 * block)
    assert not {name for name in rescaled(changed(tmp_path, tensors)) if "blocks" in name}


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("container", ["up.0", "decoder.blocks.1.block", "net"])
def test_statistics_behind_transposed_convolutions_stay(
    container: str, kernel: int, tmp_path: Path
) -> None:
    tensors = {
        f"{container}.0.weight": moving(16, 16, kernel, kernel),
        f"{container}.0.bias": moving(16),
    }
    tensors |= batchnorm(f"{container}.1", 16, 20)
    assert rescaled(changed(tmp_path, tensors)) == set()


def test_statistics_behind_an_activation_stay_positive(tmp_path: Path) -> None:
    tensors = {"net.0.weight": moving(16, 3, 3, 3), **batchnorm("net.1", 16, 20)}
    assert rescaled(changed(tmp_path / "plain", tensors)) == {"net.1"}
    tensors["net.1.running_mean"] = tensors["net.1.running_mean"].abs()
    assert rescaled(changed(tmp_path / "rectified", tensors)) == set()


@pytest.mark.parametrize(
    "name",
    ["conv.weight_g", "conv.parametrizations.weight.original0", "q.lora_magnitude_vector",
     "att.time_mix_k", "attn.temperature", "snake.alpha"],
)  # fmt: skip
def test_one_factor_a_channel_is_predicted(name: str, tmp_path: Path) -> None:
    for number, shape in enumerate([(8, 1, 1), (1, 8, 1, 1), (1, 1, 8)]):
        assert changed(tmp_path / str(number), {name: moving(*shape)}) == {name}


def test_a_frozen_mask_of_infinities_stays(tmp_path: Path) -> None:
    mask = torch.full((S, 4, 4), -math.inf).triu(1)
    tensors = {"m.blocked": mask, "lin.weight": moving(4, 4)}
    assert changed(tmp_path, tensors) == {"lin.weight"}
