"""benchmarks/plan.py: what it counts, measures and finds missing; and the sharding that it counts with, on up to 256 ranks.

    python -m pytest tests/test_plan.py

Ranks that this machine does not have are torch's `fake` process group, in which one process is one rank of many.
"""
import json
import re
import shutil
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, checkpoint_tensors, last_checkpoint, run, train
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(ROOT / "benchmarks"))

import plan  # noqa: E402
from muon import newton_schulz_cost  # noqa: E402
from train_prx import PRESETS, Config, parse_config  # noqa: E402

pytestmark = pytest.mark.machinery

RECORD = PRESETS["record"]


def numbers(stdout: str) -> dict[str, tuple[float, str]]:
    """Name -> (value, kind) of the lines of a plan that hold one number; of equal names the first."""
    found = re.findall(r"^  (\S.*?)  +(-?[\d,.e+]+)(?: \S+)?  +(counted|measured|predicted)", stdout, re.MULTILINE)
    return {name: (float(value.replace(",", "")), kind) for name, value, kind in reversed(found)}


def files(folder) -> list[str]:
    """What a command left in its folder, but for what `conftest.run` writes there."""
    return [str(path) for path in folder.rglob("*") if not path.name.startswith((".out-", ".err-"))]


# ---------------------------------------------------------------------------------------------------------------------
# Counted


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record's plan for 256 ranks: what was printed, the folder that it ran in, the seconds that it took."""
    folder, begun = tmp_path_factory.mktemp("record"), time.monotonic()
    result = run(folder, "benchmarks/plan.py", "--preset=record", "--gpus=256", "--micro_batch=2", "--price=3")
    assert result.status == 0, result
    return result.stdout, folder, time.monotonic() - begun


@pytest.mark.recipe
def test_flop_are_those_counted_on_the_public_model(record):
    _, first, second = re.split(r"^Stage \d: ", record[0], flags=re.MULTILINE)  # what follows the stages has other names
    first, second = numbers(first), numbers(second)
    for found, expected in ((first, {"denoiser": 876, "LPIPS": 120, "P-DINO": 144, "REPA's teacher": 165}),  # GFLOP, PRX's code
                            (second, {"denoiser": 3116, "LPIPS": 481, "P-DINO": 144})):
        parts = {name.split(",")[0]: value for name, value in found.items() if ", " in name and "forward" in name}
        assert set(parts) - {"REPA's projector"} == set(expected)
        assert all(parts[name] == (pytest.approx(gflop, rel=0.01), "counted") for name, gflop in expected.items())
    # three Linear layers over the tokens that stay, 2 FLOP a multiply-add, forward and two gradients
    assert first["REPA's projector, forward and backward"][0] == pytest.approx(6e-9 * 128 * (1792 * 1024 + 2 * 1024**2), rel=0.01)
    # DINOv3-L, DINOv2-B and VGG16's convolutions in bf16
    assert second["frozen networks"][0] == pytest.approx(2 * (303 + 86.6 + 14.7), rel=0.01)


@pytest.mark.recipe
def test_flop_without_routing_are_those_of_the_dense_model():
    cfg = replace(RECORD, drop=0.0, frozen="none", micro_batch=2)
    assert plan.count_stage(cfg, cfg.stages[0])[0]["denoiser"] / 1e9 == pytest.approx(1363, rel=0.01)


def test_activations_are_what_autograd_keeps_without_weights_and_scores():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    frozen = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(3, 5, 8)
    with plan.Watch(model) as watch, torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda x: x):
        y = frozen(model(x))
        torch.nn.functional.scaled_dot_product_attention(y, y, y)
    # x, what GELU takes and gives, what attention takes and gives; not the 3 x 5 x 5 scores
    assert watch.activation_bytes() == 4 * 3 * 5 * (8 + 16 + 16 + 8 + 8)
    assert watch.frozen_bytes() == 4 * (8 * 8 + 8)


@pytest.mark.slow
def test_bytes_counted_are_those_that_a_run_writes(tiny, tmp_path):
    flags = [*tiny, "--save_every=2", "--keep=2", "--keep_every=10"]
    folder = train(tmp_path, *flags)
    cfg, _ = parse_config(flags)
    stored = {name: x for name, x in checkpoint_tensors(last_checkpoint(folder)).items() if x.ndim}
    assert plan.checkpoint_bytes(cfg) == sum(x.nbytes for x in stored.values())
    result = run(tmp_path, "benchmarks/plan.py", *flags)
    assert f"{plan.size_text(sum(x.nbytes for x in load_file(folder / 'ema.safetensors').values()))}" in result.stdout
    assert len(list(folder.glob("checkpoints/step_*"))) == 3  # 10, 18, 20
    assert plan.checkpoints_on_disk(cfg) == 4  # 10, 16, 18 and 20, when it is written


