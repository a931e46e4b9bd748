"""The table of kinds, against inventories of real architectures that were reviewed by eye."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from know_cli.checkpoints.dtypes import BITS
from know_cli.kinds import (
    COMPUTABLE,
    RULES,
    Kind,
    Override,
    classify,
    classify_all,
    deciding_rules,
    parse_override,
)
from know_cli.normalisation import find_norm_layers

INVENTORIES = sorted((Path(__file__).parent / "fixtures" / "inventories").glob("*.json"))
Row = tuple[str, list[int], str, str, "str | None", "str | None"]


def rows(path: Path) -> list[Row]:
    return [tuple(row) for row in json.loads(path.read_text(encoding="utf-8"))]


def test_there_are_many_inventories() -> None:
    names = {path.stem for path in INVENTORIES}
    wanted = "resnet convnext mobilenetv2 pvtv2 vit swin deit bert gpt2 llama t5 clip whisper mixtral mamba"
    assert names.issuperset([*wanted.split(), "torch-deeplab-head", "torch-resnet18"])


@pytest.mark.parametrize("path", INVENTORIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_inventory(path: Path, prefix: str) -> None:
    expected = rows(path)
    tensors = {prefix + name: (tuple(shape), dtype) for name, shape, dtype, *_ in expected}
    classes = classify_all(tensors)
    layers = {
        name: layer
        for layer in find_norm_layers({name: shape for name, (shape, _) in tensors.items()})
        for name in (*layer.affine, *layer.statistics)
    }
    for name, _, _, kind, norm, source in expected:
        layer = layers.get(prefix + name)
        assert classes[prefix + name].kind.value == kind, name
        assert (layer.prefix if layer else None) == (norm and prefix + norm), name
        assert (layer.source_weight if layer else None) == (source and prefix + source), name


# Written by hand, independently of the inventories: model → pattern → kind of all that match.
NOTABLE = {
    "vit": {r"cls_token|position_embeddings": "fc", r"projection\.weight": "conv"},
    "deit": {r"distillation_token": "fc"},
    "beit": {r"relative_position_bias_table|mask_token": "fc", r"lambda_\d": "bias"},
    "dinov2-registers": {r"register_tokens": "fc", r"layer_scale\d\.lambda1": "bias"},
    "clip": {r"class_embedding": "fc", r"patch_embedding\.weight": "conv", r"logit_scale": "bias"},
    "swin": {r"relative_position_bias_table": "fc", r"projection\.weight": "conv"},
    "swinv2": {r"logit_scale": "bias"},
    "convnext": {r"dwconv\.weight": "conv", r"pwconv\d\.weight": "fc", r"layer_scale_parameter": "bias"},
    "pvtv2": {r"spatial_reduction\.weight|dwconv\.weight": "conv"},
    "bert": {r"word_embeddings\.weight|position_embeddings\.weight": "fc", r"LayerNorm\.weight": "bias"},
    "gpt2": {r"c_attn\.weight|wte\.weight|wpe\.weight": "fc"},
    "gpt2-old": {r"attn\.bias|masked_bias": "copy", r"c_attn\.bias": "bias"},
    "llama": {r"embed_tokens\.weight|lm_head\.weight|q_proj\.weight": "fc"},
    "t5": {r"relative_attention_bias\.weight": "fc", r"layer_norm\.weight": "bias"},
    "whisper": {r"conv\d\.weight": "conv", r"embed_positions\.weight": "fc"},
    "mixtral": {r"experts\.\w+": "fc", r"gate\.weight": "fc"},
    "mamba": {r"conv1d\.weight": "conv", r"A_log": "fc", r"mixer\.D": "bias"},
    "resnet": {r"convolution\.weight": "conv", r"running_\w+|num_batches_tracked": "copy"},
    "mobilenetv2": {r"convolution\.weight": "conv", r"normalization\.weight": "bias"},
    "torch-deeplab-head": {r"convs\.\d\.0\.weight|classifier\.4\.weight": "conv"},
    "peft-lora": {r".*": "fc"},
    "quantised": {r".*(down|up|gate)_proj.*": "copy", r"lm_head\.weight": "fc"},
}  # fmt: skip


@pytest.mark.parametrize("model", NOTABLE)
def test_notable_tensors(model: str) -> None:
    path = next(path for path in INVENTORIES if path.stem == model)
    for pattern, kind in NOTABLE[model].items():
        matched = [row for row in rows(path) if re.search(rf"(?:^|\.)(?:{pattern})$", row[0])]
        assert matched, pattern
        for name, shape, dtype, *_ in matched:
            assert classify(name, tuple(shape), dtype).kind.value == kind, name


# A small checkpoint a rule, of which that rule decides on the first tensor.
EXAMPLES = [
    {"a.qweight": ((8, 8), "I32")},
    {"a.scale": ((8, 1), "F32"), "a.W_q": ((8, 8), "U8")},
    {"a.weight_u": ((8,), "F32"), "a.weight_orig": ((8, 8), "F32")},
    {"a.count": ((), "F32"), "a.running_mean": ((8,), "F32")},
    {"q_norm.scale": ((8,), "F32")},
    {"state.ema": ((8,), "F32")},
    {"x.inv_freq": ((8,), "F32")},
    {"h.0.attn.bias": ((1, 1, 8, 8), "F32")},
    {"a.weight_scale": ((), "F32")},
    {"criterion.weight": ((8,), "F32")},
    {"moe.gate.bias": ((8,), "F32"), "moe.experts.up": ((8, 4, 4), "F32")},
    {"cls_token": ((1, 1, 8), "F32")},
    {"alphas_cumprod": ((8,), "F32")},
    {"layer_scale": ((8, 1, 1), "F32")},
    {"experts.bias": ((4, 8), "F32")},
    {"conv.weight": ((8, 8, 3, 3), "F16")},
    {"fc.weight": ((8, 8), "F64")},
    {"act.weight": ((8,), "F32")},
]  # fmt: skip


def test_every_rule_decides_something() -> None:
    deciding = [deciding_rules(tensors)[next(iter(tensors))] for tensors in EXAMPLES]
    assert deciding == list(RULES)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("patch_embed.proj.weight", (64, 3, 16, 16), Kind.CONV),
        ("position_embedding_conv.weight", (64, 64, 3), Kind.CONV),
        ("my_experts_conv.weight", (64, 64, 3), Kind.CONV),
        ("attn.bias", (64,), Kind.BIAS),
        ("scale", (), Kind.BIAS),
        ("scales_proj.weight", (4, 4), Kind.FC),
        ("running_mean_head.weight", (4, 4), Kind.FC),
        ("pos_embed", (1, 197, 64), Kind.FC),
        ("features.absolute_pos_embed", (1, 49, 96), Kind.FC),
        ("encoder.pos_embedding", (1, 197, 64), Kind.FC),
        ("class_token", (1, 1, 64), Kind.FC),
    ],
)
def test_names_that_only_look_alike(name: str, shape: tuple[int, ...], kind: Kind) -> None:
    assert classify(name, shape, "F32").kind is kind


# A block of I-BERT, and the router of Zaya, with what of them is trained.
SIMULATED = {
    "emb.weight": ((90, 8), "fc"), "emb.weight_scaling_factor": ((1,), "copy"),
    "emb.weight_integer": ((90, 8), "copy"),
    "dense.weight": ((16, 8), "fc"), "dense.bias": ((16,), "bias"),
    "dense.weight_integer": ((16, 8), "copy"), "dense.bias_integer": ((16,), "copy"),
    "dense.fc_scaling_factor": ((16,), "copy"),
    "ln_input_act.x_max": ((1,), "copy"), "ln_input_act.act_scaling_factor": ((1,), "copy"),
    "LayerNorm.weight": ((8,), "bias"), "LayerNorm.bias": ((8,), "bias"),
    "LayerNorm.shift": ((1,), "copy"), "LayerNorm.activation.x_min": ((1,), "copy"),
    "LayerNorm.activation.act_scaling_factor": ((1,), "copy"),
    "mlp.gate.balancing_biases": ((5,), "copy"), "mlp.gate.out_proj.weight": ((5, 8), "fc"),
    "mlp.gate.out_proj.bias": ((5,), "bias"),
    # What is called nearly so, and is trained.
    "film.shift": ((8,), "bias"), "film.scale": ((8,), "bias"),
    "other.LayerNorm.shift": ((1,), "bias"), "other.LayerNorm.weight": ((8,), "bias"),
    "other.LayerNorm.bias": ((8,), "bias"), "other.activation.weight": ((8,), "bias"),
    "query_activation.act_scaling_factor": ((1,), "copy"), "shift": ((8,), "bias"),
    "scale_shift_table": ((6, 8), "fc"), "latent_scaling_factor": ((), "bias"),
    "scaling_factor": ((8,), "bias"), "integer_bias": ((8,), "bias"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module.ibert.encoder.layer.0.output."])
def test_what_quantised_training_computes_is_copied_and_what_it_trains_is_not(prefix: str) -> None:
    classes = classify_all(
        {prefix + name: (shape, "F32") for name, (shape, _) in SIMULATED.items()}
    )
    kinds = {name: classes[prefix + name].kind.value for name in SIMULATED}
    assert kinds == {name: kind for name, (_, kind) in SIMULATED.items()}


@given(st.text(max_size=30), st.lists(st.integers(0, 9), max_size=6), st.sampled_from(sorted(BITS)))
def test_every_tensor_has_a_kind_and_only_floats_are_predicted(
    name: str, shape: list[int], dtype: str
) -> None:
    found = classify(name, tuple(shape), dtype)
    assert found.reason
    if dtype not in COMPUTABLE:
        assert found.kind is Kind.COPY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head.*=copy", Override("head.*", Kind.COPY)),
        ("a=b=fc", Override("a=b", Kind.FC)),
    ],
)
def test_overrides_are_read(text: str, expected: Override) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["head.*", "=fc", "head.*=dense", "", "head="])
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--kind {text}: write PATTERN=KIND")):
        parse_override(text)


TENSORS = {"head.weight": ((4, 4), "F32"), "head.bias": ((4,), "F32"), "ids": ((4,), "I64")}


def test_the_last_override_counts() -> None:
    found = classify_all(TENSORS, [Override("head.*", Kind.COPY), Override("*.bias", Kind.FC)])
    assert (found["head.weight"].kind, found["head.bias"].kind) == (Kind.COPY, Kind.FC)
    assert found["head.bias"].reason == "--kind *.bias=fc"
    assert found["ids"].kind is Kind.COPY


def test_an_override_that_matches_nothing_names_what_is_close() -> None:
    with pytest.raises(
        ValueError, match=r"--kind haed.weight=fc: matches no tensor; close to it are head.weight"
    ):
        classify_all(TENSORS, [Override("haed.weight", Kind.FC)])


def test_what_cannot_be_computed_can_only_be_copied() -> None:
    with pytest.raises(ValueError, match="'ids' is I64, which can only be copied"):
        classify_all(TENSORS, [Override("ids", Kind.BIAS)])
    assert classify_all(TENSORS, [Override("ids", Kind.COPY)])["ids"].kind is Kind.COPY
