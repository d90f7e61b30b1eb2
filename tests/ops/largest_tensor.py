"""How large the tensors are that a computation makes."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, but for views of `inputs`."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                # Storage, because an expanded view takes no memory.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
