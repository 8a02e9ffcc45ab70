"""Which OpenGL this machine can render with, and contexts of it."""

import atexit
import ctypes
import importlib
import os
import sys
from typing import Any

APT_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libosmesa6"
FIX = f"on Debian or Ubuntu: apt-get install -y {APT_PACKAGES}"


class RenderingUnavailableError(RuntimeError):
    """Neither EGL nor OSMesa can render on this machine, or not in this process."""


def _egl_device_count() -> int:
    """Devices that EGL offers, without initialising a display (that would not survive a fork)."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return 0
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return 0
    query = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )(address)
    count = ctypes.c_int(0)
    return count.value if query(0, None, ctypes.byref(count)) else 0


def _has_osmesa() -> bool:
    for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def choose_backend() -> str:
    """Set `MUJOCO_GL` to a back end that this machine has: EGL, else OSMesa.

    A `MUJOCO_GL` that is already set is kept. To be called before robosuite is imported.

    :raises RenderingUnavailableError: neither is there; the message names the packages to install
    """
    if not os.environ.get("MUJOCO_GL"):
        if _egl_device_count() > 0:
            os.environ["MUJOCO_GL"] = "egl"
        elif _has_osmesa():
            os.environ["MUJOCO_GL"] = "osmesa"
        else:
            raise RenderingUnavailableError(
                f"no off-screen rendering: neither EGL (with a device) nor OSMesa was found; {FIX}"
            )
    return os.environ["MUJOCO_GL"]


def keep_display() -> None:
    """From now on nobody ends the EGL display when Python exits; it goes with the process.

    mujoco and robosuite have both registered to end it, and it is the same one: what still has a
    context then, such as an environment that nobody closed, would print a traceback for each. To
    be called after either has made a context.
    """
    if (egl := sys.modules.get("mujoco.egl")) is not None:
        atexit.unregister(egl.EGL.eglTerminate)


class GlContext:
    """An OpenGL context that may pass from one thread to another, used by one at a time.

    :param size: side of the largest image, in pixels
    :raises Exception: as the back end raises it, when no context can be made
    """

    def __init__(self, size: int) -> None:
        # mujoco.gl_context settles on a back end when mujoco is imported, which may have been
        # before one was chosen here.
        self._backend = choose_backend().lower()
        known = self._backend in ("egl", "osmesa")
        self._module = importlib.import_module(
            f"mujoco.{self._backend}" if known else "mujoco.gl_context"
        )
        self._context: Any = self._module.GLContext(size, size)
        keep_display()

    def __enter__(self) -> "GlContext":
        self._context.make_current()
        return self

    def __exit__(self, *error: object) -> None:
        # A context that is current in one thread can't be made so in another.
        if self._backend == "egl":
            egl = self._module.EGL
            egl.eglMakeCurrent(
                self._module.EGL_DISPLAY,
                egl.EGL_NO_SURFACE,
                egl.EGL_NO_SURFACE,
                egl.EGL_NO_CONTEXT,
            )

    def free(self) -> None:
        """Free the context; to be called once, when nothing is to be rendered any more."""
        self._context.free()

    def abandon(self) -> None:
        """Never free it: in a forked child that would wait for threads that only the parent has."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))
