"""records/levers: each patch applies to the current source, trains and is no empty change; all of them train together on two
ranks; the formula of each against a closed form or the unpatched source; and the page there lists every patch.

    OMP_NUM_THREADS=1 pytest tests/test_levers.py
"""
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, curve, metrics, run
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_prx  # noqa: E402
from train_prx import Config, Frozen, Stage, gather_tokens, parse_config, velocity  # noqa: E402

pytestmark = pytest.mark.machinery

LEVERS = {  # patch -> flags of a run of three steps, and the first step whose loss is another than without the patch
    "contrastive": ([], 1),
    "dense_late": (["--route_until=0.5"], 3),
    "gated_attention": ([], 2),  # at the start every block is the identity
    "irepa": ([], 1),
    "short_late": (["--short_from=0.5", "--short_late=1"], 3),
    "sprint": (["--drop=0.5"], 2),  # at the start x0_hat is 0
}
PATCHES = sorted(path.stem for path in (ROOT / "records/levers").glob("*.patch"))
SMALL = Config(patch=4, bottleneck=16, width=48, depth=4, heads=3, text_dim=20, text_tokens=7, route_start=1, route_end=-1,
               repa_depth=2, repa_dim=48, precision="fp32", compile=False, text_encoder="builtin")
STAGE = Stage(16, 10, 4, True)


