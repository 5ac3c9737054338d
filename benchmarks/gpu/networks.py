"""A ResNet-50 and a transformer, as lists of layers and as PyTorch modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.peers.torch_ops import start


@dataclass(frozen=True)
class Conv:
    """A convolution without a bias, padded by half of its kernel."""

    name: str
    k: int
    stride: int
    c_in: int
    c_out: int
    h: int
    """Of its input."""

    @property
    def h_out(self) -> int:
        """Of its output."""
        return -(-self.h // self.stride)


@dataclass(frozen=True)
class Dense:
    """A dense layer with a bias."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class ResNet:
    """A residual network of bottlenecks, strides in their 3x3 filters."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    h: int = 224
    classes: int = 1000

    def stages(self) -> list[list[Conv]]:
        """The first convolution alone; then of each block its three, and the shortcut if any."""
        first = Conv("first", 7, 2, 3, self.width, self.h)
        found, c, h = [[first]], self.width, -(-first.h_out // 2)
        for stage, count in enumerate(self.blocks):
            width = self.width * 2**stage
            for i in range(count):
                stride = 2 if i == 0 and stage else 1
                name = f"block{stage}_{i}"
                reduce = Conv(f"{name}_reduce", 1, 1, c, width, h)
                filter_ = Conv(f"{name}_filter", 3, stride, width, width, h)
                expand = Conv(f"{name}_expand", 1, 1, width, 4 * width, filter_.h_out)
                block = [reduce, filter_, expand]
                if i == 0:
                    block.append(Conv(f"{name}_shortcut", 1, stride, c, 4 * width, h))
                found.append(block)
                c, h = 4 * width, filter_.h_out
        return found

    def layers(self) -> list[Conv | Dense]:
        """All that has Kronecker factors."""
        stages = self.stages()
        last = Dense("fc", stages[-1][2].c_out, self.classes)
        return [*(conv for stage in stages for conv in stage), last]

    def module(self) -> Any:
        """The network, from images [N, 3, h, h] to logits."""
        torch = start()
        nn = torch.nn
        stages = self.stages()

        def conv(layer: Conv) -> Any:
            padding = layer.k // 2
            return nn.Conv2d(layer.c_in, layer.c_out, layer.k, layer.stride, padding, bias=False)

        class Bottleneck(nn.Module):
            def __init__(self, layers: list[Conv]) -> None:
                super().__init__()
                self.names = [layer.name for layer in layers]
                for layer in layers:
                    self.add_module(layer.name, conv(layer))
                    self.add_module(f"{layer.name}_norm", nn.BatchNorm2d(layer.c_out))

            def branch(self, name: str, x: Any) -> Any:
                return getattr(self, f"{name}_norm")(getattr(self, name)(x))

            def forward(self, x: Any) -> Any:
                reduce, filter_, expand, *shortcut = self.names
                y = torch.relu(self.branch(reduce, x))
                y = torch.relu(self.branch(filter_, y))
                y = self.branch(expand, y)
                return torch.relu(y + (self.branch(shortcut[0], x) if shortcut else x))

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                (first,), *blocks = stages
                self.first = conv(first)
                self.first_norm = nn.BatchNorm2d(first.c_out)
                self.pool = nn.MaxPool2d(3, 2, 1)
                self.blocks = nn.Sequential(*map(Bottleneck, blocks))
                self.fc = nn.Linear(blocks[-1][2].c_out, classes)

            def forward(self, x: Any) -> Any:
                x = self.pool(torch.relu(self.first_norm(self.first(x))))
                return self.fc(self.blocks(x).mean((2, 3)))

        classes = self.classes
        return Network()


@dataclass(frozen=True)
class Transformer:
    """Encoder layers of attention and a perceptron, each after a layer norm; no embeddings."""

    depth: int = 12
    d: int = 768
    heads: int = 12
    sequence: int = 128

    def layers(self) -> list[Dense]:
        """All that has Kronecker factors; queries, keys and values are one layer."""
        d = self.d
        shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        return [
            Dense(f"layer{i}_{name}", *shape)
            for i in range(self.depth)
            for name, shape in shapes.items()
        ]

    def module(self) -> Any:
        """The network, from [N, sequence, d] to the same."""
        torch = start()
        nn = torch.nn
        d, heads = self.d, self.heads

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
                self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
                self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

            def forward(self, x: Any) -> Any:
                n, t, _ = x.shape
                parts = self.qkv(self.norms[0](x)).reshape(n, t, 3, heads, d // heads)
                q, k, v = parts.permute(2, 0, 3, 1, 4)
                mixed = nn.functional.scaled_dot_product_attention(q, k, v)
                x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
                return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))

        return nn.Sequential(*(Layer() for _ in range(self.depth)))
