"""tools/plan.py: what it counts, measures and finds missing; and the sharding that it counts with, on up to 256 ranks.

    python -m pytest tests/test_plan.py
"""
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, checkpoint_tensors, last_checkpoint, run, train
from safetensors.torch import load_file

from muon import newton_schulz_cost
from tools import plan
from train_prx import PRESETS, Config

KIND = "machinery"  # of the tests without a mark of their own

TIMES = "first step at 32px", "a chunk, forward and backward", "the rest of a step on one rank"


def numbers(stdout: str) -> dict[str, tuple[float, str]]:
    """Name -> (value, kind) of the lines of a plan that hold one number; of equal names the first."""
    found = re.findall(r"^  (\S.*?)  +(-?[\d,.e+]+)(?: \S+)?  +(counted|measured|predicted)", stdout, re.MULTILINE)
    return {name: (float(value.replace(",", "")), kind) for name, value, kind in reversed(found)}


def files(folder) -> list[str]:
    """What a command left in its folder; `conftest.run` writes .out and .err there."""
    return [str(path) for path in folder.rglob("*") if not path.name.startswith((".out-", ".err-"))]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record's plan for 256 ranks: what was printed, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("record")
    result = run(folder, "tools/plan.py", "--preset=record", "--gpus=256", "--micro_batch=2", "--price=3")
    assert result.status == 0, result
    return result.stdout, folder


@pytest.mark.recipe
def test_flop_are_those_counted_on_the_public_model(record):
    _, first, second = map(numbers, re.split(r"^Stage \d: ", record[0], flags=re.MULTILINE))
    gflop = {"denoiser": (876, 3116), "lpips": (120, 481), "pdino": (144, 144), "teacher": (165, None)}  # of PRX's code
    for name, (at_512, at_1024) in gflop.items():
        assert first[name] == (pytest.approx(at_512, rel=0.01), "counted")
        assert at_1024 is None or second[name] == (pytest.approx(at_1024, rel=0.01), "counted")
    assert not {"teacher", "projector"} & set(second)
    # three Linear layers over the tokens that stay, 2 FLOP a multiply-add, forward and two gradients
    assert first["projector"][0] == pytest.approx(6e-9 * 128 * (1792 * 1024 + 2 * 1024**2), rel=0.01)


@pytest.mark.recipe
def test_flop_without_routing_are_those_of_the_dense_model():
    cfg = replace(PRESETS["record"], drop=0.0, frozen="none", micro_batch=2)
    assert plan.count_stage(cfg, cfg.stages[0])["denoiser"] / 1e9 == pytest.approx(1363, rel=0.01)


@pytest.mark.recipe
def test_record_on_256_ranks_is_planned_without_a_gpu(record):
    stdout, folder = record
    found = numbers(stdout)
    assert files(folder) == []
    assert found["parameters"] == (1_177_215_744, "counted") and found["matrices that Muon steps"] == (112, "counted")
    assert "1,156,055,040 of the parameters" in stdout and found["Newton-Schulz a step"] == (47.9, "counted")
    assert found["the whole run"] == (pytest.approx(1.78e20, rel=0.01), "counted")
    hours, kind = found["hours"]
    assert kind == "predicted" and hours == pytest.approx(1.78e20 / (256 * 0.6 * 790e12) / 3600, rel=0.01)
    assert found["dollars"] == (pytest.approx(hours * 256 * 3, rel=0.01), "predicted") and "not measured" in stdout
    for name in ("flux_generated", "flux_reason", "midjourney"):
        command = f"python data_prep.py build --source={name} --out=data/{name} --size=512,1024; python data_prep"
        assert re.search(rf"^  MISSING  data/{name}: .*TB \(predicted\); {command}.py embed --data=", stdout, re.M)
    assert stdout.endswith(f"\n{stdout.count('MISSING ')} things are missing\n")


def test_a_tiny_run_is_measured_and_ready(tiny, data, tmp_path):
    before = set(data.rglob("*"))
    result = run(tmp_path, "tools/plan.py", *tiny, "--stages=32:20000:16:1", "--price=36")
    assert result.status == 0 and result.stdout.endswith("\nready\n"), result
    assert files(tmp_path) == [] and set(data.rglob("*")) == before
    found = numbers(result.stdout)
    first, chunk, rest = (found[name][0] for name in TIMES)
    assert {found[name][1] for name in TIMES} == {"measured"} and chunk > 0  # ms; about 10 on a quiet machine
    hours = (first + 20_000 * (4 * chunk + rest) / 1e3) / 3600  # steps of 4 chunks; times are printed to 0.1 ms
    assert found["hours"] == (pytest.approx(hours, abs=0.01), "predicted")
    assert found["dollars"] == (pytest.approx(36 * found["hours"][0], abs=0.2), "predicted")


