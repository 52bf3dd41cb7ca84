"""The PyTorch half of `cargo xtask interop`: loads what Sconce wrote and says how it differs from what it should be.

    python interop.py check KIND PATH EXPECTED     KIND: dcp, hf, safetensors; EXPECTED: a .safetensors file of whole tensors
    python interop.py values PATH JSON             values that are no tensors, of a distributed checkpoint
    python interop.py resave DIRECTORY              loads each DIRECTORY/*/a, a distributed checkpoint, and saves it as b beside it
    python interop.py ranks PATH EXPECTED          loads a distributed checkpoint into DTensors on 2 and 4 ranks
"""

import json
import os
import sys
import warnings

warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def expected_of(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(0)


def differ(name, got, want):
    if not isinstance(got, torch.Tensor):
        raise SystemExit(f"{name}: {type(got)} in the place of a tensor")
    if got.dtype != want.dtype or got.shape != want.shape:
        raise SystemExit(f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}")
    if not torch.equal(raw(got), raw(want)):
        raise SystemExit(f"{name}: other bytes")


def flatten(value, at=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list) and any(isinstance(item, (torch.Tensor, dict, list)) for item in value):
        for nth, item in enumerate(value):
            yield from flatten(item, f"{at}.{nth}" if at else str(nth))
    else:
        yield at, value


def whole(path):
    """All of a distributed checkpoint, as `dcp_to_torch_save` reads it."""
    state = {}
    _load_state_dict(state, storage_reader=dcp.FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def check(kind, path, expected):
    want = expected_of(expected)
    if kind == "dcp":
        got = dict(flatten(whole(path)))
    elif kind == "hf":
        got = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
        dcp.load(got, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
    else:
        got = {}
        names = [path] if os.path.isfile(path) else sorted(f"{path}/{n}" for n in os.listdir(path) if n.endswith(".safetensors"))
        for name in names:
            got.update(expected_of(name))
        index = f"{path}/model.safetensors.index.json"
        if os.path.isfile(index):
            with open(index) as file:
                weight_map = json.load(file)["weight_map"]
            assert set(weight_map) == set(want), "the index names other tensors"
            assert all(name in expected_of(f"{path}/{file}") for name, file in weight_map.items())
    for name, tensor in want.items():
        if name not in got:
            raise SystemExit(f"{name}: missing")
        differ(name, got[name], tensor)


def values(path, expected):
    got = dict(flatten(whole(path)))
    with open(expected) as file:
        want = json.load(file)
    for name, value in want.items():
        if name not in got or got[name] != value:
            raise SystemExit(f"{name}: {got.get(name)!r}, expected {value!r}")


def resave(directory):
    for name in sorted(os.listdir(directory)):
        state = whole(f"{directory}/{name}/a")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{directory}/{name}/b"), no_dist=True)


def ranks(path, expected):
    for world in (2, 4):
        torch.multiprocessing.spawn(one_rank, args=(world, path, expected), nprocs=world)


def one_rank(rank, world, path, expected):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29600 + world), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    want = {name: t for name, t in expected_of(expected).items() if t.dtype in (torch.float32, torch.bfloat16, torch.int64)}
    state = {}
    for nth, (name, tensor) in enumerate(want.items()):
        placement = Shard(nth % tensor.dim()) if tensor.dim() and tensor.numel() else Replicate()
        state[name] = distribute_tensor(torch.zeros_like(tensor), mesh, [placement])
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), planner=dcp.DefaultLoadPlanner(flatten_state_dict=False))
    for name, tensor in want.items():
        differ(f"{name} on {world} ranks", state[name].full_tensor(), tensor)
    dist.destroy_process_group()


if __name__ == "__main__":
    {"check": check, "values": values, "resave": resave, "ranks": ranks}[sys.argv[1]](*sys.argv[2:])
