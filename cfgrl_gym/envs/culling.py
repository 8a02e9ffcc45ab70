"""Removes from a scene what can't be visible in its image, so that the image's bytes don't change.

Most of an image's cost is in vertices, and MuJoCo sends those of every mesh to OpenGL, visible or
not; and again for a mirror, however little of it is visible.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_MARGIN = 1.0  # pixels by which a mesh must miss the image
_TOLERANCE = 1e-4  # metres; MuJoCo draws in single precision
_GRID = 4  # cells along the longest side of a large mesh, each of which gets a ball
_LARGE = 100  # faces
_SQUARE = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]])


class Culler:
    """Finds the geoms of a compiled model that a camera can't see.

    Regions of space are rows (a, b, c, d): a point is outside if ax + by + cz + d > 0 for any row.
    A mesh is outside if each of the balls that contain its faces is beyond one of the rows. If an
    image has effects that are not handled here, such as shadows, everything is drawn.

    :param model: `mujoco.MjModel`
    """

    def __init__(self, model: Any) -> None:
        import mujoco

        kinds = mujoco.mjtGeom
        self._mesh, self._nothing = int(kinds.mjGEOM_MESH), int(kinds.mjGEOM_NONE)
        self._plane, self._box = int(kinds.mjGEOM_PLANE), int(kinds.mjGEOM_BOX)
        self._is_geom = int(mujoco.mjtObj.mjOBJ_GEOM)
        self._reflection = int(mujoco.mjtRndFlag.mjRND_REFLECTION)
        self._mesh_geoms = np.flatnonzero(model.geom_type == self._mesh)
        meshes = model.geom_dataid[self._mesh_geoms]
        # In a scene a mesh has twice its number; odd numbers are convex hulls.
        self._drawn_as = dict(zip(self._mesh_geoms.tolist(), (2 * meshes).tolist(), strict=True))
        balls = {mesh: _balls(model, mesh) for mesh in np.unique(meshes)}
        counts = [len(balls[mesh]) for mesh in meshes]
        self._ball_geoms = np.repeat(self._mesh_geoms, counts)
        self._starts = np.cumsum([0, *counts[:-1]])
        all_balls = np.concatenate([np.empty((0, 4)), *(balls[mesh] for mesh in meshes)])
        self._centres, self._radii = all_balls[:, :3], all_balls[:, 3]

    @contextmanager
    def culled(self, scene: Any, model: Any, data: Any, size: int) -> Iterator[None]:
        """Remove from `scene`, inside the block, what isn't visible in a square image of it.

        :param scene: as `mjv_updateScene` filled it from `model` and `data`; the next call of that
            restores what was removed
        :param size: side of the image in pixels
        """
        reflections = scene.flags[self._reflection]
        if self._is_understood(scene, model):
            scene.flags[self._reflection] &= self._leave_out(scene, data, size)
        try:
            yield
        finally:
            scene.flags[self._reflection] = reflections

    def _is_understood(self, scene: Any, model: Any) -> bool:
        meshes_only = not (model.nflex or model.nskin) and len(self._mesh_geoms) > 0
        shadows = model.light_castshadow.any()
        plain = not (scene.stereo or scene.enabletransform)
        return (meshes_only and plain and not shadows) and all(
            camera.frustum_top == -camera.frustum_bottom
            and camera.frustum_center == camera.frustum_width == camera.orthographic == 0
            for camera in scene.camera
        )

    def _leave_out(self, scene: Any, data: Any, size: int) -> bool:
        """Take unseen geoms out of the scene, and return whether a mirror can show anything."""
        meshes, mirrors = [], []
        for geom in scene.geoms[: scene.ngeom]:
            kind = geom.type
            if geom.rgba[3] <= 0:
                # Blended with weight 0; but an infinite plane gives the sky its haze even so.
                if kind != self._plane:
                    geom.type = self._nothing
            elif kind == self._mesh:
                number = geom.objid
                if geom.objtype == self._is_geom and geom.dataid == self._drawn_as.get(number):
                    meshes.append((geom, number))
            elif kind in (self._box, self._plane) and geom.reflectance > 0:
                # Only the first is a mirror to MuJoCo, but which is first depends on the view.
                mirrors.append(geom)
        camera = _Camera(scene, size)
        turns = data.geom_xmat.reshape(-1, 3, 3)[self._ball_geoms]
        centres = data.geom_xpos[self._ball_geoms] + np.einsum("bij,bj->bi", turns, self._centres)
        unseen = self._outside(camera.frustum, centres)
        reflecting = False
        for mirror in mirrors:
            region = camera.seen_in(mirror, mirror.type == self._box)
            if region is not None:
                reflecting = True
                unseen &= self._outside(region, centres)
        hidden = set(self._mesh_geoms[unseen].tolist())
        for geom, number in meshes:
            if number in hidden:
                geom.dataid = -1
        return reflecting

    def _outside(self, region: np.ndarray, centres: np.ndarray) -> np.ndarray:
        """Return which mesh geoms are outside of a region (rows, 4), bool (mesh geoms,)."""
        normals = region[:, :3]
        reach = np.linalg.norm(normals, axis=1, keepdims=True) * self._radii  # (rows, balls)
        beyond = normals @ centres.T + region[:, 3:] > reach
        return np.logical_and.reduceat(beyond.any(0), self._starts)


class _Camera:
    """Holds a scene's camera, between its two eyes as for any image that isn't stereoscopic."""

    def __init__(self, scene: Any, size: int) -> None:
        left, right = scene.camera  # which look the same way
        self._eye = np.add(left.pos, right.pos, dtype=float) / 2
        x, y, z = left.forward.astype(float)
        up = left.up.astype(float)
        across = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ up  # np.cross is slow
        self._axes = np.stack([across, up, [x, y, z]])
        self._from_world = np.eye(4)
        self._from_world[:3, :3] = self._axes
        self._from_world[:3, 3] = -self._axes @ self._eye
        self._near = left.frustum_near
        top = left.frustum_top / left.frustum_near
        self._margin = _MARGIN * 2 * top / size
        edge = top + self._margin
        sides = [[1, 0, -edge, 0], [-1, 0, -edge, 0], [0, 1, -edge, 0], [0, -1, -edge, 0]]
        ends = [[0, 0, -1, 0.99 * self._near], [0, 0, 1, -1.01 * left.frustum_far]]
        self.frustum = np.array(sides + ends) @ self._from_world

    def seen_in(self, mirror: Any, is_box: bool) -> np.ndarray | None:
        """Return the region seen in a mirror; None if it is off screen or seen from behind."""
        turn, half = np.array(mirror.mat, float).reshape(3, 3), np.array(mirror.size, float)
        normal, centre = turn[:, 2], np.array(mirror.pos, float)
        if is_box:  # its upper face
            centre = centre + half[2] * normal
        if (self._eye - centre) @ normal < -_TOLERANCE:
            return None
        region = self.frustum
        if half[0] > 0 and half[1] > 0:  # else an infinite plane
            corners = centre + _SQUARE * half[:2] @ turn[:, :2].T
            if (corners @ region[:, :3].T + region[:, 3] > 0).all(0).any():
                return None
            corners = (corners - self._eye) @ self._axes.T
            if (corners[:, 2] > self._near).all():
                region = np.concatenate([region, self._outline(corners)])
        # What is seen is the mirror image of what is in front.
        reflect = np.eye(4)
        reflect[:3, :3] -= 2 * np.outer(normal, normal)
        reflect[:3, 3] = 2 * (centre @ normal) * normal
        rows = np.empty((len(region) + 1, 4))
        rows[:-1] = region @ reflect
        rows[-1, :3], rows[-1, 3] = -normal, centre @ normal - _TOLERANCE  # behind the mirror
        return rows

    def _outline(self, corners: np.ndarray) -> np.ndarray:
        """Return rows (8, 4) around the outline on screen of a quadrangle (4, 3) in camera axes."""
        points = corners[:, :2] / corners[:, 2:]
        x, y = (points[[1, 2, 3, 0]] - points).T
        across = np.stack([y, -x], 1)
        across = np.concatenate([across, -across])  # both normals of each edge
        reach = (across @ points.T).max(1) + 2 * self._margin * np.hypot(*across.T)
        rows = np.zeros((8, 4))
        rows[:, :2], rows[:, 2] = across, -reach
        return rows @ self._from_world


def _balls(model: Any, mesh: int) -> np.ndarray:
    """Return balls (n, centre and radius) in a mesh's frame, such that each face is inside one."""
    vertex, vertices = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    face, faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    points = model.mesh_vert[vertex : vertex + vertices].astype(float)
    corners = points[model.mesh_face[face : face + faces]]  # (faces, 3, 3)
    low, high = corners.min(1), corners.max(1)
    starts = np.zeros(1, int)
    if faces > _LARGE:
        middle = (low + high) / 2
        offset = middle - middle.min(0)
        cells = (offset * (_GRID / (offset.max() or 1))).astype(np.int16)
        cell = cells @ np.array([(_GRID + 1) ** 2, _GRID + 1, 1], np.int16)
        order = np.argsort(cell, kind="stable")
        low, high = low[order], high[order]
        starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
    low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    radii = np.linalg.norm(high - low, axis=1, keepdims=True) / 2
    return np.hstack([(low + high) / 2, radii])
