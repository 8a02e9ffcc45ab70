"""LIBERO's `OffScreenRenderEnv`, with the same results at the speed of the fast simulator.

The class is LIBERO's own; what is replaced is the environment on robosuite inside it, so that
LIBERO's `SubprocVectorEnv`, its scripts and those of others find every method and attribute.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cfgrl_gym.envs import rendering
from cfgrl_gym.envs.compiled_models import CompiledModel
from cfgrl_gym.envs.fast_simulator import FastSimulator, on_shared_models, set_measured
from cfgrl_gym.envs.installation import assets_required, fast_hint, import_libero, keep_config
from cfgrl_gym.envs.lazy_observation import LazyObservation
from cfgrl_gym.envs.problems import Builder, replace, replaced
from cfgrl_gym.envs.render_backend import keep_display, load_triton
from cfgrl_gym.envs.simulator import Simulator, building, image_key
from cfgrl_gym.envs.stability import keep_log_out_of_the_working_directory
from cfgrl_gym.envs.suites import Task
from cfgrl_gym.envs.upstream import UnknownUpstreamError

keep_config()
_wrapper: Any = import_libero("envs.env_wrapper")

# The arguments with which LIBERO's environments are fast, where one of these is given at all.
_FAST: dict[str, tuple[Any, ...]] = {
    "robots": (["Panda"], "Panda"),
    "gripper_types": ("default",),
    "initialization_noise": (None,),
    "use_camera_obs": (True,),
    "has_renderer": (False,),
    "has_offscreen_renderer": (True,),
    "render_collision_mesh": (False,),
    "render_visual_mesh": (True,),
    "control_freq": (20,),
    "hard_reset": (True,),
    "camera_depths": (False,),
    "camera_segmentations": (None,),
    "renderer": ("mujoco", "default"),
    "renderer_config": (None,),
}
_ANY = (  # it makes no difference to what is fast, or the upstream check decides about it
    *("bddl_file_name", "controller_configs", "render_camera", "render_gpu_device_id"),
    *("horizon", "ignore_done", "camera_names", "camera_heights", "camera_widths"),
)
_UNKNOWN_OF_OBSERVABLES = ("corrupter", "filter", "delayer", "sampling_rate")
_warned: set[str] = set()


class OffScreenRenderEnv(_wrapper.OffScreenRenderEnv):  # type: ignore[misc]
    """Takes the place of LIBERO's `OffScreenRenderEnv`: the same arguments, methods, attributes and
    results, bit for bit.

    - A reset doesn't compile the model again. It draws what LIBERO's draws from numpy's global
      generator, which `seed` seeds, also after many resets of one environment.
    - Observations are LIBERO's `OrderedDict`; images in it are rendered when they are read, also
      later, and when it is pickled or copied.
    - Models are shared by all environments of a process: their arrays (`env.sim.model`) can be read
      but not written.
    - Where a setting or the installed version isn't known to be exact (depth, segmentation, images
      that aren't square, another controller, ...), the environment inside is LIBERO's own, at its
      own speed, with a warning.

    :param kwargs: LIBERO's
    """

    def __init__(self, **kwargs: Any) -> None:
        with building, replaced(partial(Builder, build=_build)):
            super().__init__(**kwargs)


def accelerate() -> None:
    """Have LIBERO build fast environments from now on, whoever asks for them."""
    replace(partial(Builder, build=_build))


def _build(problem: type, bddl_file_name: str, **kwargs: Any) -> Any:
    """Build an environment of this LIBERO problem: a fast one, or LIBERO's own with a warning."""
    keep_log_out_of_the_working_directory()
    why = _why_not_fast(kwargs)
    with assets_required():
        if why is None:
            before = np.random.get_state()  # noqa: NPY002
            try:
                return _accelerated(problem)(bddl_file_name, **kwargs)
            except UnknownUpstreamError as error:
                why = f"{error}. For the fast path: {fast_hint()}"
                np.random.set_state(before)  # noqa: NPY002
        if why not in _warned:
            _warned.add(why)
            warnings.warn(f"simulating at LIBERO's own speed: {why}", stacklevel=5)
        load_triton()
        env = problem(bddl_file_name, **kwargs)
        keep_display()
        return env


def _why_not_fast(kwargs: dict[str, Any]) -> str | None:
    import robosuite.macros as macros

    for name, value in kwargs.items():
        if name not in _ANY and value not in _FAST.get(name, ()):
            return f"{name} is {value!r:.100}"
    cameras = kwargs.get("camera_names")
    for camera, height, width in _pictures(kwargs):
        if height != width:
            return f"the images of {camera!r} are {height} x {width} pixels, and not square"
        if str(camera).startswith("all-"):
            return f"camera_names is {cameras!r:.100}"
    if macros.CONCATENATE_IMAGES:
        return "robosuite's CONCATENATE_IMAGES is set"
    return None