def apply(levers: list[str], folder: Path) -> Path:
    """A copy of the source with patches applied, one after the other, in `folder`; returns its train_prx.py."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for lever in levers:
        subprocess.run(["git", "apply", ROOT / f"records/levers/{lever}.patch"], cwd=folder, check=True)
    return folder / "train_prx.py"


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """lever -> the module train_prx with its patch applied."""
    modules = {}

    def load(lever: str) -> ModuleType:
        if lever not in modules:
            name = f"train_prx_{lever}"
            spec = importlib.util.spec_from_file_location(name, apply([lever], tmp_path_factory.mktemp(lever)))
            modules[lever] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[lever])
        return modules[lever]

    return load


def config(module: ModuleType, **changes):
    """SMALL in a module's own Config, whose new fields have their defaults."""
    return replace(module.Config(**{**vars(SMALL), "drop": 0.5}), **changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(B: int = 8) -> dict[str, Tensor]:
    g = generator(1)
    return {"x0": 2 * torch.rand(B, 3, 8, 32, generator=g) - 1, "txt": torch.randn(B, 7, 20, generator=g),
            "txt_mask": torch.arange(7) < torch.randint(1, 8, (B, 1), generator=g)}


def lively(model: nn.Module) -> nn.Module:
    """The model with random numbers on all weights, so that no block is the identity."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(p.numel())))
    return model


class Planted:
    """A model whose image and features are given; it keeps what it was called with."""

    def __init__(self, x0_hat: Tensor, feat: Tensor | None = None, repa_projector=None):
        self.x0_hat, self.feat, self.repa_projector = x0_hat, feat, repa_projector

    def __call__(self, x_t, t, txt, txt_mask, ids_keep=None):
        self.x_t, self.t, self.ids_keep = x_t, t, ids_keep
        return self.x0_hat, self.feat if ids_keep is None or self.feat is None else gather_tokens(self.feat, ids_keep)


def planted_image(B: int = 8) -> Tensor:
    return 0.8 * torch.randn(B, 3, 8, 32, generator=generator(2))


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def test_the_page_lists_every_patch_and_no_other():
    page = (ROOT / "records/levers/README.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)`\]\(\1\.patch\) \|", page, re.MULTILINE)) == PATCHES == sorted(LEVERS)


@pytest.fixture(scope="module")
def flags(data, networks) -> list[str]:
    """Three steps with REPA on."""
    return [*TINY, f"--data={data}", "--stages=32:3:16:1", "--frozen=random", f"--repa_teacher={networks}/dinov3",
            "--repa_dim=24", "--lpips_weight=0", "--pdino_weight=0"]


def train(script: Path | str, folder: Path, *flags: str, ranks: int = 1) -> dict[int, float]:
    """Step -> loss of a run, all of whose numbers must be finite."""
    result = run(folder, script, *flags, ranks=ranks)
    assert result.status == 0, result
    assert all(math.isfinite(value) for line in metrics(folder / "runs/demo") for value in line.values())
    return curve(folder / "runs/demo")


@pytest.fixture(scope="module")
def unpatched(flags, tmp_path_factory) -> dict[int, float]:
    return train("train_prx.py", tmp_path_factory.mktemp("unpatched"), *flags)


@pytest.mark.slow
@pytest.mark.parametrize("lever", PATCHES)
def test_a_patch_trains_and_changes_the_loss_from_where_it_acts(lever, flags, unpatched, tmp_path):
    more, first = LEVERS[lever]
    losses = train(apply([lever], tmp_path), tmp_path, *flags, *more)
    assert [*losses] == [1, 2, 3] and [step for step in losses if losses[step] != unpatched[step]] == [*range(first, 4)]


@pytest.mark.slow
def test_all_levers_together_train_on_two_ranks_as_on_one(flags, tmp_path):
    (tmp_path / "two").mkdir()
    script, more = apply(PATCHES, tmp_path), [flag for lever in PATCHES for flag in LEVERS[lever][0]]
    one, two = train(script, tmp_path, *flags, *more), train(script, tmp_path / "two", *flags, *more, ranks=2)
    assert one == pytest.approx(two, rel=1e-5)  # measured 8e-8


@pytest.mark.parametrize("lever, flag", [
    ("contrastive", "--contrast=1"), ("contrastive", "--micro_batch=1"), ("dense_late", "--route_until=1.1"),
    ("irepa", "--repa_gamma=-1"), ("short_late", "--short_late=2"), ("short_late", "--short_from=-1"),
    ("sprint", "--path_drop=1.5")])
def test_a_value_that_cannot_work_is_an_error_that_names_the_flag(patched, lever, flag):
    with pytest.raises(train_prx.UserError, match=flag):
        patched(lever).parse_config(["--preset=demo", flag])


# ---------------------------------------------------------------------------------------------------------------------
# Each by itself


@pytest.mark.parametrize("t_power", [1.0, 2.0])
def test_contrastive_takes_off_the_squared_distance_to_the_velocity_of_the_image_before(patched, t_power):
    module, batch, model = patched("contrastive"), make_batch(), Planted(planted_image())
    cfg = config(module, t_power=t_power, uniform_t=0.0)
    loss, terms = module.training_loss(model, Frozen(), batch, cfg, STAGE, generator())
    before, _ = train_prx.training_loss(model, Frozen(), batch, cfg, STAGE, generator())
    assert list(terms) == ["flow", "contrast"] == module.term_names(cfg, Frozen(), STAGE) and terms["flow"] == before
    t, x0, x_t = model.t.double(), batch["x0"].double(), model.x_t.double()
    assert t.min() > 0.05  # below, no v is exact
    v = (x_t - x0) / t[:, None, None, None]  # eps - x0
    distance = (velocity(x_t, model.x0_hat.double(), t) - torch.cat([v[-1:], v[:-1]])).square().mean((1, 2, 3))
    expected = -0.05 * (distance * t ** (2 - t_power)).mean().item()
    assert (loss - before).item() == pytest.approx(expected, rel=1e-4)
    assert terms["contrast"].item() == pytest.approx(-expected / 0.05, rel=1e-4)


def test_contrastive_takes_the_other_image_from_the_same_chunk(patched):
    """Else the loss would change with --chunks_at_once."""
    module, batch, image = patched("contrastive"), make_batch(), planted_image()
    cfg = config(module)
    both, _ = module.training_loss(Planted(image), Frozen(), batch, cfg, STAGE, [generator(0), generator(1)])
    each = [module.training_loss(Planted(image[half]), Frozen(), {name: x[half] for name, x in batch.items()}, cfg, STAGE,
                                 generator(seed))[0] for seed, half in enumerate((slice(4), slice(4, 8)))]
    assert both.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


@pytest.mark.parametrize("drop", [0.5, 0.0])
def test_irepa_convolves_a_grid_with_zeros_for_routed_tokens_and_aligns_with_normalised_features(patched, drop):
    """Against the convolution written out: nine shifted grids of 2 x 8 tokens, each times its slice of the weights."""
    module = patched("irepa")
    projector = module.Projector(6, 5)
    feat, target = (torch.randn(8, 16, width, generator=generator(width)) + 1 for width in (6, 5))
    model = Planted(planted_image(), feat, projector)
    cfg = config(module, drop=drop, repa_gamma=0.7)
    _, terms = module.training_loss(model, Frozen(teacher=lambda x0: target), make_batch(), cfg, STAGE, generator())

    ids = torch.arange(16).expand(8, -1) if drop == 0 else model.ids_keep
    kept = torch.zeros(8, 16).scatter(1, ids, 1.0).bool()
    grid = F.pad((feat * kept[..., None]).double().unflatten(1, (2, 8)), (0, 0, 1, 1, 1, 1))  # [B, 4, 10, C]
    weight = projector.weight.double()  # [D, C, 3, 3]
    out = projector.bias + sum(grid[:, r : r + 2, c : c + 8] @ weight[:, :, r, c].T for r in range(3) for c in range(3))
    mean, variance = target.double().mean(1, keepdim=True), target.double().var(1, keepdim=True)
    cosine = F.cosine_similarity(out.flatten(1, 2), (target - 0.7 * mean) / variance.sqrt(), dim=-1)[kept]
    assert terms["repa"].item() == pytest.approx(-cosine.mean().item(), abs=1e-6)  # another formula: some 1e-2


def test_irepa_draws_the_convolution_as_torch_does(patched):
    model = patched("irepa").PRX(config(patched("irepa")))
    weight, bound = model.repa_projector.weight, (9 * 48) ** -0.5
    assert weight.shape == (48, 48, 3, 3) and 0.99 * bound < weight.abs().max() <= bound
    other = train_prx.PRX(SMALL)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in other.named_parameters() if "repa" not in name)


def test_sprint_joins_the_features_before_the_route_with_deep_ones_that_are_the_mask_token_elsewhere(patched):
    module, batch = patched("sprint"), make_batch(4)
    model = lively(module.PRX(config(module)))
    seen = {}
    model.blocks[0].register_forward_hook(lambda block, args, out: seen.update(shallow=out))
    model.blocks[2].register_forward_hook(lambda block, args, out: seen.update(deep=out))
    model.fuse.register_forward_hook(lambda fuse, args, out: seen.update(fused=args[0], out=out))
    model.blocks[3].register_forward_pre_hook(lambda block, args: seen.update(last=args[0]))
    ids_keep = train_prx.draw_ids_keep(4, 16, 0.75, "cpu", generator())
    x_t, t, text = batch["x0"], torch.rand(4, generator=generator()), (batch["txt"], batch["txt_mask"])
    path_drop = torch.tensor([False, True, False, True])
    nothing = torch.empty(4, 0, dtype=torch.int64)
    for ids, dropped in ((ids_keep, None), (ids_keep, path_drop), (None, path_drop), (None, None), (nothing, None)):
        seen.clear()
        x0_hat, _ = model(x_t, t, *text, ids, dropped)
        expected = model.mask_token.expand(4, 16, 48).clone()
        for b in range(4):
            if "deep" in seen and not (dropped is not None and dropped[b]):
                expected[b, slice(None) if ids is None else ids[b]] = seen["deep"][b]
        assert ("deep" in seen) == (ids is not nothing), "path-drop guidance runs no routed block"
        assert torch.equal(seen["fused"], torch.cat([expected, seen["shallow"]], dim=-1))
        assert seen["last"] is seen["out"] and x0_hat.shape == x_t.shape


def test_sprint_trains_with_a_share_of_dropped_paths_and_draws_nothing_else_anew(patched):
    module, batch, calls = patched("sprint"), make_batch(256), []

    def model(x_t, t, txt, txt_mask, ids_keep, path_drop=None):
        calls.append((x_t, t, ids_keep, path_drop))
        return batch["x0"], None

    for source in (module, train_prx):
        source.training_loss(model, Frozen(), batch, config(module, path_drop=0.3), STAGE, generator())
    *draws, path_drop = calls[0]
    assert all(map(torch.equal, draws, calls[1])) and 0.2 < path_drop.float().mean() < 0.4
    assert module.Config().drop == 0.75


def test_sprint_guides_by_the_shallow_path_without_prompt(patched):
    module, batch = patched("sprint"), make_batch(2)
    model = lively(module.PRX(config(module)))
    common = dict(null_txt=torch.zeros(1, 7, 20), null_mask=torch.zeros(1, 7, dtype=torch.bool), size=(8, 32), steps=1,
                  drop=0.5, seeds=[0, 1], shift=3.0)
    guided = module.generate(model, batch["txt"], batch["txt_mask"], guidance="self", scale=3.0, **common)
    x, t = torch.stack([torch.randn(3, 8, 32, generator=generator(seed)) for seed in (0, 1)]), torch.ones(2)
    with torch.no_grad():
        dense, _ = model(x, t, batch["txt"], batch["txt_mask"])
        shallow, _ = model(x, t, torch.zeros(0, 20), torch.zeros(2, 7, dtype=torch.bool), path_drop=torch.ones(2).bool())
    assert (guided - (shallow + 3 * (dense - shallow)).clamp(-1, 1)).abs().max() < 1e-5


def test_short_late_reads_what_a_stage_of_its_own_would(patched, data):
    """One stage and the patch, against two stages of one size, the second with half of its captions short."""
    module, common = patched("short_late"), [*TINY, f"--data={data}", "--text_tokens=24"]
    cfg, _ = module.parse_config([*common, "--stages=32:6:16:1,32:6:8:1"])  # 12 steps: late from 9 on, 3 into the second stage
    late = module.Chunks(cfg, cfg.stages[1], 96)
    two, _ = parse_config([*common, "--stages=32:6:16:1,32:3:8:1,32:3:8:1:0.5"])
    for i in range(12):
        stage, first_row = (two.stages[1], 96) if i < 6 else (two.stages[2], 120)
        captions = train_prx.Chunks(two, stage, first_row)[i % 6]["captions"]
        assert late[i]["captions"] == captions
        long = train_prx.Chunks(two, two.stages[1], 96)[i]["captions"]
        assert (captions != long) == (i >= 6)


def test_gated_attention_turns_each_head_of_each_token_up_or_down(patched):
    """A gate of 1 or 0 is a head that is there or not; a gate of weight 0 halves all."""
    block, plain = patched("gated_attention").Block(SMALL), train_prx.Block(SMALL)
    lively(block)
    plain.load_state_dict({name: p for name, p in block.state_dict().items() if name != "attn_gate.weight"})
    x, c, tokens = (torch.randn(shape, generator=generator(i)) for i, shape in enumerate([(1, 16, 48), (1, 48), (7, 48)]))
    rope = train_prx.rotary_table(4, 4, 16, 1e4, torch.device("cpu"))

    def out(module: nn.Module) -> Tensor:
        text = train_prx.Text(tokens, torch.tensor([7]), 7)
        return module(x, text, c, rope, text.layout(x, 16))

    for gate, factor in (([0.0, 0.0, 0.0], [0.5, 0.5, 0.5]), ([50.0, -50.0, 50.0], [1.0, 0.0, 1.0])):
        hook = block.attn_gate.register_forward_hook(lambda module, args, y: torch.tensor(gate).expand(y.shape))
        with torch.no_grad():
            plain.attn_out.weight.copy_(block.attn_out.weight * torch.tensor(factor).repeat_interleave(16))
            assert (out(block) - out(plain)).abs().max() < 1e-5
        hook.remove()


@pytest.mark.slow
def test_dense_late_trains_as_without_routing(flags, tmp_path):
    """From step 0 on, it is --drop=0, to the bit."""
    (tmp_path / "never").mkdir()
    late = train(apply(["dense_late"], tmp_path), tmp_path, *flags, "--route_until=0")
    assert late == train("train_prx.py", tmp_path / "never", *flags, "--drop=0")
