"""Kinds of tensors that people have reported: each situation with several names and sizes."""

from __future__ import annotations

import pytest

from know_cli.kinds import COMPUTABLE, Kind, classify, classify_all
from know_cli.normalisation import find_norm_layers

Shape = tuple[int, ...]
Tensors = dict[str, tuple[Shape, str]]


def kinds(tensors: Tensors) -> dict[str, Kind]:
    return {name: found.kind for name, found in classify_all(tensors).items()}


def norms(tensors: Tensors) -> dict[str, str]:
    """Tensor → prefix of the normalisation layer that owns it."""
    layers = find_norm_layers({name: shape for name, (shape, _) in tensors.items()})
    return {name: layer.prefix for layer in layers for name in layer.affine}


def floats(**shapes: Shape) -> Tensors:
    return {name.replace("__", "."): (shape, "F32") for name, shape in shapes.items()}


# ---------------------------------------------------------------------- quantised modules

PACKED: dict[str, Tensors] = {
    "nvfp4": {
        "weight": ((16, 8), "U8"), "weight_scale": ((16, 1), "F8_E4M3"),
        "weight_global_scale": ((1,), "F32"), "weight_scale_2": ((), "F32"),
        "input_global_scale": ((1,), "F32"),
    },
    "compressed tensors": {
        "weight_packed": ((16, 4), "I32"), "weight_shape": ((2,), "I64"),
        "weight_scale": ((16, 4), "BF16"), "weight_zero_point": ((16, 4), "BF16"),
    },
    "scaled fp8": {"weight": ((8, 8), "F8_E5M2"), "scale_weight": ((), "F32"), "s_in": ((), "F16")},
    "fp8 in blocks": {"weight": ((8, 8), "F8_E4M3"), "weight_scale_inv": ((1, 1), "F32")},
    "hqq": {"W_q": ((64, 8), "U8"), "scale": ((64, 1), "F16"), "zero": ((64, 1), "F16")},
    "quanto": {
        "weight._data": ((8, 8), "I8"), "weight._scale": ((8, 1), "F32"),
        "input_scale": ((), "F32"), "output_scale": ((), "F32"),
    },
    "awq": {"qweight": ((8, 4), "I32"), "qzeros": ((1, 1), "I32"), "scales": ((1, 8), "F16"),
            "pre_quant_scale": ((8,), "F32"), "qbiases": ((8, 2), "F16")},
    "mlx": {"weight": ((8, 4), "U32"), "scales": ((8, 1), "F16"), "biases": ((8, 1), "F16")},
    "codes": {"codes": ((8, 4, 2), "I16"), "codebooks": ((2, 16, 1, 8), "F16"),
              "scales": ((8, 1, 1, 1), "F16")},
    "tables": {"weight": ((8, 8), "I16"), "centroids": ((8, 4), "F32"), "tables": ((16,), "BF16"),
               "tables2": ((4, 4, 2), "F32")},
    "eight bits": {"weight": ((8, 8), "I8"), "SCB": ((8,), "F32"), "any_factor": ((8, 2), "F32")},
    "four bits": {"weight": ((32, 1), "U8"), "weight.absmax": ((4,), "F32"),
                  "weight.nested_quant_map": ((16,), "F32")},
    "binary": {"weight": ((8, 8), "BOOL"), "alpha": ((8, 1), "F32")},
    "palette": {"weight_indices": ((8, 8), "U8"), "weight_lut": ((8, 16), "F32")},
    "indices": {"indices": ((8, 8), "I32"), "centroids": ((16, 4), "F16"), "norms": ((8,), "F16")},
    "lattice": {"Qidxs": ((16, 8), "I64"), "SU": ((16,), "F16"), "SV": ((16,), "F16"),
                "Wscale": ((), "F32")},
    "bytes in a row": {"packed": ((1024,), "U8"), "scale": ((32,), "F32"), "zero": ((32,), "F32")},
    "a scale of the bias's shape": {"weight": ((16, 8), "I8"), "scale": ((16,), "F32")},
    "complex": {"complex_weight": ((8, 8), "C64"), "phase": ((8,), "F32")},
}  # fmt: skip


