"""The public sets, in small files of their exact layout: build, check, embed and train, whatever is wrong with the files,
however often the commands are killed, and whatever the number of ranks.

    pytest tests/test_sets.py
"""
import hashlib
import http.server
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import threading
import time
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import KEYS, ROOT, TINY, curve, patience, run, start, train
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file

import data_prep
from shards import UserError, is_held_out, read_manifest
from train_prx import Chunks, Config, Stage, T5GemmaText, make_batch, parse_config

pytestmark = pytest.mark.machinery

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OTHERS = ("original", "entity", "imagination", "text", "style", "affection", "composition")  # FLUX-Reason's other captions


def jpeg(seed: int, side: int = 96) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def row_of(kind: str, i: int, image: bytes | None = None, text: str | None = None) -> dict:
    """Row i of a set; `image` and `text` replace its picture and its caption."""
    image = {"bytes": jpeg(i) if image is None else image, "path": None}
    text = f"A large red circle {i}. In the top left, on the background." if text is None else text
    if kind == "flux_reason":
        row = {"id": f"fluxdb_{i:07d}", "image": image, "caption_detail": text, "caption_detail_cn": "红", "score_detail": 7.5,
               "bool_caption_detail": True}
        for name in OTHERS:
            row |= {f"caption_{name}": f"{name} {i}" if i % 2 else "", f"caption_{name}_cn": "圆", f"score_{name}": 1.0,
                    f"bool_caption_{name}": i % 2 == 0}
        return row
    if kind == "flux_generated":
        return {"image": image | {"path": f"{i}.jpg"}, "caption_caption": text}
    # a refusal, an empty caption and a good one take turns: gemini, then qwen3, then llava
    good = [("sure", "success"), ("I cannot say", "failed"), ("", "success")][i % 3]
    return {"id": i, "prompt": f"--ar 1:1 secret prompt {i}", "image": image, "llava": f"llava: {text}", "llava_status": "success",
            "gemini": text if i % 3 == 0 else good[0], "gemini_status": good[1],
            "qwen3": f"qwen3: {text}" if i % 3 == 1 else "", "qwen3_status": "success"}


FILES = {"flux_reason": ["Aesthetics-Part01/fluxdb-000000.parquet", "Imaginative/fluxdb-000001.parquet", "Text/fluxdb-000000.parquet"],
         "flux_generated": [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)],
         "midjourney": [f"train_{i:03d}.parquet" for i in range(3)]}


def write_parquet(file: Path, rows: list[dict], **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    images = pa.array([row["image"] for row in rows], STRUCT)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", images), file, **options)


def make_set(folder: Path, kind: str, rows: int = 20, replaced: dict[int, dict] = {}) -> Path:
    """`rows` rows in each of three files; replaced = {row number: arguments of row_of}."""
    for k, name in enumerate(FILES[kind]):
        write_parquet(folder / name, [row_of(kind, i, **replaced.get(i, {})) for i in range(k * rows, (k + 1) * rows)])
    (folder / "README.md").write_text("a card")
    return folder


def build(kind: str, source: Path, out: Path, *flags: str) -> dict:
    data_prep.main(["build", f"--source={kind}", f"--input={source}", f"--out={out}", "--size=32,64", *flags])
    return read_manifest(out)


def rows_of(out: Path, size: int = 32) -> list[dict]:
    return load_from_disk(str(out / str(size))).to_list()


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# From files to steps


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """All three sets, downloaded (in/) and built (out/), 60 rows each."""
    folder = tmp_path_factory.mktemp("sets")
    for kind in FILES:
        make_set(folder / "in" / kind, kind)
        build(kind, folder / "in" / kind, folder / "out" / kind)
    return folder


@pytest.fixture(scope="module")
def embedded(sets, networks) -> Path:
    """The three sets, built and embedded."""
    for kind in FILES:
        data_prep.main(["embed", f"--data={sets / 'out' / kind}", f"--encoder={networks / 't5gemma'}"])
        data_prep.main(["check", f"--data={sets / 'out' / kind}"])
    return sets / "out"


@pytest.mark.parametrize("kind", FILES)
def test_rows_are_the_sets_in_file_order_with_the_caption_of_choice(sets, kind):
    rows = rows_of(sets / "out" / kind)
    assert len(rows) == 60 and {row["source"] for row in rows} == {kind}
    for i, row in enumerate(rows):
        text = f"A large red circle {i}. In the top left, on the background."
        prefix = {0: "", 1: "qwen3: ", 2: "llava: "}[i % 3] if kind == "midjourney" else ""
        assert row["caption"] == prefix + text
        assert row["caption_short"] == prefix + f"A large red circle {i}."
        assert row["key"] == {"flux_reason": f"fluxdb_{i:07d}", "midjourney": str(i),
                              "flux_generated": hashlib.sha256(jpeg(i)).hexdigest()[:32]}[kind]
    manifest = read_manifest(sets / "out" / kind)
    assert manifest["source"] == kind and manifest["rows"] == 60 and manifest["dropped"] == {} and manifest["quality"] == 95
    assert [shard["rows"] for shard in manifest["shards"].values()] == [20] * 6
    assert [row["key"] for row in rows_of(sets / "out" / kind, 64)] == [row["key"] for row in rows]
    held_out = [row["caption"] for row in rows if is_held_out(row["key"])]
    assert manifest["prompts"][: len(held_out)] == held_out and len(manifest["prompts"]) == 16


def test_only_the_columns_needed_are_read(sets, monkeypatch):
    asked, honest = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **k: asked.append(k["columns"]) or honest(self, **k))
    for kind in FILES:
        list(data_prep.read_set(data_prep.SETS[kind], True, sets / "in" / kind / FILES[kind][0], 1))
    assert [sorted(columns) for columns in asked] == [
        ["caption_detail", "id", "image"], ["caption_caption", "image"],
        ["gemini", "gemini_status", "id", "image", "llava", "llava_status", "qwen3", "qwen3_status"]]


