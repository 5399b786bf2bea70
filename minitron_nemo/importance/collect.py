"""Hooks on Megatron's transformer layers that measure every axis during one forward-only pass.

    layer input --+-- input norm --> attention --> (linear_proj's input: heads)
                  |
                  +-- + --> pre-MLP norm --> linear_fc1 --> (linear_fc2's input: ffn)
    layer input and output: block influence;  the two norms' outputs: hidden;  the final norm's: its scale

TransformerEngine fuses a norm into the linear layer that follows, where no hook sees its output. So norms are measured
from their inputs, which both specs show: |RMSNorm(x)| is |gain| |x| / rms(x), and sums of it need no normalised tensor.
LayerNorm's mean and bias cannot be taken out of the sums like that: it is computed again, span by span, and what it
is before its gain is not measured.

Sums over a sequence are complete before anything that is not linear happens to them: under sequence parallelism they
are all-reduced over the tensor-parallel group first. Moments over sequences stay on the rank that measured them until
`Collector.scores` adds up all ranks. Context parallelism is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, distributed, nn
from torch.nn import functional

from minitron_nemo.arch import Architecture
from minitron_nemo.arch.family import family
from minitron_nemo.importance.counted import Counted, Current, Norm, final_norm, layer_norms, transformer_layers
from minitron_nemo.importance.reduce import Reducer, head_sums, sequence_moments, token_norms
from minitron_nemo.importance.scores import AGGREGATIONS, Scores


class ChunkSums:
    """What the layers of one model chunk measure on this rank; fp64.

    `totals` has moments over the sequences so far: `norms` [2, 3, 2 x layers, h], input and pre-MLP norm in turn; `ffn`
    [2, 3, layers, ffn/tp] and `heads` [2, 3, layers, heads/tp], this tensor-parallel rank's slices; `norm_squares`
    [2 x layers, h] the squares of RMSNorms' outputs before their gains, summed over the tokens; and over this rank's
    tokens `cosines` [layers] and, where the chunk ends with a final RMSNorm, its `final_squares` [h]. `current` lists
    the same of the microbatch that is in the chunk, layer by layer, before any aggregation: sums [2, b, n] of each
    sequence, those of RMSNorms without their gains. `norms` are all norms of the chunk in their order.
    """

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.totals: dict[str, Tensor] = {}
        self.current: dict[str, list[Tensor]] = {"norms": [], "ffn": [], "heads": [], "cosines": []}
        self.factors: Tensor | None = None  # [2 x layers, 2, 1, h], on the sums of RMSNorms
        if all(norm.bias is None for norm in norms):
            sizes = torch.stack([norm.gain for norm in norms]).double().abs()
            self.factors = torch.stack([sizes, sizes.square()], dim=1)[:, :, None]

    def finish_microbatch(self, tokens: Tensor, shards: distributed.ProcessGroup | None) -> None:
        """Move `current` to `totals`; `tokens` [b] counts. Sums of norms are completed over the group `shards`."""
        sums = {name: torch.stack(by_layer) for name, by_layer in self.current.items()}
        if shards is not None:
            distributed.all_reduce(sums["norms"], group=shards)
        if self.factors is not None:
            self.add("norm_squares", sums["norms"][:, 1].sum(dim=1))
            sums["norms"].mul_(self.factors)
        for name, measured in sums.items():
            self.add(name, measured if name == "cosines" else sequence_moments(measured, tokens))
            self.current[name].clear()

    def add(self, name: str, measured: Tensor) -> None:
        self.totals[name] = self.totals[name].add_(measured) if name in self.totals else measured


class Collector:
    """Measures while it is entered: attaches hooks to the layers of this rank's model chunks, and removes them.

    `microbatches` are this data-parallel rank's, in the order in which Megatron's schedule runs them, all in one run
    unless `next_run` says otherwise; of each, only `token_weights` [b, s] is read. Microbatches that the schedule runs
    beyond them do not count. `on_microbatch` is called whenever one enters the rank's first layer.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        architecture: Architecture,
        microbatches: Sequence[Mapping[str, Any]],
        *,
        sequence_parallel: bool,
        on_microbatch: Callable[[], None],
    ) -> None:
        self.architecture = architecture
        self.microbatches = microbatches
        self.sequence_parallel = sequence_parallel
        self.on_microbatch = on_microbatch
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.chunks = [transformer_layers(chunk) for chunk in chunks]
        self.traits = family(architecture.family)
        self.sums = [
            ChunkSums([norm for layer in layers for norm in layer_norms(layer, self.traits)]) for layers in self.chunks
        ]
        self.rms_norms = self.traits.normalization == "RMSNorm"
        self.final_norms = [final_norm(chunk) if self.rms_norms else None for chunk in chunks]
        self.device = next(chunks[0].parameters()).device
        self.reducer = Reducer(self.device)
        self.handles: list[Any] = []
        self.currents: list[Current] = []

    def __enter__(self) -> Collector:
        for layers, sums, last in zip(self.chunks, self.sums, self.final_norms, strict=True):
            self._attach_chunk(layers, sums, last)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def next_run(self, start: int, stop: int) -> None:
        """The next run of the schedule is of microbatches [start, stop)."""
        for current in self.currents:
            current.span = start, stop

    def state(self) -> list[dict[str, Tensor]]:
        """What this rank has measured so far: the `totals` of each model chunk."""
        return [sums.totals for sums in self.sums]

    def load_state(self, state: list[dict[str, Tensor]]) -> None:
        """Go on from what the same rank of the same job measured."""
        for sums, totals in zip(self.sums, state, strict=True):
            sums.totals = {name: total.to(self.device) for name, total in totals.items()}

    def scores(self, *, model_fingerprint: str, data_fingerprint: str, settings: Mapping[str, Any]) -> Scores:
        """Everything that all ranks measured. Collective over the whole job; every rank gets the same Scores."""
        shape, moments = self.architecture, (2, len(AGGREGATIONS))
        layers = shape.num_layers
        norms = self._zeros(*moments, layers, 2, shape.hidden_size)
        ffn = self._zeros(*moments, layers, shape.ffn_hidden_size)
        heads = self._zeros(*moments, layers, shape.num_attention_heads)
        cosines = self._zeros(layers)
        norm_squares = self._zeros(layers, 2, shape.hidden_size)
        final_squares = self._zeros(shape.hidden_size)
        column_norms = self._zeros(layers, shape.ffn_hidden_size)
        counts = self._zeros(2)  # sequences, tokens
        for chunk, sums in zip(self.chunks, self.sums, strict=True):
            mine = [layer.layer_number - 1 for layer in chunk]
            ffn[:, :, mine, self._slice(shape.ffn_hidden_size)] = sums.totals["ffn"]
            heads[:, :, mine, self._slice(shape.num_attention_heads)] = sums.totals["heads"]
            if parallel_state.get_data_parallel_rank() == 0:
                columns = [layer.mlp.linear_fc2.weight.detach().double().norm(dim=0) for layer in chunk]
                column_norms[mine, self._slice(shape.ffn_hidden_size)] = torch.stack(columns)
            # What all tensor-parallel ranks hold alike is given by the first; cosines of other tokens by each.
            if self.tp_rank == 0:
                norms[:, :, mine] = sums.totals["norms"].unflatten(2, (len(mine), 2))
                if self.rms_norms:
                    norm_squares[mine] = sums.totals["norm_squares"].unflatten(0, (len(mine), 2))
            if self.tp_rank == 0 or self.sequence_parallel:
                cosines[mine] = sums.totals["cosines"]
                final_squares += sums.totals.get("final_squares", 0)
        if self.tp_rank == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0:
            for microbatch in self.microbatches:
                tokens = (microbatch["token_weights"] != 0).sum(dim=1)
                counts += torch.stack([(tokens > 0).sum(), tokens.sum()])
        for array in (norms, ffn, heads, cosines, norm_squares, final_squares, column_norms, counts):
            distributed.all_reduce(array)  # over all ranks: each entry has one contributor per data-parallel replica
        sequences, tokens = counts.tolist()
        squares = torch.cat([norm_squares.flatten(0, 1), final_squares[None]]) / tokens
        return Scores(
            architecture=shape,
            hidden=norms.flatten(2, 3).cpu().numpy(),
            ffn=ffn.cpu().numpy(),
            heads=heads.cpu().numpy(),
            block_influence=(1 - cosines / tokens).cpu().numpy(),
            norm_squares=(squares if self.rms_norms else squares[:0]).cpu().numpy(),
            ffn_column_norms=column_norms.cpu().numpy(),
            sequences=int(sequences),
            tokens=int(tokens),
            model_fingerprint=model_fingerprint,
            data_fingerprint=data_fingerprint,
            settings=settings,
        )

    def _attach_chunk(self, layers: list[TransformerLayer], sums: ChunkSums, last: nn.Module | None) -> None:
        current = Current(
            layers,
            self.microbatches,
            sequence_parallel=self.sequence_parallel,
            on_microbatch=self.on_microbatch if layers is self.chunks[0] else None,
        )

        def after_microbatch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            sums.finish_microbatch(current.counted.tokens, self.tp_group if self.sequence_parallel else None)

        def on_final_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
            squares = self._rms_norm_sums(args[0], token_norms(args[0]), current.counted)[1]
            sums.add("final_squares", squares.sum(dim=0))

        self.currents.append(current)
        self.handles.append(current.handle)
        for layer in layers:
            self._attach(layer, sums, current)
        self.handles.append(layers[-1].register_forward_hook(after_microbatch))
        if last is not None:
            self.handles.append(last.register_forward_pre_hook(on_final_norm))

    def _attach(self, layer: TransformerLayer, sums: ChunkSums, current: Current) -> None:
        def on_heads(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.current["heads"].append(head_sums(args[0], current.counted.mask, self.architecture.kv_channels))

        def on_pre_mlp(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.current["norms"].append(self._norm_sums(args[0], token_norms(args[0]), pre_mlp_norm, current.counted))

        def on_ffn(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.current["ffn"].append(self.reducer.absolute_sums(args[0], current.counted.mask))

        def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states, result = kwargs["hidden_states"], output[0]  # [s(/tp), b, h]
            lengths = token_norms(states)
            cosines = self.reducer.cosines(states, result, lengths) * current.counted.local_mask.t()
            sums.current["cosines"].append(cosines.sum(dtype=torch.float64))
            # Its norm comes first, but the length of its input is needed here anyway.
            sums.current["norms"].insert(-1, self._norm_sums(states, lengths, input_norm, current.counted))

        input_norm, pre_mlp_norm = layer_norms(layer, self.traits)
        self.handles += [
            layer.self_attention.linear_proj.register_forward_pre_hook(on_heads),
            layer.pre_mlp_layernorm.register_forward_pre_hook(on_pre_mlp),
            layer.mlp.linear_fc2.register_forward_pre_hook(on_ffn),
            layer.register_forward_hook(on_output, with_kwargs=True),
        ]

    def _norm_sums(self, states: Tensor, lengths: Tensor, norm: Norm, counted: Counted) -> Tensor:
        """`absolute_sums` of the normed states over this rank's tokens: [2, b, h]; of RMSNorms without their gains.

        `lengths` are the states' norms.
        """
        if norm.bias is None:
            return self._rms_norm_sums(states, lengths, counted)
        gain, bias, epsilon = norm.gain.float(), norm.bias.float(), self.architecture.layernorm_epsilon
        return self.reducer.absolute_sums(
            states,
            counted.local_mask,
            lambda span: functional.layer_norm(span, span.shape[-1:], gain, bias, epsilon),
        )

    def _rms_norm_sums(self, states: Tensor, lengths: Tensor, counted: Counted) -> Tensor:
        scale = torch.rsqrt(lengths.square() / states.shape[-1] + self.architecture.layernorm_epsilon)  # [s, b]
        return self.reducer.absolute_sums(states, counted.local_mask * scale.t())

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def _slice(self, size: int) -> slice:
        """This tensor-parallel rank's share of an axis: ranks hold contiguous, equal parts."""
        return slice(self.tp_rank * size // self.tp_size, (self.tp_rank + 1) * size // self.tp_size)
