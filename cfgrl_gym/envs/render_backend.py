"""Chooses the OpenGL back end that this machine can render with, and makes contexts of it."""

import atexit
import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

APT_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libosmesa6"
FIX = f"on Debian or Ubuntu: apt-get install -y {APT_PACKAGES}"


class RenderingUnavailableError(RuntimeError):
    """Raised when neither EGL nor OSMesa can render on this machine, or in this process."""


def _egl_device_count() -> int:
    """Count EGL's devices without initialising a display, which would not survive a fork."""
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

    :raises RenderingUnavailableError: it has neither; the message names the packages to install
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
    """Keep the EGL display until the process ends, whoever would terminate it at Python's exit.

    mujoco and robosuite have both registered to end it, and it is the same one: what still has a
    context then, such as an environment that nobody closed, would print a traceback for each. To
    be called after either has made a context.
    """
    if (egl := sys.modules.get("mujoco.egl")) is not None:
        atexit.unregister(egl.EGL.eglTerminate)


def load_triton() -> None:
    """Load triton's library, where torch comes with it, before Mesa's llvmpipe loads its own LLVM.

    In the other order, as when torch imports triton after a first image, the process ends in a
    segmentation fault (seen with the CUDA build of torch 2.14 on Python 3.13). To be called before
    a context is made; where somebody else has made one, it is too late, and nothing is done.
    """
    maps = Path("/proc/self/maps")
    too_late = maps.exists() and "libLLVM" in maps.read_text(encoding="utf-8", errors="replace")
    if not too_late and importlib.util.find_spec("triton") is not None:
        with contextlib.suppress(ImportError):
            importlib.import_module("triton._C.libtriton")


class GlContext:
    """Makes an OpenGL context that threads may share, one at a time.

    :param size: side of the largest image, in pixels
    :raises Exception: no context can be made; the back end chooses the kind
    """

    def __init__(self, size: int) -> None:
        # mujoco.gl_context settles on a back end when mujoco is imported, which may have been
        # before one was chosen here.
        self._backend = choose_backend().lower()
        load_triton()
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
        # A context that is current in one thread can't be made current in another.
        if self._backend == "egl":
            egl = self._module.EGL
            egl.eglMakeCurrent(
                self._module.EGL_DISPLAY,
                egl.EGL_NO_SURFACE,
                egl.EGL_NO_SURFACE,
                egl.EGL_NO_CONTEXT,
            )

    def free(self) -> None:
        """Free the context; to be called once, after the last image."""
        self._context.free()

    def abandon(self) -> None:
        """Keep the context from being freed: a forked child would wait for the parent's threads."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))