@pytest.mark.parametrize("module", ["p", "model.layers.3.mlp.up_proj", "q_proj.base_layer"])
@pytest.mark.parametrize("form", PACKED)
def test_floats_of_a_packed_module_are_copied_with_it(form: str, module: str) -> None:
    tensors = {f"{module}.{leaf}": tensor for leaf, tensor in PACKED[form].items()}
    tensors |= {f"{module}.bias": ((16,), "F32"), "head.weight": ((4, 4), "F32")}
    found = kinds(tensors)
    assert found.pop(f"{module}.bias") is Kind.BIAS
    assert found.pop("head.weight") is Kind.FC
    assert set(found.values()) == {Kind.COPY}


def test_adapters_of_a_packed_weight_are_weights() -> None:
    tensors = {
        "q.base_layer.weight": ((32, 1), "U8"), "q.base_layer.weight.absmax": ((4,), "F32"),
        "q.lora_A.default.weight": ((4, 8), "F32"), "q.lora_B.default.weight": ((8, 4), "F32"),
        "q.lora_magnitude_vector.default.weight": ((8,), "F32"),
    }  # fmt: skip
    assert list(kinds(tensors).values()) == [Kind.COPY, Kind.COPY, Kind.FC, Kind.FC, Kind.BIAS]


def test_biases_of_packed_experts_are_weights() -> None:
    tensors = {
        "experts.gate_up_proj_blocks": ((4, 8, 2, 16), "U8"),
        "experts.gate_up_proj_scales": ((4, 8, 2), "U8"),
        "experts.gate_up_proj_bias": ((4, 8), "BF16"),
    }
    assert list(kinds(tensors).values())[:2] == [Kind.COPY, Kind.COPY]
    assert kinds(tensors)["experts.gate_up_proj_bias"] is not Kind.COPY


@pytest.mark.parametrize(
    "other",
    [
        {"m.num_batches_tracked": ((), "I64")},
        {"m.position_ids": ((1, 16), "I32")},
        {"m.relative_position_index": ((16, 16), "I32")},
        {"m.causal_mask": ((16, 16), "U8")},
        {"m.bias": ((1, 1, 16, 16), "U8")},
        {"m.ids": ((8,), "U8")},
        {"m.marker": ((0,), "F8_E4M3")},
        {"m.lookup": ((16, 16), "I64")},
        {"m.attention_bias_idxs": ((16, 16), "I64")},
        {"m.relative_position": ((16, 16), "I64")},
        {"m.rng_state": ((5056,), "U8")},
        {"m.tokens_seen": ((64,), "I64")},
    ],
)
def test_counters_and_positions_pack_nothing(other: Tensors) -> None:
    tensors = {"m.weight": ((8, 8), "F32"), "m.scale": ((8,), "F32"), **other}
    assert list(kinds(tensors).values())[:2] == [Kind.FC, Kind.BIAS]
    if not any("bias" in name or "lookup" in name for name in other):
        del tensors["m.weight"]
        assert kinds(tensors)["m.scale"] is Kind.BIAS


@pytest.mark.parametrize("leaf", ["k_scale", "kv_scale", "prob_scale", "kv_cache_scaling_factor"])
def test_factors_of_a_quantised_cache_are_copied(leaf: str) -> None:
    assert classify(f"layers.0.self_attn.{leaf}", (), "F32").kind is Kind.COPY


def test_a_scale_beside_a_linear_layer_s_bias_makes_no_norm() -> None:
    tensors = floats(
        fc__weight=(16, 8), fc__scale=(16,), fc__bias=(16,), n__scale=(8,), n__bias=(8,)
    )
    assert set(norms(tensors)) == {"n.scale", "n.bias"}


# ---------------------------------------------------------------------- what is not trained


