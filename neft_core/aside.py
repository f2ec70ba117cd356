"""Tensors that are seldom read, out of the memory in which a training step works.

Those of a GPU go to the host's memory. Those of a CPU go to a file without a name in the system's
folder for temporary files (TMPDIR), mapped back: the system writes its pages out, drops them where
memory is short, and reads them again when they are looked at. The file ends with the last tensor
that sees it, or with the process, however that ends. Where that folder is memory itself (tmpfs),
nothing is gained.
"""

import tempfile

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def put_aside(tensor: Tensor) -> Tensor:
    """The same numbers, not to be written, elsewhere; the tensor itself where no room is there."""
    if isinstance(tensor, FakeTensor):
        # It has no content to keep: it stands for one that takes no memory.
        return tensor.new_empty(()).expand(tensor.shape)
    if tensor.device.type not in ("cpu", "meta"):
        return tensor.cpu()
    if not tensor.numel() or tensor.is_meta:
        return tensor
    try:
        with tempfile.TemporaryFile() as file:
            tensor.detach().contiguous().view(torch.uint8).numpy().tofile(file)
            file.flush()
            place = f"/dev/fd/{file.fileno()}"
            mapped = torch.from_file(place, False, tensor.numel(), dtype=tensor.dtype)
    except (OSError, RuntimeError):  # a full disk, a system that can't map
        return tensor
    return mapped.view(tensor.shape)
