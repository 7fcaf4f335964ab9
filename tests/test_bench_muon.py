"""benchmarks/muon.py: it measures every arm, times none that computes something else, and counts what ranks exchange.

    python -m pytest tests/test_bench_muon.py
"""
import re

import pytest
import torch
import torch.distributed as dist
from conftest import fork_context
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import muon as bench
from muon import newton_schulz_cost
from shards import UserError

pytestmark = pytest.mark.machinery

TINY = ["--preset=demo", "--width=16", "--rounds=1"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """On the CPU. The script settles how many threads torch has, and here it may end as a member of a group."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_table_of_ranks_has_every_arm(monkeypatch, capsys):
    """One matrix of each shape. To compile muon-fsdp2's loop would take longer than all the rest."""
    monkeypatch.setattr(bench, "missing", lambda name, device: "time" * (name == "muon-fsdp2"))
    shapes = bench.shapes_of("demo", 16)
    monkeypatch.setattr(bench, "shapes_of", lambda preset, width: shapes[: len(shapes) // 6])
    fork_context()
    bench.main([*TINY, "--ranks=2", "--only=ranks"])
    table = capsys.readouterr().out.split("\n\n")[1]
    assert table.startswith("2 ranks, gloo: 7 matrices at width 16, ")
    for arm in ("ours", "ours in fp32", "torch.optim.Muon"):
        assert re.search(rf"^  {arm} +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+x +[\d.e+-]+$", table, re.MULTILINE), table
    assert re.search(r"^  muon-fsdp2 +not measured: time$", table, re.MULTILINE), table


def test_without_muon_fsdp2_its_row_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.missing("muon-fsdp2", torch.device("cpu")) == "pip install muon-fsdp2==0.3.0"
    assert not bench.missing("ours", torch.device("cpu")) and not bench.missing("torch.optim.Muon", torch.device("cpu"))


@pytest.mark.parametrize("flag, named", [("--ranks=1", "--ranks"), ("--only=two", "--only=two"), ("--width=20", "--width"),
                                         ("--rank=256", "--rank"), ("--widht=16", "--width")])
def test_a_bad_flag_is_refused_by_name(flag, named):
    with pytest.raises(UserError, match=named):
        bench.main([*TINY, "--only=fake", flag])


@pytest.mark.parametrize("change", [{"lr": 1.1e-4}, {"ns_steps": 4}])
def test_an_arm_that_computes_something_else_is_named_and_not_timed(change, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ARMS", {"ours": bench.ours, "other": lambda params: bench.muon.Muon(
        [{"params": params, "use_muon": True, **bench.SAME, **change}])})
    with pytest.raises(UserError, match="the first update of other is"):
        bench.main([*TINY, "--only=one"])
    assert "median" not in capsys.readouterr().out


@pytest.fixture(params=[8, 32, 256], ids=lambda world: f"rank of {world}")
def fake(request):
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=request.param)
    return request.param


def test_loop_back_gives_this_ranks_input_and_counts_what_would_have_been_sent(fake):
    x = torch.arange(2.0 * fake)  # [2 x world]
    twice, all_of_it, shard = torch.empty(2 * fake), torch.empty(2 * fake * fake), torch.empty(2)
    with bench.loop_back() as traffic:
        assert dist.all_to_all_single(twice, x) is None and torch.equal(twice, x)
        dist.all_gather_into_tensor(all_of_it, x, async_op=True).wait()
        dist.reduce_scatter_tensor(shard, x)
    assert torch.equal(all_of_it, x.repeat(fake)) and shard.tolist() == [6, 7]
    each = 4 * (2 * (fake - 1) + 2 * fake * (fake - 1) + 2 * (fake - 1))  # bytes: fp32
    assert traffic == {tuple(range(fake)): [each, each]}


def test_the_row_of_one_rank_counts_its_share_and_its_bytes(monkeypatch, capsys):
    """32 square matrices: on 8 ranks four are mine, on 32 ranks one. Slices of bf16 go to owners, and back."""
    monkeypatch.setattr(bench, "shapes_of", lambda preset, width: [torch.Size((512, 512))] * 32)
    bench.main([*TINY, "--only=fake", "--rank=3"])
    rows = [line.replace("/", " ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("  3 of")]
    assert [row[2] for row in rows] == ["8", "32", "256"]
    for row, mine, beyond in zip(rows, (4, 1), (0, 3)):
        piece, in_node = 2 * 512 * 512 / 8, 8 * mine  # bytes of a slice, matrices that my node owns
        assert int(row[7]) == mine and float(row[9]) == 1  # of the mean
        assert float(row[8]) == pytest.approx(10e-12 * mine * newton_schulz_cost(torch.Size((512, 512))), abs=1e-4)
        near = (in_node - mine) * piece + 7 * mine * piece
        far = beyond * in_node * piece
        assert [float(x) for x in row[10:14]] == pytest.approx([x / 1e6 for x in (near, near, far, far)], abs=0.06)
