"""Second moments of what the tensors of a cut model read, and the least-squares maps that follow from them.

A `Place` is a tensor of the student whose columns are an axis that is cut. Its teacher's counterpart W reads x [n], it
will read y [k]: of linear_fc2, y are the kept entries of x; behind an RMSNorm, x is the normalised residual stream
before the gain and y the same of the kept channels alone, or of the k rotated ones. Wanted is the matrix M [n, k] for
which W M y is nearest to W x for every W: with A = sum y y^T, X = sum x y^T over tokens, S [n, k] the selection or the
rotation and c = <S^T x, y> / <y, y>,

    M = c S + (X - c S A) (A + ridge * mean(diag A) * I)^-1

A large ridge gives the plain cut, c S. One M serves all tensors that read the same x: router and experts of a mixture,
too. The linear_fc2 of an expert reads the tokens that are routed to it, each times the router's weight of it, as
Megatron-core has it; what a shared expert's reads is multiplied here by its gate. So x is weighted by what it adds to
the residual stream. How many tokens t come to an expert nobody chooses: where they are fewer than its k columns, its
ridge is (k / t)^3 times as large, since what is fitted to a few tokens may be worse than the plain cut on others
(docs/evidence/cuts.md). An expert that no token comes to has the plain cut.

Behind a LayerNorm the means of x and y over tokens are not 0, and a tensor reads a bias as well: x is near M y + b. A
1 behind both x and y brings their sums and the number of tokens into the products; A and X are of what is left without
the means, and b = mean x - M mean y. The entries of such a y sum to 0: of a vector (a, a, ..., a) A is 0, the ridge
alone makes the system regular, and what M makes of it, c S's part, has no bearing. What is left without the means is a
small difference of large sums, so that these are fp64 throughout.

The rotation keeps as much as k channels can of the sum over all norms of E[x x^T], x as above: its columns are the
eigenvectors with the largest eigenvalues. Of the raw stream a few channels, large everywhere and normalised away, would
decide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn
from torch.nn import functional

from minitron_nemo.arch import Architecture, Axis
from minitron_nemo.errors import UserError
from minitron_nemo.importance.counted import Current, transformer_layers
from minitron_nemo.importance.experts import Routing, shared_expert_hooks
from minitron_nemo.importance.places import Cut, Place, has_means, owners

SPAN_TOKENS = 2048  # multiplied at once, in fp32, behind LayerNorms in fp64; spans are added up in fp64


class Watch(ABC):
    """Gives the tokens of a pass, while it is entered, to `add`, at those `places` that are on this rank.

    All ranks of a tensor-parallel group have every token of linear_fc2, [t, f/tp], an expert's weighted as above, and
    share those of a norm, [t, h]; the ranks of a data-parallel group each have their own.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        architecture: Architecture,
        microbatches: Sequence[Mapping[str, Any]],
        places: Sequence[Place],
        *,
        sequence_parallel: bool,
        on_microbatch: Callable[[], None],
    ) -> None:
        self.chunks = chunks
        self.architecture = architecture
        self.microbatches = microbatches
        self.sequence_parallel = sequence_parallel
        self.on_microbatch = on_microbatch
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.tp_rank, self.tp_size = self.tp_group.rank(), self.tp_group.size()
        self.device = next(chunks[0].parameters()).device
        self.places = places
        self.handles: list[Any] = []

    @abstractmethod
    def add(self, place: Place, tokens: Tensor) -> None:
        """Take in the tokens that came to a place."""

    def __enter__(self) -> Watch:
        for chunk in self.chunks:
            layers = transformer_layers(chunk)
            current = Current(
                layers,
                self.microbatches,
                sequence_parallel=self.sequence_parallel,
                on_microbatch=self.on_microbatch if chunk is self.chunks[0] else None,
            )
            self.handles.append(current.handle)
            modules = owners(chunk, self.architecture)
            here = [place for place in self.places if place.layer in modules]
            mixtures = {place.layer for place in here if place.expert is not None}
            routings = {layer: Routing(modules[layer], current) for layer in mixtures}
            self.handles += [routing.handle for routing in routings.values()]
            for place in here:
                if place.expert is None:
                    self._attach(place, modules[place.layer], current)
                else:
                    self.handles.append(routings[place.layer].watch(place.expert, partial(self.add, place)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _attach(self, place: Place, module: nn.Module, current: Current) -> None:
        def on_ffn(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.add(place, args[0][current.counted.mask.t() != 0])

        def on_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]  # [s(/tp), b, h]
            tokens = states[current.counted.local_mask.t() != 0]
            # Without sequence parallelism all tensor-parallel ranks hold the same tokens: each takes its share.
            self.add(place, tokens if self.sequence_parallel else tokens[self.tp_rank :: self.tp_size])

        if place.norm is not None:
            watched: nn.Module = module.pre_mlp_layernorm if place.before_mlp else module  # type: ignore[assignment]
            self.handles.append(watched.register_forward_pre_hook(on_norm, with_kwargs=True))
        elif place.axis == Axis.SHARED_FFN:
            self.handles += shared_expert_hooks(module, current, partial(self.add, place))
        else:
            assert isinstance(module, TransformerLayer)
            self.handles.append(module.mlp.linear_fc2.register_forward_pre_hook(on_ffn))

    def _normalised(self, states: Tensor) -> Tensor:
        if has_means(self.architecture):
            return functional.layer_norm(states, states.shape[-1:], eps=self.architecture.layernorm_epsilon)
        return states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.architecture.layernorm_epsilon)


class NormCovariance(Watch):
    """The sum of x x^T over the tokens of a pass and over `places`, all behind norms: [h, h], fp64."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        size = self.architecture.hidden_size
        self.sum = torch.zeros(size, size, dtype=torch.float64, device=self.device)

    def add(self, place: Place, tokens: Tensor) -> None:
        for part in _spans(tokens):  # [t, h]
            x = self._normalised(part.float())
            self.sum += x.t() @ x

    def principal(self, columns: int) -> tuple[Tensor, Tensor]:
        """The rotation [h, columns], fp32 on the device, and all eigenvalues [h], descending, of the whole job's sum.

        Collective over the job, on every rank of which both are the same bits. Raises UserError where the sum is not
        finite.
        """
        distributed.all_reduce(self.sum)  # every rank has tokens, or norms, of its own
        if not bool(self.sum.isfinite().all()):
            raise UserError("repair: what the norms read is not finite everywhere; does the model give finite logits?")
        values, vectors = torch.zeros_like(self.sum[0]), torch.zeros_like(self.sum)
        if distributed.get_rank() == 0:
            values, vectors = torch.linalg.eigh(self.sum)  # ascending
        rotation = vectors.flip(1)[:, :columns].float().contiguous()
        values = values.flip(0).contiguous()
        distributed.broadcast(rotation, src=0)
        distributed.broadcast(values, src=0)
        return rotation, values


class Moments(Watch):
    """Sums of A and X over the tokens of a pass, fp64.

    `sums[name]` is [rows, k]: [A; X] of a norm over this rank's tokens, X of linear_fc2 over this rank's rows. Behind a
    LayerNorm [rows + 1, k + 1]: the last row and column are of the 1 behind x and y. `tokens[name]` counts the rows
    that came to an expert's place on this rank and, after `totals`, in the job.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.sums = {place.name: self._zeros(place) for place in self.places}
        self.tokens = {place.name: 0.0 for place in self.places if place.expert is not None}

    def add(self, place: Place, tokens: Tensor) -> None:
        if place.expert is not None:
            self.tokens[place.name] += len(tokens)
        (self._add_ffn if place.norm is None else self._add_norm)(place, tokens)

    def _zeros(self, place: Place) -> Tensor:
        more = place.norm is not None and has_means(self.architecture)
        rows, columns = place.rows(self.architecture, self.tp_size) + more, place.columns + more
        return torch.zeros(rows, columns, dtype=torch.float64, device=self.device)

    def _add_ffn(self, place: Place, tokens: Tensor) -> None:
        for part in _spans(tokens):  # [t, f/tp]
            whole = gather_from_tensor_model_parallel_region(part).float()  # [t, f]
            self.sums[place.name] += part.float().t() @ _shrunk(whole, place.cut)

    def _add_norm(self, place: Place, tokens: Tensor) -> None:
        for part in _spans(tokens):  # [t, h]
            means = has_means(self.architecture)
            states = part.double() if means else part.float()
            few = self._normalised(_shrunk(states, place.cut))
            both = [few, self._normalised(states)]
            if means:
                ones = few.new_ones(len(few), 1)
                few, both = torch.cat([few, ones], dim=1), [*both, ones]
            self.sums[place.name] += torch.cat(both, dim=1).t() @ few  # [t, k + h (+ 1)]

    def totals(self) -> Iterator[tuple[Place, Tensor]]:
        """This rank's share of the stage's places, each with its sums over all tokens and rows; `sums` is consumed.

        [A; X] of a norm, [k + h, k], and the last row and column of a LayerNorm's; X [f, k] of linear_fc2, whose rows
        `kept` are A. Collective over the tensor- and data-parallel ranks of the stage, which get the places in turn.
        """
        group = parallel_state.get_tensor_and_data_parallel_group()
        if self.tokens:
            tokens = torch.tensor(list(self.tokens.values()), dtype=torch.float64, device=self.device)
            distributed.all_reduce(tokens, group=group)  # all tensor-parallel ranks have counted the same ones
            self.tokens = dict(zip(self.tokens, (tokens / self.tp_size).tolist(), strict=True))
        for number, place in enumerate(self.places):
            mine = self.sums.pop(place.name)
            if place.norm is None:
                whole = mine.new_zeros(self.architecture.size(place.axis), mine.shape[1])
                whole[self.tp_rank * len(mine) : (self.tp_rank + 1) * len(mine)] = mine
                mine = whole
            owner = number % group.size()
            distributed.reduce(mine, dst=distributed.get_global_rank(group, owner), group=group)
            if group.rank() == owner:
                yield place, mine

    def ridge(self, place: Place, ridge: float) -> float:
        """The ridge of a place after `totals`: `ridge`, or a larger one for an expert that few tokens have come to."""
        few = place.columns / max(1.0, self.tokens.get(place.name, place.columns))
        return ridge * max(1.0, few**3)


def fit(place: Place, totals: Tensor, ridge: float) -> Tensor:
    """The map M [n, k], fp64, of a place with its `Moments.totals`; [M, b] [n, k + 1] behind a LayerNorm.

    `totals` is used up. Raises UserError where it is not finite.
    """
    if not bool(totals.isfinite().all()):
        raise UserError(f"repair: what {place.name} reads is not finite everywhere; does the model give finite logits?")
    if place.norm is None:
        return least_squares(totals, _shrunk(totals.t(), place.cut).t(), place.cut, ridge)
    count = place.columns
    if totals.shape[1] == count:
        return least_squares(totals[count:], totals[:count], place.cut, ridge)
    means = totals[:, -1] / totals[-1, -1].clamp(min=1.0)
    totals.addr_(means, totals[-1].clone(), alpha=-1.0)  # of x and y without their means
    fitted = least_squares(totals[count:-1, :count], totals[:count, :count], place.cut, ridge)
    return torch.cat([fitted, (means[count:-1] - fitted @ means[:count])[:, None]], dim=1)


def least_squares(cross: Tensor, second: Tensor, cut: Cut, ridge: float) -> Tensor:
    """M [n, k] of the formula above from X [n, k] and A [k, k], fp64. Without any signal the plain cut."""
    identity = torch.eye(len(second), dtype=cross.dtype, device=cross.device)
    size = second.diagonal().mean()
    if size == 0:
        return _plus_spread(torch.zeros_like(cross), cut, identity, 1.0)
    scale = _overlap(cross, cut) / float(second.diagonal().sum())
    rest = _plus_spread(cross, cut, second, -scale)
    factor = torch.linalg.cholesky(second + ridge * size * identity)
    fitted = torch.cholesky_solve(rest.t(), factor).t()
    return _plus_spread(fitted, cut, identity, scale)


def _shrunk(states: Tensor, cut: Cut) -> Tensor:
    """[t, n] -> [t, k]: states times S."""
    if isinstance(cut, Tensor):
        return states @ cut.to(states)
    return states[:, torch.from_numpy(cut).to(states.device)]


def _overlap(cross: Tensor, cut: Cut) -> float:
    """Sum of the products of the entries of X and S, both [n, k]."""
    if isinstance(cut, Tensor):
        return float(cross.flatten().dot(cut.to(cross).flatten()))
    return float(_shrunk(cross.t(), cut).diagonal().sum())


def _plus_spread(values: Tensor, cut: Cut, rows: Tensor, factor: float) -> Tensor:
    """[n, m] plus `factor` times S [n, k] times rows [k, m]."""
    if isinstance(cut, Tensor):
        return torch.addmm(values, cut.to(values), rows, alpha=factor)
    return values.index_add(0, torch.from_numpy(cut).to(values.device), rows, alpha=factor)


def _spans(tokens: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(tokens), SPAN_TOKENS):
        yield tokens[start : start + SPAN_TOKENS]
