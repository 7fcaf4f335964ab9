"""Sampling: `train_prx.generate` beside diffusers' PRXPixelPipeline, same weights, prompts, noise and time grid.

    python benchmarks/sampling.py                        a GPU: the record at 512px; none: its sequences, a small model
    python benchmarks/sampling.py --size=1024 --batch=1

diffusers knows classifier-free guidance alone, and its pipeline takes one prompt at a time (0.42.1 fails on more); it
runs the two passes of guidance as one batch. The pictures are compared first. Text latents are given, of as many tokens
as captions have, padded as both pad them. `compiled`: the blocks, with torch.compile, in both. Our `self` guidance is
timed for information: half of the tokens of its second pass are routed around most blocks. `ours is`: the median of the
rounds' ratios, since a machine with other work on it is slow for seconds at a time.
"""
import logging
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from tools.exchange import diffusers_config, to_diffusers  # noqa: E402
from tools.plan import clock, hardware, perturb, synthetic_batch  # noqa: E402
from train_prx import (  # noqa: E402
    PRESETS, PRX, Parser, Stage, UserError, compiles, compute_dtype, generate, run_main, shift_t)

SMALL = dict(patch=4, bottleneck=48, width=128, heads=4, depth=6, text_dim=256)  # 256 tokens at 64px


def main(argv: list[str]) -> None:
    """Compare, time, print."""
    cuda = torch.cuda.is_available()
    parser = Parser(prog="sampling.py", description="Seconds of a batch of pictures, ours beside diffusers'.")
    parser.add_argument("--size", type=int, default=512 if cuda else 64, help="pixels a side")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--steps", type=int, default=28 if cuda else 8, help="Euler steps")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale")
    parser.add_argument("--rounds", type=int, default=5 if cuda else 15, help="rounds in which the arms take turns")
    own = parser.parse_args(argv)
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel
        from diffusers.utils import logging as diffusers_logging
    except ImportError:
        raise UserError("the diffusers arms need it: pip install diffusers==0.42.1") from None
    cfg = PRESETS["record"] if cuda else replace(PRESETS["record"], **SMALL)
    if min(own.size, own.batch, own.steps, own.rounds) < 1 or own.size % cfg.patch:
        raise UserError(f"--size={own.size} must be a multiple of {cfg.patch}; --batch, --steps, --rounds at least 1")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of absent CUDA
    torch._dynamo.config.recompile_limit = 64  # as sample.py has it
    diffusers_logging.set_verbosity_error()  # of timesteps without sigmas, at every call
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if cuda else "cpu")
    dtype = compute_dtype(cfg, device)

    model = PRX(cfg).eval().requires_grad_(False)
    perturb(model)
    transformer = PRXTransformer2DModel(**diffusers_config(cfg))
    model.repa_projector = None
    transformer.load_state_dict(to_diffusers(model.state_dict()))
    model, transformer = model.to(device, dtype), transformer.to(device, dtype).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline = PRXPixelPipeline(transformer, scheduler, None, None, own.size, noise_scale=1.0)
    pipeline.set_progress_bar_config(disable=True)
    batch = synthetic_batch(replace(cfg, micro_batch=own.batch), Stage(own.size, 1, own.batch, False), device)
    txt, txt_mask = batch["txt"].to(dtype), batch["txt_mask"]
    null_txt, null_mask = txt[:1], torch.arange(cfg.text_tokens, device=device)[None] < 1  # the empty prompt: one token
    null_txt = torch.randn(null_txt.shape, generator=torch.Generator().manual_seed(1)).to(txt) * null_mask[:, :, None]
    seeds = list(range(own.batch))
    shape, generators = (3, own.size, own.size), [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    grid = (1000 * shift_t(torch.linspace(1, 0, own.steps + 1), cfg.shift))[:-1].tolist()

    def ours(at_once: int = 1, guidance: str = "cfg") -> torch.Tensor:
        parts = [slice(i, i + at_once) for i in range(0, own.batch, at_once)]
        return torch.cat([generate(
            model, txt[part], txt_mask[part], null_txt=null_txt, null_mask=null_mask, size=shape[1:], steps=own.steps,
            guidance=guidance, scale=own.scale, drop=cfg.drop, seeds=seeds[part], shift=cfg.shift) for part in parts])

    def theirs() -> torch.Tensor:
        return torch.cat([pipeline(
            prompt_embeds=txt[i : i + 1], prompt_attention_mask=txt_mask[i : i + 1], negative_prompt_embeds=null_txt,
            negative_prompt_attention_mask=null_mask, timesteps=grid, height=own.size, width=own.size,
            guidance_scale=own.scale, latents=noise[i : i + 1].to(dtype), output_type="pt",
            use_resolution_binning=False).images
            for i in range(own.batch)]).float().clamp(-1, 1)

    print(f"{hardware(device)}, torch {torch.__version__}; {own.batch} pictures of {own.size}px, {own.steps} steps, "
          f"cfg, {dtype}, {txt_mask.sum().item() / own.batch:.0f} of {cfg.text_tokens} text tokens a prompt")
    difference = (ours() - theirs()).abs()
    print(f"pictures in [-1, 1] differ by at most {difference.max():.1e}, {difference.mean():.1e} on average")
    if not cuda and difference.max() > 1e-4:
        raise UserError("the pictures are not the same: nothing was timed")
    print(f"{'arm':28}{'ms a picture':>13}{'spread':>18}{'ours is':>9}")
    for compiled in (False, True) if compiles(cfg, device) else (False,):
        if compiled:
            for block in (*model.blocks, *transformer.blocks):
                block.compile(dynamic=False)
        arms = {"ours": ours, "diffusers": theirs}
        if not compiled:
            arms |= {"ours, all at once": lambda: ours(own.batch), "ours, self guidance": lambda: ours(guidance="self")}
        for arm in arms.values():
            arm()
        times = {name: [] for name in arms}
        for _ in range(own.rounds):
            for name, arm in arms.items():
                times[name].append(1e3 * clock(arm, device) / own.batch)
        for name, of_arm in times.items():
            spread = f"{min(of_arm):.1f} to {max(of_arm):.1f}"
            ratio = statistics.median(a / b for a, b in zip(of_arm, times["ours"]))
            print(f"{name + ', compiled' * compiled:28}{statistics.median(of_arm):13.1f}{spread:>18}{ratio:8.2f}x")


if __name__ == "__main__":
    run_main(main)
