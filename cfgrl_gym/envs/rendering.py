"""Off-screen images of a MuJoCo scene, pixel for pixel as robosuite renders them.

Render contexts are large (they hold every texture and mesh) and slow to make, so a process keeps
a few, not more than it has processor cores, and all its environments and threads take turns.
"""

import atexit
import ctypes
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cfgrl_gym.envs.compiled_models import CompiledModel
from cfgrl_gym.envs.render_backend import FIX, GlContext, RenderingUnavailableError

MAX_MODELS = 4  # of which one context keeps the textures and meshes
_MAX_GEOMS = 1000  # robosuite's own limit of a scene


def render(
    model: CompiledModel,
    data: Any,
    colours: Mapping[str, np.ndarray],
    cameras: Sequence[str],
    size: int,
) -> list[np.ndarray]:
    """Images of named cameras as robosuite gives them (OpenGL's first row is the bottom).

    :param data: `mujoco.MjData` with the poses to draw
    :param colours: model arrays that differ in this environment, such as "geom_rgba"
    :param size: side of the images in pixels
    :return: for each camera uint8 (size, size, 3), RGB
    :raises RenderingUnavailableError: no context can be made here
    """
    with _pool.painter(model.base, size) as painter:
        return [painter.paint(model, data, colours, camera, size) for camera in cameras]


def free_unused() -> None:
    """Give back what was kept for models that are gone."""
    _pool.free_unused()


class _Painter:
    """What is kept of one model in one context: its textures, its meshes, a scene to fill."""

    def __init__(self, base: CompiledModel, size: int) -> None:
        import mujoco

        self._mujoco = mujoco
        self.size = size
        self.model = weakref.ref(base)
        # A scene holds pointers into the model it was made for; both are this model's.
        with base.lock:
            quality = base.mj.vis.global_
            quality.offwidth, quality.offheight = size, size
            self._context: Any = mujoco.MjrContext(base.mj, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(base.mj, maxgeom=_MAX_GEOMS)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        # robosuite, environments/base.py: collision meshes (group 0) off, visual ones (1) on
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0], self._options.geomgroup[1] = 0, 1
        self._perturbation = mujoco.MjvPerturb()

    def paint(
        self,
        model: CompiledModel,
        data: Any,
        colours: Mapping[str, np.ndarray],
        camera: str,
        size: int,
    ) -> np.ndarray:
        mujoco = self._mujoco
        self._camera.fixedcamid = mujoco.mj_name2id(model.mj, mujoco.mjtObj.mjOBJ_CAMERA, camera)
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
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(viewport, self._scene, self._context)
        image = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(image, None, viewport, self._context)
        return image

    def free(self) -> None:
        """The context must be current."""
        self._context.free()

    def abandon(self) -> None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))


class _Easel:
    """An OpenGL context with the painters of the models it was last used for."""

    def __init__(self, size: int) -> None:
        try:
            self.gl = GlContext(size)
        except Exception as error:
            raise _unavailable(error) from error
        self.painters: OrderedDict[int, _Painter] = OrderedDict()
        self.busy = False

    def painter(self, base: CompiledModel, size: int) -> _Painter:
        """The context must be current."""
        self.free_unused()
        painter = self.painters.get(id(base))
        if painter is not None and painter.size < size:
            self.painters.pop(id(base)).free()
            painter = None
        if painter is None:
            if len(self.painters) >= MAX_MODELS:
                self.painters.popitem(last=False)[1].free()
            try:
                painter = self.painters[id(base)] = _Painter(base, size)
            except Exception as error:
                raise _unavailable(error) from error
        self.painters.move_to_end(id(base))
        return painter

    def free_unused(self) -> None:
        """The context must be current."""
        for key in [key for key, painter in self.painters.items() if painter.model() is None]:
            self.painters.pop(key).free()

    def free(self) -> None:
        with self.gl:
            while self.painters:
                self.painters.popitem()[1].free()
        self.gl.free()

    def abandon(self) -> None:
        for painter in self.painters.values():
            painter.abandon()
        self.gl.abandon()


class _Pool:
    """The render contexts of this process."""

    def __init__(self) -> None:
        self._easels: list[_Easel] = []
        self._changed = threading.Condition()
        self._owner: int | None = None

    @contextmanager
    def painter(self, base: CompiledModel, size: int) -> Iterator[_Painter]:
        """A painter of this model for the calling thread's use, its context current."""
        easel = self._take(base, size)
        try:
            with easel.gl:
                yield easel.painter(base, size)
        finally:
            self._give_back(easel)

    def _take(self, base: CompiledModel, size: int) -> _Easel:
        with self._changed:
            self._claim()
            while True:
                free = [easel for easel in self._easels if not easel.busy]
                prepared = [easel for easel in free if id(base) in easel.painters]
                roomy = [easel for easel in free if len(easel.painters) < MAX_MODELS]
                if prepared or roomy:
                    easel = (prepared or roomy)[0]
                elif len(self._easels) < processors():
                    easel = self._set_up(size)
                elif free:
                    easel = free[0]
                else:
                    self._changed.wait()
                    continue
                easel.busy = True
                return easel

    def _set_up(self, size: int) -> _Easel:
        easel = _Easel(size)
        if not self._easels:
            # Only now, so that it runs before mujoco's own handler takes the display away.
            atexit.register(self.close)
        self._easels.append(easel)
        return easel

    def _give_back(self, easel: _Easel) -> None:
        with self._changed:
            easel.busy = False
            self._changed.notify()

    def _claim(self) -> None:
        # A GL display that was initialised before a fork hangs or crashes in the child.
        if self._owner is None:
            self._owner = os.getpid()
            os.register_at_fork(after_in_child=self._abandon)
        elif self._owner != os.getpid():
            raise RenderingUnavailableError(
                "this process was forked from one that had already rendered, and a render context "
                "does not survive a fork; start workers with 'spawn' or 'forkserver' (SB3: "
                "SubprocVecEnv(..., start_method='forkserver'); Gymnasium: "
                "AsyncVectorEnv(..., context='spawn')), or render in the parent only afterwards"
            )

    def free_unused(self) -> None:
        with self._changed:
            if self._owner != os.getpid():
                return
            for easel in self._easels:
                if not easel.busy and easel.painters:
                    with easel.gl:
                        easel.free_unused()

    def close(self) -> None:
        with self._changed:
            if self._owner == os.getpid():
                while self._easels:
                    self._easels.pop().free()

    def _abandon(self) -> None:
        self._changed = threading.Condition()
        for easel in self._easels:
            easel.abandon()
        self._easels = []


def processors() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unavailable(error: Exception) -> RenderingUnavailableError:
    return RenderingUnavailableError(
        f"a render context (MUJOCO_GL={os.environ.get('MUJOCO_GL')}) cannot be made: {error}; {FIX}"
    )


_pool = _Pool()