@pytest.mark.slow
def test_one_huge_row_group_is_not_held_in_memory(tmp_path):
    rows = [row_of("flux_reason", i, image=os.urandom(300_000)) for i in range(600)]
    write_parquet(tmp_path / "fluxdb-0.parquet", rows, row_group_size=600, compression="none")
    del rows
    used = []
    for _ in data_prep.read_set(data_prep.SETS["flux_reason"], True, tmp_path / "fluxdb-0.parquet", 600):
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert len(used) == 600 and max(used) - used[0] < 90 << 20  # of 180 MB; measured 58 MB


def test_a_file_of_nothing_new_leaves_no_shard_and_a_join_that_was_killed_goes_on(tmp_path, monkeypatch):
    source = make_set(tmp_path / "in", "flux_reason", replaced={i: {"image": jpeg(i - 20)} for i in range(20, 40)} | {41: {"image": jpeg(0)}})
    whole = build("flux_reason", source, tmp_path / "whole")
    assert whole["dropped"] == {"duplicate": 21} and len(whole["shards"]) == 4
    for moves in (1, 2, 4):  # killed when so many of the four shards have been moved to their place
        honest, left = os.rename, [moves]

        def rename(old, new):
            if Path(new).name.startswith("data-"):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            honest(old, new)

        monkeypatch.setattr(os, "rename", rename)
        try:
            build("flux_reason", source, tmp_path / "out", "--workers=0")
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "rename", honest)
        if moves < 4:
            build("flux_reason", source, tmp_path / "out", "--workers=0")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_limit_reads_the_first_rows(sets, tmp_path):
    manifest = build("flux_reason", sets / "in/flux_reason", tmp_path / "out", "--limit=25")
    assert manifest["rows"] == 25 and manifest["limit"] == 25
    assert [row["key"] for row in rows_of(tmp_path / "out")] == [f"fluxdb_{i:07d}" for i in range(25)]


def test_any_number_of_workers_writes_the_same_bytes(sets, tmp_path):
    for workers in (0, 1, 3):
        build("midjourney", sets / "in/midjourney", tmp_path / str(workers), f"--workers={workers}")
    assert files_of(tmp_path / "0") == files_of(tmp_path / "1") == files_of(tmp_path / "3") == {
        name: digest for name, digest in files_of(sets / "out/midjourney").items() if not name.startswith("text-")} | {
        "manifest.json": files_of(tmp_path / "0")["manifest.json"]}


def test_a_file_added_before_a_finished_one_is_read_when_the_build_goes_on(tmp_path):
    source = make_set(tmp_path / "in", "flux_reason")
    last = source / FILES["flux_reason"][2]
    whole = last.read_bytes()
    data = bytearray(whole)
    column = pq.ParquetFile(last).metadata.row_group(0).column(1)
    data[column.data_page_offset : column.data_page_offset + 30] = bytes(30)
    last.write_bytes(data)
    with pytest.raises(UserError, match="cut or damaged"):
        build("flux_reason", source, tmp_path / "out", "--workers=0")
    last.write_bytes(whole)
    write_parquet(source / "Aesthetics-Part00/fluxdb-9.parquet", [row_of("flux_reason", i) for i in range(900, 920)])
    build("flux_reason", source, tmp_path / "out")
    assert [row["key"] for row in rows_of(tmp_path / "out")] == [f"fluxdb_{i:07d}" for i in [*range(900, 920), *range(60)]]


def test_links_are_followed(tmp_path, sets):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/data").symlink_to(sets / "in/flux_generated/data")
    assert build("flux_generated", tmp_path / "in", tmp_path / "out")["rows"] == 60


