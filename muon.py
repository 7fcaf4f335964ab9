"""Muon and Adam in one optimizer, over plain tensors and FSDP2 shards.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) steps a weight matrix along the orthogonalised momentum
of its gradient. Newton-Schulz needs the whole matrix, and FSDP2 leaves a slice of its rows on each rank, so

    1. momentum is updated where it lives, on the slices, and is never gathered;
    2. every matrix has one owner among all ranks: the slices of an update travel to it in all-to-alls, one a shape;
    3. each owner runs Newton-Schulz on its own matrices, those of equal shape as one batched product;
    4. more all-to-alls carry the rows of the result back to the ranks that hold them, one all-gather to their replicas.

Slices leave the node only in that all-gather. The slices of one shape travel under the products of another, and no rank
waits for the Newton-Schulz of another's matrix before it begins its own: the work is 1 / world size of a serial Muon's.
Everything that is not a Muon matrix takes an ordinary Adam step (Kingma & Ba, arXiv 1412.6980).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from math import prod

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

# Newton-Schulz, one (a, b, c) a step: the quintic of Jordan 2024, steepest at 0, five times. No singular value ends
# above 1.21, and those that were at least 1 / 760 of the Frobenius norm end above 0.6; smaller ones stay smaller.
NS_COEFFICIENTS: list[tuple[float, float, float]] = [(3.4445, -4.7750, 2.0315)] * 5
RMS_SCALE = 0.2  # Adam's typical update RMS: Muon's learning rate then means what Adam's does (arXiv 2502.16982)

MUON_DEFAULTS = dict(lr=1e-4, momentum=0.95, nesterov=True, ns_steps=5, ns_dtype=torch.bfloat16, weight_decay=0.0)
ADAM_DEFAULTS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


def coefficients(steps: int) -> list[tuple[float, float, float]]:
    """The triples of `steps` Newton-Schulz steps. Raises ValueError if there are not so many."""
    if not 0 <= steps <= len(NS_COEFFICIENTS):
        raise ValueError(f"ns_steps={steps}, but muon.NS_COEFFICIENTS has {len(NS_COEFFICIENTS)} steps")
    return NS_COEFFICIENTS[:steps]


def newton_schulz(G: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix in `G` [..., m, n] towards 1, in the dtype of `G`.

    Returns [..., m, n] with the singular vectors of `G`: an approximation of the polar factor U V^T by quintic steps
    X <- aX + (bA + cA^2)X with A = X X^T. Raises ValueError if NS_COEFFICIENTS has fewer than `steps`.
    """
    X = G.reshape(-1, *G.shape[-2:])  # [..., m, n] -> [K, m, n]
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # the smaller Gram matrix
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(X.dtype, torch.float32))
    X = X / norm.clamp(min=1e-7).to(X.dtype)  # the Frobenius norm bounds the spectral norm: all singular values <= 1
    for a, b, c in coefficients(steps):
        A = X @ X.mT  # [K, m, m]
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape)  # [K, m, n] -> [..., m, n]


def newton_schulz_cost(shape: torch.Size) -> int:
    """Multiply-adds of one Newton-Schulz step on a matrix of `shape`: two m x m x n products and one m x m x m."""
    m, n = sorted(shape)
    return 2 * m * m * n + m * m * m


def by_shape(matrices: list[Tensor]) -> dict[torch.Size, list[int]]:
    """Shape -> the indices of the matrices of that shape, the most expensive shape first."""
    indices = defaultdict(list)
    for i, matrix in enumerate(matrices):
        indices[matrix.shape].append(i)
    return {shape: indices[shape] for shape in sorted(indices, key=lambda shape: (-newton_schulz_cost(shape), *shape))}


