"""State that lives on a device: every array of the host has a twin there, and moves only when it must."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from titans_runtime.backends import Array


class Device(Protocol):
    """Memory beside the host's."""

    def allocate(self, like: Array) -> Any:  # noqa: ANN401 - whatever stands for memory there
        """Room for an array; freed when the result is dropped."""
        ...

    def upload(self, twin: Any, array: Array) -> None:  # noqa: ANN401
        """Copy an array into its twin, which may be in use by earlier work."""
        ...

    def download(self, twin: Any, array: Array) -> None:  # noqa: ANN401
        """Copy the twin into its array, once earlier work is done."""
        ...


class Mirror:
    """One array and its twin. At most one of the two is newer."""

    def __init__(self, device: Device, array: Array) -> None:
        """The array as it stands is what counts."""
        self._device, self._array = device, weakref.ref(array)
        self.twin = device.allocate(array)
        self.host_is_newer, self.device_is_newer = True, False

    def to_device(self) -> None:
        """Before the device reads it."""
        array = self._array()
        if self.host_is_newer and array is not None:
            self._device.upload(self.twin, array)
            self.host_is_newer = False

    def to_host(self) -> None:
        """Before the host reads it, or writes a part of it."""
        array = self._array()
        if self.device_is_newer and array is not None:
            self._device.download(self.twin, array)
            self.device_is_newer = False

    def written_by_device(self) -> None:
        """The device has written all of it."""
        self.host_is_newer, self.device_is_newer = False, True

    def written_by_host(self) -> None:
        """The host has written, or is about to, with nothing newer on the device."""
        self.host_is_newer = True


class Mirrors:
    """The arrays of one backend that have twins: its :class:`titans_runtime.backends.Residence`.

    An array has a twin from when it is first bound until it is dropped. A view belongs to the array whose
    memory it shows.
    """

    def __init__(self, device: Device) -> None:
        """``device``: where the twins are."""
        self.device = device
        self._found: dict[int, Mirror] = {}
        self._lock = threading.Lock()

    def of(self, array: Array) -> Mirror:
        """The mirror of a whole array."""
        with self._lock:
            key = id(array)
            if key not in self._found:
                self._found[key] = Mirror(self.device, array)
                weakref.finalize(array, self._found.pop, key, None)
            return self._found[key]

    def fetch(self, arrays: Iterable[Array]) -> None:
        """See :class:`titans_runtime.backends.Residence`."""
        for array in arrays:
            mirror = self._found.get(id(whole(array)))
            if mirror is not None:
                mirror.to_host()

    def changed(self, arrays: Iterable[Array]) -> None:
        """See :class:`titans_runtime.backends.Residence`."""
        for array in arrays:
            mirror = self._found.get(id(whole(array)))
            if mirror is not None:
                mirror.written_by_host()


def whole(array: Array) -> Array:
    """The array whose memory a view shows; an array itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def is_state(name: str) -> bool:
    """Whether a graph's input or output stays on the device between calls."""
    return name.startswith(("past.", "present."))