def test_images_that_an_earlier_file_has_are_dropped_and_the_first_stays(tmp_path):
    again = {i: {"image": jpeg(i - 21)} for i in range(22, 31)} | {40: {"image": jpeg(0)}, 41: {"image": jpeg(41)}, 42: {"image": jpeg(41)}}
    manifest = build("flux_reason", make_set(tmp_path / "in", "flux_reason", replaced=again), tmp_path / "out", "--workers=2")
    kept = [i for i in range(60) if i not in again or i == 41]
    for size in (32, 64):
        assert [row["key"] for row in rows_of(tmp_path / "out", size)] == [f"fluxdb_{i:07d}" for i in kept]
    assert manifest["dropped"] == {"duplicate": 11} and manifest["rows"] == 49
    data_prep.main(["check", f"--data={tmp_path / 'out'}"])


FLAGS = ["--text_dim=24", "--text_tokens=256", "--stages=32:25:16:1,64:25:16:0:0.5"]


@pytest.mark.slow
def test_fifty_steps_on_the_three_sets_with_and_without_latents(tmp_path, embedded, networks):
    mix = f"--data={embedded}/flux_reason,{embedded}/flux_generated:10,{embedded}/midjourney"
    flags = [*TINY, *FLAGS, mix, f"--text_encoder={networks / 't5gemma'}"]
    stored = curve(train(tmp_path, *flags, "--name=stored"))
    plain = tmp_path / "plain"
    for kind in FILES:  # the same data without its latents
        (plain / kind).mkdir(parents=True)
        for size in ("32", "64"):
            (plain / kind / size).symlink_to(embedded / kind / size)
        manifest = read_manifest(embedded / kind)
        del manifest["text"]
        (plain / kind / "manifest.json").write_text(json.dumps(manifest))
    online = curve(train(tmp_path, *flags, mix.replace(str(embedded), str(plain)), "--name=online"))
    assert len(stored) == 50 and all(np.isfinite(list(stored.values())))
    worst = max(abs(stored[step] - online[step]) / online[step] for step in stored)
    assert worst < 1e-2, worst  # both bf16; measured 8e-4


# ---------------------------------------------------------------------------------------------------------------------
# Latents


def test_latents_are_the_encoders_unpadded_in_row_order(embedded, networks):
    cfg = Config(text_encoder=str(networks / "t5gemma"), precision="fp32", text_dim=24)
    encoder = T5GemmaText(cfg, torch.device("cpu"))
    folder = embedded / "midjourney/text-t5gemma"
    text = read_manifest(embedded / "midjourney")["text"]["text-t5gemma"]
    assert (text["encoder"], text["dim"], text["tokens"], text["dtype"]) == (cfg.text_encoder, 24, 256, "bfloat16")
    assert len(text["revision"]) == 64
    rows = rows_of(embedded / "midjourney")
    for shard in range(3):
        tensors = load_file(folder / f"data-{shard:05d}.safetensors")
        for kind in ("caption", "caption_short"):
            latents, ends = tensors[kind], tensors[f"{kind}_ends"].tolist()
            assert latents.dtype == torch.bfloat16 and len(ends) == 20 and ends[-1] == len(latents)
            for row, begin, end in zip(rows[20 * shard:], [0, *ends], ends):
                alone = encoder.encode(encoder.tokenize([row[kind]]))
                assert end - begin == len(alone)
                assert (latents[begin:end] - alone).abs().max() < 0.1  # order 1, bf16; measured 0.05


def test_a_chunks_latents_are_those_of_its_captions(embedded, networks):
    data = ",".join(f"{embedded}/{kind}" for kind in FILES)
    cfg = Config(data=data, text_encoder=str(networks / "t5gemma"), text_dim=24, micro_batch=40, workers=0, caption_dropout=0.3)
    encoder = T5GemmaText(cfg, torch.device("cpu"))
    chunk = Chunks(cfg, Stage(32, 10, 40, True, short=0.5), 0)[0]
    kinds = Counter("none" if not caption else "short" if caption.count(".") == 1 else "long" for caption in chunk["captions"])
    assert len(kinds) == 3 and min(kinds.values()) > 5, kinds
    batch = make_batch(chunk, encoder, torch.device("cpu"))
    txt, mask = encoder(chunk["captions"])
    assert torch.equal(batch["txt_mask"], mask) and txt.shape == (40, 256, 24) and batch["txt"].shape == (mask.sum(), 24)
    assert (batch["txt"] - txt[mask]).abs().max() < 0.1 and (txt[~mask] == 0).all()


def test_five_processes_share_the_work_and_write_the_bytes_of_one(sets, networks, embedded, tmp_path):
    build("flux_generated", sets / "in/flux_generated", tmp_path / "out")
    flags = ["embed", "--data=out", f"--encoder={networks / 't5gemma'}"]
    slow = tmp_path / "slow.py"  # a shard takes long to write, so that the others come upon its lock
    slow.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data_prep
honest = data_prep.save_file
def save_file(tensors, file):
    honest(tensors, file)
    open("saved", "a").write(file.name.split(".")[1] + "\\n")
    time.sleep(0.5)
