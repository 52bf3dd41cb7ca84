"""The figures of crates/checkpoint/benches/plan.rs, for torch's own planner on the same plans."""

import io, os, pickle, time

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

RANKS, ROWS, COLUMNS = 1024, 4096, 1024
TENSORS = int(os.environ.get("SCONCE_BENCH_TENSORS", "1000"))


def timed(what, call, size=0):
    started = time.perf_counter()
    result = call()
    print(what, time.perf_counter() - started, size, sep="\t", flush=True)
    return result


def plan_of(rank):
    rows = ROWS // RANKS
    size, sizes = torch.Size([ROWS, COLUMNS]), torch.Size([rows, COLUMNS])
    offsets = torch.Size([rank * rows, 0])
    properties = TensorProperties(dtype=torch.bfloat16)
    item = lambda nth: WriteItem(
        index=MetadataIndex(f"model.layers.{nth}.self_attn.q_proj.weight", offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, size),
    )
    return SavePlan([item(nth) for nth in range(TENSORS)])


messages = [pickle.dumps(plan_of(rank)) for rank in range(RANKS)]
size = sum(map(len, messages))
plans = timed("decode plans of all ranks", lambda: [pickle.loads(m) for m in messages], size)
del messages
planner = DefaultSavePlanner(flatten_state_dict=False)
plans, metadata = timed("global plan", lambda: planner.create_global_plan(plans))
del plans
manifest = timed("write manifest", lambda: pickle.dumps(metadata))
print("manifest", 0, len(manifest), sep="\t")
del metadata
timed("read manifest and plan a load", lambda: pickle.loads(manifest))
