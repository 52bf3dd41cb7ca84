"""Random checkpoints that PyTorch writes, for `cargo xtask interop`: python interop_cases.py OUT COUNT SEED

Each case is a folder: what torch wrote (`checkpoint/`, `checkpoint.pt` or `checkpoint.safetensors`), and either what it
holds (`expected.safetensors`, `expected.json`) or words of the error that it must be refused with (`refused.txt`).
"""

import collections
import json
import os
import pathlib
import pickle
import random
import sys
import warnings

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
          "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
SIZES = [0, 1, 1, 2, 3, 4, 5, 7, 8, 13]
WORDS = ["", "text", "schöne Größe", "two\nlines", "tab\t\"quoted\"", "漢字", "x" * 300]


def random_bytes(rng, shape, dtype):
    """A tensor of any bit patterns, but for truth values."""
    numel = 1
    for size in shape:
        numel *= size
    if dtype == "bool":
        return torch.tensor([rng.random() < 0.5 for _ in range(numel)], dtype=torch.bool).reshape(shape)
    kind = getattr(torch, dtype)
    raw = torch.tensor(list(rng.randbytes(numel * kind.itemsize)), dtype=torch.uint8)
    return raw.view(kind).reshape(shape) if numel else torch.empty(shape, dtype=kind)


def random_shape(rng):
    return [rng.choice(SIZES) for _ in range(rng.choice([0, 1, 1, 2, 2, 2, 3, 4]))]


def local_tensor(rng):
    """Of any strides: transposed, permuted, stepped, narrowed, repeated, with a storage that is larger than it."""
    made = random_bytes(rng, random_shape(rng), rng.choice(DTYPES))
    for _ in range(rng.randrange(3)):
        dims = made.dim()
        way = rng.randrange(8)
        if way == 0 and dims:
            order = list(range(dims))
            rng.shuffle(order)
            made = made.permute(order)
        elif way == 1 and dims:
            made = made[(slice(None),) * rng.randrange(dims) + (slice(None, None, 2),)]
        elif way == 2 and dims and made.shape[0] > 1:
            made = made[1:]
        elif way == 3 and dims:
            made = made.select(rng.randrange(dims), 0) if min(made.shape) else made
        elif way == 4:
            made = made.unsqueeze(rng.randrange(dims + 1)).expand([3 if s == -2 else s for s in [-1] * (dims + 1)])
        elif way == 5 and dims and 1 in made.shape:
            made = made.expand([3 if size == 1 else size for size in made.shape])
        elif way == 6 and made.dtype.is_floating_point and made.dtype.itemsize > 1:
            made = torch.nn.Parameter(made)
        elif way == 7 and made.dtype == torch.complex64:
            made = made.conj() if rng.random() < 0.5 else made.clone().conj().imag
    return made


def plain_tensor(made):
    return made.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def sharded_tensor(rng, meshes):
    mesh = rng.choice(meshes)
    whole = random_bytes(rng, random_shape(rng) or [3], rng.choice(DTYPES))
    placements = [Shard(rng.randrange(whole.dim())) if rng.random() < 0.75 else Replicate() for _ in range(mesh.ndim)]
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = whole
    for dim, (size, start) in enumerate(zip(shape, offset)):
        part = part.narrow(dim, min(start, whole.shape[dim]), size)
    part = part.contiguous() if rng.random() < 0.5 else part.clone(memory_format=torch.preserve_format)
    made = DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride())
    return made, whole


