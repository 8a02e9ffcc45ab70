"""Renders off-screen images of a MuJoCo scene, pixel for pixel as robosuite does.

Render contexts are large (they hold every texture and mesh) and slow to make, so a process keeps
a few, which all its environments and threads use in turn.
"""

import atexit
import ctypes
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from cfgrl_gym.envs.compiled_models import CompiledModel
from cfgrl_gym.envs.culling import Culler
from cfgrl_gym.envs.render_backend import FIX, GlContext, RenderingUnavailableError

MAX_CONTEXTS = 8  # that a process keeps; each takes 300 to 500 MB for a LIBERO task
_MAX_GEOMS = 1000  # robosuite's own limit for a scene
_LEAST_SIZE = 256  # pixels; a context serves every size up to its own

# As robosuite renders, or without multisampling (smooth edges), which is cheaper in software.
Quality: TypeAlias = Literal["benchmark", "draft"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)


def render(
    model: CompiledModel,
    data: Any,
    colours: Mapping[str, np.ndarray],
    cameras: Sequence[str],
    size: int,
    quality: Quality = "benchmark",
) -> list[np.ndarray]:
    """Render images of named cameras as robosuite does (OpenGL's first row is the bottom).

    :param data: `mujoco.MjData` with the poses to draw
    :param colours: model arrays that differ in this environment, such as "geom_rgba"
    :param size: side of the images in pixels
    :param quality: "draft" has no multisampling, so its images aren't the benchmark's
    :return: for each camera uint8 (size, size, 3), RGB
    :raises RenderingUnavailableError: no context can be made here
    :raises ValueError: the model has no such camera
    """
    with _pool.painter(model.base, size, quality) as painter:
        return painter.paint(model, data, colours, cameras, size)


def free_unused() -> None:
    """Free the render contexts of models that no longer exist."""
    _pool.free_unused()


class _Painter:
    """Holds a render context of one model: its textures, its meshes, and a scene to fill.

    It has an OpenGL context of its own, so that nothing of another model can appear in an image.
    """

    def __init__(self, base: CompiledModel, size: int, quality: Quality) -> None:
        import mujoco

        self._mujoco = mujoco
        self._model = weakref.ref(base)
        self.size, self._quality = max(size, _LEAST_SIZE), quality
        self._gl = GlContext(self.size)
        # A scene holds pointers into the model it was made for; both are this model's.
        with self._gl, base.lock:
            with _context_settings(base, self.size, quality):
                self._context: Any = mujoco.MjrContext(base.mj, mujoco.mjtFontScale.mjFONTSCALE_150)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
            culler = _cullers.get(base)
            if culler is None:
                culler = _cullers[base] = Culler(base.mj)
            self._culler = culler
        self._scene = mujoco.MjvScene(base.mj, maxgeom=_MAX_GEOMS)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        # robosuite, environments/base.py: collision meshes (group 0) off, visual ones (1) on
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0], self._options.geomgroup[1] = 0, 1
        self._perturbation = mujoco.MjvPerturb()

    def serves(self, base: CompiledModel, quality: Quality) -> bool:
        return self._model() is base and self._quality == quality

    @property
    def is_unused(self) -> bool:
        """Return whether the model no longer exists."""
        return self._model() is None

    def paint(
        self,
        model: CompiledModel,
        data: Any,
        colours: Mapping[str, np.ndarray],
        cameras: Sequence[str],
        size: int,
    ) -> list[np.ndarray]:
        mujoco, images = self._mujoco, []
        viewport = mujoco.MjrRect(0, 0, size, size)
        with self._gl:
            for camera in cameras:
                number = mujoco.mj_name2id(model.mj, mujoco.mjtObj.mjOBJ_CAMERA, camera)
                if number < 0:  # MuJoCo would end the process
                    raise ValueError(f"the model has no camera {camera!r}")
                self._camera.fixedcamid = number
                with model.lock:
                    for name, values in colours.items():
                        getattr(model.mj, name)[:] = values
                    mujoco.mjv_updateScene(
                        model.mj,
                        data,
                        self._options,
                        self._perturbation,
                        self._camera,
                        mujoco.mjtCatBit.mjCAT_ALL,
                        self._scene,
                    )
                with self._culler.culled(self._scene, model.mj, data, size):
                    mujoco.mjr_render(viewport, self._scene, self._context)
                image = np.empty((size, size, 3), dtype=np.uint8)
                mujoco.mjr_readPixels(image, None, viewport, self._context)
                images.append(image)
        return images

    def free(self) -> None:
        with self._gl:
            self._context.free()
        self._gl.free()

    def abandon(self) -> None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))
        self._gl.abandon()


