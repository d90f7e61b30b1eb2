"""What every mixer's state has in common: it is a value. It can be measured, copied, saved, restored and reordered."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class TensorSpec(NamedTuple):
    """Shape, dtype and initial value of one tensor of a state; the first dimension is the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class MixerState(CacheLayerMixin):
    """The memory of one mixer during generation, as a transformers cache layer.

    A subclass says in `spec` which tensors it holds; allocation, size, snapshots and batch operations follow from
    it. The tensors are attributes of the state under the names of the spec. A mixer reads and advances its own state;
    `update`, through which transformers' attention layers write, is therefore refused.
    """

    keys: Tensor
    values: Tensor

    growing: ClassVar[bool] = False
    """Whether the bytes depend on the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        del self.keys, self.values  # found in `tensors` instead, once allocated
        self.tensors: dict[str, Tensor] = {}
        self.columns = 0  # columns (pads included) this state has been advanced by

    @abstractmethod
    def spec(self, batch_size: int, dtype: torch.dtype, tokens: int = 0) -> dict[str, TensorSpec]:
        """The tensors held for `batch_size` rows of a model computing in `dtype` after `tokens` columns."""

    def bytes_for(self, batch_size: int, dtype: torch.dtype, tokens: int = 0) -> int:
        """Bytes that this state occupies for a batch, known before anything is allocated."""
        return sum(entry.nbytes for entry in self.spec(batch_size, dtype, tokens).values())

    @property
    def nbytes(self) -> int:
        """Bytes of memory allocated now (storage, not views: what the allocator gave)."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute or tensor '{name}'") from None

    def allocate(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """Allocate the tensors for `batch_size` rows, empty. A no-op where they exist."""
        if self.is_initialized:
            return
        self.tensors = {
            name: lasting(partial(torch.full, entry.shape, entry.fill, dtype=entry.dtype, device=device))
            for name, entry in self.spec(batch_size, dtype).items()
        }
        self.dtype, self.device = dtype, torch.device(device)
        self.is_initialized = True

    def begin_call(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make the tensors ready to be advanced in place by a layer on `device`; allocate them at the first call.

        They are cut off from the graph of earlier calls, which would otherwise live as long as the state. Memory stays
        where it is, but for a copy of tensors made under `torch.inference_mode` or held on another device.
        """
        self.allocate(batch_size, dtype, device)
        self.tensors = {name: writable(tensor, device) for name, tensor in self.tensors.items()}
        self.device = torch.device(device)

    def advance(self, columns: int) -> None:
        """Count the columns of a call; the mixer calls it once its tensors are up to date."""
        self.columns += columns

    def reset(self) -> None:
        """Forget everything; the memory stays allocated (a growing state gives it back)."""
        if self.is_initialized:
            batch_size = next(iter(self.tensors.values())).shape[0]
            for name, entry in self.spec(batch_size, self.dtype).items():
                tensor = self.tensors[name].detach()
                same = tensor.shape == entry.shape
                self.tensors[name] = tensor.fill_(entry.fill) if same else tensor.new_full(entry.shape, entry.fill)
        self.columns = 0

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the state: tensors by name, and `columns` as a scalar tensor. Empty if nothing is allocated."""
        if not self.is_initialized:
            return {}
        copies = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return copies | {"columns": torch.tensor(self.columns)}

    def restore(self, snapshot: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> None:
        """Return to a snapshot, which is left untouched and can be used again.

        Raises:
            ValueError: if the snapshot's tensors are not those of this kind of state.
        """
        if not snapshot:
            self.tensors, self.columns, self.is_initialized = {}, 0, False
            return
        if "columns" not in snapshot or len(snapshot) == 1:
            raise ValueError(f"the snapshot of {type(self).__name__} is incomplete: it holds {sorted(snapshot)}")
        columns = int(snapshot["columns"])
        batch_size = next(tensor for name, tensor in snapshot.items() if name != "columns").shape[0]
        expected = {name: entry.shape for name, entry in self.spec(batch_size, dtype, columns).items()}
        found = {name: tuple(tensor.shape) for name, tensor in snapshot.items() if name != "columns"}
        if expected != found:
            raise ValueError(f"the snapshot does not fit {type(self).__name__}: it holds {found}, expected {expected}")
        self.tensors = {name: lasting(partial(snapshot[name].to, device, copy=True)) for name in expected}
        self.columns, self.dtype, self.device, self.is_initialized = columns, dtype, torch.device(device), True

    def select_rows(self, index: Tensor) -> None:
        """Keep the batch rows `index` [n] (any order, repeats allowed)."""
        self.tensors = {
            name: lasting(partial(tensor.index_select, 0, index.to(tensor.device)))
            for name, tensor in self.tensors.items()
        }

    # The names under which transformers asks for the same.
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.tensors = {
            name: lasting(partial(tensor.repeat_interleave, repeats, dim=0)) for name, tensor in self.tensors.items()
        }

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was evicted or folded into a state cannot be taken out again."""
        raise ValueError(
            f"{type(self).__name__} cannot give tokens back (crop). Take cache.snapshot() before the tokens and "
            "cache.restore(snapshot) afterwards."
        )

    def get_seq_length(self) -> int:
        """Columns seen so far, pads included."""
        return self.columns

    def get_max_length(self) -> int:
        """−1: any number of tokens may follow."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of an attention mask over everything seen and the next `query_length` columns."""
        return self.columns + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, dtype and device of `key_states`."""
        self.allocate(key_states.shape[0], key_states.dtype, key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a mixer advances its own state."""
        raise TypeError(f"{type(self).__name__} is advanced by its mixer, not through update().")

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        self.tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in self.tensors.items()}

    def prefetch(self) -> None:
        """Move the tensors back to their device."""
        self.tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.tensors.items()}


def writable(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`, without a graph, and such that it can be written in place here; a copy only if needed."""
    if tensor.requires_grad or tensor.device != torch.device(device):
        tensor = tensor.detach().to(device)
    if torch.compiler.is_compiling():  # which reads no inference tensors outside inference mode
        return tensor
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def lasting(make: Callable[[], Tensor]) -> Tensor:
    """A new tensor that can be written in place in every mode, and whose address torch.compile may take for granted.

    What is made under `torch.inference_mode` could not be written outside of it. CUDA graphs write into what stays
    where it is, and copy everything else.
    """
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False), torch.no_grad():
        tensor = make()
    torch._dynamo.mark_static_address(tensor, guard=False)  # with a guard each new cache would be compiled for
    return tensor
