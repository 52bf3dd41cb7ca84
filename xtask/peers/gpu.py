"""The step of crates/testkit/benches/gpu.rs, for torch: same layers, same rows, a process a device, medians of the slowest rank."""

import os, socket, statistics, sys, time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

WIDTH, LAYERS, ROWS, REPEATS = 4096, 8, 4096, 5


def step_seconds(offload):
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
    if not isinstance(offload, CPUOffloadPolicy):
        model.cuda()
    for module in (*layers, model):
        fully_shard(module, offload_policy=offload)
    optim = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.ones(ROWS, WIDTH, device="cuda")
    seconds = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        model(x).mean().backward()
        optim.step()
        optim.zero_grad()
        torch.cuda.synchronize()
        slowest = torch.tensor([time.perf_counter() - started], device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds.append(slowest.item())
    return statistics.median(seconds[1:])


def rank(me, n, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(me), WORLD_SIZE=str(n))
    torch.cuda.set_device(me)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=me, world_size=n)
    for what, offload in [("on the device", OffloadPolicy()), ("CPUOffloadPolicy", CPUOffloadPolicy())]:
        seconds = step_seconds(offload)
        if me == 0:
            print(f"fully_shard, {what}", f"{seconds * 1e3:.1f}", sep="\t", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    n = torch.cuda.device_count()
    if n == 0:
        sys.exit("torch sees no CUDA device")
    print(f"\nthe same step, torch {torch.__version__}, {n} ranks\tms", flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, (n, port), nprocs=n)
