"""The figures of crates/fsdp/benches/step.rs, for torch: same models, same batches, one thread a rank, same lines, medians."""

import os, socket, statistics, sys, time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

WIDTH, LAYERS, ROWS = 1024, 8, 32
EMBED, HEADS, BLOCKS, CONTEXT, BATCH, VOCABULARY = 160, 4, 4, 64, 4, 96


class Mlp(nn.Module):
    unit = nn.Linear

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    @staticmethod
    def batch():
        return (torch.randn(ROWS, WIDTH),)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(EMBED, bias=False)
        self.qkv = nn.Linear(EMBED, 3 * EMBED, bias=False)
        self.out = nn.Linear(EMBED, EMBED)
        self.norm2 = nn.LayerNorm(EMBED, bias=False)
        self.up = nn.Linear(EMBED, 4 * EMBED)
        self.down = nn.Linear(4 * EMBED, EMBED)

    def attention(self, x):
        batch, context, _ = x.shape
        q, k, v = self.qkv(x).view(batch, context, 3, HEADS, EMBED // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, context, EMBED))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """crates/fsdp/examples/train_hsdp/model.rs."""

    unit = Block

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, EMBED)
        self.position = nn.Embedding(CONTEXT, EMBED)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(EMBED, bias=False)
        self.head = nn.Linear(EMBED, VOCABULARY, bias=False)

    @staticmethod
    def batch():
        return torch.randint(VOCABULARY, (BATCH, CONTEXT)), torch.randint(VOCABULARY, (BATCH * CONTEXT,))

    def forward(self, tokens, targets):
        x = (self.token(tokens) + self.position(torch.arange(CONTEXT))) * 0.1
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).view(-1, VOCABULARY), targets)


MODELS = {"mlp": Mlp, "transformer": Transformer}


def passes(model, batch):
    """Forward and backward of the plain model."""
    times = []
    for _ in range(4 + 25):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        model(*batch).backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times[4:])


def steps(model, batch):
    """Whole steps under FSDP: forward, backward, AdamW, gradients to none."""
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    times = []
    for _ in range(4 + 15):
        dist.barrier()
        started = time.perf_counter()
        model(*batch).backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    slowest = torch.tensor(times[4:], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def rank(me, n, port, name):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(me)
    dist.init_process_group("gloo", rank=me, world_size=n)
    model, batch = MODELS[name](), MODELS[name].batch()
    if n == 1:
        print(n, name, "passes", passes(model, batch), sep="\t", flush=True)
    wrapped = FSDP(
        model,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=ModuleWrapPolicy({MODELS[name].unit}),
        device_id=torch.device("cpu"),
    )
    seconds = steps(wrapped, batch)
    if me == 0:
        print(n, name, "step", seconds, sep="\t", flush=True)
    dist.barrier()
    # Not through the interpreter's end: torch's threads are still there then, and now and then abort the process.
    os._exit(0)


if __name__ == "__main__":
    for n in [1, 2, 4]:
        for name in MODELS:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(rank, args=(n, port, name), nprocs=n)
