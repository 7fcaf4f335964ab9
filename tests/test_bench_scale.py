"""benchmarks/scale.py: its bytes are those that a training step gives to its collectives; its times follow from them by hand.

    python -m pytest tests/test_bench_scale.py
"""
import contextlib
import inspect
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import fork_context
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import scale
from benchmarks.plan import newton_schulz_loads, parameter_groups
from shards import UserError
from train_prx import EMA, PRESETS, Config, Frozen, Stage, build_model, build_optimizer, parse_config, run_main, train_step

pytestmark = pytest.mark.machinery

# (replicas, shards, rank); at width 20 no matrix has a multiple of 8 rows, and biases and norms have fewer than 8 numbers
MESHES = [(1, 8, 5), (4, 8, 19)]
SMALL = Config(patch=8, bottleneck=12, width=20, depth=3, heads=1, text_dim=6, text_tokens=4, micro_batch=2, chunks_at_once=1,
               route_start=1, repa_depth=2, repa_dim=9, frozen="random", compile=False)
PRECISIONS, STAGES = ("bf16", "fp32"), {"repa": True, "no repa": False}
COLLECTIVES = {"all_gather_into_tensor": "weights", "reduce_scatter_tensor": "gradients", "all_to_all_single": "owners",
               "all_gather_single": "weights", "reduce_scatter_single": "gradients",  # what FSDP calls in torch 2.15
               "all_reduce": "sums"}


