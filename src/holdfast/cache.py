"""The memory of a model during generation: one state per mixer, and how many tokens each row has seen."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from holdfast.mixers import MIXERS, MixerState
from holdfast.mixers.state import lasting, writable

if TYPE_CHECKING:
    from holdfast.configuration import HybridConfig


class HybridCache(Cache):
    """What a model remembers. It is a value: measured in bytes, copied, saved, restored, reordered, selected by rows.

    A call advances it in place. Gradients do not pass from one call to the next: what a call finds in the cache is
    constant to it. Where all mixers have memory of a fixed size, tensors stay where they were allocated, and compiled
    steps are one graph without numbers that change: before the first call of a model that is compiled with
    `mode="reduce-overhead"`, read the prompt eagerly, or call `allocate`.

    Args:
        config: of the model. States are allocated at the first forward pass, or by `allocate`.

    Attributes:
        layers: one `MixerState` per layer.
        seen: [B] int64, real tokens of each row so far (pads do not count); None before the first token.
        is_fresh: whether nothing has been read yet.
    """

    layers: list[MixerState]  # type: ignore[assignment]

    def __init__(self, config: HybridConfig) -> None:
        assert config.mixers is not None
        states = [MIXERS[name].make_state(config.options_for(name)) for name in config.mixers]
        super().__init__(layers=states)  # type: ignore[arg-type]
        self.seen: Tensor | None = None
        self.is_fresh = True
        # Columns that compiled calls have read, on the device, until somebody asks for them.
        self._ahead: Tensor | None = None
        self._is_ahead = False

    def allocate(self, batch_size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Allocate every state for `batch_size` rows. A no-op where they exist.

        Raises:
            ValueError: if the cache already holds another batch size.
        """
        self.begin_call(batch_size, device)
        for layer in self.layers:
            layer.allocate(batch_size, dtype, device)

    def begin_call(self, batch_size: int, device: torch.device | str) -> None:
        """Prepare the row counts for a call; each layer prepares its own state, where it computes.

        Raises:
            ValueError: if the cache already holds another batch size.
        """
        if self.seen is None:
            self.seen = lasting(partial(torch.zeros, batch_size, dtype=torch.long, device=device))
            self._ahead = lasting(partial(torch.zeros, (), dtype=torch.long, device=device))
        if len(self.seen) != batch_size:
            raise ValueError(
                f"the cache holds {len(self.seen)} rows, the input has {batch_size}; use cache.select_rows"
            )
        self.seen = writable(self.seen, device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, all layers and the row counts."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self.seen is None else self.seen.nbytes)

    @classmethod
    def bytes_for(cls, config: HybridConfig, batch_size: int, dtype: torch.dtype, tokens: int = 0) -> int:
        """Bytes that a cache of this configuration occupies after `tokens` tokens, without allocating it."""
        return 8 * batch_size + sum(layer.bytes_for(batch_size, dtype, tokens) for layer in cls(config).layers)

    @property
    def columns(self) -> int:
        """Columns the model has read so far, pads included. After compiled calls this waits for the device."""
        self._catch_up()
        return self.layers[0].columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns the model has read so far, pads included (transformers slices its inputs by it)."""
        return self.columns

    def advance(self, columns: int, num_real: Tensor) -> None:
        """Count the columns of a call, and each row's tokens [B] among them."""
        assert self.seen is not None
        assert self._ahead is not None
        self.seen.add_(num_real)
        self.is_fresh = False
        if torch.compiler.is_compiling() and not any(layer.growing for layer in self.layers):
            # In Python they would be a number that is another in every call: compiled anew for the second, and no
            # CUDA graph could be played twice.
            self._ahead.add_(columns)
            self._is_ahead = True
        else:
            for layer in self.layers:
                layer.advance(columns)

    def _catch_up(self) -> None:
        """Let every layer count the columns of compiled calls."""
        if self._ahead is not None and self._is_ahead:
            columns = int(self._ahead)
            for layer in self.layers:
                layer.advance(columns)
            self._forget_ahead()

    def _forget_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.zero_()
        self._is_ahead = False

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        if self.seen is not None:
            self.seen.zero_()
        self._forget_ahead()
        self.is_fresh = True
        for layer in self.layers:
            layer.reset()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the whole memory as flat, contiguous tensors (`safetensors.torch.save_file` can write them)."""
        if self.seen is None:
            return {}
        self._catch_up()
        copies = {"seen": self.seen.clone()}
        for index, layer in enumerate(self.layers):
            copies |= {f"layers.{index}.{name}": tensor for name, tensor in layer.snapshot().items()}
        return copies

    def restore(self, snapshot: dict[str, Tensor], device: torch.device | str | None = None) -> None:
        """Return to a snapshot of a cache of the same configuration; the snapshot can be used again.

        Raises:
            ValueError: if it does not fit; the cache is then as it was.
        """
        kept = ("seen", *(f"layers.{index}." for index in range(len(self.layers))))
        if foreign := sorted(name for name in snapshot if not name.startswith(kept)):
            raise ValueError(f"the snapshot holds what this cache of {len(self.layers)} layers lacks: {foreign[0]}")
        if snapshot and "seen" not in snapshot:
            raise ValueError("the snapshot is incomplete: it has no 'seen', the number of tokens of each row")
        restored = []
        for index, layer in enumerate(self.layers):
            prefix = f"layers.{index}."
            part = {name.removeprefix(prefix): t for name, t in snapshot.items() if name.startswith(prefix)}
            if snapshot and not part:
                raise ValueError(f"the snapshot has nothing for layer {index} ({type(layer).__name__})")
            state = copy.copy(layer)
            dtype = next((t.dtype for name, t in part.items() if name in ("keys", "conv_q")), torch.float32)
            state.restore(part, dtype, device or (snapshot["seen"].device if snapshot else "cpu"))
            restored.append(state)
        if snapshot:
            _check_agreement(restored, snapshot["seen"])
        self.layers = restored
        self.seen = self._ahead = None
        if snapshot:
            seen = snapshot["seen"]
            self.seen = lasting(partial(seen.to, device or seen.device, copy=True))
            self._ahead = lasting(partial(self.seen.new_zeros, ()))
        self._is_ahead, self.is_fresh = False, self.layers[0].columns == 0

    def select_rows(self, index: Tensor) -> None:
        """Keep the batch rows `index` [n] (any order, repeats allowed)."""
        if self.seen is None:
            return
        self.seen = lasting(partial(self.seen.index_select, 0, index.to(self.seen.device)))
        for layer in self.layers:
            layer.select_rows(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.seen is not None:
            self.select_rows(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: see `MixerState.crop`."""
        self.layers[0].crop(0)


def _check_agreement(layers: list[MixerState], seen: Tensor) -> None:
    """Refuse the layers of a snapshot that hold other rows than `seen`, or other columns than the first."""
    if seen.dim() != 1 or seen.dtype != torch.int64:
        raise ValueError(f"the snapshot's 'seen' must be [B] int64, got {list(seen.shape)} {seen.dtype}")
    for index, layer in enumerate(layers):
        rows = len(next(iter(layer.tensors.values())))
        if rows != len(seen):
            raise ValueError(f"the snapshot contradicts itself: layer {index} has {rows} rows, 'seen' has {len(seen)}")
        if layer.columns != layers[0].columns:
            raise ValueError(
                f"the snapshot contradicts itself: layer {index} has read {layer.columns} columns, "
                f"layer 0 has read {layers[0].columns}"
            )
