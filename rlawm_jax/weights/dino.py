"""The dialects in which DINOv2 and DINOv3 checkpoints are published, as conversion tables.

They are those of Hugging Face's hub files and transformers' in-memory models, Meta's files, and timm's DINOv3; a file's
tensor names show its dialect. Tensors that a frozen encoder never uses (mask token, RoPE periods, bias masks) are
ignored by name.
"""

import numpy as np

from rlawm_jax.models.vit import ROPE_BASE, VitSpec
from rlawm_jax.weights.rules import Rule, Table, Transform, linear, norm, split

BLOCK = "stack.blocks"
LAYER = "[{i}]"
MASK_TOKEN = "used in pretraining only"

ROW = Transform(lambda x: (x.reshape(-1),), lambda x: x.reshape(1, 1, -1))
ROWS = Transform(lambda x: (x.reshape(x.shape[1:]),), lambda x: x[None])


def _patch_transform(patch: int) -> Transform:
    """An [out, in, kh, kw] convolution with stride equal to kernel size, as a linear on flat (row, col, in) patches."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),)

    def backward(x: np.ndarray) -> np.ndarray:
        return x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)

    return Transform(forward, backward)


def _stem(
    spec: VitSpec, *, patch: str, cls_token: str, registers: str, position: str = "pos_embed", final_norm: str = "norm"
) -> list[Rule]:
    """Rules outside the blocks."""
    rules = [
        Rule(f"{patch}.weight", ("patch.kernel",), _patch_transform(spec.patch)),
        Rule(f"{patch}.bias", ("patch.bias",)),
        Rule(cls_token, ("cls_token",), ROW),
        *norm(final_norm, "norm"),
    ]
    if spec.registers:
        rules.append(Rule(registers, ("register_tokens",), ROWS))
    if spec.position_grid:
        rules.append(Rule(position, ("position",), ROWS))
    return rules


def _layers(prefix: str, modules: dict[str, str], scales: tuple[str, str]) -> list[Rule]:
    """Rules of the norms, LayerScales and named linears inside the blocks."""
    rules = [rule for n in ("norm1", "norm2") for rule in norm(f"{prefix}.{n}", f"{BLOCK}.{n}", LAYER)]
    rules += [Rule(f"{prefix}.{name}", (f"{BLOCK}.scale{n}{LAYER}",)) for n, name in enumerate(scales, 1)]
    for source, target in modules.items():
        rules += linear(f"{prefix}.{source}", f"{BLOCK}.{target}", LAYER)
    return rules


def _slots(leaf: str, *modules: str) -> tuple[str, ...]:
    return tuple(f"{BLOCK}.{module}.{leaf}{LAYER}" for module in modules)


def _fused_qkv(source: str) -> Rule:
    return Rule(f"{source}.weight", _slots("kernel", "attn.query", "attn.key", "attn.value"), split(3, transpose=True))


def _drop_key_bias() -> Transform:
    """A fused q, k, v bias whose middle third is always masked to zero in use, so that no leaf holds it."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        query, _, value = np.split(x, 3)
        return query, value

    return Transform(forward, lambda query, value: np.concatenate([query, np.zeros_like(query), value]))


def _separate(names: tuple[str, str, str, str]) -> dict[str, str]:
    return dict(zip(names, ("attn.query", "attn.key", "attn.value", "attn.out"), strict=True))


