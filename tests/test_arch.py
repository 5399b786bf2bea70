"""Counts against the published models, configurations against transformers, selections against brute force."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from minitron_nemo.arch import Architecture, Axis, Plan
from minitron_nemo.arch.axes import AxisDim, Dim, GatedDim, HeadsDim, KVChannelsDim, QKVDim
from minitron_nemo.arch.counts import active_parameters, forward_flops_per_token, non_embedding_parameters, parameters
from minitron_nemo.arch.families import FAMILIES
from minitron_nemo.arch.huggingface import architecture_from_hf, hf_config, hf_warnings
from minitron_nemo.arch.nemo import architecture_from_nemo, nemo_config
from minitron_nemo.arch.tensors import tensors
from minitron_nemo.errors import UserError
from tests.tiny import LLAMA3_ROPE

LLAMA_31_8B = Architecture(32, 4096, 14336, 32, 8, 128, 128256, 131072, rotary_base=500000.0)
MISTRAL_NEMO_12B = Architecture(40, 5120, 14336, 32, 8, 128, 131072, 131072, rotary_base=1e6, model_type="mistral")
SMOLLM2_135M = Architecture(
    30, 576, 1536, 9, 3, 64, 49152, 8192, rotary_base=100000.0, share_embeddings_and_output_weights=True
)
NEMOTRON: dict[str, Any] = {"family": "nemotron", "model_type": "nemotron", "rotary_percent": 0.5}
NEMOTRON4_15B = Architecture(32, 6144, 24576, 48, 8, 128, 256000, 4096, **NEMOTRON)
QWEN25_7B = Architecture(28, 3584, 18944, 28, 4, 128, 152064, 131072, 1e-6, 1e6, family="qwen2", model_type="qwen2")
QWEN3_8B = Architecture(36, 4096, 12288, 32, 8, 128, 151936, 40960, 1e-6, 1e6, family="qwen3", model_type="qwen3")
MIXTRAL_8X7B = Architecture(
    *(32, 4096, 14336, 32, 8, 128, 32000, 32768),
    rotary_base=1e6,
    num_moe_experts=8,
    moe_ffn_hidden_size=14336,
    moe_router_topk=2,
    family="mixtral",
    model_type="mixtral",
)
QWEN3_30B_A3B = Architecture(
    *(48, 2048, 768, 32, 4, 128, 151936, 40960, 1e-6, 1e6),
    num_moe_experts=128,
    moe_ffn_hidden_size=768,
    moe_router_topk=8,
    family="qwen3_moe",
    model_type="qwen3_moe",
)
QWEN15_MOE_A27B = Architecture(
    *(24, 2048, 1408, 16, 16, 128, 151936, 8192, 1e-6, 1e6),
    num_moe_experts=60,
    moe_ffn_hidden_size=1408,
    moe_router_topk=4,
    moe_router_pre_softmax=True,
    moe_shared_expert_intermediate_size=5632,
    family="qwen2_moe",
    model_type="qwen2_moe",
)
PHI3_MINI = Architecture(32, 3072, 8192, 32, 32, 96, 32064, 4096, window_size=2047, family="phi3", model_type="phi3")


@pytest.mark.parametrize(
    ("architecture", "total", "non_embedding"),
    [
        (LLAMA_31_8B, "8.030", "6.980"),
        # Llama-3.1-Minitron-4B, width and depth (2408.11796, table 2)
        (LLAMA_31_8B.resized({Axis.HIDDEN: 3072, Axis.FFN: 9216}), "4.513", "3.725"),
        (LLAMA_31_8B.resized({Axis.LAYERS: 16}), "4.540", "3.490"),
        # MN-Minitron-8B
        (MISTRAL_NEMO_12B.resized({Axis.HIDDEN: 4096, Axis.FFN: 11520}), "8.414", "7.340"),
        # Nemotron-4 15B, Minitron 8B and 4B (2407.14679, table 10)
        (NEMOTRON4_15B, "15.629", "12.483"),
        (NEMOTRON4_15B.resized({Axis.HIDDEN: 4096, Axis.FFN: 16384}), "8.272", "6.175"),
        (NEMOTRON4_15B.resized({Axis.HIDDEN: 3072, Axis.FFN: 9216, Axis.HEADS: 24}), "4.191", "2.618"),
    ],
)
def test_parameter_counts_are_the_published_ones(architecture: Architecture, total: str, non_embedding: str) -> None:
    assert f"{parameters(architecture) / 1e9:.3f}" == total
    assert f"{non_embedding_parameters(architecture) / 1e9:.3f}" == non_embedding


@pytest.mark.parametrize(
    ("architecture", "total", "active"),
    [(MIXTRAL_8X7B, "46.70", "12.88"), (QWEN3_30B_A3B, "30.53", "3.35"), (QWEN15_MOE_A27B, "14.32", "2.69")],
)
def test_parameter_counts_of_mixtures_are_the_published_ones(
    architecture: Architecture, total: str, active: str
) -> None:
    assert f"{parameters(architecture) / 1e9:.2f}" == total
    assert f"{active_parameters(architecture) / 1e9:.2f}" == active
    fewer = architecture.resized({Axis.EXPERTS: architecture.moe_router_topk or 0})
    assert active_parameters(fewer) == parameters(fewer) < active_parameters(architecture)  # fewer rows of the router


@pytest.mark.parametrize(
    "architecture",
    [NEMOTRON4_15B, QWEN25_7B, QWEN3_8B, PHI3_MINI, MIXTRAL_8X7B, QWEN3_30B_A3B, QWEN15_MOE_A27B],
    ids=lambda a: a.family,
)
def test_parameter_and_flop_counts_are_those_of_transformers_model(architecture: Architecture) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(architecture, "bfloat16")))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameters(architecture) == sum(sizes.values())
    inside = {name: size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name}
    assert non_embedding_parameters(architecture) == sum(inside.values())
    matrices = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() == 2)
    matrices -= sizes["model.embed_tokens.weight"]  # a table, not a product
    stacks = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 3)  # of experts
    matrices += stacks * (architecture.moe_router_topk or 0) // (architecture.num_moe_experts or 1)
    length = 4096
    window = architecture.window_size or length
    pairs = sum(min(token + 0.5, window - 0.5) for token in range(length))  # half of a token's view of itself
    attention = 4 * pairs / length * architecture.num_layers * architecture.num_attention_heads
    expected = 2 * matrices + attention * architecture.kv_channels
    assert forward_flops_per_token(architecture, length) == pytest.approx(expected, rel=1e-4)


def test_parameter_counts_of_smollm2_are_exact() -> None:
    assert parameters(SMOLLM2_135M) == 134_515_008
    assert non_embedding_parameters(SMOLLM2_135M) == 106_203_456


@pytest.mark.parametrize(
    "architecture",
    [
        LLAMA_31_8B,
        SMOLLM2_135M,
        Architecture(4, 64, 96, 8, 4, 16, 259, 512, layernorm_epsilon=1e-6, rope_scaling=LLAMA3_ROPE),
        MISTRAL_NEMO_12B,
        NEMOTRON4_15B,
        QWEN25_7B,
        QWEN3_8B,
        PHI3_MINI,
        MIXTRAL_8X7B,
        QWEN3_30B_A3B,
        replace(QWEN3_30B_A3B, moe_router_pre_softmax=True),
        QWEN15_MOE_A27B,
    ],
)
def test_configuration_survives_transformers(architecture: Architecture) -> None:
    ours = hf_config(architecture, "bfloat16")
    assert architecture_from_hf(ours) == architecture
    theirs = AutoConfig.for_model(**ours)
    assert theirs.head_dim == architecture.kv_channels
    assert theirs.num_key_value_heads == architecture.num_query_groups
    assert theirs.rope_parameters["rope_theta"] == architecture.rotary_base
    assert theirs.rope_parameters["rope_type"] == ("llama3" if architecture.rope_scaling else "default")
    assert theirs.rope_parameters.get("partial_rotary_factor", 1.0) == architecture.rotary_percent
    assert (getattr(theirs, "sliding_window", None) or None) == architecture.window_size
    assert theirs.tie_word_embeddings == architecture.share_embeddings_and_output_weights
    # What transformers 5 writes has other keys than what we wrote.
    assert "rope_parameters" in theirs.to_dict()
    assert architecture_from_hf(theirs.to_dict()) == architecture


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_features_of_other_families_are_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        architecture_from_hf(hf_config(SMOLLM2_135M, "bfloat16") | change)


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        (PHI3_MINI, {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "rope_type 'su'"),
        (PHI3_MINI, {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        (QWEN25_7B, {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN3_8B, {"attention_bias": True}, "attention_bias is True"),
        (NEMOTRON4_15B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'relu2' is supported"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only \[\] is supported"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 is supported"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_in_one_line(
    architecture: Architecture, change: dict, named: str
) -> None:
    with pytest.raises(UserError, match=named) as error:
        architecture_from_hf(hf_config(architecture, "bfloat16") | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "4k"}, "hidden_size is '4k'; it must be a whole number, at least 1"),
        ({"num_layers": 2.5}, "num_layers is 2.5; it must be a whole number"),
        ({"num_layers": True}, "num_layers is True; it must be a whole number"),
        ({"kv_channels": 0}, "kv_channels is 0; it must be a whole number, at least 1"),
        ({"num_query_groups": 0}, "num_query_groups is 0; it must be a whole number, at least 1"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None; it must be a whole number"),
        ({"layernorm_epsilon": "1e-5"}, "layernorm_epsilon is '1e-5'; it must be a number above 0"),
        ({"rotary_base": float("nan")}, "rotary_base is nan; it must be a number above 0"),
        ({"rotary_percent": 2.0}, "rotary_percent is 2; it must be a share, up to 1"),
        ({"window_size": 0}, "window_size is 0; it must be a whole number, at least 1, or null"),
        ({"share_embeddings_and_output_weights": "no"}, "share_embeddings_and_output_weights is 'no'; it must be true"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be keys with values, or null"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": "8"}}, "rope_scaling: factor is '8'; it must be a number above 0"),
        ({"family": ["llama"]}, r"family is \['llama'\]; it must be a name"),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_named(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"^model.architecture: {named}"):
        Architecture.from_dict(SMOLLM2_135M.to_dict() | change, "model.architecture")


def test_a_field_that_is_missing_is_named() -> None:
    given = SMOLLM2_135M.to_dict()
    del given["kv_channels"]
    with pytest.raises(UserError, match="^model.architecture: key 'kv_channels' is missing$"):
        Architecture.from_dict(given, "model.architecture")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None, "head_dim": None}, "hidden_size is None; it must be a whole number, at least 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0; it must be a whole number"),
        ({"intermediate_size": "4k"}, "intermediate_size is '4k'; it must be a whole number"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None; it must be a whole number"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be keys with values, or null"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "architecture: rope_scaling: low_freq_factor is None",
        ),
        ({"rope_theta": "x"}, "architecture: rotary_base is 'x'; it must be a number above 0"),
        ({"head_dim": "64"}, "architecture: kv_channels is '64'; it must be a whole number"),
        ({"sliding_window": "4096"}, "architecture: window_size is '4096'; it must be a whole number"),
        ({"rms_norm_eps": None}, "architecture: layernorm_epsilon is None; it must be a number above 0"),
    ],
)
def test_a_value_of_config_json_that_its_key_cannot_have_is_named(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"^here/config.json: {named}"):
        architecture_from_hf(hf_config(MISTRAL_NEMO_12B, "bfloat16") | change, "here/config.json")


def test_an_unknown_family_and_a_model_type_of_another_are_refused() -> None:
    with pytest.raises(
        UserError,
        match="family 'gemma' is not known; known: llama, mixtral, nemotron, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe",
    ):
        replace(SMALL, family="gemma")
    with pytest.raises(UserError, match="model_type 'llama' is not one of family 'qwen2': qwen2"):
        replace(SMALL, family="qwen2")


@pytest.mark.parametrize(
    ("architecture", "change", "named"),
    [
        (LLAMA_31_8B, {"num_moe_experts": 8}, "num_moe_experts is 8, and family 'llama' has no such experts"),
        (MIXTRAL_8X7B, {"num_moe_experts": None}, "num_moe_experts is None, and family 'mixtral' needs a number"),
        (MIXTRAL_8X7B, {"moe_router_topk": 1}, "moe_router_topk is 1 and moe_router_pre_softmax is false"),
        (MIXTRAL_8X7B, {"num_moe_experts": 1}, "moe_router_topk 2 is not from 1 to num_moe_experts 1"),
        (MIXTRAL_8X7B, {"moe_ffn_hidden_size": 7168}, "ffn_hidden_size 14336 is not moe_ffn_hidden_size 7168"),
    ],
)
def test_experts_that_a_family_cannot_have_are_refused(architecture: Architecture, change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        replace(architecture, **change)


def test_shapes_that_transformers_refuses_are_warned_of() -> None:
    odd = SMOLLM2_135M.resized({Axis.HIDDEN: 448})
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        LlamaConfig(**hf_config(odd, "bfloat16"))
    assert len(hf_warnings(odd)) == 1
    assert hf_warnings(SMOLLM2_135M) == []


SMALL = Architecture(2, 10, 6, 6, 2, 4, 11, 32)  # 3 heads per group
KEPT = {Axis.HIDDEN: [0, 3, 9], Axis.FFN: [1, 2, 5], Axis.HEADS: [0, 2, 4, 5]}


def _labels(dim: Dim) -> list[tuple]:
    """What each row of a dim of SMALL is, spelled out row by row."""
    if isinstance(dim, AxisDim):
        return [(dim.axis, entry) for entry in range(SMALL.size(dim.axis))]
    if isinstance(dim, GatedDim):
        return [(dim.axis, entry, half) for half in ("gate", "up") for entry in range(SMALL.size(dim.axis))]
    if isinstance(dim, KVChannelsDim):
        return [("channel", channel) for channel in range(4)]
    if isinstance(dim, HeadsDim):
        return [(Axis.HEADS, head, channel) for head in range(6) for channel in range(4)]
    rows: list[tuple] = []
    for group in range(2):
        for head in range(3 * group, 3 * group + 3):
            rows += [(Axis.HEADS, head, channel) for channel in range(4)]
        rows += [("key", group, channel) for channel in range(4)]
        rows += [("value", group, channel) for channel in range(4)]
    return rows


@pytest.mark.parametrize(
    "dim", [AxisDim(Axis.HIDDEN), AxisDim(Axis.VOCAB), GatedDim(Axis.FFN), HeadsDim(), KVChannelsDim(), QKVDim()]
)
def test_selection_keeps_exactly_the_rows_of_kept_entries(dim: Dim) -> None:
    labels = _labels(dim)
    assert dim.size(SMALL) == len(labels)
    kept = {axis: np.array(entries) for axis, entries in KEPT.items()}
    wanted = [row for row, label in enumerate(labels) if label[0] not in KEPT or label[1] in KEPT[label[0]]]
    selected = dim.select(SMALL, kept)
    assert wanted == (list(range(len(labels))) if selected is None else selected.tolist())
    assert dim.select(SMALL, {}) is None


@pytest.mark.parametrize(
    ("family", "outside", "in_a_layer"),
    [
        *(("llama", 3, 9), ("qwen2", 3, 12), ("qwen3", 3, 11), ("nemotron", 4, 10), ("phi3", 3, 6)),
        # router, 5 experts
        *(("mixtral", 3, 7 + 3 * 5), ("qwen3_moe", 3, 9 + 3 * 5), ("qwen2_moe", 3, 10 + 3 * 5 + 4)),
    ],
)
def test_every_huggingface_row_has_one_place(family: str, outside: int, in_a_layer: int) -> None:
    experts = FAMILIES[family].mixture_of_experts and {
        "num_moe_experts": 5,
        "moe_ffn_hidden_size": SMALL.ffn_hidden_size,
        "moe_router_topk": 2,
        "moe_shared_expert_intermediate_size": 4 if FAMILIES[family].moe_shared_expert_gate else None,
    }
    small = replace(SMALL, family=family, model_type=next(iter(FAMILIES[family].hugging_face)), **(experts or {}))
    places: dict[str, list[int]] = {}
    for tensor in tensors(small):
        position = 0
        for piece in tensor.hf_pieces(small):
            assert piece.start == position
            position += piece.length
            places.setdefault(piece.hf_name, []).extend(range(piece.hf_start, piece.hf_start + piece.length))
        assert position == tensor.spec.shape(small)[0]
    assert all(sorted(rows) == list(range(len(rows))) for rows in places.values())
    assert len(places) == outside + 2 * in_a_layer


def test_plan_survives_its_file(tmp_path) -> None:
    target = SMALL.resized({Axis.HIDDEN: 3, Axis.FFN: 3, Axis.HEADS: 4, Axis.LAYERS: 1})
    plan = Plan(
        source=SMALL,
        target=target,
        kept_layers=(1,),
        kept_hidden=(0, 3, 9),
        kept_ffn=((1, 2, 5),),
        kept_heads=((0, 2, 4, 5),),
        gaps={"hidden_size": 0.25},
        provenance={"scores": "abc"},
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert replace(plan, kept_hidden=(0, 3, 8)) != plan


def test_a_plan_of_many_entries_has_them_as_lists_in_its_file(tmp_path) -> None:
    source = replace(SMALL, ffn_hidden_size=70000)
    kept = [list(range(layer, 70000, 7)) for layer in range(source.num_layers)]
    says = '"[' + "1, " * 100 + "]"  # not a list, though it looks like one
    plan = Plan(
        source,
        source.resized({Axis.FFN: 10000}),
        tuple(range(source.num_layers)),
        kept_ffn=kept,
        provenance={"note": says, "entries": 3, "layers": [0, 1]},
    )
    plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["kept_ffn"] == kept and written["provenance"]["note"] == says
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan and read.kept_ffn is not None
    assert read.kept_ffn[1] == kept[1] and hash(read.kept_ffn[1]) == hash(tuple(kept[1]))
    assert read.kept(1)[Axis.FFN].tolist() == kept[1]
    assert 8 in read.kept_ffn[1] and 9 not in read.kept_ffn[1]


@pytest.mark.parametrize(
    "text", ["[0, 1.5, 9]", f"[0, 3, {2**32 + 9}]", f"[0, 3, {2**70}]", "[[0, 3, 9]]", '"0, 3, 9"', "[true, true]"]
)
def test_lists_that_are_not_of_entries_are_refused(text: str, tmp_path) -> None:
    plan = Plan(SMALL, SMALL.resized({Axis.HIDDEN: 3}), tuple(range(SMALL.num_layers)), kept_hidden=(0, 3, 9))
    plan.save(tmp_path / "plan.json")
    content = (tmp_path / "plan.json").read_text()
    assert '"kept_hidden": [0, 3, 9]' in content
    (tmp_path / "plan.json").write_text(content.replace("[0, 3, 9]", text))
    with pytest.raises(UserError, match="plan.json"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kept_hidden": (0, 3)}, "kept_hidden keeps 2"),
        ({"kept_hidden": (3, 0, 9)}, "ascending"),
        ({"kept_hidden": (0, 3, 10)}, "within"),
        ({"kept_hidden": None}, "hidden_size shrinks"),
        ({"kept_heads": ((0, 1, 2, 5),)}, "heads per query group"),
        ({"kept_ffn": ((1, 2, 5), (1, 2, 5))}, "kept_ffn has 2 layers"),
    ],
)
def test_plans_that_do_not_fit_are_refused(change: dict, named: str) -> None:
    fitting: dict[str, Any] = {
        "source": SMALL,
        "target": SMALL.resized({Axis.HIDDEN: 3, Axis.FFN: 3, Axis.HEADS: 4, Axis.LAYERS: 1}),
        "kept_layers": (1,),
        "kept_hidden": (0, 3, 9),
        "kept_ffn": ((1, 2, 5),),
        "kept_heads": ((0, 2, 4, 5),),
    }
    Plan(**fitting)
    with pytest.raises(UserError, match=named):
        Plan(**fitting | change)


MIXTURE = replace(
    SMALL,
    num_moe_experts=4,
    moe_ffn_hidden_size=6,
    moe_router_topk=2,
    family="mixtral",
    model_type="mixtral",
)
FEWER_EXPERTS: dict[str, Any] = {
    "source": MIXTURE,
    "target": MIXTURE.resized({Axis.EXPERTS: 2, Axis.MOE_FFN: 3}),
    "kept_layers": (0, 1),
    "kept_experts": ((0, 3), (1, 2)),
    "kept_moe_ffn": (((0, 1, 2), (3, 4, 5)), ((0, 2, 4), (1, 3, 5))),
}


def test_a_plan_for_experts_survives_its_file_and_numbers_them_anew(tmp_path) -> None:
    plan = Plan(**FEWER_EXPERTS)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    named = {tensor.name: tensor for tensor in tensors(plan.target)}
    second = named["decoder.layers.1.mlp.experts.experts.1.linear_fc1.weight"]
    assert plan.source_name(second) == "decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight"
    kept = {axis: entries.tolist() for axis, entries in plan.kept(1, 1).items()}
    assert kept == {Axis.EXPERTS: [1, 2], Axis.MOE_FFN: [1, 3, 5]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kept_experts": None}, "num_moe_experts shrinks"),
        ({"kept_experts": ((0, 4), (1, 2))}, r"kept_experts\[0\] must be ascending, unique and within"),
        ({"kept_experts": ((0, 3),)}, "kept_experts has 1 layers"),
        ({"kept_moe_ffn": None}, "moe_ffn_hidden_size shrinks"),
        ({"kept_moe_ffn": (((0, 1, 2), (3, 4, 5)),)}, "kept_moe_ffn has 1 layers"),
        ({"kept_moe_ffn": (((0, 1, 2),), ((0, 2, 4), (1, 3, 5)))}, r"kept_moe_ffn\[0\] has 1 experts, the target 2"),
        ({"kept_moe_ffn": (((0, 1), (3, 4, 5)), ((0, 2, 4), (1, 3, 5)))}, r"kept_moe_ffn\[0\]\[0\] keeps 2 entries"),
    ],
)
def test_plans_for_experts_that_do_not_fit_are_refused(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Plan(**FEWER_EXPERTS | change)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama.Llama31Config8B", LLAMA_31_8B),
        ("mistral.MistralNeMoConfig12B", replace(MISTRAL_NEMO_12B, max_position_embeddings=4096)),
        ("nemotron.Nemotron4Config15B", NEMOTRON4_15B),
        ("qwen2.Qwen25Config7B", QWEN25_7B),
        ("qwen3.Qwen3Config8B", QWEN3_8B),
        ("phi3mini.Phi3ConfigMini", replace(PHI3_MINI, window_size=None)),  # it has no window there
    ],
)
def test_nemos_classes_are_the_published_models(name: str, published: Architecture) -> None:
    scaling = published.model_type == "llama" and {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    class_name = f"nemo.collections.llm.gpt.model.{name}"
    found = architecture_from_nemo(class_name, {}, "config", published.vocab_size)
    assert found == replace(published, rope_scaling=scaling or None)
    assert architecture_from_nemo(*nemo_config(found, "bfloat16"), "config", None) == found
