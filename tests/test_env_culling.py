"""Leaving geoms out of a scene: every image stays the same bytes."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from ctypes import memmove, memset
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np
import pytest
from conftest import downward_actions

from cfgrl_gym.envs import rendering
from cfgrl_gym.envs.compiled_models import COLOURS, CompiledModel
from cfgrl_gym.envs.culling import Culler
from cfgrl_gym.envs.libero import LiberoEnv
from cfgrl_gym.envs.simulator import CAMERAS

MESH, REFLECTION = mujoco.mjtGeom.mjGEOM_MESH, mujoco.mjtRndFlag.mjRND_REFLECTION
INIT_STATES, POSES = (0, 17, 33), 5
AWAY_FROM_THE_STOVE = np.array([0.6, -0.9, 0, 0, 0, 0, 0])


@dataclass
class Drawn:
    """What MuJoCo was given to draw: for each image the meshes, and whether reflections."""

    meshes: list[int] = field(default_factory=list)
    reflections: list[bool] = field(default_factory=list)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    record, mjr_render = Drawn(), mujoco.mjr_render

    def count(viewport: Any, scene: Any, context: Any) -> None:
        geoms = scene.geoms[: scene.ngeom]
        record.meshes.append(sum(g.type == MESH and g.dataid >= 0 for g in geoms))
        record.reflections.append(bool(scene.flags[REFLECTION]))
        mjr_render(viewport, scene, context)

    monkeypatch.setattr(mujoco, "mjr_render", count)
    return record


@contextmanager
def _nothing_left_out(*_: Any) -> Iterator[None]:
    yield


def picture(env: LiberoEnv, camera: str, size: int, **more: Any) -> np.ndarray:
    """Of the poses as they are, whatever was measured."""
    simulator: Any = env.simulator
    colours = {name: getattr(simulator.robosuite_env.sim.model, name) for name in COLOURS}
    arguments = (simulator._compiled, simulator.data, colours, (camera,), size)
    return rendering.render(*arguments, **more)[0]


def whole_and_culled(
    env: LiberoEnv, camera: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, np.ndarray]:
    with monkeypatch.context() as patch:
        patch.setattr(Culler, "culled", _nothing_left_out)
        whole = picture(env, camera, size)
    return whole, picture(env, camera, size)


@pytest.mark.parametrize("suite", ["libero_object", "libero_goal"])  # the latter with a mirror
def test_culled_images_are_the_same_bytes(
    suite: str, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(LiberoEnv(suite, 0, image_size=64, settle_steps=0)) as env:
        for init_state in INIT_STATES:
            env.reset(seed=0, options={"init_state_id": init_state})
            actions = downward_actions(4 * POSES, seed=init_state)
            actions[:, :3] += np.random.default_rng(init_state).uniform(-1, 1, 3)
            drawn.meshes.clear()
            drawn.reflections.clear()
            for pose in range(POSES):
                for action in actions[4 * pose : 4 * pose + 4]:
                    env.simulator.advance(np.clip(action, -1, 1))
                size = 224 if pose == POSES - 1 else 64
                for camera in CAMERAS:
                    whole, culled = whole_and_culled(env, camera, size, monkeypatch)
                    np.testing.assert_array_equal(culled, whole, err_msg=f"{camera} {pose}")
            # By turns: whole and culled, of the one camera and of the other.
            for camera, most in enumerate((0.9, 0.5)):
                whole_meshes = sum(drawn.meshes[2 * camera :: 4])
                assert sum(drawn.meshes[2 * camera + 1 :: 4]) < most * whole_meshes
            assert all(drawn.reflections[0::2])
            if suite == "libero_object":
                assert not any(drawn.reflections[1::2])
            else:
                assert any(drawn.reflections[1::2])


def test_without_a_face_in_the_mirror_its_reflection_is_not_drawn(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(LiberoEnv("libero_goal", 0, image_size=64, settle_steps=0)) as env:
        env.reset(seed=0, options={"init_state_id": 0})
        for action in downward_actions(40):
            env.simulator.advance(np.clip(action + AWAY_FROM_THE_STOVE, -1, 1))
        drawn.reflections.clear()
        whole, culled = whole_and_culled(env, CAMERAS[1], 64, monkeypatch)
        np.testing.assert_array_equal(culled, whole)
        assert drawn.reflections == [True, False]
        picture(env, CAMERAS[0], 64)
        assert drawn.reflections[-1], "for the next image it is on again"


def test_with_shadows_everything_is_drawn(can_env: LiberoEnv, drawn: Drawn) -> None:
    can_env.reset(seed=0)
    simulator: Any = can_env.simulator
    light_castshadow = simulator.model.light_castshadow
    kept = light_castshadow.copy()
    picture(can_env, CAMERAS[1], 64)
    try:
        memset(light_castshadow.ctypes.data, True, light_castshadow.nbytes)  # it is read-only
        picture(can_env, CAMERAS[1], 64)
    finally:
        memmove(light_castshadow.ctypes.data, kept.ctypes.data, kept.nbytes)
    culled, everything = drawn.meshes[-2:]
    assert culled < everything / 2


SCENE = """
<mujoco>
  <asset>
    <material name="mirror" reflectance="0.6" rgba=".2 .2 .2 1" specular="0"/>
    <mesh name="die" vertex="0 0 0  .1 0 0  0 .1 0  0 0 .1  .1 .1 0  .1 0 .1  0 .1 .1  .1 .1 .1"/>
  </asset>
  <worldbody>
    <light pos="0 0 3" castshadow="false"/>
    <camera name="camera" pos="0 -1 .5" xyaxes="1 0 0 0 .45 .9" fovy="30"/>
    <geom {mirror} material="mirror" group="1"/>
    <body mocap="true"><geom type="mesh" mesh="die" rgba="1 0 0 1" group="1"/></body>
  </worldbody>