@contextlib.contextmanager
def counting(replicas: int, shards: int):
    """Within this context collectives count the bytes that this rank sends to others, by `Moved`'s names."""
    counts = Counter()

    def counted(kind: str, honest):
        def collective(*args, **kwargs):
            named = inspect.signature(honest).bind(*args, **kwargs).arguments  # in the order of the signature
            (output, source, *_), group = [*named.values(), None], named.get("group")
            ranks = dist.get_process_group_ranks(group)
            if kind == "weights":  # Muon's go to other nodes
                counts[kind if len({rank // shards for rank in ranks}) == 1 else "replicas"] += output.nbytes - source.nbytes
            elif kind == "gradients":
                counts[kind] += source.nbytes - output.nbytes
            elif kind == "owners":
                counts[kind] += source.nbytes - named["input_split_sizes"][dist.get_rank(group)] * source.element_size()
            elif len(ranks) == replicas:
                counts[kind] += 2 * output.nbytes * (replicas - 1) / replicas
            else:
                counts["norm"] += output.nbytes  # one number, to all ranks
            return honest(*args, **kwargs)
        return collective

    with mock.patch.multiple(dist, **{name: counted(kind, getattr(dist, name)) for name, kind in COLLECTIVES.items()
                                      if hasattr(dist, name)}):
        yield counts


def count_steps(i: int, folder: str) -> None:
    """Body of a process: be one rank of mesh i on the fake process group, and count real steps of two chunks each."""
    replicas, shards, rank = MESHES[i]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=replicas * shards)
    shape, names = ((replicas, shards), ("replicate", "shard")) if replicas > 1 else ((shards,), ("shard",))
    mesh, found = init_device_mesh("cpu", shape, mesh_dim_names=names), {}
    batch = {"x0": torch.rand(2, 3, 32, 32) * 2 - 1, "txt": torch.randn(2, 4, 6), "txt_mask": torch.ones(2, 4, dtype=torch.bool)}
    frozen = Frozen(teacher=lambda x0: torch.randn(len(x0), 16, 9))
    for precision in PRECISIONS:
        cfg = replace(SMALL, precision=precision)
        model = build_model(cfg, mesh, torch.device("cpu"))
        optimizer, ema = build_optimizer(model, cfg), EMA(model)
        for step, (name, repa) in enumerate(STAGES.items()):
            with counting(replicas, shards) as counts:
                stage = Stage(32, 1, 4 * replicas * shards, repa)
                train_step(model, optimizer, ema, frozen, iter([batch] * 2), cfg, stage, step, {})
            found[f"{precision}, {name}"] = counts
    Path(folder, f"{i}.json").write_text(json.dumps(found))


def test_the_bytes_are_those_of_a_real_step(tmp_path):
    """Exactly, by collective: padded rows, unused projector and odd shares included; weights move once for two chunks."""
    fork_context()
    torch.multiprocessing.start_processes(count_steps, (str(tmp_path),), nprocs=len(MESHES), start_method="forkserver")
    for i, (replicas, shards, rank) in enumerate(MESHES):
        found = json.loads((tmp_path / f"{i}.json").read_text())
        assert len(found) == len(PRECISIONS) * len(STAGES)
        for precision in PRECISIONS:
            cfg = replace(SMALL, precision=precision)
            for name, repa in STAGES.items():
                fsdp = scale.fsdp_bytes(cfg, Stage(32, 1, 4, repa), replicas, shards)
                muon = scale.muon_bytes(cfg, replicas, shards)[rank]
                counts = found[f"{precision}, {name}"]
                assert counts.pop("norm") == 4
                expected = {kind: a + b for kind, a, b in zip(fsdp._fields, fsdp, muon) if a + b}
                assert counts == expected, (replicas, precision, name)


def test_what_never_hides_and_what_can_are_all_that_moves():
    cfg, stage = PRESETS["record"], PRESETS["record"].stages[0]
    hideable, exposed = scale.step_bytes(cfg, stage, 4, 8)
    whole, muon = scale.fsdp_bytes(cfg, stage, 4, 8), scale.muon_bytes(cfg, 4, 8)
    assert [a + b for a, b in zip(hideable, exposed)] == [
        whole.weights, whole.gradients, max(m.owners for m in muon), whole.sums, max(m.replicas for m in muon)]
    blocks = 15 / 16 * 1_156_055_040  # the matrices of all blocks but the first; biases and norms make the rest
    assert hideable.weights == pytest.approx(7 / 8 * 2 * blocks, rel=1e-3) and not (hideable.owners or hideable.replicas)


def test_a_step_by_hand():
    """One GB within the node at 400 GB/s is 2.5 ms, one beyond at 50 GB/s is 20 ms."""
    hideable = scale.Moved(weights=2e9, gradients=4e9, sums=1e9)  # 15 ms, 20 ms
    exposed = scale.Moved(weights=1e9, owners=1e9, replicas=0.5e9)  # 5 ms, 10 ms
    assert scale.step_range(80, [4, 6], hideable, exposed, 400, 50) == pytest.approx((80 + 4 + 15, 80 + 35 + 6 + 15))
    assert scale.step_range(10, [4, 4], hideable, exposed, 400, 50) == pytest.approx((20 + 4 + 15, 10 + 35 + 4 + 15))


FLAGS = ["--preset=demo", "--stages=32:3600:512:1,32:100:64:0", "--micro_batch=4", "--batch=16", "--frozen=none"]


def test_a_row_follows_from_the_measured_step_and_the_bytes(capsys):
    scale.main([*FLAGS, "--step_ms=10", "--optimizer_ms=2", "--network_gbps=0.25", "--price=3"])
    out = capsys.readouterr().out
    assert out.startswith("measured, as the command line says: 10 ms for 16 images on one GPU as one of 32, 2 ms of them the opt")
    assert re.search("^left out: 256 GPUs, .*: 1, 2, 4, 8, 16, 32, 64, 128$", out, re.MULTILINE)
    title, *table = out.split("\n\n")[2].splitlines()
    assert title.startswith("simulated, but for the first row") and table[1].split() == ["1", "16", "10.0", "measured", "1,600.0"]
    rows = {row.split()[0]: [float(x.replace(",", "")) for x in row.replace("%", "").split() if x != "to"] for row in table[2:]}
    assert list(rows) == ["8", "16", "32", "64", "128"]

    cfg, _ = parse_config(FLAGS[:3] + FLAGS[4:])
    hideable, exposed = scale.step_bytes(cfg, cfg.stages[0], 2, 8)
    (near, far), (never_near, never_far) = ((sum(moved[:3]), sum(moved[3:])) for moved in (hideable, exposed))
    load = {n: max(newton_schulz_loads([p.shape for p in parameter_groups(cfg)[0]["params"]], n)) for n in (16, 32)}
    assert load[16] > load[32]  # so the optimizer takes from 2 ms to more
    best = 2 * (10 - 2) + 2 + never_near / 400e6 + never_far / 0.25e6  # twice the images; ms
    worst = 2 * (10 - 2) + 2 * load[16] / load[32] + (near + never_near) / 300e6 + (far + never_far) / 0.25e6
    gpus, images, *columns = rows["16"]
    assert (gpus, images) == (16, 32) and far / 0.25e6 > 1
    assert columns[1] == pytest.approx(worst, abs=0.051) and columns[4] == pytest.approx(best, abs=0.051)
    assert columns[6:8] == pytest.approx([512e3 / worst, 512e3 / best], abs=0.51)
    assert columns[8:10] == pytest.approx([100 * 512e3 / ms / 16 / 1600 for ms in (worst, best)], abs=0.51)
    assert columns[10:12] == pytest.approx([best / 1000, worst / 1000], abs=0.0051)
    assert columns[12:] == pytest.approx([16 * 3 * ms / 1000 for ms in (best, worst)], abs=0.51)


MISTAKES = {"--step_ms=0": "--step_ms=0 must be above", "--optimizer_ms=100": "above --optimizer_ms=100",
            "--batch=6": "--micro_batch=4", "--batch=48": "divides the stage's 512 images", "--stage=3": "the run has 2",
            "--network_gbps=0": "--network_gbps", "--gpus_a_node=0": "--gpus_a_node must be", "--widht=3": "did you mean --width"}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_bad_flag_is_refused_by_name(flag):
    with pytest.raises(UserError, match=re.escape(MISTAKES[flag])):
        scale.main([*FLAGS, "--step_ms=100", flag])


def test_without_a_measured_step_one_line_says_how_to_measure_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scale.py", *FLAGS, "--stage=2"])
    with pytest.raises(SystemExit) as ended:
        run_main(scale.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and err.startswith("error: --step_ms is missing") and err.count("\n") == 1
    assert err.endswith("python benchmarks/step.py --arms=ours --ranks=4 --batch=16 --stage=2\n")