def _pictures(kwargs: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Return name, height and width of each camera's image."""
    names = kwargs["camera_names"]
    names = list(names) if isinstance(names, list | tuple) else [names]
    sizes = [
        list(size) if isinstance(size, list | tuple) else [size] * len(names)
        for size in (kwargs["camera_heights"], kwargs["camera_widths"])
    ]
    return list(zip(names, *sizes, strict=True))


def _accelerated(problem: type) -> type:
    """Make a subclass of a LIBERO problem that has the same results faster."""
    shared: Any = on_shared_models(problem)

    def __init__(self: Any, bddl_file_name: str, **kwargs: Any) -> None:
        self.simulator = None
        changed = {"use_camera_obs": False, "has_offscreen_renderer": False, "hard_reset": False}
        shared.__init__(self, bddl_file_name, **(kwargs | changed))
        self.simulator = DropInSimulator(self, shared, _pictures(kwargs))

    def reset(self: Any) -> Any:
        if self.simulator is None:
            return shared.reset(self)
        self.simulator.reset_by_global_generator()
        return self._get_observations()

    def step(self: Any, action: Any) -> Any:
        if self.simulator is None:
            return shared.step(self, action)
        if self.done:
            raise ValueError("executing action in terminated episode")
        reward = self.simulator.step(action)
        return self._get_observations(), reward, self._check_success(), {}

    def _update_observables(self: Any, force: bool = False) -> None:
        if self.simulator is None:
            shared._update_observables(self, force)
        else:
            self.simulator.measure(force)

    def _get_observations(self: Any, force_update: bool = False) -> Any:
        if self.simulator is None:
            return shared._get_observations(self, force_update)
        if force_update:
            self.simulator.measure(force=True)
        return self.simulator.observation()

    def modify_observable(self: Any, observable_name: str, attribute: str, modifier: Any) -> None:
        if self.simulator is not None and attribute in _UNKNOWN_OF_OBSERVABLES:
            raise _not_here(f"an observable's {attribute} can't be modified")
        shared.modify_observable(self, observable_name, attribute, modifier)

    def reset_from_xml_string(self: Any, xml_string: str) -> None:
        raise _not_here("there is no reset_from_xml_string")

    def close(self: Any) -> None:
        simulator, self.simulator = self.simulator, None
        if simulator is None:
            shared.close(self)
        else:
            simulator.close()

    methods = (
        *(__init__, reset, step, _update_observables, _get_observations, close),
        *(modify_observable, reset_from_xml_string),
    )
    body = {each.__name__: each for each in methods} | {"__module__": __name__}
    return type(problem.__name__, (shared,), body)


def _not_here(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} in a fast environment; take LIBERO's own class for that: "
        "libero.libero.envs.OffScreenRenderEnv, in a process without accelerate_libero()"
    )


