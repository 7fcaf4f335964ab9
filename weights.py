"""Weights that come from elsewhere: models of the hub, safetensors files, folders of diffusers. Nothing is unpickled.

    load_pretrained(loader, model_id)     transformers' `from_pretrained`, its failures in one line
    read_weights(path)                    a run, its ema.safetensors or a diffusers folder -> tensors under our names
    to_diffusers(state), from_diffusers(state)

Our names are those of PRX's own code (`blocks.0.img_qkv_proj.weight`); diffusers' PRXTransformer2DModel has others.
"""
import json
import logging
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from muon import local
from shards import UserError, file_sha256, folder_revision

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # also where lpips, torchvision and torch-fidelity load theirs: tensors only

FALLBACKS = {  # gated model -> (the flag that replaces it, an open model)
    "facebook/dinov3-vitl16-pretrain-lvd1689m": ("--repa_teacher", "facebook/dinov2-with-registers-large"),
    "openai/clip-vit-large-patch14-336": ("--metric", "cmmd:FOLDER, with its weights as model.safetensors"),
    "google/t5gemma-2b-2b-ul2": ("--text_encoder", "the folder `text_encoder` of Photoroom/prx-1024-t2i-beta, downloaded"),
}


def load_pretrained(loader, model_id: str, **kwargs):
    """`loader.from_pretrained`, its failures as one UserError: the id, where access is asked for, the open fallback.

    Models are loaded with `output_loading_info=True`, from safetensors only, and must have all their weights.
    """
    from transformers import logging as transformers_logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its five attempts, before the one line below
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # a report of the decoder's unused weights; missing ones raise below
    is_model = kwargs.get("output_loading_info", False)
    try:
        loaded = loader.from_pretrained(model_id, **kwargs, **({"use_safetensors": True} if is_model else {}))
    except (OSError, ValueError, KeyError) as error:
        flag, fallback = FALLBACKS.get(model_id, (None, None))
        advice = f"; open fallback: {flag}={fallback}" if flag else ""
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model_id) and not Path(model_id).exists()
        where = f"; access and download: https://huggingface.co/{model_id}" if on_hub else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        reason = reason if on_hub or Path(model_id).exists() else "there is no such folder"
        raise UserError(f"cannot load {model_id}: {reason}{where}{advice}") from None
    if is_model:
        loaded, info = loaded
        if info["missing_keys"]:
            raise UserError(f"{model_id} lacks weights of {loader.__name__}: {', '.join(sorted(info['missing_keys'])[:3])}, ...")
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def weights_file(path: str | Path) -> Path:
    """The safetensors file that `path`, a run's folder or the file itself, stands for; raises UserError."""
    file = Path(path) / "ema.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {path}: it takes a run's folder (runs/NAME) or its ema.safetensors, "
                        "which train_prx.py writes at its first save")
    return file


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata; raises UserError where it is damaged or holds what no weight can be."""
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{file} is damaged: {name} is of {tensor.dtype}, and weights are floating-point numbers")
        if not tensor.isfinite().all():
            raise UserError(f"{file} is damaged: {name} has values that are not finite")
    return state, metadata


def in_fp32(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The tensors in fp32; raises UserError where that is too small for one."""
    state = {name: tensor.float() for name, tensor in state.items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source} is damaged: {name} has values beyond fp32")
    return state


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights under our names, fp32: of a run, its ema.safetensors, or a diffusers folder; and the fields of
    train_prx.Config that belong to the network but are in no shape: `rope_theta` and `noise_scale`, where they are known.
    """
    if is_diffusers(path):
        refuse_links(Path(path))
        state, config = read_transformer(diffusers_transformer(path))
        return state, {"rope_theta": config.get("theta", 10000)} | pipeline_fields(path)
    state, metadata = read_safetensors(weights_file(path))
    try:
        config = json.loads(metadata.get("config", "{}"))
        return state, {name: config[name] for name in ("rope_theta", "noise_scale") if name in config}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: its config is damaged") from None


def weights_hash(path: str | Path) -> str:
    """The sha256 of the files that `read_weights` reads."""
    return folder_revision(diffusers_transformer(path)) if is_diffusers(path) else file_sha256(weights_file(path))


def read_init(path: str, cfg) -> dict[str, Tensor]:
    """The weights that a run with config `cfg` starts from; raises UserError where they are of another model."""
    state, fields = read_weights(path)
    flags = model_flags(path, state) | fields
    if "patch" not in flags:
        raise UserError(f"--init={path}: it draws latents, not pixels; `python sample.py import --from={path} --out=DIR` keeps "
                        "what fits")
    if int(cfg.width * cfg.mlp_ratio) == len(state["blocks.0.gate_proj.weight"]):
        flags["mlp_ratio"] = cfg.mlp_ratio  # several round to the same width
    wrong = [f"--{name}={value}" for name, value in flags.items() if getattr(cfg, name) != value]
    if wrong:
        raise UserError(f"--init={path} is of another model than this run's: pass {' '.join(wrong)}")
    return state


def check_shapes(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Raise UserError unless `state` has every parameter of a PRX but those of REPA's projector, in the model's shapes."""
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("repa_projector.")}
    for name in sorted(parameters.keys() | state.keys()):
        ours, theirs = (tuple(x[name].shape) if name in x else "none" for x in (parameters, state))
        if ours != theirs:
            raise UserError(f"{source}: {name} has shape {theirs}, but the model's is {ours}")