@pytest.mark.parametrize("module", ["conv", "net.module.conv3", "a._orig_mod"])
@pytest.mark.parametrize(
    ("leaves", "kept"),
    [
        ({"weight_orig": (8, 4, 3, 3), "weight_u": (8,), "weight_v": (36,)}, "weight_orig"),
        ({"weight_bar": (8, 4), "weight_u": (8,), "weight_v": (4,)}, "weight_bar"),
        (
            {
                "parametrizations.weight.original": (8, 4),
                "parametrizations.weight.0._u": (8,),
                "parametrizations.weight.0._v": (4,),
            },
            "parametrizations.weight.original",
        ),
    ],
)
def test_singular_vectors_are_copied(leaves: dict[str, Shape], kept: str, module: str) -> None:
    found = kinds({f"{module}.{leaf}": (shape, "F32") for leaf, shape in leaves.items()})
    assert found.pop(f"{module}.{kept}") in (Kind.CONV, Kind.FC)
    assert set(found.values()) == {Kind.COPY}


@pytest.mark.parametrize(
    "names",
    [
        ["n._mean", "n._var", "n._count"],
        ["env.running_mean_std.count", "env.running_mean_std.running_mean"],
        ["obs_rms.mean", "obs_rms.var"],
        ["vq.codebook.embed", "vq.codebook.cluster_size", "vq.codebook.embed_avg"],
        ["q.0.embed_sum", "q.0.cluster_usage", "q.0.initialized"],
        ["layer.weight_mask"], ["m.attn_mask"],
        ["observer.min_val"], ["act.max_vals"], ["lin.input_min"],
        ["moco.queue"], ["dino.center"], ["g.w_avg"], ["g.latent_avg"], ["m.ema_shadow"],
        ["moe.gate.e_score_correction_bias"], ["gate.expert_bias"],
        ["criterion.weight"], ["criterion.empty_weight"], ["loss.pos_weight"],
        ["diffusion.sqrt_alphas_cumprod"], ["diffusion.betas"],
        ["spec.mel_fb"], ["stft.window"], ["rope.freqs_cis"], ["rope.cos_cached"],
        ["x.activation_post_process.scale"],
        ["albef.image_queue"], ["moco.text_queue"], ["moe.router.balance_bias"],
        ["moe.tokens_per_expert"], ["vq.code_usage"], ["returns.mean_square"],
        ["value_norm.running_mean", "value_norm.running_mean_sq", "value_norm.debiasing_term"],
        ["state.0.exp_avg", "state.0.exp_avg_sq"], ["exp_avg_sq.layer.weight"],
        ["optimizer.state.0.momentum_buffer", "optimizer.state.0.step"],
        ["vq._ema_cluster_size", "vq._ema_w"],
    ],
)  # fmt: skip
def test_buffers_by_other_names_are_copied(names: list[str]) -> None:
    tensors: Tensors = dict.fromkeys(names, ((8,), "F32"))
    assert set(kinds(tensors).values()) == {Kind.COPY}


@pytest.mark.parametrize(
    "name",
    ["log_std", "mask_token", "meaningful.weight", "counter_proj.weight", "mean_pool.weight",
     "indexer.weight", "masked_lm.bias", "window_attn.scale", "queue_embed", "center_proj.bias",
     "v_scale_proj.weight", "optimizer.lstm.weight", "optim.fc.weight", "optimizer_net.fc.weight",
     "exp_avg_pool.weight", "experts.scale_per_expert"],
)  # fmt: skip
def test_names_that_only_contain_such_a_word_are_weights(name: str) -> None:
    assert classify(name, (8,), "F32").kind is not Kind.COPY