def orthogonalize(updates: list[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of whole matrices of one dtype, equal shapes as one batch; returns them in the given order."""
    updates = list(updates)
    for indices in by_shape(updates).values():
        batch = newton_schulz(torch.stack([updates[i] for i in indices]), steps)  # [K, m, n]
        for i, result in zip(indices, batch):
            updates[i] = result
    return updates


def assign_owners(shapes: list[torch.Size], world: int) -> list[int]:
    """The owning rank of each matrix, balanced by Newton-Schulz cost (longest processing time first)."""
    load = [0] * world
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -newton_schulz_cost(shapes[i])):
        owners[i] = min(range(world), key=load.__getitem__)
        load[owners[i]] += newton_schulz_cost(shapes[i])
    return owners


def begin_all_to_all(send: Iterable[Iterable[Tensor]], shapes: list[tuple[int, int, int]], like: Tensor,
                     group: dist.ProcessGroup) -> Callable[[], list[Tensor]]:
    """Begin to send to each rank of the group its matrices of `send`, of the dtype of `like`; returns a function that
    waits for what each rank sends here, a [K, m, n] of its entry in `shapes`."""
    pieces = [[matrix.flatten() for matrix in matrices] for matrices in send]
    lengths = [prod(shape) for shape in shapes]
    # A rank with no rows or no matrix of its own sends itself a number: torch 2.14 refuses a buffer that is empty
    pieces[dist.get_rank(group)].append(like.new_zeros(1))
    lengths[dist.get_rank(group)] += 1
    buffer = torch.cat(sum(pieces, []))
    received = buffer.new_empty(sum(lengths))
    sent = [sum(map(len, to_rank)) for to_rank in pieces]
    work = dist.all_to_all_single(received, buffer, lengths, sent, group, async_op=True)

    def arrived() -> list[Tensor]:
        work.wait()
        return [piece[: prod(shape)].view(shape) for piece, shape in zip(received.split(lengths), shapes)]

    return arrived


class Owners:
    """Which rank orthogonalises which of a list of sharded matrices, and how their rows get there and back.

    The matrices are sharded by rows over the last dimension of one device mesh and replicated over any other, as FSDP2
    leaves them; the mesh covers all ranks. Raises ValueError for any other layout.
    """

    def __init__(self, params: list[DTensor]):
        mesh, world = params[0].device_mesh, dist.get_world_size()
        by_rows = (Replicate(),) * (mesh.ndim - 1) + (Shard(0),)
        for p in params:
            if p.device_mesh != mesh or tuple(p.placements) != by_rows:
                raise ValueError(f"Muon needs all matrices sharded by rows over one mesh, not {p.placements}")
        if mesh.size() != world or mesh.ndim > 2:
            raise ValueError(f"Muon needs a mesh of all ranks in one or two dimensions, not of {mesh.size()} of {world}"
                             f" ranks in {mesh.ndim}")
        grid = mesh.mesh.reshape(-1, mesh.shape[-1])  # [replicas, shards] -> rank
        self.replica, self.shard = (grid == dist.get_rank()).nonzero()[0].tolist()
        self.near, self.across = mesh.get_group(mesh.ndim - 1), mesh.get_group(0)  # ranks of my replica, of my shard
        order = grid.T.flatten().tolist()  # neighbours are of different replicas, whose shares are then alike
        self.owner = [order[place] for place in assign_owners([p.shape for p in params], world)]  # matrix -> rank
        self.of_replica = [[i for i, rank in enumerate(self.owner) if rank in ranks] for ranks in grid.tolist()]
        self.rounds = []  # one a shape: its columns, each shard's rows, the matrices that each rank of my replica owns
        for (m, n), indices in by_shape(params).items():
            most = -(-m // mesh.shape[-1])  # ceil(m / shards) rows until none are left, as in torch.chunk
            rows = [max(0, min(m - shard * most, most)) for shard in range(mesh.shape[-1])]
            owned = [[i for i in indices if self.owner[i] == rank] for rank in grid[self.replica].tolist()]
            self.rounds.append((n, rows, owned))

    def orthogonalize(self, updates: list[Tensor], steps: int) -> list[Tensor]:
        """This rank's rows of every matrix in, its rows of every orthogonalised matrix out; all of one dtype."""
        updates, to_owners, to_holders = list(updates), [], []
        for n, rows, owned in self.rounds:
            slices = [[updates[i] for i in matrices] for matrices in owned]
            shapes = [(len(owned[self.shard]), of_shard, n) for of_shard in rows]
            to_owners.append(begin_all_to_all(slices, shapes, updates[0], self.near))
        for (n, rows, owned), arrived in zip(self.rounds, to_owners):
            whole = torch.cat(arrived(), dim=1)  # shards of [K, rows, n] -> [K, m, n]
            if len(whole) > 0:
                whole = newton_schulz(whole, steps)
            shapes = [(len(matrices), rows[self.shard], n) for matrices in owned]
            to_holders.append(begin_all_to_all(whole.split(rows, dim=1), shapes, updates[0], self.near))
        for (n, rows, owned), arrived in zip(self.rounds, to_holders):
            for matrices, results in zip(owned, arrived()):
                for i, result in zip(matrices, results):
                    updates[i] = result
        return self.from_replicas(updates) if len(self.of_replica) > 1 else updates

    def from_replicas(self, updates: list[Tensor]) -> list[Tensor]:
        """My rows of every result, where so far I have those of the matrices that my replica owns."""
        sizes = [[updates[i].numel() for i in matrices] for matrices in self.of_replica]
        longest = max(map(sum, sizes))  # an all-gather takes equally much from each
        mine = torch.cat([updates[0].new_empty(0), *(updates[i].flatten() for i in self.of_replica[self.replica])])
        whole = mine.new_empty(len(sizes), longest)
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # named so until 2.14
        all_gather(whole.view(-1), F.pad(mine, (0, longest - len(mine))), self.across)
        for row, matrices, lengths in zip(whole, self.of_replica, sizes):
            for i, result in zip(matrices, row[: sum(lengths)].split(lengths)):
                updates[i] = result.view_as(updates[i])
        return updates


def update_momenta(grads: list[Tensor], momenta: list[Tensor], ok: Tensor, grad_scale: Tensor, momentum: float,
                   nesterov: bool, dtype: torch.dtype) -> list[Tensor]:
    """Move each momentum in place towards its scaled gradient; returns what Newton-Schulz takes, in `dtype`."""
    updates = []
    for grad, average in zip(grads, momenta):
        grad = torch.where(ok > 0, grad * grad_scale, 0.0)
        average.lerp_(grad, (1 - momentum) * ok)
        updates.append((grad.lerp(average, momentum) if nesterov else average).to(dtype, copy=True))
    return updates


def apply_updates(weights: list[Tensor], updates: list[Tensor], lr: Tensor, factors: list[float], decay: float) -> None:
    """Step each weight in place along its update, with its own factor on the learning rate."""
    for weight, update, factor in zip(weights, updates, factors):
        weight.mul_(1 - decay * lr).addcmul_(update, lr * factor, value=-1)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon` True, Adam for those with `use_muon` False.

    Muon groups hold 2-D parameters and take `lr, momentum, nesterov, ns_steps, ns_dtype, weight_decay`; Adam groups
    take `lr, betas, eps, weight_decay` (decoupled decay in both). Another key, and more `ns_steps` than NS_COEFFICIENTS
    has, raise ValueError. Muon's update is -lr * 0.2 * sqrt(max(rows, cols)) * newton_schulz(nesterov momentum), the
    scale of arXiv 2502.16982. `compile`: fuse what Muon does element by element, a dozen passes, into two.
    """

    def __init__(self, param_groups: list[dict], compile: bool = False):
        groups = []
        for group in param_groups:
            if not isinstance(group.get("use_muon"), bool):
                raise ValueError("every group needs use_muon=True or use_muon=False")
            defaults = MUON_DEFAULTS if group["use_muon"] else ADAM_DEFAULTS
            unknown = set(group) - set(defaults) - {"params", "use_muon"}
            if unknown:
                raise ValueError(f"unknown keys {sorted(unknown)} in a group with use_muon={group['use_muon']}; "
                                 f"known are {sorted(defaults)}")
            group = {**defaults, **group, "params": list(group["params"])}
            if group["use_muon"]:
                coefficients(group["ns_steps"])  # raises before the first step does
                not_matrices = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
                if not_matrices:
                    raise ValueError(f"Muon takes matrices only, not shapes {not_matrices}")
            groups.append(group)
        super().__init__(groups, {})
        fused = partial(torch.compile, fullgraph=True, dynamic=False)
        self._update_momenta = fused(update_momenta) if compile else update_momenta
        self._apply_updates = fused(apply_updates) if compile else apply_updates
        self._owners: dict[tuple[int, ...], Owners] = {}  # by the parameters that have gradients
        # State exists from the start, so that a checkpoint can be loaded into it before the first step.
        for group in self.param_groups:
            averages = ["momentum"] if group["use_muon"] else ["exp_avg", "exp_avg_sq"]
            for p in group["params"]:
                self.state[p] = {name: torch.zeros_like(p) for name in averages}
                if not group["use_muon"]:
                    self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self, ok: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
        """Update all parameters that have a gradient.

        ok: a 0-dim tensor on the parameters' device, 1 to step and 0 to leave weights and state as they are, whatever
        the gradients hold; grad_scale: likewise, a factor on all gradients, such as clipping's. The host reads neither.
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            one = torch.ones((), device=params[0].device)
            step = self._muon if group["use_muon"] else self._adam
            step(group, params, one if ok is None else ok, one if grad_scale is None else grad_scale)

    def _muon(self, group: dict, params: list[Tensor], ok: Tensor, grad_scale: Tensor) -> None:
        weights, grads = local(params), local([p.grad for p in params])
        momenta = local([self.state[p]["momentum"] for p in params])
        updates = self._update_momenta(grads, momenta, ok, grad_scale, group["momentum"], group["nesterov"],
                                       group["ns_dtype"])
        if isinstance(params[0], DTensor) and params[0].device_mesh.size() > 1:
            key = tuple(id(p) for p in params)
            if key not in self._owners:
                self._owners[key] = Owners(params)
            updates = self._owners[key].orthogonalize(updates, group["ns_steps"])
        else:
            updates = orthogonalize(updates, group["ns_steps"])
        lr = torch.full_like(ok, group["lr"]) * ok  # a tensor: a compiled function would be compiled for each number
        factors = [RMS_SCALE * max(p.shape) ** 0.5 for p in params]
        self._apply_updates(weights, updates, lr, factors, group["weight_decay"])

    def _adam(self, group: dict, params: list[Tensor], ok: Tensor, grad_scale: Tensor) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        weights, grads = local(params), torch._foreach_mul(local([p.grad for p in params]), grad_scale)
        steps = [self.state[p]["step"] for p in params]
        exp_avg = local([self.state[p]["exp_avg"] for p in params])
        exp_avg_sq = local([self.state[p]["exp_avg_sq"] for p in params])
        skipped = ok == 0
        for grad in grads:
            grad.masked_fill_(skipped, 0.0)
        torch._foreach_add_(steps, [ok] * len(steps))
        torch._foreach_mul_(exp_avg, torch.where(ok > 0, beta1, 1.0))
        torch._foreach_add_(exp_avg, grads, alpha=1 - beta1)
        torch._foreach_mul_(exp_avg_sq, torch.where(ok > 0, beta2, 1.0))
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - beta2)

        count = torch.stack(steps).clamp(min=1)  # [K]; 0 only if the very first step was skipped
        step_size = (lr * ok / (1 - beta1**count)).unbind()  # bias corrections of Kingma & Ba, section 3
        denominator = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominator, (1 - beta2**count).sqrt().unbind())
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"] * ok)
        torch._foreach_div_(denominator, step_size)  # m / (d / s) = s m / d, one list fewer than scaling m
        torch._foreach_addcdiv_(weights, exp_avg, denominator, value=-1.0)