def plain_value(rng, depth=0):
    way = rng.randrange(20 if depth < 3 else 12)
    if way < 2:
        return rng.choice([0, 1, -1, 255, 256, 65535, 65536, -2**31, 2**31, 2**40, 2**63 - 1, -2**63])
    if way < 4:
        return rng.choice([0.1, -0.0, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"), 3.0])
    if way == 4:
        return rng.random() < 0.5
    if way == 5:
        return None
    if way < 8:
        return rng.choice(WORDS)
    if way == 8:
        return rng.randbytes(rng.choice([0, 1, 300]))
    if way == 9:
        return rng.choice([torch.float32, torch.float8_e4m3fn, torch.complex128, torch.device("cpu"), torch.device("cuda", 1)])
    if way == 10:
        return torch.Size([2, 3])
    if way == 11:
        return pathlib.PurePosixPath("/a/b") if rng.random() < 0.5 else frozenset([1, 2])
    items = [plain_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if way < 15:
        return items
    if way < 17:
        return tuple(items)
    # Torch loses dicts without entries.
    kind = rng.choice([dict, collections.OrderedDict])
    return kind((rng.choice([f"k{n}", n]), item) for n, item in enumerate(items or [None]))


def state_of(rng, meshes, depth=0, values=True):
    """A state, and the same with whole tensors."""
    state, whole = {}, {}
    for nth in range(rng.randrange(1, 7)):
        key = rng.choice([f"w{nth}", f"layer.{nth}.weight", nth, f"größe {nth}"])
        way = rng.randrange(10)
        if way < 3 or (way > 4 and depth > 2) or (way > 7 and not values):
            state[key] = whole[key] = local_tensor(rng)
        elif way < 6:
            state[key], whole[key] = sharded_tensor(rng, meshes)
        elif way == 6:
            state[key], whole[key] = state_of(rng, meshes, depth + 1, values)
        elif way == 7 and values:
            pairs = [state_of(rng, meshes, depth + 1, values) for _ in range(rng.randrange(1, 3))] + [(7, 7), ([], [])]
            state[key], whole[key] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        elif values:
            state[key] = whole[key] = plain_value(rng)
        else:
            state[key] = whole[key] = local_tensor(rng)
    return state, whole


def flat(value, at, tensors, values):
    below = lambda key: f"{at}.{key}" if at else str(key)
    if isinstance(value, torch.Tensor):
        tensors[at] = plain_tensor(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            flat(item, below(key), tensors, values)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for nth, item in enumerate(value):
            flat(item, below(nth), tensors, values)
    elif isinstance(value, bytes):
        values[at] = {"bytes": list(value)}
    elif isinstance(value, float):
        values[at] = {"float": value.hex()}
    elif isinstance(value, (torch.dtype, torch.device, pathlib.PurePath)):
        values[at] = str(value)
    else:
        values[at] = value


def expect(folder, state):
    tensors, values = {}, {}
    flat(state, "", tensors, values)
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, f"{folder}/expected.safetensors")
    with open(f"{folder}/expected.json", "w") as file:
        json.dump(values, file)


def grow_old(checkpoint, rng):
    """`.metadata` as versions from 1.13 on wrote it: other modules, fewer fields, other protocols."""
    path = f"{checkpoint}/.metadata"
    with open(path, "rb") as file:
        metadata = pickle.load(file)
    if rng.random() < 0.5:
        metadata.__dict__.pop("storage_meta", None)
        metadata.__dict__.pop("version", None)
    for info in metadata.storage_data.values():
        if getattr(info, "transform_descriptors", None) is None:
            info.__dict__.pop("transform_descriptors", None)
    protocol = rng.choice([2, 3, 4, 5])
    text = pickle.dumps(metadata, protocol=protocol)
    if protocol < 4 and rng.random() < 0.7:
        old = b"ctorch.distributed._shard.checkpoint."
        text = text.replace(b"ctorch.distributed.checkpoint.metadata\n_MEM", b"ctorch.distributed._shard.sharded_tensor.metadata\nMEM")
        text = text.replace(b"ctorch.distributed.checkpoint.metadata\nTensorProperties", b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties")
        text = text.replace(b"ctorch.distributed.checkpoint.", old)
    with open(path, "wb") as file:
        file.write(text)


def save_dcp(checkpoint, state, rng):
    options = {"thread_count": rng.choice([1, 1, 2, 3]), "single_file_per_rank": rng.random() < 0.7, "sync_files": False}
    if rng.random() < 0.25 and ZStandard.is_available():
        options["_extensions"] = [ZStandard()]
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=rng.random() < 0.3)
    dcp.save(state, storage_writer=FileSystemWriter(checkpoint, **options), planner=planner)
    if dist.get_rank() == 0 and rng.random() < 0.4:
        grow_old(checkpoint, rng)


def save_alone(checkpoint, state):
    """Every rank writes metadata of its own."""
    dcp.save(state, storage_writer=FileSystemWriter(checkpoint, sync_files=False), use_collectives=False)


def save_hf(checkpoint, state, rng):
    files = {name: rng.randrange(1, 3) for name in state} if rng.random() < 0.5 else None
    # Torch's consolidation knows floats only, and no tensors without elements.
    is_simple = all(t.dtype.is_floating_point and t.dtype.itemsize > 1 and t.numel() for t in state.values())
    consolidated = rng.random() < 0.8 and is_simple
    writer = HuggingFaceStorageWriter(checkpoint, fqn_to_index_mapping=files, save_distributed=True,
                                      enable_consolidation=consolidated, thread_count=rng.choice([1, 2]))
    dcp.save(state, storage_writer=writer)


def flat_state(rng, meshes):
    """Tensors alone, by flat names, of the dtypes that torch gives to safetensors."""
    state, whole = {}, {}
    for nth in range(rng.randrange(1, 8)):
        name = rng.choice([f"w{nth}", f"layers.{nth}.weight"])
        if rng.random() < 0.7:
            state[name], whole[name] = sharded_tensor(rng, meshes)
        else:
            state[name] = whole[name] = plain_tensor(local_tensor(rng))
    return state, whole


def one_rank(rank, world, out, count, seed, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    shapes = {1: [(1,)], 2: [(2,), (1, 2)], 3: [(3,), (3, 1)], 4: [(4,), (2, 2), (4, 1), (2, 1, 2)]}[world]
    meshes = [init_device_mesh("cpu", shape) for shape in shapes]
    for nth in range(count):
        rng = random.Random(seed * 1_000_003 + world * 10_007 + nth)
        kind = rng.choice(["dcp"] * 5 + ["hf", "image", "alone"])
        folder = f"{out}/{kind}_{world}_{nth:03}"
        checkpoint = f"{folder}/checkpoint"
        state, whole = state_of(rng, meshes) if kind in ("dcp", "alone") else flat_state(rng, meshes)
        if kind == "dcp":
            save_dcp(checkpoint, state, rng)
        elif kind == "alone":
            save_alone(checkpoint, state)
        elif kind == "hf":
            save_hf(checkpoint, state, rng)
        else:
            dcp.save(state, storage_writer=FileSystemWriter(checkpoint, serialization_format=SerializationFormat.SAFETENSORS))
        if rank == 0:
            expect(folder, whole)
        dist.barrier()
    if world == 4:
        models(rank, out)
    dist.destroy_process_group()


def models(rank, out):
    """What trainers save: FSDP1 with its older sharded tensors, FSDP2 over tensor parallelism, and their optimizers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))

    def trained(sharded, kind):
        optim = kind(sharded.parameters(), lr=1e-3)
        for _ in range(2):
            sharded(torch.ones(2, 6)).sum().backward()
            optim.step()
            optim.zero_grad()
        return optim

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both = model()
    parallelize_module(both, grid["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(both, mesh=grid["dp"])
    cases = {"fsdp2_tp": (both, trained(both, torch.optim.AdamW))}
    for name, strategy in [("fsdp1", ShardingStrategy.FULL_SHARD), ("fsdp1_grad_op", ShardingStrategy.SHARD_GRAD_OP)]:
        sharded = FullyShardedDataParallel(model(), sharding_strategy=strategy, use_orig_params=True, device_id=torch.device("cpu"))
        cases[name] = (sharded, trained(sharded, torch.optim.Adam))
    for name, (sharded, optim) in cases.items():
        for flattened in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flattened)
            parts = dict(zip(["model", "optim"], get_state_dict(sharded, optim, options=options)))
            folder = f"{out}/{name}_{'flat' if flattened else 'nested'}"
            dcp.save({**parts, "step": 2}, storage_writer=FileSystemWriter(f"{folder}/checkpoint"))
            if rank == 0:
                # What torch itself reads: its full state dicts of FSDP1 hold other moments than its sharded ones.
                whole = {}
                _load_state_dict(whole, FileSystemReader(f"{folder}/checkpoint"), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
                expect(folder, whole)
            dist.barrier()


def alone(out, count, seed):
    """What one process writes: torch.save files, safetensors, and what is refused."""
    mesh = None
    for nth in range(count):
        rng = random.Random(seed * 7_919 + nth)
        kind = rng.choice(["pt", "pt", "single", "indexed", "unflattened"])
        folder = f"{out}/{kind}_{nth:03}"
        os.makedirs(folder)
        tensors = {f"layers.{n}.w": local_tensor(rng) for n in range(rng.randrange(1, 6))}
        contiguous = {name: plain_tensor(t) for name, t in tensors.items()}
        if kind in ("pt", "unflattened"):
            shared = torch.arange(24.0)
            state = {"model": tensors, "all": shared, "odd": shared.view(4, 6)[:, 1::2], "turned": shared.view(4, 6).t(),
                     "values": {f"v{n}": plain_value(rng) for n in range(6)}, "list": [local_tensor(rng), plain_value(rng)]}
            expect(folder, state)
            if kind == "pt":
                torch.save(state, f"{folder}/checkpoint.pt", pickle_protocol=rng.choice([2, 3, 4, 5]))
            else:
                planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
                dcp.save(state, storage_writer=FileSystemWriter(f"{folder}/checkpoint"), planner=planner, no_dist=True)
            continue
        expect(folder, contiguous)
        if kind == "single":
            save_file(contiguous, f"{folder}/checkpoint.safetensors", metadata={"format": "pt", "by": "größe"})
            continue
        os.makedirs(f"{folder}/checkpoint")
        count_files = rng.randrange(1, 4)
        weight_map = {name: f"model-{rng.randrange(count_files) + 1:05}-of-{count_files:05}.safetensors" for name in contiguous}
        for file in set(weight_map.values()):
            save_file({n: t for n, t in contiguous.items() if weight_map[n] == file}, f"{folder}/checkpoint/{file}", metadata={"format": "pt"})
        save_file({"other": torch.ones(2)}, f"{folder}/checkpoint/training.safetensors")
        with open(f"{folder}/checkpoint/model.safetensors.index.json", "w") as file:
            json.dump({"metadata": {"total_size": 1}, "weight_map": weight_map}, file)


class Mine:
    pass


def refused(out):
    numpy_scalar = __import__("numpy").float64(1.5)
    sparse = torch.eye(3).to_sparse()
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    states = {"complex128": ({"w": torch.ones(2, dtype=torch.complex128)}, ["complex128"]),
              "complex32": ({"w": torch.ones(2, dtype=torch.complex32)}, ["complex32"]),
              "mine": ({"w": torch.ones(2), "x": Mine()}, ["Mine"]),
              "numpy": ({"x": numpy_scalar}, ["numpy"]),
              "complex_number": ({"x": 1 + 2j}, ["complex"]),
              "enormous": ({"x": 2**70}, ["64 bits"])}
    pt = {**states, "sparse": ({"w": sparse}, ["_rebuild_sparse_tensor"]), "quantized": ({"w": quantized}, ["_rebuild_qtensor"]),
          "tensor": (torch.ones(3), ["no dict"]), "module": (torch.nn.Linear(2, 2), ["Linear"])}
    for name, (state, words) in states.items():
        folder = f"{out}/refused_dcp_{name}"
        dcp.save(state, storage_writer=FileSystemWriter(f"{folder}/checkpoint"), no_dist=True)
        pathlib.Path(f"{folder}/refused.txt").write_text("\n".join(words))
    for name, (state, words) in pt.items():
        folder = f"{out}/refused_pt_{name}"
        os.makedirs(folder)
        torch.save(state, f"{folder}/checkpoint.pt")
        pathlib.Path(f"{folder}/refused.txt").write_text("\n".join(words))
    folder = f"{out}/refused_pt_legacy"
    os.makedirs(folder)
    torch.save({"w": torch.ones(2)}, f"{folder}/checkpoint.pt", _use_new_zipfile_serialization=False)
    pathlib.Path(f"{folder}/refused.txt").write_text("before 1.6")


def main():
    out, count, seed = os.path.abspath(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    alone(out, count, seed)
    refused(out)
    for world in (1, 2, 3, 4):
        mp.spawn(one_rank, args=(world, out, count, seed, 29620 + world), nprocs=world)


if __name__ == "__main__":
    main()