</mujoco>
"""


@pytest.mark.parametrize(
    ("mirror", "works"),
    [
        ('type="box" size=".3 .2 .02" euler="20 0 10"', True),
        ('type="plane" size=".3 .2 .1" euler="20 0 10"', True),
        ('type="plane" size="0 0 .1" euler="20 0 10"', True),  # infinite
        ('type="box" size=".1 .1 .02" pos="1 0 0"', False),  # off screen
        ('type="box" size=".3 .2 .02" euler="200 0 10"', False),  # seen from behind
    ],
)
def test_what_shows_only_in_a_mirror_is_drawn(
    mirror: str, works: bool, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CompiledModel(mujoco.MjModel.from_xml_string(SCENE.format(mirror=mirror)))
    data = mujoco.MjData(model.mj)

    def image() -> np.ndarray:
        mujoco.mj_forward(model.mj, data)
        return rendering.render(model, data, {}, ["camera"], 64)[0]

    data.mocap_pos[0] = 0, 0, -100  # out of sight
    empty = image()
    rng = np.random.default_rng(0)
    places = rng.uniform((-0.8, -1.5, -0.3), (0.8, 1.2, 1.5), (300, 3))
    drawn.meshes.clear()
    drawn.reflections.clear()
    shows = []
    for place in places:
        data.mocap_pos[0] = place
        data.mocap_quat[0] = rng.normal(size=4)
        with monkeypatch.context() as patch:
            patch.setattr(Culler, "culled", _nothing_left_out)
            whole = image()
        np.testing.assert_array_equal(image(), whole, err_msg=str(place))
        shows.append(not np.array_equal(whole, empty))
    was_drawn = np.array(drawn.meshes[1::2], bool)
    assert was_drawn[shows].all()
    assert 0 < sum(shows) <= was_drawn.sum() < 0.7 * len(places)
    assert set(drawn.reflections[1::2]) == {works}
    above_all_that_the_camera_sees = places[:, 2] > 0.75
    assert np.array(shows)[above_all_that_the_camera_sees].any() == works


def test_a_draft_has_no_smoothed_edges_and_leaves_the_model_as_it_was(can_env: LiberoEnv) -> None:
    can_env.reset(seed=0)
    before = picture(can_env, CAMERAS[0], 64)
    draft = picture(can_env, CAMERAS[0], 64, quality="draft")
    assert not np.array_equal(draft, before)
    assert np.abs(draft.astype(int) - before).mean() < 5
    simulator: Any = can_env.simulator
    assert simulator._compiled.base.mj.vis.quality.offsamples > 0
    np.testing.assert_array_equal(picture(can_env, CAMERAS[0], 64), before)
