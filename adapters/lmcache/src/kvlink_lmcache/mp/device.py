"""What LMCache's entry-point group ``lmcache.device_plugins`` loads whenever lmcache is imported, in every process.

It is the only thing that runs in ``lmcache server`` before its transfer channel is chosen. Loading it registers
kvlink's channels; the device it has to describe for that does not exist, and is never chosen.
"""

from __future__ import annotations

from lmcache.v1.platform.base.device_spec import DeviceSpec

from .. import registration

registration.register()


class KVLinkDevice(DeviceSpec):  # type: ignore[misc]
    """No device."""

    @property
    def device_type(self) -> str:
        """A name that no torch device has."""
        return "kvlink"

    @property
    def backend_name(self) -> str:
        """The entry point's name, as LMCache demands."""
        return "kvlink"

    def is_available(self) -> bool:
        """Returns False."""
        return False