@pytest.mark.parametrize(
    ("table", "weight"),
    [
        ({"text_tokens": ((80, 77), "I64")}, "logit_scale"),
        ({"patch_order": ((14, 14), "I64")}, "cls_token"),
        ({"attn.neighbors": ((49, 9), "I64")}, "attn.gamma"),
        ({"vq.tok2code": ((100, 4), "I64"), "vq.codebooks": ((8, 8), "F32")}, "vq.weight"),
        ({"latent_tokens": ((4, 64), "F32"), "latent_std": ((4, 64), "F32")}, "cls_token"),
    ],
)  # fmt: skip
def test_what_is_trained_beside_tables_and_statistics_is_predicted(
    table: Tensors, weight: str
) -> None:
    for shape in ((), (16,), (1, 1, 192)) if "vq" not in weight else ((8, 8),):
        assert kinds(table | {weight: (shape, "F32")})[weight] is not Kind.COPY, shape


@pytest.mark.parametrize("size", [(8, 4), (1, 64, 16)])
@pytest.mark.parametrize(
    ("table", "statistics"),
    [
        ("embed", ["embed_avg", "cluster_size"]), ("embeddings", ["z_avg", "N"]),
        ("_embedding.weight", ["_ema_w", "_ema_cluster_size"]),
        ("codebook", ["codebook_ema", "usage"]),
    ],
)  # fmt: skip
def test_codebooks_that_follow_a_moving_average_are_copied_with_it(
    table: str, statistics: list[str], size: Shape
) -> None:
    average, count = statistics
    found = kinds(
        {
            f"vq.{table}": (size, "F32"), f"vq.{average}": (size, "F32"),
            f"vq.{count}": (size[:-1], "F32"), "vq.project.weight": ((3, 5), "F32"),
            "embedding.weight": (size, "F32"),
        }
    )  # fmt: skip
    assert [kind is Kind.COPY for kind in found.values()] == [True] * 3 + [False] * 2


def test_a_scale_beside_a_mean_of_its_shape_is_a_statistic() -> None:
    found = kinds(floats(mean=(8,), scale=(8,), head__scale=(8,)))
    assert found == {"mean": Kind.COPY, "scale": Kind.COPY, "head.scale": Kind.BIAS}


def test_all_beside_running_statistics_but_weight_and_bias_is_copied() -> None:
    tensors = floats(
        bn__weight=(8,), bn__bias=(8,), bn__running_mean=(8,), bn__running_var=(8,), bn__seen=()
    )
    assert [kind.value for kind in kinds(tensors).values()] == ["bias"] * 2 + ["copy"] * 3


# ---------------------------------------------------------------------- normalisation layers


@pytest.mark.parametrize("size", [8, 48])
@pytest.mark.parametrize(
    "name",
    ["q_norm.scale", "LayerNorm_0.scale", "norm.g", "rms_1.weight", "norm1.alpha", "ln_f.w",
     "lnf.weight", "attn.lnq.scale", "normalize.weight", "syncbn.gamma",
     "blocks.3.attn_norm.gamma", "RMSNorm_2.scale", "layernorm2d.weight", "norms.4.g",
     "final_layer_norm.rms_weight", "norm._orig_mod.weight", "k_norm.module.scale",
     "input_layernorm._checkpoint_wrapped_module.weight",
     "norm.modules_to_save.default.weight",
     "params/layers_0/LayerNorm_0/scale", "bert/encoder/LayerNorm/gamma:0"],
)  # fmt: skip
def test_in_a_norm_all_vectors_are_the_norm_s(name: str, size: int) -> None:
    for shape in [(size,), (1, size), (1, size, 1, 1), (size, 1, 1)]:
        tensors: Tensors = {name: (shape, "F32")}
        assert norms(tensors) == {name: name[: max(name.rfind("."), name.rfind("/"))]}
        assert kinds(tensors) == {name: Kind.BIAS}


@pytest.mark.parametrize("shape", [(4, 5, 5), (16, 16), (1, 8, 1, 1), (2, 3)])
@pytest.mark.parametrize(("factor", "offset"), [("weight", "bias"), ("gamma", "beta"), ("g", "b")])
def test_a_factor_and_an_offset_of_one_shape_are_a_norm(
    factor: str, offset: str, shape: Shape
) -> None:
    tensors: Tensors = {f"down.1.{factor}": (shape, "F32"), f"down.1.{offset}": (shape, "F32")}
    assert set(norms(tensors).values()) == {"down.1"}
    assert set(kinds(tensors).values()) == {Kind.BIAS}


