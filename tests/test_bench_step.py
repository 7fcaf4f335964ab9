"""benchmarks/step.py: arms compute what ours does, or nothing is timed; its tables have every arm and part.

    python -m pytest tests/test_bench_step.py
"""
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import need_diffusers, run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import step as bench  # noqa: E402
from shards import UserError  # noqa: E402
from train_prx import Config, Stage, load_frozen  # noqa: E402

pytestmark = pytest.mark.parity

CPU = torch.device("cpu")
STAGE = Stage(32, 100, 8, True)
SMALL = Config(stages=(STAGE,), patch=8, bottleneck=16, width=64, depth=4, heads=2, text_dim=24, text_tokens=12, micro_batch=8,
               route_start=1, repa_depth=2, repa_dim=24, frozen="random", precision="fp32", compile=False)
FLAGS = ["--preset=demo", "--compile=0", "--width=32", "--depth=3", "--heads=2", "--route_end=2", "--repa_depth=2", "--micro_batch=2",
         "--batch=4", "--rounds=1", "--steps=2", "--warmup=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusers-routed", "diffusers"])
def test_an_arm_computes_our_loss_and_gradients_with_all_four_terms(networks, name):
    need_diffusers()
    """Relative difference of the losses below 1e-5, cosines of the gradients above 1 - 1e-8; one matrix 10% off is noticed."""
    cfg = replace(SMALL, repa_teacher=str(networks / "dinov3"), pdino_model=str(networks / "dinov2"))
    with bench.rank_of(1, 0, 8, CPU) as mesh:
        frozen = load_frozen(cfg, CPU)
        ours = bench.Ours(cfg, STAGE, frozen, mesh, CPU)
        theirs = bench.Assembled(name, cfg, STAGE, frozen, mesh, CPU, ours, Path())
        batch = bench.make_batches(cfg, STAGE, 1, CPU)[0]
        found = re.fullmatch(r"loss [\d.]+, (\S+) apart; cosine of the gradients 1 - (\S+), of \S+, the least alike, 1 - (\S+)",
                             bench.compare(ours, theirs, batch))
        assert float(found[1]) < 1e-5 and float(found[2]) < 1e-8 and float(found[3]) < 1e-8
        assert bool(theirs.step([batch, batch], 0))
        with torch.no_grad():
            theirs.model.net.blocks[1].gate_proj.weight.mul_(1.1)  # one matrix of one block
        with pytest.raises(UserError, match="does not compute what ours does"):
            bench.compare(ours, theirs, batch)


@pytest.mark.slow
def test_the_table_has_every_arm_and_each_part(tmp_path):
    need_diffusers()
    result = run(tmp_path, "benchmarks/step.py", *FLAGS, "--parts")
    assert result.status == 0, result
    for arm in ("ours", "diffusers-routed", "diffusers"):
        assert re.search(rf"^{arm} +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+ +[\d.]+ +[\d.]+% +[\d.]+x +[\d.]+ +-$", result.stdout, re.M), result
    for part in ("denoiser, forward", "denoiser, forward and backward", "global norm", "optimizer", "averaged weights, one step in 10"):
        assert re.search(rf"^  {part} +[\d.]+ ms +[\d.]+ (TFLOP|GB)", result.stdout, re.M), (part, result)


@pytest.mark.slow
def test_a_rank_of_32_takes_its_own_chunks_and_its_share_of_muon(tmp_path):
    result = run(tmp_path, "benchmarks/step.py", *FLAGS, "--arms=ours", "--ranks=32", "--rank=9")
    assert result.status == 0 and "4 images a step in chunks of 2" in result.stdout and "rank 9 of 32" in result.stdout, result


MISTAKES = {"--arms=diffusers": "ours first", "--arms=ours,theirs": "comma list", "--ranks=2": "--arms=ours", "--batch=3": "--micro_batch=2",
            "--stage=2": "the run has 1", "--rank=1": "--rank below --ranks", "--widht=3": "did you mean --width"}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_answered_with_one_line(flag):
    with pytest.raises(UserError, match=MISTAKES[flag]):
        bench.parse_flags([*FLAGS, flag])
