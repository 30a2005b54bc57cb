"""Stand for the storage of a traced value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import debug
from ..debug import at
from ..errors import CaptureError
from .memory import storage_of
from .traced import Traced


class TracedStorage:
    """The storage of a traced value: its size and its owner, but nothing of what it holds."""

    def __init__(self, t: Traced, typed: bool = False) -> None:
        memory = Tensor.untyped_storage(t)
        self.shown, self.nbytes = t, memory.nbytes
        if not typed:
            self.size, self.device = memory.size, memory.device

    @property
    def _cdata(self) -> Any:
        return storage_of(self.shown)

    def __eq__(self, other: object) -> bool:
        return bool(self._cdata == getattr(other, "_cdata", None))

    def __hash__(self) -> int:
        return hash(self._cdata)

    def __len__(self) -> int:
        return self.size()

    def __getattr__(self, name: Any, *_: Any) -> Any:
        raise CaptureError(
            f"a traced value has no memory: {name!r} of its storage was asked "
            f"for{at(debug.user_line())}; do so outside, on the tensor itself"
        )

    __getitem__ = __setitem__ = __getattr__