@contextmanager
def _context_settings(base: CompiledModel, size: int, quality: Quality) -> Iterator[None]:
    """Set, inside the block, what the model's render context holds: nothing that isn't drawn."""
    globals_, settings = base.mj.vis.global_, base.mj.vis.quality
    globals_.offwidth = globals_.offheight = size
    before = settings.offsamples, settings.shadowsize
    if quality == "draft":
        settings.offsamples = 0
    if not base.mj.light_castshadow.any():
        settings.shadowsize = 0  # else a map of 64 MB
    try:
        yield
    finally:
        settings.offsamples, settings.shadowsize = before


class _Pool:
    """Holds the render contexts of this process."""

    def __init__(self) -> None:
        self._idle: list[_Painter] = []  # the last used one last
        self._busy = 0
        self._changed = threading.Condition()
        self._owner: int | None = None

    @contextmanager
    def painter(self, base: CompiledModel, size: int, quality: Quality) -> Iterator[_Painter]:
        """Lend a painter of this model to the calling thread."""
        with self._changed:
            self._claim()
            self._changed.wait_for(lambda: self._busy < min(processors(), MAX_CONTEXTS))
            painter = self._take(base, size, quality)
            self._busy += 1
        sound = False
        try:
            yield painter
            sound = True
        finally:
            with self._changed:
                self._busy -= 1
                if sound:
                    self._idle.append(painter)
                else:  # a painter that failed once isn't used again
                    with suppress(Exception):
                        painter.free()
                self._changed.notify()

    def _take(self, base: CompiledModel, size: int, quality: Quality) -> _Painter:
        for painter in [p for p in reversed(self._idle) if p.serves(base, quality)]:
            self._idle.remove(painter)
            if painter.size >= size:
                return painter
            painter.free()
        while self._idle and len(self._idle) + self._busy >= MAX_CONTEXTS:
            self._idle.pop(0).free()
        try:
            return _Painter(base, size, quality)
        except Exception as error:
            raise RenderingUnavailableError(
                f"a render context (MUJOCO_GL={os.environ.get('MUJOCO_GL')}) cannot be made: "
                f"{error}; {FIX}"
            ) from error
        finally:
            if self._owner is None:
                self._owner = os.getpid()
                os.register_at_fork(after_in_child=self._abandon)
                # Only now, so that it runs before mujoco's own handler takes the display away.
                atexit.register(self.close)

    def _claim(self) -> None:
        # A GL display that was initialised before a fork hangs or crashes in the child.
        if self._owner not in (None, os.getpid()):
            raise RenderingUnavailableError(
                "this process was forked from one that had already rendered, and a render context "
                "does not survive a fork; start workers with 'spawn' or 'forkserver' (SB3: "
                "SubprocVecEnv(..., start_method='forkserver'); Gymnasium: "
                "AsyncVectorEnv(..., context='spawn')), or render in the parent only afterwards"
            )

    def free_unused(self) -> None:
        with self._changed:
            if self._owner == os.getpid():
                for painter in [painter for painter in self._idle if painter.is_unused]:
                    self._idle.remove(painter)
                    painter.free()

    def close(self) -> None:
        with self._changed:
            if self._owner == os.getpid():
                while self._idle:
                    painter = self._idle.pop()
                    try:
                        painter.free()
                    except Exception:  # other code, such as robosuite, has ended the display before
                        painter.abandon()

    def _abandon(self) -> None:
        self._changed = threading.Condition()
        for painter in self._idle:
            painter.abandon()
        self._idle = []


def processors() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_cullers: "weakref.WeakKeyDictionary[CompiledModel, Culler]" = weakref.WeakKeyDictionary()
_pool = _Pool()
