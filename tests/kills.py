"""Kill a run of the demo again and again, and see that the same command always continues it, to the same bits.

    python tests/kills.py --kills=100                                  about 20 minutes; the output is in kills.txt
    python tests/kills.py --kills=10 --data=DIR --max_steps=200        any flag of train_prx.py

Every kill is `kill -9`: of ten, one hits the start, five a random moment around a step, and four the writing of a checkpoint
(up to 50 ms after it began). Then weights, average, optimizer and every logged loss are compared, bit for bit, with those of
a run that nobody disturbed. On CPU only: there the order of sums is fixed.
"""
import json
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import Running, checkpoint_tensors, curve, different, last_checkpoint, run, start
from tqdm import tqdm

from train_prx import SOURCE_HASH, Parser, UserError, run_main

DEMO = ["--preset=demo", "--device=cpu", "--compile=0", "--log_every=1", "--save_every=20", "--eval_every=0", "--sample_every=0"]
DAY = 24 * 3600.0


def strike(process: Running, folder: Path, aim: int, draw: random.Random) -> bool:
    """Kill a run at its start, after step `aim` or in the first save after it; returns whether it was writing a checkpoint."""
    def partial() -> bool:
        return any(folder.glob("checkpoints/.step_*.partial"))

    kind = draw.random()
    if kind < 0.1:
        time.sleep(draw.uniform(0, 3))
    else:
        while process.alive() and max(map(int, re.findall(r"^step (\d+)/", process.out.read_text(), re.MULTILINE)), default=0) < aim:
            time.sleep(0.002)
        while kind < 0.5 and process.alive() and not partial():
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.05 if kind < 0.5 else 0.5))
    writing = partial()
    process.kill(signal.SIGKILL)
    return writing


def kill_and_compare(cwd: Path, kills: int, flags: list[str], seed: int = 0) -> dict:
    """Train undisturbed and killed `kills` times, evenly over the steps; `different` names what is not the same bits."""
    draw = random.Random(seed)
    began = time.monotonic()
    assert run(cwd, "train_prx.py", *flags, "--name=whole", seconds=DAY).status == 0
    whole, broken = cwd / "runs/whole", cwd / "runs/broken"
    steps = max(curve(whole))
    seen = {"source": SOURCE_HASH[:12], "steps": steps, "seconds_undisturbed": round(time.monotonic() - began), "kills": 0, "kills_while_a_checkpoint_was_written": 0,
            "kills_before_the_first_checkpoint": 0, "steps_done_again": 0}
    began = time.monotonic()
    for k in tqdm(range(kills + 1), unit=" attempts", disable=None):
        process = start(cwd, "train_prx.py", *flags, "--name=broken")
        writing = strike(process, broken, steps * (k + 1) // (kills + 1), draw) if k < kills else False
        result = process.wait(DAY)
        assert result.status == (-signal.SIGKILL if k < kills else 0), result
        if k < kills:
            saved = sorted(broken.glob("checkpoints/step_*"))
            done = max(map(int, re.findall(r"^step (\d+)/", result.stdout, re.MULTILINE)), default=0)
            seen["kills"] += 1
            seen["kills_while_a_checkpoint_was_written"] += writing
            seen["kills_before_the_first_checkpoint"] += not saved
            seen["steps_done_again"] += max(0, done - (int(saved[-1].name.removeprefix("step_")) if saved else 0))
    seen["seconds_killed"] = round(time.monotonic() - began)
    seen["different"] = different(*(checkpoint_tensors(last_checkpoint(folder)) for folder in (whole, broken)))
    seen["different"] += ["losses"] if curve(whole) != curve(broken) else []
    return seen


def main(argv: list[str]) -> None:
    """Print what was seen; exit status 1 where a bit differs."""
    parser = Parser(prog="kills.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how often the run is killed")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if not any(flag.startswith("--data=") for flag in flags):
            made = run(Path(folder), "scenes.py", "make", "--out=data/demo", "--rows=20000", "--size=32", seconds=DAY)
            if made.status:
                raise UserError(f"cannot make scenes: {made.stderr.strip()}")
        flags = [f"--data={Path(flag.removeprefix('--data=')).resolve()}" if flag.startswith("--data=") else flag for flag in flags]
        seen = kill_and_compare(Path(folder), args.kills, [*DEMO, *flags])
    print(json.dumps(seen, indent=1))
    sys.exit(1 if seen["different"] else 0)


if __name__ == "__main__":
    run_main(main)