@pytest.mark.slow
def test_ranks_share_chunks_and_hours_are_a_range_of_what_they_wait(tiny, monkeypatch, capsys):
    monkeypatch.setattr(plan, "NETWORK", 1e7)  # bytes/s, so that they wait about as long as they work
    plan.main([*tiny, "--stages=32:20000:16:1", "--gpus=4", "--gpus_a_node=2"])
    stdout = capsys.readouterr().out
    first, chunk, rest = (numbers(stdout)[name][0] for name in TIMES)
    hours = (first + 20_000 * (chunk + rest / 2) / 1e3) / 3600  # one chunk, half of the slices
    low, high = map(float, re.search(r"hours +([\d.]+) to ([\d.]+) +predicted", stdout).groups())
    wait = float(re.search(r"for it +0 to ([\d.]+) ms +simulated", stdout)[1])
    assert low == pytest.approx(hours, abs=0.01) and high - low == pytest.approx(20_000 * wait / 3.6e6, abs=0.01)


@pytest.mark.parametrize("flag, said", {
    "--witdh=64": "did you mean --width?", "--gpus=many": "--gpus", "--gpus=0": "at least 1",
    "--gpus=3": "cannot share chunks of 16 rows evenly; these can: 1, 2, 4, 8, 16, 32",
    "--gpus_a_node=6": "nodes of 6"}.items())
def test_a_mistake_is_one_line(flag, said, tmp_path):
    assert said in run(tmp_path, "tools/plan.py", "--gpus=16", flag).error() and files(tmp_path) == []


def test_damaged_data_is_missing_and_a_network_is_there_with_its_weights(tiny, data, networks, tmp_path):
    shutil.copytree(data, tmp_path / "copy")
    next((tmp_path / "copy/32").glob("*.arrow")).write_bytes(b"")
    result = run(tmp_path, "tools/plan.py", *tiny[:-1], f"--data={tmp_path}/copy")
    assert result.status == 0 and f"MISSING  {tmp_path}/copy: " in result.stdout and "build the data" in result.stdout
    assert result.stdout.endswith("\n1 thing is missing\n")
    assert plan.is_here(str(networks / "dinov3"))
    assert not plan.is_here("nobody/has-this-model") and not plan.is_here(str(tmp_path))


@pytest.mark.slow
def test_bytes_counted_are_those_that_a_run_writes(tiny, tmp_path):
    folder, stdout = train(tmp_path, *tiny), run(tmp_path, "tools/plan.py", *tiny).stdout
    stored = sum(x.nbytes for x in checkpoint_tensors(last_checkpoint(folder)).values() if x.ndim)
    weights = sum(x.nbytes for x in load_file(folder / "ema.safetensors").values())
    for name, n in ("a checkpoint", stored + weights), ("ema.safetensors", weights):
        assert re.search(rf"  {name} +{plan.size_text(n)}  counted", stdout), (name, n, stdout)


# One rank of many: torch's `fake` process group, in which one process is one of them
RANK = """
import json, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from muon import local
from train_prx import EMA, PRX, Config, build_optimizer

rank, world, shards, depth = map(int, sys.argv[1:])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))
cfg = Config(depth=depth, repa_depth=2)
with torch.device("meta"):
    model = PRX(cfg)
for unit in [*model.blocks, model]:
    fully_shard(unit, mesh=mesh, reshard_after_forward=False)
optimizer, ema = build_optimizer(model, cfg), EMA(model)
count = lambda tensors: sum(x.numel() for x in local(list(tensors)))
state = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
print(json.dumps({{"weights": count(model.parameters()), "average": count(ema.weights.values()),
                  "optimizer": count(x for each in state for x in each.values() if x.ndim)}}))
"""


@pytest.mark.recipe
@pytest.mark.parametrize("rank, world, shards, depth", [
    (0, 32, 8, 4), pytest.param(253, 256, 8, 16, marks=pytest.mark.slow), (0, 22, 11, 2), (21, 22, 11, 2)])
def test_state_is_cut_evenly_and_as_planned(rank, world, shards, depth, tmp_path):
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT)))
    result = run(tmp_path, tmp_path / "rank.py", *map(str, (rank, world, shards, depth)))
    assert result.status == 0, result
    there, cfg = json.loads(result.stdout.splitlines()[-1]), Config(depth=depth, repa_depth=2)
    state, whole = plan.state_bytes(cfg, shards), sum(plan.held_weights(cfg, 1))
    assert there["weights"] == there["average"]
    assert there["weights"] == pytest.approx(whole / shards, rel=0 if shards == 8 else 0.02)
    if rank == 0 or shards == 8:  # every number of rows is a multiple of 8, not of 11: then the first ranks hold most
        assert state["weights, gradients, averages"] == 12 * there["weights"]
        assert state["momentum, Adam's moments"] == 4 * there["optimizer"]


@pytest.mark.recipe
@pytest.mark.parametrize("world", [8, 32, 256])
def test_newton_schulz_is_balanced(world):
    loads = plan.newton_schulz_loads([p.shape for p in plan.parameter_groups(Config())[0]["params"]], world)
    largest = newton_schulz_cost(torch.Size((1792, 6 * 1792)))  # with more ranks than matrices one each is the best
    assert max(loads) < 1.05 * sum(loads) / world or sum(load > 0 for load in loads) == 112 and max(loads) == largest