class DropInSimulator(FastSimulator):
    """Simulates the environment inside an `OffScreenRenderEnv`, which seeds and resets as it likes.

    :param env: LIBERO's environment on robosuite
    :param problem: its class, with robosuite's own reset and step
    :param pictures: name, height and width of each camera's image
    """

    def __init__(self, env: Any, problem: Any, pictures: list[tuple[str, int, int]]) -> None:
        import robosuite.macros as macros
        from robosuite.utils.mjcf_utils import IMAGE_CONVENTION_MAPPING

        cameras = tuple(camera for camera, _, _ in pictures)
        known = env.sim.model.camera_names
        for camera in cameras:
            if camera not in known:
                raise ValueError(
                    f"the scene has no camera {camera!r}; it has {', '.join(map(str, known))}"
                )
        file = Path(env.bddl_file_name)
        task = Task(file.parent.name, -1, file.stem, "", file, file)  # of no suite
        Simulator.__init__(self, task, pictures[0][1], cameras)
        self.quality = "benchmark"
        self._sizes = {camera: size for camera, size, _ in pictures}
        self._rows = IMAGE_CONVENTION_MAPPING[macros.IMAGE_CONVENTION]  # 1, or -1 for upright
        self._resets = 0
        self._own: CompiledModel | None = None
        self._take(env, problem)
        self._render_by_robosuite = env.sim.render
        env.sim.render = self._render_now

    def _placed(self, base: CompiledModel) -> CompiledModel:
        """Return this environment's own model where fixtures have moved: a program's seeds move
        them elsewhere at every reset, so that no other has the same."""
        if not base.has_moved:
            return base
        if self._own is None:
            self._own = CompiledModel(copy.copy(base.mj), base)
        for name, places in base.places().items():
            getattr(self._own.mj, name)[:] = places
        return self._own

    def _reset_robosuite(self) -> None:
        env = self.robosuite_env
        simulator, env.simulator = env.simulator, None
        try:
            self._problem.reset(env)
        finally:
            env.simulator = simulator

    def reset_by_global_generator(self) -> None:
        """Reset as LIBERO's hard reset, by what numpy's global generator gives next.

        :raises RandomizationError: the sampler found no placement; LIBERO then tries again
        """
        with self._placing():
            self._prepare_reset(self._resets)
            self._resets += 1
            self._reset_robosuite()
        self._begin_episode(forced_measurements=1)

    def step(self, action: Any) -> float:
        """Execute a control step, and return LIBERO's reward."""
        env = self.robosuite_env
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (env.action_dim,):
            raise ValueError(
                f"an action has shape ({env.action_dim},); got {given.shape}, {action!r:.100}"
            )
        self._loop.read_controller()
        return self._control_step(given)

    def measure(self, force: bool) -> None:
        """Measure what robosuite would by `_update_observables`."""
        if self._loop.clock.substep(force):
            self._loop.measure()
            self._measured_is_current = False
            self._measured_colours = self._colours()

    def observation(self) -> LazyObservation:
        """Return what robosuite has measured last, in LIBERO's order, with lazy images."""
        moment = _Moment(self._compiled, self._loop.measured, self._measured_colours)
        lazy: dict[str, Callable[[], np.ndarray]] = {
            image_key(camera): partial(moment.render, camera, size, self._rows)
            for camera, size in self._sizes.items()
        }
        observables = self.robosuite_env._observables
        measured = self.observe()
        values: OrderedDict[str, Any] = OrderedDict()
        modalities: dict[str, list[np.ndarray]] = {}
        images_follow = True
        for name, value in measured.items():
            modality = observables[name].modality
            if images_follow and not modality.startswith("robot"):  # robots', cameras, objects
                values.update(dict.fromkeys(lazy))
                images_follow = False
            values[name] = value
            modalities.setdefault(f"{modality}-state", []).append(np.atleast_1d(value))
        if images_follow:
            values.update(dict.fromkeys(lazy))
        values.update({name: np.concatenate(parts, -1) for name, parts in modalities.items()})
        return LazyObservation(values, lazy)

    def _render_now(
        self,
        width: int | None = None,
        height: int | None = None,
        *,
        camera_name: str | None = None,
        depth: bool = False,
        mode: str = "offscreen",
        device_id: int = -1,
        segmentation: bool = False,
    ) -> Any:
        """Take the place of `MjSim.render`."""
        plain = mode == "offscreen" and not depth and not segmentation
        if plain and camera_name is not None and width is not None and width == height:
            return self._render(self.data, (camera_name,), width)[0]
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        sim = self.robosuite_env.sim
        if sim._render_context_offscreen is None:
            load_triton()
            context = MjRenderContextOffscreen(sim, device_id=device_id)
            context.vopt.geomgroup[0], context.vopt.geomgroup[1] = 0, 1
            keep_display()
        with self._compiled.lock:
            for name, colours in self._colours().items():
                getattr(self.model, name)[:] = colours
            return self._render_by_robosuite(
                width,
                height,
                camera_name=camera_name,
                depth=depth,
                mode=mode,
                device_id=device_id,
                segmentation=segmentation,
            )


class _Moment:
    """Holds what the images of an observation depend on."""

    def __init__(
        self,
        model: CompiledModel,
        measured: tuple[np.ndarray, np.ndarray, np.ndarray],
        colours: dict[str, np.ndarray],
    ) -> None:
        self._base, self._colours = model.base, colours
        self._places = None if model is model.base else model.places()
        self._measured = tuple(part.copy() for part in measured)

    def render(self, camera: str, size: int, rows: int) -> np.ndarray:
        """Render a camera's image, uint8 (size, size, 3).

        :param rows: -1 to turn them round
        """
        with building if self._places else nullcontext():  # as a reset, which moves fixtures
            try:
                for name, places in (self._places or {}).items():
                    getattr(self._base.mj, name)[:] = places
                return self._render(camera, size)[::rows]
            finally:
                if self._places:
                    self._base.restore()

    def _render(self, camera: str, size: int) -> np.ndarray:
        import mujoco

        model = self._base.mj
        data = mujoco.MjData(model)
        set_measured(model, data, self._measured)
        (picture,) = rendering.render(self._base, data, self._colours, (camera,), size)
        return picture