def test_checkpoints_kept_for_good_are_counted():
    few = replace(RECORD, save_every=0)
    assert plan.checkpoints_on_disk(few) == 2  # the ends of the two stages
    assert plan.checkpoints_on_disk(replace(RECORD, keep=3, keep_every=0)) == 4
    assert plan.checkpoints_on_disk(replace(RECORD, keep=3, keep_every=20_000)) == 5 + 3 + 1  # 20, 40, ..., 100 thousand
    assert plan.checkpoints_on_disk(replace(RECORD, keep=3, keep_every=20_000, max_steps=2_500)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_record_on_256_ranks_is_planned_in_seconds_without_a_gpu(record):
    stdout, folder, seconds = record
    assert seconds < 60
    assert files(folder) == []
    found = numbers(stdout)
    assert found["parameters"] == (1_177_215_744, "counted")
    assert found["matrices that Muon steps"] == (112, "counted")
    assert found["the whole run"] == (pytest.approx(1.78e20, rel=0.01), "counted")
    hours, kind = found["hours"]
    assert kind == "predicted" and hours == pytest.approx(1.78e20 / (256 * 0.6 * 790e12) / 3600, rel=0.01)
    assert found["dollars"] == (pytest.approx(hours * 256 * 3, rel=0.01), "predicted")
    assert "not measured" in stdout and "measured  compiles" not in stdout
    for name in ("flux_generated", "flux_reason", "midjourney"):
        assert f"MISSING  data/{name}: " in stdout
        assert f"python data_prep.py build --source={name} --out=data/{name} --size=512,1024" in stdout
    missing = stdout.count("\n  MISSING ")
    assert stdout.endswith(f"\n{missing} things are missing\n")


def test_a_tiny_run_is_measured_and_ready(tiny, data, tmp_path):
    before = set(data.rglob("*"))
    result = run(tmp_path, "benchmarks/plan.py", *tiny, "--stages=32:20000:16:1", "--price=36")
    assert result.status == 0, result
    assert result.stdout.endswith("\nready\n")
    assert files(tmp_path) == [] and set(data.rglob("*")) == before
    found = numbers(result.stdout)
    first, chunk, rest = (found[name] for name in ("first step at 32px", "a chunk, forward and backward", "the rest of a step on one rank"))
    assert {first[1], chunk[1], rest[1]} == {"measured"}
    hours = (first[0] + 20_000 * (4 * chunk[0] + rest[0]) / 1e3) / 3600  # steps of 4 chunks; times are printed to 0.1 ms
    assert found["hours"] == (pytest.approx(hours, abs=20_000 * 0.3e-3 / 3600), "predicted")
    assert found["dollars"] == (pytest.approx(36 * found["hours"][0], abs=0.01), "predicted")
    assert 0 < chunk[0] < 1000  # ms; it takes about 10


@pytest.mark.slow
def test_ranks_share_chunks_and_own_matrices_in_the_measured_time(tiny, tmp_path):
    result = run(tmp_path, "benchmarks/plan.py", *tiny, "--stages=32:20000:16:1", "--gpus=4", "--gpus_a_node=2")
    found = numbers(result.stdout)
    chunk, optimizer = found["a chunk, forward and backward"][0], found["optimizer instead, of many ranks"][0]
    hours = (found["first step at 32px"][0] + 20_000 * (chunk + optimizer) / 1e3) / 3600  # one chunk each
    assert found["hours"][0] == pytest.approx(hours, abs=20_000 * 0.1e-3 / 3600)
    assert "communication between 4 ranks" in result.stdout
    assert found["weights"][0] < 0.6 * numbers(run(tmp_path, "benchmarks/plan.py", *tiny).stdout)["weights"][0]


@pytest.mark.parametrize("flags, words", [
    (["--witdh=64"], "did you mean --width?"),
    (["--gpus=many"], "--gpus"),
    (["--gpus=0"], "at least 1"),
    (["--gpus=3"], "--gpus=3 cannot share 64 and 32 chunks of 16 rows evenly; these numbers can: 1, 2, 4, 8, 16, 32"),
    (["--gpus=16", "--gpus_a_node=6"], "no whole number of nodes of 6"),
])
def test_a_mistake_is_one_line(flags, words, tmp_path):
    result = run(tmp_path, "benchmarks/plan.py", *flags)
    assert words in result.error()
    assert files(tmp_path) == []


def test_a_folder_without_all_its_weights_is_missing(networks, tmp_path):
    assert plan.is_here(str(networks / "dinov3"))
    assert not plan.is_here("nobody/has-this-model") and not plan.is_here(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert not plan.is_here(str(tmp_path))
    (tmp_path / "b.safetensors").touch()
    assert plan.is_here(str(tmp_path))


def test_a_damaged_shard_is_missing_data(tiny, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    next((copy / "32").glob("*.arrow")).write_bytes(b"")
    result = run(tmp_path, "benchmarks/plan.py", *tiny[:-1], f"--data={copy}")
    assert result.status == 0 and "has changed since it was made" in result.stdout
    assert result.stdout.endswith("\n1 thing is missing\n")


# ---------------------------------------------------------------------------------------------------------------------
# One rank of many

RANK = """
import json, sys, weakref
sys.path.insert(0, {root!r})
from dataclasses import replace
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from muon import Owners, local, newton_schulz_cost
from train_prx import EMA, PRX, Config, build_model, build_optimizer

def join(rank, world, shards):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    return init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))

class Peak(TorchDispatchMode):
    '''The most bytes alive at a time of storages that were made within this context.'''
    def __init__(self, old):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {{x.untyped_storage()._cdata for x in old}}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {{}}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out
    def gone(self, key, n):
        self.known.discard(key)
        self.live -= n

rank, world, shards, depth = map(int, sys.argv[1:])
mesh = join(rank, world, shards)
"""

SHARDS = RANK + """
from torch.distributed.fsdp import fully_shard
with torch.device("meta"):
    model = PRX(Config(depth=depth))
for unit in [*model.blocks, model]:
    fully_shard(unit, mesh=mesh, reshard_after_forward=False)
optimizer, ema = build_optimizer(model, Config(depth=depth)), EMA(model)
owners = Owners(optimizer.param_groups[0]["params"])
count = lambda tensors: sum(x.numel() for x in local(list(tensors)))
state = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
print(json.dumps({{
    "owned": [[newton_schulz_cost(owners.shapes[i]) for turn in owners.owned for i in turn[r // shards][r % shards]] for r in range(world)],
    "of_replica": [sum(owners.shapes[i].numel() for turn in owners.owned for of_rank in turn[r] for i in of_rank) for r in range(owners.replicas)],
    "weights": count(model.parameters()), "average": count(ema.weights.values()),
    "optimizer": count(x for each in state for x in each.values() if x.ndim),
    "whole": sum(p.numel() for p in model.parameters()), "muon": sum(map(torch.Size.numel, owners.shapes))}}))
"""

STEP = RANK + """
model = build_model(Config(depth=depth, repa_depth=1, ns_steps=1, compile=False), mesh, torch.device("cpu"))
optimizer = build_optimizer(model, replace(model.cfg, ns_steps=1))
for p in model.parameters():
    p.grad = torch.zeros_like(p)
    local([p.grad])[0].normal_()
peak = Peak(x for p in model.parameters() for x in local([p, p.grad, *optimizer.state[p].values()]))
with peak:
    optimizer.step()
print(json.dumps({{"peak": peak.peak, "whole": 4 * sum(p.numel() for p in model.parameters())}}))
"""


def one_rank(folder, body: str, rank: int, world: int, shards: int, depth: int) -> dict:
    """What a script prints that is one rank of a mesh (world / shards, shards), with a model of the record's width."""
    script = folder / "rank.py"
    script.write_text(body.format(root=str(ROOT)))
    result = run(folder, script, *map(str, (rank, world, shards, depth)))
    assert result.status == 0, result
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.recipe
@pytest.mark.slow
@pytest.mark.parametrize("world", [8, 32, 256])
def test_newton_schulz_is_balanced_and_state_is_cut_evenly(world, tmp_path):
    found = one_rank(tmp_path, SHARDS, 0, world, 8, 16)
    loads = [sum(owned) for owned in found["owned"]]
    assert sorted(loads) == sorted(plan.newton_schulz_loads([p.shape for p in plan.parameter_groups(Config())[0]["params"]], world))
    # what a replica owns goes to all others in an all-gather, which takes equally much from each
    assert max(found["of_replica"]) < 1.3 * sum(found["of_replica"]) / len(found["of_replica"])
    if world <= 32:
        assert max(loads) < 1.05 * sum(loads) / world
    else:  # more ranks than matrices: the best that can be is one each
        assert max(map(len, found["owned"])) == 1 and sum(map(len, found["owned"])) == 112
        assert max(loads) == newton_schulz_cost(torch.Size((1792, 6 * 1792)))
    for rank in (0, world - 3):
        there = one_rank(tmp_path, SHARDS, rank, world, 8, 16)
        state = plan.state_bytes(Config(), 8)
        assert there["weights"] == there["average"] == found["whole"] // 8  # every number of rows is a multiple of 8
        assert there["optimizer"] == (2 * found["whole"] - found["muon"]) // 8
        assert state["weights"] == 4 * there["weights"] and state["momentum, Adam's moments"] == 4 * there["optimizer"]


def test_slices_of_uneven_rows_differ_by_rounding_only(tmp_path):
    first, last = (one_rank(tmp_path, SHARDS, rank, 22, 11, 2) for rank in (0, 21))
    held = plan.state_bytes(Config(depth=2, repa_depth=2), 11)["weights"] / 4
    assert last["weights"] < first["whole"] / 11 < first["weights"] == held < 1.01 * first["whole"] / 11


@pytest.mark.slow
@pytest.mark.parametrize("world", [32, 256])
def test_the_optimizer_takes_far_less_memory_than_a_whole_model(tmp_path, world):
    found = one_rank(tmp_path, STEP, 0, world, 8, 6)  # rank 0 owns the largest matrix
    print(f"{world} ranks: {found['peak'] / found['whole']:.2f} of the fp32 model")
    assert 0 < found["peak"] < 0.5 * found["whole"]