def test_a_norm_over_each_head_is_one() -> None:
    assert norms(floats(attn__q_norm__weight=(4, 16))) == {"attn.q_norm.weight": "attn.q_norm"}


@pytest.mark.parametrize(
    ("before", "after"),
    [(floats(net__0__weight=(16, 8)), {}), ({}, floats(net__2__weight=(4, 16)))],
)
def test_a_numbered_vector_beside_a_linear_layer_is_a_norm(before: Tensors, after: Tensors) -> None:
    tensors = {**before, **floats(net__1__weight=(16,)), **after}
    assert norms(tensors) == {"net.1.weight": "net.1"}


@pytest.mark.parametrize(
    "tensors",
    [
        floats(net__0__weight=(16, 8, 3, 3), net__1__weight=(16,)),
        floats(net__0__weight=(16, 8), net__1__weight=(1,)),
        floats(net__0__weight=(1, 8), net__1__weight=(1,)),
        floats(net__0__weight=(16,), net__0__bias=(16,), net__1__weight=(16,)),
        floats(net__0__weight=(16, 8), net__1__weight=(12,)),
        floats(net__0__weight=(16, 8), net__1__slope=(16,)),
    ],
)
def test_a_numbered_vector_elsewhere_is_the_slope_of_an_activation(tensors: Tensors) -> None:
    assert not {name for name in norms(tensors) if name.startswith("net.1")}


@pytest.mark.parametrize(
    "tensors",
    [
        floats(proj_norm__weight=(8, 8), proj_norm__bias=(8,)),
        floats(conv_norm_relu__0__weight=(8, 8, 1, 1)),
        floats(norm_proj__weight=(8, 8)),
        floats(fc__weight=(8, 4), fc__weight_norm=(8,)),
        floats(table__weight=(8, 4), table__max_norm=(8,)),
        floats(snake__alpha=(1, 8, 1), snake__beta=(1, 8, 1)),
    ],
)
def test_other_layers_are_no_norms(tensors: Tensors) -> None:
    assert norms(tensors) == {}


def test_norms_within_a_fused_layer_are_found() -> None:
    tensors = floats(
        qkv__layer_norm_weight=(8,), qkv__layer_norm_bias=(8,), qkv__weight=(24, 8), qkv__bias=(24,)
    )
    assert norms(tensors) == dict.fromkeys(list(tensors)[:2], "qkv.layer_norm")
    assert [kind.value for kind in kinds(tensors).values()] == ["bias", "bias", "fc", "bias"]


def test_what_else_a_norm_has_is_kept() -> None:
    (layer,) = find_norm_layers({"frn.weight": (8,), "frn.bias": (8,), "frn.tau": (8,)})
    assert (layer.weight, layer.bias, layer.others) == ("frn.weight", "frn.bias", ("frn.tau",))
    assert layer.affine == ("frn.weight", "frn.bias", "frn.tau")


