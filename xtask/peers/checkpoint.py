"""The figures of crates/checkpoint/benches/checkpoint.rs, for torch.distributed.checkpoint: same state, same lines."""

import os, shutil, socket, statistics, sys, tempfile, time, warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

warnings.filterwarnings("ignore")
WIDTH = 1024


def bytes_read():
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


class Bench:
    def __init__(self, place, directory, mib):
        self.place, self.dir = place, directory
        self.tensors = (mib << 20) // (WIDTH * WIDTH * 4)
        self.whole = self.tensors * WIDTH * WIDTH * 4
        self.n, self.me = dist.get_world_size(), dist.get_rank()

    def timed(self, repeats, prepare, call):
        seconds = []
        for _ in range(repeats):
            prepare()
            dist.barrier()
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return statistics.median(slowest.tolist())

    def report(self, what, seconds, read=0):
        if self.me == 0:
            print(self.place, self.n, what, self.whole, seconds, read, sep="\t", flush=True)

    def state(self, mesh, placements):
        tensors = {}
        shard = [(i, p.dim) for i, p in enumerate(placements) if isinstance(p, Shard)]
        for nth in range(self.tensors):
            shape = [WIDTH, WIDTH]
            for dim, along in shard:
                shape[along] //= mesh.size(dim)
            local = torch.full(shape, float(nth + 1))
            tensors[f"layers.{nth}.weight"] = DTensor.from_local(local, mesh, placements, run_check=False)
        return tensors

    def remove(self, path):
        dist.barrier()
        if self.me == 0:
            shutil.rmtree(path, ignore_errors=True)

    def save(self, what, name, state):
        path = os.path.join(self.dir, name)
        self.report(what, self.timed(3, lambda: self.remove(path), lambda: dcp.save(state, checkpoint_id=path)))

    def load(self, what, name, state):
        path = os.path.join(self.dir, name)
        dcp.load(state, checkpoint_id=path)
        before = bytes_read()
        seconds = self.timed(3, lambda: None, lambda: dcp.load(state, checkpoint_id=path))
        read = torch.tensor([(bytes_read() - before) // 3])
        dist.all_reduce(read)
        self.report(what, seconds, int(read.item()))

    def drop(self, name):
        self.remove(os.path.join(self.dir, name))


def rank(me, n, port, place, directory, mib):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=me, world_size=n)
    bench = Bench(place, directory, mib)
    mesh = init_device_mesh("cpu", (n,))
    rows = bench.state(mesh, [Shard(0)])
    bench.save("save fsdp", "rows", rows)
    bench.load("load fsdp", "rows", rows)
    del rows
    bench.load("load rows as columns", "rows", bench.state(mesh, [Shard(1)]))
    bench.drop("rows")
    if n == 4:
        hybrid = init_device_mesh("cpu", (2, 2))
        state = bench.state(hybrid, [Replicate(), Shard(0)])
        bench.save("save hsdp", "hsdp", state)
        bench.load("load hsdp", "hsdp", state)
    else:
        bench.load("load hsdp of 4 as fsdp of 2", "hsdp", bench.state(mesh, [Shard(0)]))
    dist.destroy_process_group()


if __name__ == "__main__":
    mib = int(os.environ.get("SCONCE_BENCH_MIB", "1024"))
    for place in os.environ["SCONCE_BENCH_PLACES"].split(":"):
        name = "tmpfs" if place.startswith("/dev/shm") else "disk"
        with tempfile.TemporaryDirectory(dir=place) as directory:
            for n in (4, 2):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", 0))
                    port = s.getsockname()[1]
                mp.spawn(rank, (n, port, name, directory, mib), nprocs=n)
