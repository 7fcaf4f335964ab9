"""Muon and Adam in one optimizer, over plain tensors and FSDP2 shards.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) steps a weight matrix along the orthogonalised momentum
of its gradient. Newton-Schulz needs the whole matrix, and FSDP2 leaves a slice of its rows on each rank, so

    1. momentum is updated where it lives, on the slices, and is never gathered;
    2. every matrix has one owner among all ranks: the slices of an update travel to it in all-to-alls, one a shape;
    3. each owner runs Newton-Schulz on its own matrices, those of equal shape as one batched product;
    4. more all-to-alls carry the rows of the result back to the ranks that hold them, and one all-gather to their replicas.

Slices leave the node only in that all-gather. The exchanges of one shape run under the products of another, and no rank
waits for the Newton-Schulz of another's matrix before it begins its own: the work is 1 / world size of a serial Muon's.
Everything that is not a Muon matrix takes an ordinary Adam step (Kingma & Ba, arXiv 1412.6980).
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan 2024: steepest at 0, singular values end near 1
RMS_SCALE = 0.2  # Adam's typical update RMS: Muon's learning rate then means what Adam's does (arXiv 2502.16982)

MUON_DEFAULTS = dict(lr=1e-4, momentum=0.95, nesterov=True, ns_steps=5, ns_dtype=torch.bfloat16, weight_decay=0.0)
ADAM_DEFAULTS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


def newton_schulz(G: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix in `G` [..., m, n] towards 1, in the dtype of `G`.

    Returns [..., m, n] with the singular vectors of `G`: an approximation of the polar factor U V^T by `steps` quintic
    iterations X <- aX + (bA + cA^2)X with A = X X^T. After 5 steps no singular value is above 1.21, and those that were
    at least 1 / 760 of the Frobenius norm are above 0.6; smaller ones stay smaller, as in torch.optim.Muon.
    """
    a, b, c = NS_COEFFICIENTS
    X = G.reshape(-1, *G.shape[-2:])  # [..., m, n] -> [K, m, n]
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # the smaller Gram matrix
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(X.dtype, torch.float32))
    X = X / norm.clamp(min=1e-7).to(X.dtype)  # the Frobenius norm bounds the spectral norm: all singular values <= 1
    for _ in range(steps):
        A = X @ X.mT  # [K, m, m]
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    X = X.mT if tall else X
    return X.reshape(G.shape)  # [K, m, n] -> [..., m, n]


def by_shape(matrices: list[Tensor]) -> list[list[int]]:
    """The indices of matrices of equal shape together, the most expensive shape first."""
    groups = defaultdict(list)
    for i, matrix in enumerate(matrices):
        groups[matrix.shape].append(i)
    return [groups[shape] for shape in sorted(groups, key=lambda shape: (-newton_schulz_cost(shape), *shape))]


def orthogonalize(updates: list[Tensor], steps: int) -> list[Tensor]:
    """`newton_schulz` of whole matrices of one dtype, equal shapes as one batch; returns them in the given order."""
    out: list[Tensor] = [torch.empty(0)] * len(updates)
    for indices in by_shape(updates):
        batch = newton_schulz(torch.stack([updates[i] for i in indices]), steps)  # [K, m, n]
        for i, result in zip(indices, batch.unbind()):
            out[i] = result
    return out


def newton_schulz_cost(shape: torch.Size) -> int:
    """Multiply-adds of one Newton-Schulz iteration on a matrix of `shape`: two m x m x n products and one m x m x m."""
    m, n = sorted(shape)
    return 2 * m * m * n + m * m * m


def assign_owners(shapes: list[torch.Size], world: int) -> list[int]:
    """The owning rank of each matrix, balanced by Newton-Schulz cost (longest processing time first)."""
    load = [0] * world
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -newton_schulz_cost(shapes[i])):
        owners[i] = min(range(world), key=load.__getitem__)
        load[owners[i]] += newton_schulz_cost(shapes[i])
    return owners


def exchange(send: list[list[Tensor]], shapes: list[list[tuple[int, int]]], like: Tensor,
             group: dist.ProcessGroup) -> Callable[[], list[list[Tensor]]]:
    """Begin to send `send[s]` to each rank s, which sends matrices of `shapes[s]` here; returns what waits for these."""
    me = dist.get_rank(group)
    sizes = [[m * n for m, n in of_rank] for of_rank in shapes]
    # A rank with no rows or no matrix of its own sends itself a number: torch 2.14 refuses a buffer that is empty
    send = [matrices if rank != me else [*matrices, like.new_zeros(1)] for rank, matrices in enumerate(send)]
    sizes[me] = [*sizes[me], 1]
    buffer = torch.cat([matrix.flatten() for matrices in send for matrix in matrices])
    received = like.new_empty(sum(map(sum, sizes)))
    work = dist.all_to_all_single(received, buffer, [sum(of_rank) for of_rank in sizes],
                                  [sum(matrix.numel() for matrix in matrices) for matrices in send], group, async_op=True)

    def arrived() -> list[list[Tensor]]:
        work.wait()
        of_ranks = received.split([sum(of_rank) for of_rank in sizes])
        return [[piece.view(shape) for piece, shape in zip(of_rank.split(lengths), wanted)]
                for of_rank, lengths, wanted in zip(of_ranks, sizes, shapes)]

    return arrived


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fill `whole` with the parts of all ranks, which are equally large, one after the other."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.14
    gather(whole, part, group)