HF_HUB_ATTENTION = _separate(
    ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense")
)
HF_ATTENTION = _separate(("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"))
HF_GATED_MLP = {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
HF_SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")
PLAIN_MLP = {"mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}


def _packed_mlp(prefix: str, packed: str) -> list[Rule]:
    """The first linear of a gated MLP, which holds both halves: gate, then up."""
    targets = ("mlp.gate", "mlp.up")
    return [
        Rule(f"{prefix}.{packed}.weight", _slots("kernel", *targets), split(2, transpose=True)),
        Rule(f"{prefix}.{packed}.bias", _slots("bias", *targets), split(2)),
    ]


def _dinov2_hf(spec: VitSpec, *, hub: bool) -> Table:
    prefix, packed = "encoder.layer.{i}", []
    mlp = HF_GATED_MLP if spec.gated else PLAIN_MLP
    if spec.gated and hub:
        mlp, packed = {"mlp.weights_out": "mlp.down"}, _packed_mlp(prefix, "mlp.weights_in")
    stem = _stem(
        spec,
        patch="embeddings.patch_embeddings.projection",
        cls_token="embeddings.cls_token",
        registers="embeddings.register_tokens",
        position="embeddings.position_embeddings",
        final_norm="layernorm",
    )
    attention = HF_HUB_ATTENTION if hub else HF_ATTENTION
    return Table(
        "Hugging Face hub" if hub else "transformers in-memory",
        (*stem, *_layers(prefix, {**attention, **mlp}, HF_SCALES), *packed),
        ignored={"embeddings.mask_token": MASK_TOKEN},
        constants={"embeddings.mask_token": np.zeros((1, spec.width), np.float32)},
    )


def _dinov2_meta(spec: VitSpec) -> Table:
    prefix = "blocks.{i}"
    mlp, packed = PLAIN_MLP, []
    if spec.gated:
        mlp, packed = {"mlp.w3": "mlp.down"}, _packed_mlp(prefix, "mlp.w12")
    qkv = ("attn.query", "attn.key", "attn.value")
    return Table(
        "Meta",
        (
            *_stem(spec, patch="patch_embed.proj", cls_token="cls_token", registers="register_tokens"),
            *_layers(prefix, {"attn.proj": "attn.out", **mlp}, ("ls1.gamma", "ls2.gamma")),
            _fused_qkv(f"{prefix}.attn.qkv"),
            Rule(f"{prefix}.attn.qkv.bias", _slots("bias", *qkv), split(3)),
            *packed,
        ),
        ignored={"mask_token": MASK_TOKEN},
        constants={"mask_token": np.zeros((1, spec.width), np.float32)},
    )


def _dinov3_hf(spec: VitSpec, *, hub: bool) -> Table:
    prefix = "layer.{i}" if hub else "model.layer.{i}"
    mlp = HF_GATED_MLP if spec.gated else {"mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
    stem = _stem(
        spec,
        patch="embeddings.patch_embeddings",
        cls_token="embeddings.cls_token",
        registers="embeddings.register_tokens",
    )
    return Table(
        "Hugging Face hub" if hub else "transformers in-memory",
        (*stem, *_layers(prefix, {**HF_ATTENTION, **mlp}, HF_SCALES)),
        ignored={"embeddings.mask_token": MASK_TOKEN},
        constants={"embeddings.mask_token": np.zeros((1, 1, spec.width), np.float32)},
    )


def _dinov3_meta(spec: VitSpec) -> Table:
    prefix, width, quarter = "blocks.{i}", spec.width, spec.width // spec.heads // 4
    mlp = {"mlp.w1": "mlp.gate", "mlp.w2": "mlp.up", "mlp.w3": "mlp.down"} if spec.gated else PLAIN_MLP
    constants = {
        "mask_token": np.zeros((1, width), np.float32),
        "rope_embed.periods": (ROPE_BASE ** (np.arange(quarter) / quarter)).astype(np.float32),
    }
    if spec.query_bias:
        mask = np.repeat(np.array([1, 0, 1], np.float32), width)
        constants |= {f"blocks.{i}.attn.qkv.bias_mask": mask for i in range(spec.depth)}
    return Table(
        "Meta",
        (
            *_stem(spec, patch="patch_embed.proj", cls_token="cls_token", registers="storage_tokens"),
            *_layers(prefix, {"attn.proj": "attn.out", **mlp}, ("ls1.gamma", "ls2.gamma")),
            _fused_qkv(f"{prefix}.attn.qkv"),
            Rule(f"{prefix}.attn.qkv.bias", _slots("bias", "attn.query", "attn.value"), _drop_key_bias()),
        ),
        ignored={
            "mask_token": MASK_TOKEN,
            "rope_embed.periods": "a constant of the architecture",
            f"{prefix}.attn.qkv.bias_mask": "states that the key bias is zero, as the architecture implies",
            "local_cls_norm.{leaf}": "normalises the CLS token of local crops in pretraining",
        },
        constants=constants,
    )


def _dinov3_timm(spec: VitSpec) -> Table:
    prefix = "blocks.{i}"
    mlp = {"mlp.fc1_g": "mlp.gate", "mlp.fc1_x": "mlp.up", "mlp.fc2": "mlp.down"} if spec.gated else PLAIN_MLP
    zero = "timm leaves out q and v biases that were zero"
    return Table(
        "timm",
        (
            *_stem(spec, patch="patch_embed.proj", cls_token="cls_token", registers="reg_token"),
            *_layers(prefix, {"attn.proj": "attn.out", **mlp}, ("gamma_1", "gamma_2")),
            _fused_qkv(f"{prefix}.attn.qkv"),
            Rule(f"{prefix}.attn.q_bias", _slots("bias", "attn.query")),
            Rule(f"{prefix}.attn.v_bias", _slots("bias", "attn.value")),
        ),
        optional={f"{BLOCK}.attn.query.bias": zero, f"{BLOCK}.attn.value.bias": zero},
    )


def backbone_tables(spec: VitSpec) -> list[Table]:
    """Every dialect in which a backbone of this family is published."""
    if spec.family == "dinov2":
        return [_dinov2_hf(spec, hub=True), _dinov2_hf(spec, hub=False), _dinov2_meta(spec)]
    return [_dinov3_hf(spec, hub=True), _dinov3_hf(spec, hub=False), _dinov3_meta(spec), _dinov3_timm(spec)]
