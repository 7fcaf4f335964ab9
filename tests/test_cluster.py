"""A run on many ranks and nodes: every mesh trains the same model; whatever a cluster does to a run, it continues or says
why not; replicas that drift apart are found.

    pytest tests/test_cluster.py

Nodes are groups of processes on this machine, but for the last test, whose two are network namespaces.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENV, KEYS, ROOT, checkpoint_tensors, curve, different, last_checkpoint, metrics, run, start, train
from test_run import FINISH, SAVING, assert_same_curve, assert_same_end

FP32 = ["--precision=fp32", "--ema_every=3"]
MESHES = {"1x1": (1, 1), "1x2": (2, 1), "2x1": (2, 2), "2x2": (4, 2)}  # nodes x processes a node -> (ranks, nodes)


# ---------------------------------------------------------------------------------------------------------------------
# Every mesh is the same run


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory, data) -> dict[str, Path]:
    """30 steps in fp32 of the demo's model, in four chunks a step, on each mesh."""
    runs = {}
    for mesh, (ranks, nodes) in MESHES.items():
        flags = ["--preset=demo", f"--data={data}", "--micro_batch=8", "--max_steps=30", "--compile=0", "--log_every=1",
                 "--sample_steps=2", *FP32]
        runs[mesh] = train(tmp_path_factory.mktemp(mesh), *flags, ranks=ranks, nodes=nodes)
    return runs


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "1x1"])
def test_thirty_steps_of_the_demo_agree_on_every_mesh(demo_runs, mesh):
    one, other = curve(demo_runs["1x1"]), curve(demo_runs[mesh])
    assert one.keys() == other.keys() == set(range(1, 31))
    apart = max(abs(one[step] - other[step]) for step in one)
    print(f"{mesh}: losses {apart:.1e} apart", end="")
    assert apart < 1e-5
    expected, found = (checkpoint_tensors(last_checkpoint(demo_runs[m])) for m in ("1x1", mesh))
    assert expected.keys() == found.keys()
    floats = [name for name in expected if expected[name].is_floating_point() and expected[name].norm() > 0]
    assert sum(name.startswith("model.") for name in floats) > 60
    worst = max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in floats)
    print(f", tensors {worst:.1e} relative")
    assert worst < 1e-5