class Owners:
    """Which rank orthogonalises which of a list of sharded matrices, and how their rows get there and back.

    The matrices are sharded by rows over the last dimension of one device mesh and replicated over any other, as FSDP2
    leaves them; the mesh covers all ranks. Raises ValueError for any other layout.
    """

    def __init__(self, params: list[DTensor]):
        mesh = params[0].device_mesh
        by_rows = (Replicate(),) * (mesh.ndim - 1) + (Shard(0),)
        for p in params:
            if p.device_mesh != mesh or tuple(p.placements) != by_rows:
                raise ValueError(f"Muon needs all matrices sharded by rows over one mesh, not {p.placements}")
        if mesh.size() != dist.get_world_size() or mesh.ndim > 2:
            raise ValueError(f"Muon's mesh has {mesh.size()} of {dist.get_world_size()} ranks in {mesh.ndim} dimensions; "
                             "it needs all of them, in one or two")
        grid = mesh.mesh.reshape(-1, mesh.shape[-1])  # [replicas, shards] -> rank
        self.replicas, self.shards = grid.shape
        self.replica, self.shard = (grid == dist.get_rank()).nonzero()[0].tolist()
        self.near, self.across = mesh.get_group(mesh.ndim - 1), mesh.get_group(0)  # the ranks of my replica, of my shard
        self.shapes = [p.shape for p in params]
        order = grid.T.flatten().tolist()  # neighbours in it are of different replicas, whose shares of the matrices are alike
        owners = [order[owner] for owner in assign_owners(self.shapes, mesh.size())]
        # [rounds][replicas][shards] -> the matrices of one shape that the rank owns
        self.owned = [[[[i for i in indices if owners[i] == rank] for rank in row] for row in grid.tolist()]
                      for indices in by_shape(params)]

    def part(self, i: int, shard: int) -> tuple[int, int]:
        """The shape of a shard of matrix i: ceil(m / shards) rows each until none are left, as in torch.chunk."""
        m, n = self.shapes[i]
        rows = -(-m // self.shards)
        return max(0, min(m - shard * rows, rows)), n

    def orthogonalize(self, updates: list[Tensor], steps: int) -> list[Tensor]:
        """This rank's rows of every matrix in, its rows of every orthogonalised matrix out; all of one dtype."""
        updates = list(updates)
        rounds = [owned[self.replica] for owned in self.owned]  # [rounds][shards]: my replica's
        to_owners = [exchange([[updates[i] for i in matrices] for matrices in owned],
                              [[self.part(i, shard) for i in owned[self.shard]] for shard in range(self.shards)],
                              updates[0], self.near) for owned in rounds]
        to_holders = []
        for owned, arrived in zip(rounds, to_owners):
            mine, slices = owned[self.shard], arrived()  # [shards][K] of [rows, n]
            parts = []  # [K][shards] of [rows, n]
            if mine:
                whole = torch.stack([torch.cat(of_matrix) for of_matrix in zip(*slices)])  # [K, m, n]
                rows = [self.part(mine[0], shard)[0] for shard in range(self.shards)]
                parts = [matrix.split(rows) for matrix in newton_schulz(whole, steps)]
            to_holders.append(exchange([[part[shard] for part in parts] for shard in range(self.shards)],
                                       [[self.part(i, self.shard) for i in matrices] for matrices in owned],
                                       updates[0], self.near))
        for owned, arrived in zip(rounds, to_holders):
            for matrices, parts in zip(owned, arrived()):
                for i, rows in zip(matrices, parts):
                    updates[i] = rows
        return self.from_replicas(updates) if self.replicas > 1 else updates

    def from_replicas(self, updates: list[Tensor]) -> list[Tensor]:
        """My rows of every matrix, where so far I have those of my replica's."""
        matrices = [[i for owned in self.owned for of_rank in owned[replica] for i in of_rank] for replica in range(self.replicas)]
        sizes = [[math.prod(self.part(i, self.shard)) for i in of_replica] for of_replica in matrices]
        longest = max(map(sum, sizes))  # an all-gather takes equally much from each
        mine = torch.cat([updates[0].new_empty(0), *(updates[i].flatten() for i in matrices[self.replica])])
        gathered = mine.new_empty(self.replicas * longest)
        all_gather(gathered, F.pad(mine, (0, longest - len(mine))), self.across)
        for row, of_replica, parts in zip(gathered.view(self.replicas, longest), matrices, sizes):
            for i, rows in zip(of_replica, row[: sum(parts)].split(parts)):
                updates[i] = rows.view(self.part(i, self.shard))
        return updates


def update_momenta(grads: list[Tensor], momenta: list[Tensor], ok: Tensor, scale: Tensor, momentum: float, nesterov: bool,
                   dtype: torch.dtype) -> list[Tensor]:
    """Move each momentum in place towards its gradient times `scale`, and return what Newton-Schulz takes, in `dtype`."""
    updates = []
    for grad, average in zip(grads, momenta):
        grad = torch.where(ok > 0, grad * scale, 0.0)
        average.lerp_(grad, (1 - momentum) * ok)
        updates.append((grad.lerp(average, momentum) if nesterov else average).to(dtype, copy=True))
    return updates


def apply_updates(weights: list[Tensor], updates: list[Tensor], lr: Tensor, factors: list[float], weight_decay: float) -> None:
    """Step each weight in place along its update, with its own factor on the learning rate."""
    for weight, update, factor in zip(weights, updates, factors):
        weight.mul_(1 - weight_decay * lr).addcmul_(update, lr * factor, value=-1)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon` True, Adam for those with `use_muon` False.

    Muon groups hold 2-D parameters and take `lr, momentum, nesterov, ns_steps, ns_dtype, weight_decay`; Adam groups take
    `lr, betas, eps, weight_decay` (decoupled decay in both). Any other key raises ValueError. Muon's update is
    -lr * 0.2 * sqrt(max(rows, cols)) * newton_schulz(nesterov momentum), the scale of arXiv 2502.16982. `compile`: fuse what
    Muon does element by element.
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
            not_matrices = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if group["use_muon"] and not_matrices:
                raise ValueError(f"Muon takes matrices only, not shapes {not_matrices}")
            groups.append(group)
        super().__init__(groups, {})
        # Each passes over its tensors once; as single operations they would a dozen times
        self._momentum, self._apply = (torch.compile(f, fullgraph=True, dynamic=False) if compile else f
                                       for f in (update_momenta, apply_updates))
        self._owners: dict[tuple[int, ...], Owners] = {}  # by the parameters that have gradients
        # State exists from the start, so that a checkpoint can be loaded into it before the first step.
        for group in self.param_groups:
            for p in group["params"]:
                if group["use_muon"]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                else:
                    self.state[p]["step"] = torch.zeros((), device=p.device)
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, ok: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Update all parameters that have a gradient.

        ok: a 0-dim tensor on the parameters' device, 1 to step and 0 to leave weights and state as they are, whatever the
        gradients hold; scale: likewise, a factor on all gradients, such as that of clipping. Neither is read by the host.
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            one = torch.ones((), device=params[0].device)
            step = self._muon if group["use_muon"] else self._adam
            step(group, params, one if ok is None else ok, one if scale is None else scale)

    def _muon(self, group: dict, params: list[Tensor], ok: Tensor, scale: Tensor) -> None:
        weights, grads = local(params), local([p.grad for p in params])
        momenta = local([self.state[p]["momentum"] for p in params])
        updates = self._momentum(grads, momenta, ok, scale, group["momentum"], group["nesterov"], group["ns_dtype"])
        if isinstance(params[0], DTensor) and params[0].device_mesh.size() > 1:
            key = tuple(id(p) for p in params)
            if key not in self._owners:
                self._owners[key] = Owners(params)
            updates = self._owners[key].orthogonalize(updates, group["ns_steps"])
        else:
            updates = orthogonalize(updates, group["ns_steps"])
        lr = torch.full_like(ok, group["lr"]) * ok  # no number of the host's, which a compiled function would be compiled for
        self._apply(weights, updates, lr, [RMS_SCALE * max(p.shape) ** 0.5 for p in params], group["weight_decay"])

    def _adam(self, group: dict, params: list[Tensor], ok: Tensor, scale: Tensor) -> None:
        beta1, beta2 = group["betas"]
        weights, grads = local(params), torch._foreach_mul(local([p.grad for p in params]), scale)
        skipped = ok == 0
        for grad in grads:
            grad.masked_fill_(skipped, 0.0)
        steps = [self.state[p]["step"] for p in params]
        exp_avg = local([self.state[p]["exp_avg"] for p in params])
        exp_avg_sq = local([self.state[p]["exp_avg_sq"] for p in params])
        torch._foreach_add_(steps, [ok] * len(steps))
        torch._foreach_mul_(exp_avg, torch.where(ok > 0, beta1, 1.0))
        torch._foreach_add_(exp_avg, grads, alpha=1 - beta1)
        torch._foreach_mul_(exp_avg_sq, torch.where(ok > 0, beta2, 1.0))
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - beta2)

        count = torch.stack(steps).clamp(min=1)  # [K]; 0 only if the very first step was skipped
        step_size = (group["lr"] * ok / (1 - beta1**count)).unbind()  # bias corrections of Kingma & Ba, section 3
        correction = (1 - beta2**count).sqrt().unbind()
        denominator = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominator, correction)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * ok)
        torch._foreach_div_(denominator, step_size)  # m / (d / s) = s m / d, one list fewer than scaling m
        torch._foreach_addcdiv_(weights, exp_avg, denominator, value=-1.0)