def fill(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Set the parameters of a PRX, sharded or not, to tensors that every rank holds whole; raises UserError as `check_shapes`."""
    check_shapes(model, state, source)
    for name, whole in state.items():
        set_whole(model.get_parameter(name), whole)


@torch.no_grad()
def set_whole(p: Tensor, whole: Tensor) -> None:
    """Set a parameter, of which this rank may hold a shard, to a tensor that it holds whole."""
    if isinstance(p, DTensor):
        whole = distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()
    local([p])[0].copy_(whole)


def model_flags(path: str | Path, state: dict[str, Tensor]) -> dict[str, int | float]:
    """The fields of train_prx.Config that shapes tell, without `patch` and `bottleneck` where the weights draw latents."""
    try:
        width, text_dim = state["txt_in.weight"].shape
        hidden = len(state["blocks.0.gate_proj.weight"])
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        if blocks != set(map(str, range(len(blocks)))):
            raise ValueError(f"one of {len(blocks)} blocks")
        ratios = (math.ceil(hidden / width * 10**digits) / 10**digits for digits in range(1, 9))
        ratio = next(ratio for ratio in ratios if int(width * ratio) == hidden)  # 2.7, where 345 / 128 is 2.6953125
        flags = {"width": width, "text_dim": text_dim, "heads": width // len(state["blocks.0.qk_norm.query_norm.scale"]),
                 "depth": len(blocks), "mlp_ratio": ratio}
        if "img_in.0.weight" in state:
            flags |= {"patch": round((len(state["final_layer.linear.bias"]) / 3) ** 0.5), "bottleneck": len(state["img_in.0.bias"])}
    except (KeyError, ValueError, TypeError, StopIteration, ZeroDivisionError) as error:
        raise UserError(f"{path} holds no weights of PRX: {str(error) or 'a shape'} is missing or wrong") from None
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# diffusers

KEYS = {  # PRX's names -> those of diffusers' PRXTransformer2DModel; everything else is called alike
    "img_qkv_proj": "attention.img_qkv_proj", "txt_kv_proj": "attention.txt_kv_proj", "attn_out": "attention.to_out.0",
    "qk_norm.query_norm.scale": "attention.norm_q.weight", "qk_norm.key_norm.scale": "attention.norm_k.weight",
    "k_norm.scale": "attention.norm_added_k.weight",
}
# What our network has built in, of that class's config: shapes do not tell it
BUILT_IN = {"time_factor": 1000.0, "time_max_period": 10000, "resolution_embeds": False}


def rename(state: dict[str, Tensor], keys: dict[str, str]) -> dict[str, Tensor]:
    """State dict with `keys` replaced inside the names of block parameters."""
    pattern = re.compile(r"^(blocks\.\d+\.)(" + "|".join(map(re.escape, keys)) + r")(?=\.|$)")
    return {pattern.sub(lambda m: m[1] + keys[m[2]], name): tensor for name, tensor in state.items()}


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names, the REPA projector left out."""
    return rename({name: t for name, t in state.items() if not name.startswith("repa_projector.")}, KEYS)


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    return rename(state, {theirs: ours for ours, theirs in KEYS.items()})


def diffusers_transformer(path: str | Path) -> Path:
    """The folder of the transformer: of a pipeline its `transformer`, or the folder itself."""
    return Path(path) / "transformer" if (Path(path) / "transformer").is_dir() else Path(path)


def is_diffusers(path: str | Path) -> bool:
    """Whether `path` is a folder of a diffusers pipeline or transformer."""
    return (diffusers_transformer(path) / "config.json").is_file()


def read_json(file: Path) -> dict:
    """A JSON file's object; raises UserError where it is not one."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds no object")
    return values


def pipeline_fields(path: str | Path) -> dict[str, float]:
    """What a pipeline's folder says in model_index.json of the fields of train_prx.Config; {} for a transformer alone."""
    file = Path(path) / "model_index.json"
    if not file.is_file():
        return {}
    index = read_json(file)
    pixels = index.get("_class_name") == "PRXPixelPipeline"
    return {"noise_scale": index.get("noise_scale", 2.0)} if pixels else {}  # 2 is the class's default


def refuse_links(folder: Path) -> None:
    """Raise UserError for a link that leads out of a folder; the hub's cache alone keeps its files beside it, as `blobs`."""
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and (path.is_dir() or not any(
                Path(os.path.realpath(path)).is_relative_to(home) for home in (root, root.parent.parent / "blobs"))):
            raise UserError(f"{path} is a link that leads out of its folder, and is not followed")


def read_transformer(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """A PRXTransformer2DModel's folder -> (weights under our names in fp32, its config).

    Raises UserError where it has no safetensors, is damaged, or has what our network has not.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "PRXTransformer2DModel":
        raise UserError(f"{folder} is a {config.get('_class_name')}, not a PRXTransformer2DModel")
    for name, value in BUILT_IN.items():
        if config.get(name, value) != value:
            raise UserError(f"{folder}: its {name} is {config[name]}, and ours is always {value}")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    files = ["diffusion_pytorch_model.safetensors"]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} is damaged: it has no weight_map of file names")
        files = sorted(set(weight_map.values()))
    state = {}
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not in its folder, and is not read")
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: weights are read from safetensors only, pickled ones (.bin, .pt) never")
        state |= read_safetensors(folder / name)[0]
    renamed = from_diffusers(state)
    if len(renamed) < len(state):
        raise UserError(f"{folder} is damaged: it has a tensor under two names")
    return in_fp32(renamed, folder), config