data_prep.save_file = save_file
time.sleep(0.1 * int(os.environ["RANK"]))
data_prep.run_main(data_prep.main, every_rank=True)
""")
    all_five = start(tmp_path, slow, *flags, ranks=5)
    assert all_five.wait().status == 0
    assert sorted((tmp_path / "saved").read_text().split()) == ["data-00000", "data-00001", "data-00002", "prompts"]
    one, two = (read_manifest(folder)["text"]["text-t5gemma"] for folder in (embedded / "flux_generated", tmp_path / "out"))
    assert one == two
    assert files_of(tmp_path / "out/text-t5gemma") == files_of(embedded / "flux_generated/text-t5gemma")
    again = run(tmp_path, "data_prep.py", *flags)
    assert again.status == 0 and files_of(tmp_path / "out/text-t5gemma") == files_of(embedded / "flux_generated/text-t5gemma")
    other = run(tmp_path, "data_prep.py", *flags, "--text_tokens=8")
    assert "256 tokens" in other.error() and "delete it" in other.error()


def test_a_full_disk_while_embedding_is_one_line_and_the_same_command_continues(tmp_path, sets, networks):
    build("flux_generated", sets / "in/flux_generated", tmp_path / "out")
    script = tmp_path / "small_disk.py"
    script.write_text(f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import data_prep
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # a shard's latents are larger
data_prep.run_main(data_prep.main)
""")
    flags = ["embed", "--data=out", f"--encoder={networks / 't5gemma'}"]
    result = run(tmp_path, script, *flags)
    assert result.status == 2 and "Traceback" not in result.stderr, result
    assert "error: cannot write out/text-t5gemma" in result.stderr and "the same command continues" in result.stderr
    assert "text" not in read_manifest(tmp_path / "out")
    assert run(tmp_path, "data_prep.py", *flags).status == 0
    shutil.rmtree(tmp_path / "out/text-t5gemma")  # as training asks for where a file is damaged
    assert run(tmp_path, "data_prep.py", *flags).status == 0
    data_prep.main(["check", f"--data={tmp_path / 'out'}"])


def test_training_refuses_latents_of_another_encoder(tmp_path, embedded, networks):
    (tmp_path / "other").symlink_to(networks / "dinov2")
    (tmp_path / "t5gemma").mkdir()
    for file in (networks / "t5gemma").iterdir():
        (tmp_path / "t5gemma" / file.name).write_bytes(file.read_bytes())
    flags = [*TINY, *FLAGS, f"--data={embedded}/midjourney", "--max_steps=1", "--name=x"]
    right = run(tmp_path, "train_prx.py", *flags, "--text_encoder=t5gemma")  # the same weights at another place
    assert right.status == 0, right
    (tmp_path / "t5gemma/config.json").write_text((tmp_path / "t5gemma/config.json").read_text() + " ")
    wrong = [run(tmp_path, "train_prx.py", *flags, flag).error() for flag in
             ("--text_encoder=t5gemma", "--text_encoder=other", "--text_encoder=google/t5gemma-2b-2b-ul2")]
    assert "made by other weights than those in t5gemma" in wrong[0] and "data_prep.py embed --data=" in wrong[0]
    for line, name in zip(wrong[1:], ("other", "google/t5gemma-2b-2b-ul2")):
        assert f"has text latents by {networks / 't5gemma'}, not by {name}" in line and f"embed --data={embedded}/midjourney" in line
    line = run(tmp_path, "train_prx.py", *flags, f"--text_encoder={networks / 't5gemma'}", "--text_tokens=64").error()
    assert "--text_tokens=256" in line
    line = run(tmp_path, "train_prx.py", *flags, f"--text_encoder={networks / 't5gemma'}", "--text_dim=32").error()
    assert "--text_dim=24" in line


