"""Off-screen images of a MuJoCo scene, pixel for pixel as robosuite renders them."""

import atexit
import ctypes
import importlib
import os
import weakref
from typing import Any

import numpy as np

APT_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libosmesa6"
_FIX = f"on Debian or Ubuntu: apt-get install -y {APT_PACKAGES}"


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
                f"no off-screen rendering: neither EGL (with a device) nor OSMesa was found; {_FIX}"
            )
    return os.environ["MUJOCO_GL"]


def _context_class() -> Any:
    # mujoco.gl_context settles on a back end when mujoco is imported, which may have been before
    # one was chosen here.
    backend = choose_backend().lower()
    module = f"mujoco.{backend}" if backend in ("egl", "osmesa") else "mujoco.gl_context"
    return importlib.import_module(module).GLContext


# A GL display that was initialised before a fork hangs or crashes in the child, so remember who
# initialised it.
_context_owner: int | None = None
_live: "weakref.WeakSet[OffscreenRenderer]" = weakref.WeakSet()


def _close_all() -> None:
    for renderer in list(_live):
        renderer.close()


def _abandon_all() -> None:
    # In a forked child: to free a context there waits forever for threads that only the parent
    # has, so none is ever freed.
    for renderer in list(_live):
        for part in (renderer._gl, renderer._context):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))
    _live.clear()


class OffscreenRenderer:
    """Renders cameras of one compiled model. Made in the process that uses it, never before a fork.

    :param model: `mujoco.MjModel`
    :param max_size: the largest image side that will be asked for, in pixels
    :raises RenderingUnavailableError: no context can be made here
    """

    def __init__(self, model: Any, max_size: int) -> None:
        global _context_owner
        import mujoco

        if _context_owner not in (None, os.getpid()):
            raise RenderingUnavailableError(
                "this process was forked from one that had already rendered, and a render context "
                "does not survive a fork; start workers with 'spawn' or 'forkserver' (SB3: "
                "SubprocVecEnv(..., start_method='forkserver'); Gymnasium: "
                "AsyncVectorEnv(..., context='spawn')), or render in the parent only afterwards"
            )
        self._mujoco = mujoco
        self._model = model
        glob = model.vis.global_
        glob.offwidth, glob.offheight = max(glob.offwidth, max_size), max(glob.offheight, max_size)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)  # robosuite's own limit
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        # robosuite, environments/base.py: collision meshes (group 0) off, visual ones (1) on
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0], self._options.geomgroup[1] = 0, 1
        self._perturbation = mujoco.MjvPerturb()
        try:
            self._gl: Any = _context_class()(max_size, max_size)
            self._gl.make_current()
            self._context: Any = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:
            raise RenderingUnavailableError(
                f"a render context (MUJOCO_GL={os.environ.get('MUJOCO_GL')}) cannot be made: "
                f"{error}; {_FIX}"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        if _context_owner is None:
            # Registered after mujoco's own handler, so it runs before the display goes away.
            atexit.register(_close_all)
            os.register_at_fork(after_in_child=_abandon_all)
            _context_owner = os.getpid()
        _live.add(self)

    def render(self, data: Any, camera: str, size: int) -> np.ndarray:
        """Image of a named camera as robosuite gives it (OpenGL's first row is the bottom).

        :return: uint8 (size, size, 3), RGB
        """
        mujoco = self._mujoco
        self._gl.make_current()
        self._camera.fixedcamid = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._options,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        mujoco.mjr_render(viewport, self._scene, self._context)
        image = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, self._context)
        return image

    def close(self) -> None:
        """Free the context; safe to call twice."""
        _live.discard(self)
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = self._gl = None
