"""A byte-level GPT and real text that every machine has: the sources of Python's standard library.

The model is the usual pre-norm transformer with learned positions and a tied head, about 1.8M parameters by default.
Nothing here knows of arc_dist; `train_gpt.py` trains it, and the benchmarks use its larger configurations.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

NUM_BYTES = 256  # the vocabulary: every value of a byte
HELD_OUT_EVERY = 16  # one file in so many is kept for evaluation
IGNORED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a model."""

    context: int = 128  # bytes that the model sees
    layers: int = 4
    heads: int = 4
    width: int = 192

    @staticmethod
    def m10() -> GPTConfig:
        """10M parameters, 512 tokens."""
        return GPTConfig(context=512, layers=6, heads=8, width=368)

    @staticmethod
    def m50() -> GPTConfig:
        """50M parameters, 512 tokens."""
        return GPTConfig(context=512, layers=8, heads=8, width=720)


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a norm and beside a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.feed_norm = nn.LayerNorm(config.width)
        self.feed_in = nn.Linear(config.width, 4 * config.width)
        self.feed_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.feed_out(functional.gelu(self.feed_in(self.feed_norm(x))))


class GPT(nn.Module):
    """Bytes in, a prediction of each next byte out. `blocks` are what FSDP shards one by one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.byte_embedding = nn.Embedding(NUM_BYTES, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, NUM_BYTES, bias=False)
        self.head.weight = self.byte_embedding.weight
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, time) to logits (batch, time, 256)."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.byte_embedding(inputs) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def next_byte_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy in nats per byte; `batch` is (inputs, targets), each (batch, time)."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def make_optimizer(model: nn.Module, *, lr: float = 1e-3, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices but neither biases nor norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def count_parameters(model: nn.Module) -> int:
    """Number of distinct parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


class StdlibText(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of `context` bytes, with each next byte as target, over the sources of Python's standard library.

    The files come in sorted order, so the same Python gives the same data everywhere; every 16th file is held out.

    Args:
        context: bytes per window.
        held_out: the files kept for evaluation instead of those for training.
        max_bytes: where reading stops.
    """

    def __init__(self, context: int, *, held_out: bool = False, max_bytes: int = 8 << 20) -> None:
        text = read_stdlib(held_out=held_out, max_bytes=max_bytes)
        self.context = context
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.data[index * self.context : (index + 1) * self.context + 1].long()
        return window[:-1], window[1:]


def stdlib_files() -> list[Path]:
    """The standard library's own .py files, sorted by their path within it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = sorted(path for path in relative if not IGNORED_DIRECTORIES.intersection(path.parts))
    return [root / path for path in kept]


def read_stdlib(*, held_out: bool = False, max_bytes: int = 8 << 20) -> bytes:
    """Concatenates one side of the split, at most `max_bytes`."""
    chunks: list[bytes] = []
    size = 0
    for index, path in enumerate(stdlib_files()):
        if (index % HELD_OUT_EVERY == 0) != held_out:
            continue
        chunks.append(path.read_bytes()[: max_bytes - size])
        size += len(chunks[-1])
        if size >= max_bytes:
            break
    if size == 0:
        raise FileNotFoundError(
            f"no .py files under {sysconfig.get_paths()['stdlib']}: this Python was installed without the sources of "
            "its standard library. Use one that has them."
        )
    return b"".join(chunks)


@torch.no_grad()
def held_out_loss(model: nn.Module, *, context: int, num_windows: int = 256, batch_size: int = 32) -> float:
    """Mean loss over evenly spread windows of the held-out files. Under FSDP every rank must call this."""
    data = StdlibText(context, held_out=True)
    stride = max(1, len(data) // num_windows)
    indices = list(range(0, len(data), stride))[:num_windows]
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(indices), batch_size):
        windows = [data[i] for i in indices[start : start + batch_size]]
        batch = (torch.stack([w[0] for w in windows]), torch.stack([w[1] for w in windows]))
        total += next_byte_loss(model, batch).item() * len(windows)
    model.train(was_training)
    return total / len(indices)
