"""The released networks' layout in PyTorch, written from their parameter names and formulas, with random weights.

For comparison only: state_dict names and shapes are those of the published checkpoints, so the same code converts both,
and these networks load the published checkpoints with strict=True.
Shapes: b batch, l patches, c width, k RLA tokens, d RLA width, t action rows.
"""

import math

import torch
from torch import nn
from torch.nn.functional import gelu
from torch.nn.utils.rnn import pack_padded_sequence


def randomise(module: nn.Module, seed: int = 0, std: float = 0.15) -> nn.Module:
    """Every parameter N(0, std), norm weights around 1; none is zero, which would hide a branch. float32, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, std, generator=generator).add_(float(id(parameter) in norms))
    return module.eval()


class Attention(nn.MultiheadAttention):
    """torch's multi-head attention, batch first, with a packed in_proj_weight because all widths agree."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, batch_first=True)

    def forward(self, x, context=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        context = x if context is None else context
        return super().forward(x, context, context, need_weights=False)[0]


def mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False)


class Block(nn.Module):
    """Pre-norm block of the token transformer."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.norm1, self.norm2 = plain_norm(width), plain_norm(width)
        self.attn, self.mlp = Attention(width, heads), mlp(width, ratio)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenTransformer(nn.Module):
    """Encoder (`latent_dim` None) and decoder of the RLA autoencoder."""

    def __init__(self, in_dim, out_dim, num_tokens, width, depth, heads, ratio, latent_dim=None):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, width))
        if latent_dim:
            self.token_proj = nn.Linear(latent_dim, width)
        self.input_layer = nn.Linear(in_dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.out_layer = nn.Linear(width, out_dim)

    def forward(self, x, latent=None):
        tokens = self.tokens.expand(len(x), -1, -1)
        if latent is not None:
            tokens = tokens + self.token_proj(latent)
        x = torch.cat([tokens, self.input_layer(x)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out_layer(self.norm_out(x))


class ActionEncoder(nn.Module):
    """Per-row MLP, then a GRU over the valid rows; returns the last valid hidden state."""

    def __init__(self, action_dim: int, width: int, channels: int = 64):
        super().__init__()
        self.per_frame_mlp = nn.Sequential(nn.Linear(action_dim, channels), nn.GELU(), nn.Linear(channels, channels))
        self.gru = nn.GRU(channels, width, batch_first=True)

    def forward(self, rows, lengths):
        packed = pack_padded_sequence(self.per_frame_mlp(rows), lengths, batch_first=True, enforce_sorted=False)
        return self.gru(packed)[1][0]


def modulated(norm: nn.Module, x, shift, scale):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


class ConditionBlock(nn.Module):
    """AdaLN block; the modulation is cond_proj, SiLU and a linear applied to the action vector."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.norm1, self.norm2 = plain_norm(width), plain_norm(width)
        self.attn, self.mlp = Attention(width, heads), mlp(width, ratio)
        self.cond_proj = nn.Linear(width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, action_vec):
        modulation = self.modulation(self.cond_proj(action_vec))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        x = x + gate_a[:, None] * self.attn(modulated(self.norm1, x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulated(self.norm2, x, shift_m, scale_m))


class FlowBlock(nn.Module):
    """Modulated self-attention, plain cross-attention behind an affine norm, modulated MLP."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = plain_norm(width), nn.LayerNorm(width), plain_norm(width)
        self.self_attn, self.cross_attn, self.mlp = Attention(width, heads), Attention(width, heads), mlp(width, ratio)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, time_vec, cond):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(time_vec).chunk(6, dim=-1)
        x = x + gate_a[:, None] * self.self_attn(modulated(self.norm1, x, shift_a, scale_a))
        x = x + self.cross_attn(self.norm2(x), cond)
        return x + gate_m[:, None] * self.mlp(modulated(self.norm3, x, shift_m, scale_m))


class TimeEmbedder(nn.Module):
    """Sinusoid of 1000 t, cosines first, then Linear-SiLU-Linear."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        angles = (1000.0 * t)[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class FlowModel(nn.Module):
    """The denoiser: `condition` over the patch tokens, then `velocity` of the noisy latents."""

    def __init__(self, dino_width, token_dim, action_dims, width, cond_depth, flow_depth, heads, ratio, max_horizon=15):
        super().__init__()
        self.max_horizon, self.width = max_horizon, width
        self.action_dims = {str(robot): dim for robot, dim in action_dims.items()}
        self.qpos_encoders = nn.ModuleDict({str(r): ActionEncoder(dim, width) for r, dim in action_dims.items()})
        if dino_width != width:
            self.xt_proj = nn.Linear(dino_width, width)
        self.cond_blocks = nn.ModuleList(ConditionBlock(width, heads, ratio) for _ in range(cond_depth))
        self.flow_latent_proj = nn.Linear(token_dim, width)
        self.flow_time_embedder = TimeEmbedder(width)
        self.flow_blocks = nn.ModuleList(FlowBlock(width, heads, ratio) for _ in range(flow_depth))
        self.flow_norm_out = nn.LayerNorm(width)
        self.flow_out_proj = nn.Linear(width, token_dim)

    def action_vec(self, actions, lengths, robot_id):
        """One encoder per robot; rows [b, t, a] are padded to the widest robot, and lengths capped at max_horizon."""
        rows, lengths = actions[:, : self.max_horizon], lengths.clamp(max=self.max_horizon)
        out = torch.zeros(len(actions), self.width)
        for robot, encoder in self.qpos_encoders.items():
            own = robot_id == int(robot)
            if own.any():
                out[own] = encoder(rows[own][..., : self.action_dims[robot]], lengths[own])
        return out

    def condition(self, tokens, action_vec):
        x = self.xt_proj(tokens) if hasattr(self, "xt_proj") else tokens
        for block in self.cond_blocks:
            x = block(x, action_vec)
        return x

    def velocity(self, noisy, t, cond):
        x, vec = self.flow_latent_proj(noisy), self.flow_time_embedder(t)
        for block in self.flow_blocks:
            x = block(x, vec, cond)
        return self.flow_out_proj(self.flow_norm_out(x))


class ResidualBlock(nn.Module):
    """conv-GroupNorm-GELU-conv-GroupNorm, add, GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)

    def forward(self, x):
        return gelu(x + self.norm2(self.conv2(gelu(self.norm1(self.conv1(x))))))


class Up(nn.Module):
    """2x transposed convolution to half the width, then two residual blocks."""

    def __init__(self, width: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
        self.resblock = nn.Sequential(ResidualBlock(width // 2), ResidualBlock(width // 2))

    def forward(self, x):
        return self.resblock(self.upsample(x))


class ImageDecoder(nn.Module):
    """Tokens [b, h*w, c] to RGB [b, 3, 16h, 16w]; `width` a multiple of 128 (8 groups in the last stage)."""

    def __init__(self, token_width: int, width: int):
        super().__init__()
        self.input_proj = nn.Sequential(
            nn.Conv2d(token_width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            ResidualBlock(width),
            ResidualBlock(width),
        )
        self.up1, self.up2, self.up3, self.up4 = (Up(width // 2**i) for i in range(4))
        self.out_conv = nn.Sequential(ResidualBlock(width // 16), nn.Conv2d(width // 16, 3, 3, padding=1))

    def forward(self, tokens, grid):
        x = tokens.transpose(1, 2).unflatten(2, grid)
        return self.out_conv(self.up4(self.up3(self.up2(self.up1(self.input_proj(x))))))
