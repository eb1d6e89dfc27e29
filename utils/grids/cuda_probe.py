"""The GPUs that CUDA shows to a process, asked of the driver in a process of its own.

    python -m utils.grids.cuda_probe [--hold]

Prints one UUID per line, in CUDA's order, and an empty line at the end; no UUID where there is no driver or no GPU.
With --hold it then keeps a context on each GPU until its standard input ends.

Not torch: that takes seconds to load. A process of its own: what asks the driver keeps a connection to it.
"""

import ctypes
import sys
import uuid

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class Driver:
    """NVIDIA's driver library, initialised.

    Raises:
        OSError: there is none.
    """

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.status = self.library.cuInit(0)

    def check(self, status: int) -> None:
        """End this process with the driver's words, unless `status` is 0."""
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            sys.exit(f"CUDA error {status}: {(text.value or b'unknown').decode(errors='replace')}")

    def devices(self) -> list[int]:
        """Handles of the GPUs."""
        count = ctypes.c_int()
        self.check(self.library.cuDeviceGetCount(ctypes.byref(count)))
        handles = [ctypes.c_int() for _ in range(count.value)]
        for index, handle in enumerate(handles):
            self.check(self.library.cuDeviceGet(ctypes.byref(handle), index))
        return [handle.value for handle in handles]

    def uuid(self, device: int) -> str:
        content = ctypes.create_string_buffer(16)
        # The second version knows MIG instances; old drivers have only the first.
        ask = getattr(self.library, "cuDeviceGetUuid_v2", None) or self.library.cuDeviceGetUuid
        self.check(ask(content, device))
        return str(uuid.UUID(bytes=content.raw))

    def hold(self, device: int) -> None:
        """Make a context on the GPU, which lasts as long as this process."""
        self.check(self.library.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), device))


def main(hold: bool) -> None:
    try:
        driver = Driver()
    except OSError:  # no driver is installed
        return
    if driver.status == NO_DEVICE:
        return
    driver.check(driver.status)
    devices = driver.devices()
    for device in devices if hold else ():
        driver.hold(device)
    print("\n".join([*map(driver.uuid, devices), ""]), flush=True)
    if hold:
        sys.stdin.read()


if __name__ == "__main__":
    main(hold="--hold" in sys.argv[1:])
