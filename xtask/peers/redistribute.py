"""The figures of crates/dtensor/benches/redistribute.rs, for torch's DTensor on gloo: same sizes, same lines, same medians."""

import os, socket, statistics, time, warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

RANKS, SIDE, REPEATS = 4, 8192, 7


def timed(call):
    call()
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        started = time.perf_counter()
        result = call()
        # A functional collective may still be under way when it returns.
        result.to_local()[-1, -1].item()
        seconds.append(time.perf_counter() - started)
        del result
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def name(placement):
    return "R" if placement.is_replicate() else f"S({placement.dim})"


def rank(me, port):
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=me, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for source, target in [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Shard(1), Replicate()), (Shard(1), Shard(0))]:
        shape = [SIDE, SIDE]
        shape[source.dim] //= RANKS
        tensor = DTensor.from_local(torch.ones(shape), mesh, [source], run_check=False)
        seconds = timed(lambda: tensor.redistribute(mesh, [target]))
        if me == 0:
            print(RANKS, f"{name(source)} -> {name(target)}", SIDE * SIDE * 4, seconds, sep="\t", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, args=(port,), nprocs=RANKS)
