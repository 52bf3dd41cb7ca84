"""The figures of crates/mesh/benches/collectives.rs, for torch's gloo backend: same sizes, same lines, same medians."""

import os, socket, statistics, sys, time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

BYTES = [1 << 20, 4 << 20, 16 << 20, 64 << 20]
BURST = 20


def timed(call, repeats):
    call()
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def rank(me, n, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=me, world_size=n)

    def report(op, size, seconds):
        if me == 0:
            print(n, op, size, seconds, sep="\t", flush=True)

    for size in BYTES:
        whole, part = torch.ones(size // 4), torch.ones(size // 4 // n)
        other = torch.ones(size // 4)
        repeats = 15 if size < (16 << 20) else 7
        report("all_reduce", size, timed(lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX), repeats))
        report("all_gather", size, timed(lambda: dist.all_gather_into_tensor(whole, part), repeats))
        report("reduce_scatter", size, timed(lambda: dist.reduce_scatter_tensor(part, whole), repeats))
        report("broadcast", size, timed(lambda: dist.broadcast(whole, 0), repeats))
        report("all_to_all", size, timed(lambda: dist.all_to_all_single(other, whole), repeats))
    small = torch.ones(1024)
    burst = timed(lambda: [dist.all_reduce(small, op=dist.ReduceOp.MAX) for _ in range(BURST)], 9)
    report("all_reduce", 4096, burst / BURST)
    dist.destroy_process_group()


if __name__ == "__main__":
    for n in [2, 4]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(rank, args=(n, port), nprocs=n)