def test_training_on_latents_needs_no_encoder_but_for_its_hash(tmp_path, embedded, networks, monkeypatch):
    monkeypatch.setattr("train_prx.T5GemmaText", None)
    from train_prx import StoredPrompts
    cfg = Config(data=f"{embedded}/midjourney", text_encoder=str(networks / "t5gemma"), text_dim=24, micro_batch=4, workers=0)
    chunks = Chunks(cfg, Stage(32, 10, 4, True), 0)
    prompts = chunks.sets[0].latents.prompts
    assert list(prompts) == ["", *chunks.sets[0].manifest["prompts"]]
    encode = StoredPrompts(cfg, chunks.sets, torch.device("cpu"))
    txt, mask = encode(["", chunks.sets[0].manifest["prompts"][3]])
    assert mask.sum(1).tolist() == [len(prompts[""]), len(prompts[chunks.sets[0].manifest["prompts"][3]])] and txt.shape == (2, 256, 24)
    row = chunks.sets[0].read(5)  # as if it were held out: a score then draws its caption
    chunks.sets[0].held_out = np.array([5])
    encode = StoredPrompts(cfg, chunks.sets, torch.device("cpu"))
    latents, lengths = encode.latents([row["caption"]])
    assert torch.equal(latents, row["latents"]) and lengths == [len(latents)]
    with pytest.raises(UserError, match="its own captions only"):  # and not at the first score, hours later
        StoredPrompts(replace(cfg, score="cmmd,scenes"), chunks.sets, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Kill -9


KILLS = 20


def kill_at_random(cwd: Path, flags: list[str], begin_anew, is_as_it_should_be, is_done=lambda: False) -> None:
    """Start the command and kill it at a random moment until that has happened KILLS times.

    Each time that it gets to its end in spite of that, the result is looked at, and it all begins anew. `is_done`: whether
    a kill came after the work was done, while the command was about to leave.
    """
    rng, died, seconds = random.Random(0), 0, 0.0
    begin_anew()
    while True:
        running, begun = start(cwd, "data_prep.py", *flags), time.monotonic()
        if died < KILLS and seconds:
            time.sleep(rng.uniform(0.1, 1) * seconds)
            died += any(process.is_alive() for process in running.processes)
            running.kill(signal.SIGKILL)
            if any(process.exitcode for process in running.processes) and not is_done():
                continue
        assert running.wait().status == 0 or is_done()
        is_as_it_should_be()
        if died >= KILLS:
            return
        seconds = seconds or time.monotonic() - begun  # of an undisturbed run
        begin_anew()


@pytest.mark.slow
def test_kill_9_during_build_changes_nothing(tmp_path):
    kind = "flux_generated"
    for k in range(12):
        rows = [row_of(kind, i if i % 7 else 0, image=jpeg(i if i % 7 else 0, 256)) for i in range(40 * k, 40 * k + 40)]
        write_parquet(tmp_path / f"in/data/train-{k:05d}-of-00012.parquet", rows)
    flags = ["build", f"--source={kind}", "--input=in", "--size=64,32", "--format=png", "--workers=2"]
    assert run(tmp_path, "data_prep.py", *flags, "--out=undisturbed").status == 0
    assert read_manifest(tmp_path / "undisturbed")["dropped"]["duplicate"] > 60

    def compare() -> None:
        assert files_of(tmp_path / "killed") == files_of(tmp_path / "undisturbed")
        assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"in", "killed", "undisturbed"}

    kill_at_random(tmp_path, [*flags, "--out=killed"], lambda: shutil.rmtree(tmp_path / "killed", ignore_errors=True), compare,
                   is_done=lambda: (tmp_path / "killed").exists())  # it gets its name when it is whole


@pytest.mark.slow
def test_kill_9_during_embed_changes_nothing(tmp_path, networks):
    kind = "flux_generated"
    for k in range(8):
        write_parquet(tmp_path / f"in/data/train-{k:05d}-of-00008.parquet", [row_of(kind, i) for i in range(30 * k, 30 * k + 30)])
    build(kind, tmp_path / "in", tmp_path / "built")
    shutil.copytree(tmp_path / "built", tmp_path / "undisturbed")
    flags = ["embed", f"--encoder={networks / 't5gemma'}"]
    assert run(tmp_path, "data_prep.py", *flags, "--data=undisturbed").status == 0

    def begin_anew() -> None:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(tmp_path / "built", tmp_path / "killed")

    def compare() -> None:
        assert files_of(tmp_path / "killed") == files_of(tmp_path / "undisturbed")

    kill_at_random(tmp_path, [*flags, "--data=killed"], begin_anew, compare)


def test_workers_die_with_the_command(tmp_path):
    make_set(tmp_path / "in", "midjourney", rows=400)
    deadline = time.monotonic() + patience()
    running = start(tmp_path, "data_prep.py", "build", "--source=midjourney", "--input=in", "--out=out", "--size=64", "--workers=2")
    group = running.processes[0].pid  # each command leads a process group, and its workers are in it

    def members() -> list[str]:
        stats = (path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists())
        return [fields[0] for fields in stats if int(fields[2]) == group and fields[0] != "Z"]

    while len(members()) < 3:
        assert running.alive() and time.monotonic() < deadline
        time.sleep(0.01)
    running.kill(signal.SIGKILL)
    while members():
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.01)


def test_a_build_begun_with_other_settings_is_not_continued(tmp_path, sets):
    (tmp_path / "out.partial/parts/00000").mkdir(parents=True)
    (tmp_path / "out.partial/settings.json").write_text('{"sizes": [16]}')
    with pytest.raises(UserError, match="was begun with other settings"):
        build("midjourney", sets / "in/midjourney", tmp_path / "out")