# ---------------------------------------------------------------------- dimensions


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv.weight_g", (16, 1, 1)), ("lin.weight_g", (16, 1)),
        ("c.parametrizations.weight.original0", (16, 1, 1, 1)),
        ("c.lora_magnitude_vector", (1, 16, 1, 1)),
        ("c.lora_magnitude_vector.default.weight", (1, 16, 1, 1)),
        ("att.time_mix_k", (1, 1, 16)), ("ffn.time_maa_r", (1, 1, 16)),
        ("grn.beta", (1, 1, 1, 16)), ("attn.temperature", (4, 1, 1)),
        ("snake.alpha", (1, 16, 1)), ("block.layer_scale_2", (16, 1, 1)), ("gain", (16, 1, 1, 1)),
        ("c.ia3_l", (1, 16, 1, 1)), ("b.noise_weight", (1, 16, 1, 1)), ("attn.logit_scale", (4, 1, 1)),
    ],
)  # fmt: skip
def test_one_factor_a_channel_is_bias(name: str, shape: Shape) -> None:
    assert classify(name, shape, "F32").kind is Kind.BIAS


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("block_sparse_moe.input_linear.weight", (4, 64, 32)),
        ("block_sparse_moe.output_linear.weight", (4, 32, 32)),
        ("mlp.experts.fc2.weight", (4, 96, 96)), ("moe.down_proj", (4, 32, 64)),
        ("shared_experts.gate_proj", (2, 16, 32)), ("ffn.grouped_linear.weight", (8, 12, 20)),
        ("head.probe", (1, 1, 16)), ("pool.query", (1, 4, 16)), ("cls_token1", (1, 1, 16)),
        ("pos_embed1", (1, 4, 16)), ("pos_embed_window", (1, 16, 8, 8)),
        ("quantizer.codevectors", (1, 64, 16)), ("rel_attn.q", (64, 4, 16)),
        ("rel_attn.k", (64, 4, 16)), ("rel_attn.r", (64, 4, 16)), ("const", (1, 16, 4, 4)),
        ("patch_embed.pos_emb.weight", (8, 8, 32)), ("head.weight", (1, 16)),
        ("MultiHeadDotProductAttention_0.query.kernel", (64, 4, 16)),
        ("attention/out/kernel:0", (4, 16, 64)),
    ],
)  # fmt: skip
def test_stacked_matrices_and_tables_are_fc(name: str, shape: Shape) -> None:
    assert classify(name, shape, "F32").kind is Kind.FC


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv.weight", (16, 8, 3)), ("pos_conv_embed.conv.weight", (64, 4, 128)),
        ("encoder.proj.weight", (16, 8, 1)), ("up.conv.weight", (16, 1, 32)),
        ("c.parametrizations.weight.original1", (16, 8, 7)), ("c.weight_v", (16, 8, 7)),
        ("head.conv.weight", (1, 16, 1, 1)), ("stem.weight", (16, 1, 1, 1)),
        ("Conv_0.kernel", (3, 3, 8, 16)), ("eca.conv.weight", (1, 1, 5)),
        ("stem.linear.weight", (16, 8, 3, 3)), ("my_filter", (16, 8, 5, 5)),
        ("net.conv", (10, 3, 5, 2)), ("conv_w", (16, 8, 3)), ("theta", (16, 8, 3, 1)),
        ("experts.3.conv.weight", (16, 8, 3)), ("rpr_scale.conv.weight", (16, 1, 1, 1)),
    ],
)  # fmt: skip
def test_convolutions_are_conv(name: str, shape: Shape) -> None:
    assert classify(name, shape, "F32").kind is Kind.CONV


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    "name",
    ["params.Conv_0.kernel", "params/stage/ConvBlock_0/Conv_1/kernel", "conv2d_3.kernel:0"],
)
def test_pointwise_kernels_of_flax_are_no_fixed_filters(name: str, size: int) -> None:
    for shape in [(1, 1, size, size), (1, 1, size, 2 * size), (1, 1, 4, 4)]:
        assert classify(name, shape, "F32").kind is Kind.CONV
    assert classify("downs.0.kernel", (1, 1, size, 2 * size), "F32").kind is Kind.CONV
    assert classify("blur.kernel", (1, 1, 4, 4), "F32").kind is Kind.COPY
    assert classify("down.lowpass.filter", (1, 1, 12), "F32").kind is Kind.COPY


@pytest.mark.parametrize("dtype", sorted(COMPUTABLE))
def test_a_causal_mask_within_wrappers_is_copied(dtype: str) -> None:
    assert classify("h.0.attn._orig_mod.bias", (1, 1, 16, 16), dtype).kind is Kind.COPY
