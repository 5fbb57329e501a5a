"""The release's BC policy in PyTorch, from its parameter names: ResNet, MLPs, residual head, LoRA, normaliser."""

import torch
from torch import nn
from torch.nn.functional import relu


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 16), width)


class LoraLayer(nn.Module):
    """PEFT's wrapper of a layer under the adapter name `rl`: base + alpha / rank * B A."""

    def __init__(self, base: nn.Module, rank: int, alpha: float = 16.0):
        super().__init__()
        self.base_layer, self.scale = base, alpha / rank
        if isinstance(base, nn.Conv2d):
            a = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
            b = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            a, b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"rl": a}), nn.ModuleDict({"rl": b})

    def forward(self, x):
        return self.base_layer(x) + self.scale * self.lora_B["rl"](self.lora_A["rl"](x))


class BasicBlock(nn.Module):
    def __init__(self, in_dim: int, width: int, stride: int, wrap):
        super().__init__()
        self.conv1 = wrap(nn.Conv2d(in_dim, width, 3, stride, 1, bias=False))
        self.conv2 = wrap(nn.Conv2d(width, width, 3, 1, 1, bias=False))
        self.bn1, self.bn2 = group_norm(width), group_norm(width)
        if stride != 1 or in_dim != width:
            self.downsample = nn.Sequential(wrap(nn.Conv2d(in_dim, width, 1, stride, bias=False)), group_norm(width))

    def forward(self, x):
        short = self.downsample(x) if hasattr(self, "downsample") else x
        return relu(short + self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, widths, blocks, wrap):
        super().__init__()
        self.conv1, self.bn1 = wrap(nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)), group_norm(widths[0])
        in_dim = widths[0]
        self.stages = len(widths)
        for stage, (width, depth) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for i in range(depth):
                layers.append(BasicBlock(in_dim, width, 2 if stage and i == 0 else 1, wrap))
                in_dim = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x):
        x = nn.functional.max_pool2d(relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x.mean(dim=(2, 3))


class Mlp(nn.Module):
    """`net`: Linear, ReLU (, Dropout), ..., and a last linear where `out` is given."""

    def __init__(self, in_dim, hidden, out=None, *, dropout=False, wrap=lambda layer: layer):
        super().__init__()
        layers = []
        for width in hidden:
            layers += [wrap(nn.Linear(in_dim, width)), nn.ReLU(), *([nn.Dropout(0.1)] if dropout else [])]
            in_dim = width
        self.net = nn.Sequential(*layers, *([] if out is None else [wrap(nn.Linear(in_dim, out))]))

    def forward(self, x):
        return self.net(x)


class ResidualNet(nn.Module):
    def __init__(self, in_dim, hidden, out):
        super().__init__()
        self.backbone = Mlp(in_dim, hidden).net
        self.head = nn.Linear(hidden[-1], out)


class Policy(nn.Module):
    def __init__(self, widths, blocks, hidden, *, actions, horizon, executed=8, state=0, residual=(), rank=0):
        super().__init__()

        def wrap(layer):
            return LoraLayer(layer, rank) if rank else layer

        self.img_encoder = nn.ModuleDict(
            {"backbones": nn.ModuleDict({"front_right_camera": ResNet(widths, blocks, wrap)})}
        )
        features = widths[-1]
        if state:
            self.state_encoder = Mlp(state, (6, 5))
            features += 5
        self.decoder = Mlp(features, hidden, horizon * actions, dropout=True, wrap=wrap)
        if residual:
            self.residual_net = ResidualNet(features, residual, 2 * executed * actions)
        self.actions, self.horizon, self.executed = actions, horizon, executed
        self.normalizer = {"action": actions, "image": 1} | ({"state": state} if state else {})
        rng = torch.Generator().manual_seed(3)
        self.statistics = {}
        for field, width in self.normalizer.items():
            prefix = f"normalizer.params_dict.{field}"
            for name in ("scale", "offset", *(f"input_stats.{kind}" for kind in ("min", "max", "mean", "std"))):
                self.statistics[f"{prefix}.{name}"] = 0.5 + torch.rand(width, generator=rng)
        self.statistics["normalizer.params_dict.image.scale"] = torch.tensor([2.0])
        self.statistics["normalizer.params_dict.image.offset"] = torch.tensor([-1.0])

    def full_state(self) -> dict[str, torch.Tensor]:
        """The state_dict as the release saves it, the normaliser's entries included."""
        return self.state_dict() | self.statistics

    def forward(self, images, state=None):
        """Normalised rows, and features, of images [b, 3, h, w] in [0, 1] at the policy's size."""
        features = self.img_encoder["backbones"]["front_right_camera"](2 * images - 1)
        if state is not None:
            prefix = "normalizer.params_dict.state"
            state = state * self.statistics[f"{prefix}.scale"] + self.statistics[f"{prefix}.offset"]
            features = torch.cat([features, self.state_encoder(state)], dim=-1)
        return self.decoder(features).view(-1, self.horizon, self.actions), features