def test_a_part_whose_source_has_changed_is_made_again(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    parts = tmp_path / "partial"
    parts.mkdir()
    part = next(data_prep.folder_parts(data_prep.folder_rows(folder, []), None))
    os.utime(folder / "1.jpg", (1, 1))
    assert next(data_prep.folder_parts(data_prep.folder_rows(folder, []), None)).fingerprint != part.fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong with files


def huge_png() -> bytes:
    """A small PNG that claims 30,000 x 30,000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    png, header = buffer.getvalue(), struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return png[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png[33:]


def test_bad_rows_are_dropped_and_counted(tmp_path):
    bad = {1: {"image": jpeg(1)[:700]}, 2: {"image": b""}, 3: {"image": huge_png()}, 4: {"text": "a" * 1_000_000},
           5: {"text": " \n"}, 6: {"image": jpeg(6, 20)}, 25: {"image": jpeg(0)}}
    manifest = build("flux_reason", make_set(tmp_path / "in", "flux_reason", replaced=bad), tmp_path / "out")
    assert manifest["dropped"] == {"unreadable": 2, "too large": 1, "caption too long": 1, "empty caption": 1, "too small": 1, "duplicate": 1}
    assert [row["key"] for row in rows_of(tmp_path / "out")] == [f"fluxdb_{i:07d}" for i in range(60) if i not in bad]
    data_prep.main(["check", f"--data={tmp_path / 'out'}"])


@pytest.mark.parametrize("bad, allowed", [(1, True), (2, False)])
def test_more_than_one_percent_of_a_file_unusable_is_an_error(tmp_path, bad, allowed):
    source = make_set(tmp_path / "in", "flux_generated", rows=100, replaced={100 + i: {"image": b"html"} for i in range(bad)})
    if allowed:
        assert build("flux_generated", source, tmp_path / "out")["dropped"] == {"unreadable": 1}
        return
    with pytest.raises(UserError, match=r"data/train-00001-of-00003.parquet: 2 of 100 .*unreadable: 2; the first is row 0.*--max_unusable"):
        build("flux_generated", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # the flag is a setting of the build, so it starts another
    assert build("flux_generated", source, tmp_path / "other", "--max_unusable=0.02")["dropped"] == {"unreadable": 2}


@pytest.mark.parametrize("damage", ["cut in half", "empty", "no parquet", "without a column", "lists", "bare images"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    source = make_set(tmp_path / "in", "midjourney")
    file = source / "train_001.parquet"
    whole = file.read_bytes()
    if damage == "without a column":
        pq.write_table(pq.read_table(file).drop_columns(["gemini"]), file)
    elif damage in ("lists", "bare images"):
        table, name = pq.read_table(file), {"lists": "gemini", "bare images": "image"}[damage]
        column = pa.array([["a"]] * 20) if damage == "lists" else pa.array([b"x"] * 20)
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), file)
    else:
        file.write_bytes({"cut in half": whole[: len(whole) // 2], "empty": b"", "no parquet": b"<html>" * 100}[damage])
    result = run(tmp_path, "data_prep.py", "build", "--source=midjourney", "--input=in", "--out=out", "--size=32")
    assert "train_001.parquet" in result.error()
    words = {"without a column": "has no column gemini", "lists": "column gemini holds list", "bare images": "column image holds binary"}
    assert words.get(damage, "download it again") in result.error()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    file.write_bytes(whole)
    assert run(tmp_path, "data_prep.py", "build", "--source=midjourney", "--input=in", "--out=out", "--size=32").status == 0


def test_a_parquet_file_damaged_inside_is_named_and_its_rows_are_not_kept(tmp_path):
    source = make_set(tmp_path / "in", "midjourney")
    file = source / "train_001.parquet"
    data = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(0).column(2)  # the images
    data[column.data_page_offset : column.data_page_offset + 30] = bytes(30)
    file.write_bytes(data)
    result = run(tmp_path, "data_prep.py", "build", "--source=midjourney", "--input=in", "--out=out", "--size=32")
    assert result.status == 2 and "train_001.parquet is cut or damaged" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_two_builds_into_one_folder_are_one_build_and_one_line(tmp_path):
    make_set(tmp_path / "in", "midjourney", rows=300)
    flags = ["build", "--source=midjourney", "--input=in", "--out=out", "--size=64,32"]
    both = [start(tmp_path, "data_prep.py", *flags, "--workers=1") for _ in range(2)]
    results = sorted((running.wait() for running in both), key=lambda result: result.status)
    assert [result.status for result in results] == [0, 2], results
    assert "another process is writing out" in results[1].stderr or "exists" in results[1].stderr
    data_prep.main(["check", f"--data={tmp_path / 'out'}"])


@pytest.mark.slow
def test_a_shard_changed_after_the_manifest_is_refused(tmp_path, sets, networks):
    build("midjourney", sets / "in/midjourney", tmp_path / "out")
    data_prep.main(["embed", f"--data={tmp_path / 'out'}", f"--encoder={networks / 't5gemma'}"])
    flags = [*TINY, *FLAGS, "--data=out", f"--text_encoder={networks / 't5gemma'}", "--max_steps=1"]
    assert run(tmp_path, "train_prx.py", *flags).status == 0
    for name in ("32/data-00001.arrow", "text-t5gemma/data-00002.safetensors"):
        file = tmp_path / "out" / name
        whole = bytearray(file.read_bytes())
        for changed, words in ((whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], "has changed"), (whole[:-8], "has changed"), (None, "is missing")):
            file.unlink() if changed is None else file.write_bytes(changed)
            line = run(tmp_path, "train_prx.py", *flags, "--name=other").error()
            assert f"out/{name} {words}" in line and ("embed --data=out" in line or "build the data again" in line)
            with pytest.raises(UserError, match=r"problem\(s\)"):
                data_prep.main(["check", f"--data={tmp_path / 'out'}"])
        file.write_bytes(whole)
    data_prep.main(["check", f"--data={tmp_path / 'out'}"])


def test_a_list_of_shards_that_is_not_the_manifests_is_found_and_not_used(tmp_path, sets):
    build("midjourney", sets / "in/midjourney", tmp_path / "out")
    state = json.loads((tmp_path / "out/32/state.json").read_text())
    state["_data_files"][1] = state["_data_files"][0]
    (tmp_path / "out/32/state.json").write_text(json.dumps(state))
    assert list(data_prep.find_problems(tmp_path / "out", read_manifest(tmp_path / "out"))) == [
        f"{tmp_path / 'out/32'}/state.json: lists other shards than the manifest"]
    chunks = Chunks(Config(data=str(tmp_path / "out"), text_encoder="builtin", micro_batch=4), Stage(32, 1, 4, False), 0)
    assert sorted(chunks.sets[0].columns["key"].to_pylist()) == sorted(map(str, range(60)))
    manifest = read_manifest(tmp_path / "out")
    del manifest["shards"]["32/data-00001.arrow"]
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has 40 rows, its manifest says 60"):
        Chunks(Config(data=str(tmp_path / "out"), text_encoder="builtin", micro_batch=4), Stage(32, 1, 4, False), 0)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{", b'{"sizes": 32, "rows": 1, "prompts": [], "dropped": {}, "shards": {}}',
                                     b'{"sizes": [32], "rows": 1, "prompts": [], "dropped": {}, "shards": {"32/a": {}}}'])
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest.json is damaged"):
        read_manifest(tmp_path)


def test_a_set_that_would_never_be_read_is_refused(tmp_path, sets):
    data = f"{sets}/out/midjourney:1,{sets}/out/flux_reason:100000"
    with pytest.raises(UserError, match="midjourney has so little weight"):
        Chunks(Config(data=data, text_encoder="builtin", micro_batch=4), Stage(32, 1, 4, False), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_rots_after_the_build_is_passed_over_and_said(tmp_path, workers):
    def rows():
        for i in range(60):
            bad = i == 7 or (i >= 30 and workers == 1)
            yield {"key": f"k{i}", "images": {32: b"rotten" if bad else jpeg(i, 32)}, "caption": f"c{i}", "caption_short": "c",
                   "source": "s", "digest": i.to_bytes(16, "big")}

    parts = lambda finished: iter([data_prep.Part("all", "", 60, ())])
    data_prep.write_dataset(tmp_path / "data", parts, lambda part, dropped: rows(), settings={"source": "s", "revision": "r", "sizes": [32]})
    result = run(tmp_path, "train_prx.py", *TINY, "--data=data", "--max_steps=5", f"--workers={workers}")
    if workers == 0:
        assert result.status == 0 and "data/32 row 7 does not decode and is passed over" in result.stderr, result
    else:  # half of them: no longer a matter of single rows
        assert result.status == 2 and "3 rows in a row do not decode" in result.stderr and "Traceback" not in result.stderr, result


# ---------------------------------------------------------------------------------------------------------------------
# The order of rows


@pytest.mark.slow
def test_any_number_of_ranks_reads_the_same_chunks_and_a_resume_goes_on(tmp_path, embedded, networks):
    """24 chunks a step, of 2 rows, from a mix of two sets: 1, 2, 3 and 8 ranks, and 3 after 2."""
    (tmp_path / "keys.py").write_text(KEYS.format(root=str(ROOT)))
    data = f"{embedded}/flux_reason:1,{embedded}/midjourney:2"
    flags = [*TINY, f"--data={data}", "--stages=32:4:48:0", "--micro_batch=2", "--text_dim=24", "--text_tokens=256", f"--text_encoder={networks / 't5gemma'}"]
    cfg, _ = parse_config(flags)
    stream = Chunks(cfg, cfg.stages[0], 0)
    expected = [stream[i]["keys"] for i in range(4 * 24)]

    def sequence(cwd: Path, ranks: int, steps: range) -> list:
        """The chunks in the order of (step, rank, place), from what each rank wrote down."""
        read = [[json.loads(line) for line in (cwd / f"keys-{rank}").read_text().splitlines()] for rank in range(ranks)]
        mine = 24 // ranks
        assert all(len(chunks) == mine * len(steps) for chunks in read)
        return [chunk for s in range(len(steps)) for chunks in read for chunk in chunks[s * mine : (s + 1) * mine]]

    for ranks in (1, 2, 3, 8):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        assert run(cwd, tmp_path / "keys.py", *flags, ranks=ranks).status == 0
        assert sequence(cwd, ranks, range(4)) == expected, ranks
    cwd = tmp_path / "resumed"
    cwd.mkdir()
    for ranks, steps, last in ((2, range(0, 2), 2), (3, range(2, 4), 4)):
        assert run(cwd, tmp_path / "keys.py", *flags, f"--max_steps={last}", ranks=ranks).status == 0
        assert sequence(cwd, ranks, steps) == expected[24 * steps.start : 24 * steps.stop]
        for file in cwd.glob("keys-*"):
            file.unlink()
    for kind, s in zip(("flux_reason", "midjourney"), stream.sets):  # each set in its own epochs
        keys = [row["key"] for row in rows_of(embedded / kind)]
        seen = [key for chunk in expected for key in chunk if key in keys]
        n = len(s.train)
        assert len(seen) > n and all(set(seen[k : k + n]) == {keys[row] for row in s.train} for k in range(0, len(seen) - n + 1, n))


# ---------------------------------------------------------------------------------------------------------------------
# The hub, played by a server of ours that answers as it does


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for when it looks up a data set and downloads its files."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root: Path, asked: list[str], *arguments):
        self.root, self.asked = root, asked
        super().__init__(*arguments)

    def answer(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        info, _, revision = self.path.partition("/revision/")
        if self.path.startswith("/api/datasets/lehduong/flux_generated") and revision in ("", "main", "v1", self.COMMIT):
            files = [{"rfilename": str(path.relative_to(self.root))} for path in self.root.rglob("*") if path.is_file()]
            return self.answer(200, json.dumps({"id": "lehduong/flux_generated", "sha": self.COMMIT, "siblings": files}).encode(),
                               Content_Type="application/json")
        prefix = f"/datasets/lehduong/flux_generated/resolve/{self.COMMIT}/"
        if self.path.startswith(prefix):
            data = (self.root / self.path.removeprefix(prefix)).read_bytes()
            begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
            return self.answer(206 if begin else 200, data[begin:], X_Repo_Commit=self.COMMIT, ETag=f'"{hashlib.sha256(data).hexdigest()}"',
                               Accept_Ranges="bytes", Content_Range=f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.answer(401 if "gated" in self.path else 404, b"{}", X_Error_Code="RevisionNotFound" if revision else "EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(sets):
    """(the environment that makes huggingface_hub ask our server, the requests that came)."""
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, sets / "in/flux_generated", asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}, asked
    server.shutdown()


def from_hub(cwd: Path, env: dict, *flags: str):
    """The command in a Python of its own: huggingface_hub reads its environment when it is imported."""
    import subprocess
    import sys
    return subprocess.run([sys.executable, ROOT / "data_prep.py", *flags], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                          capture_output=True, text=True, timeout=patience())


@pytest.mark.slow
def test_a_set_comes_from_the_hub_at_one_commit_and_leaves_no_download(tmp_path, sets, hub):
    env, asked = hub
    flags = ["build", "--source=flux_generated", "--size=32,64", "--revision=v1"]
    result = from_hub(tmp_path, env, *flags, "--out=out")
    assert result.returncode == 0, result
    assert read_manifest(tmp_path / "out")["revision"] == Hub.COMMIT
    assert rows_of(tmp_path / "out") == rows_of(sets / "out/flux_generated")
    assert all("/revision/v1" in line or f"/resolve/{Hub.COMMIT}/" in line for line in asked if "flux_gen" in line), asked
    assert not any("README" in line for line in asked), "only what is needed is downloaded"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"32", "64", "manifest.json"}
    asked.clear()
    assert from_hub(tmp_path, env, *flags, "--out=few", "--limit=30").returncode == 0
    assert len(rows_of(tmp_path / "few")) == 30 and not any("train-00002" in line for line in asked)


@pytest.mark.slow
def test_a_revision_that_is_not_there_is_one_line(tmp_path, hub):
    result = from_hub(tmp_path, hub[0], "build", "--source=flux_generated", "--size=32", "--revision=v9", "--out=out")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot get lehduong/flux_generated from the hub" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_fourth_set_of_the_readme_is_built(tmp_path, monkeypatch):
    entry = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.setattr(data_prep, "SETS", eval("{" + entry + "}", vars(data_prep)))
    rows = [{"id": f"r{i}", "image": {"bytes": jpeg(i), "path": None}, "long": "" if i % 2 else f"A long {i}.", "short": f"short {i}"}
            for i in range(8)]
    write_parquet(tmp_path / "in/more/train-0.parquet", rows)
    build("my_set", tmp_path / "in", tmp_path / "out")
    assert [(row["key"], row["caption"], row["source"]) for row in rows_of(tmp_path / "out")] == [
        (f"r{i}", f"short {i}" if i % 2 else f"A long {i}.", "my_set") for i in range(8)]
