"""Kill a run of the demo again and again, and see that the same command always continues it, to the same bits.

    python tests/kills.py --kills=100 [any flag of train_prx.py]      about 20 minutes

Every kill is `kill -9`: of ten, one hits the start, five a random moment around a step, and four the writing of a
checkpoint (up to 50 ms after it began). Then weights, average, optimizer and every logged loss are compared, bit for
bit, with those of a run that nobody disturbed. On CPU only: there the order of sums is fixed.
"""
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import Running, checkpoint_tensors, curve, different, last_checkpoint, last_logged, run, start
from tqdm import tqdm

from train_prx import SOURCE_HASH, Parser, UserError, run_main

DEMO = ["--preset=demo", "--device=cpu", "--compile=0", "--log_every=1", "--save_every=20", "--eval_every=0",
        "--sample_every=0"]
DAY = 24 * 3600.0


def strike(process: Running, folder: Path, aim: int, draw: random.Random) -> bool:
    """Kill a run at its start, after step `aim` or in the next save; returns whether it was writing a checkpoint."""
    is_writing, kind = lambda: any(folder.glob("checkpoints/.step_*")), draw.random()
    if kind < 0.1:
        time.sleep(draw.uniform(0, 3))
    else:
        while process.alive() and last_logged(folder) < aim:
            time.sleep(0.002)
        while kind < 0.5 and process.alive() and not is_writing():
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.05 if kind < 0.5 else 0.5))
    writing = is_writing()
    process.kill(signal.SIGKILL)
    return writing


def kill_and_compare(cwd: Path, kills: int, flags: list[str], seed: int = 0) -> dict:
    """Train undisturbed, and killed `kills` times, evenly over the steps; `different` names what is not the same."""
    draw, began = random.Random(seed), time.monotonic()
    assert run(cwd, "train_prx.py", *flags, "--name=whole", seconds=DAY).status == 0
    whole, broken = cwd / "runs/whole", cwd / "runs/broken"
    steps, undisturbed = max(curve(whole)), round(time.monotonic() - began)
    writing, unsaved, again, began = 0, 0, 0, time.monotonic()
    for k in tqdm(range(kills), unit=" kills", disable=None):
        process = start(cwd, "train_prx.py", *flags, "--name=broken")
        writing += strike(process, broken, steps * (k + 1) // (kills + 1), draw)
        assert process.wait(DAY).status == -signal.SIGKILL, process.wait()
        saved = [int(path.name.removeprefix("step_")) for path in broken.glob("checkpoints/step_*")]
        unsaved += not saved
        again += max(0, last_logged(broken) - max(saved, default=0))
    assert run(cwd, "train_prx.py", *flags, "--name=broken", seconds=DAY).status == 0
    names = different(*(checkpoint_tensors(last_checkpoint(folder)) for folder in (whole, broken)))
    return {"source": SOURCE_HASH[:12], "steps": steps, "seconds_undisturbed": undisturbed, "kills": kills,
            "kills_while_a_checkpoint_was_written": writing, "kills_before_the_first_checkpoint": unsaved,
            "steps_done_again": again, "seconds_killed": round(time.monotonic() - began),
            "different": names + (["losses"] if curve(whole) != curve(broken) else [])}


def main(argv: list[str]) -> None:
    """Print what was seen; exit status 1 where a bit differs."""
    parser = Parser(prog="kills.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how often the run is killed")
    parser.add_argument("--data", help="the data folder (default: 20,000 scenes that are made for it)")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(args.data or f"{folder}/data/demo").resolve()
        if args.data is None:
            scenes = ["make", f"--out={data}", "--rows=20000", "--size=32"]
            made = run(Path(folder), "tools/scenes.py", *scenes, seconds=DAY)
            if made.status:
                raise UserError(f"cannot make scenes: {made.stderr.strip()}")
        seen = kill_and_compare(Path(folder), args.kills, [*DEMO, f"--data={data}", *flags])
    print(json.dumps(seen, indent=1))
    sys.exit(1 if seen["different"] else 0)


if __name__ == "__main__":
    run_main(main)
