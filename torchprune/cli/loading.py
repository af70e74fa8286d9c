"""The options of how a model is loaded, which most commands have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchprune.cli.console import DeviceOption, Dtype, DtypeOption

if TYPE_CHECKING:
    from torchprune.cli.models import Loader


@dataclass(frozen=True)
class Loading:
    """Where models go, and in which dtype. (See `registry` for what becomes of such a class.)"""

    dtype: DtypeOption = Dtype.auto
    device: DeviceOption = "auto"

    def loader(self, bars: bool) -> Loader:
        """What loads; torch, which takes seconds to import, comes with it.

        Raises:
            InputError: the device cannot be used.
        """
        from torchprune.cli.models import Loader, device_of

        return Loader(self.dtype.to_torch(), device_of(self.device), bars)
