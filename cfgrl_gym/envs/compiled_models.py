"""Keeps compiled MuJoCo models: compiled once per machine, loaded once per process.

A LIBERO model takes seconds to compile and 250 MB of memory, nearly all of it for meshes and
textures that never change. So the environments of a process share it, and a copy in MuJoCo's binary
format (MJB) on disk spares the next process the compilation.
"""

import copy
import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import threading
import warnings
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cfgrl_gym.whole_files import whole_file

CACHE_VARIABLE = "CFGRL_GYM_CACHE"  # another folder for the models on disk; "off" for none
CACHE_LIMIT = 6 * 2**30  # bytes, about 24 tasks; the least recently used are deleted first
_CHECKSUM_BYTES = 4


# The model arrays that robosuite and LIBERO write to: fixtures are placed by moving their bodies;
# markers, stove flames and the like are shown and hidden by colour.
PLACES = ("body_pos", "body_quat")
COLOURS = ("site_rgba", "geom_rgba")


class CompiledModel:
    """Holds a `mujoco.MjModel` that several environments use.

    A model that is stepped is never modified, with one exception: each environment has its own
    colours, which are in the model only while `lock` is held. The positions of fixtures are part of
    a model, too, and LIBERO moves them at a reset. So resets are made on the model as compiled,
    `base`, one at a time, and what is stepped afterwards is a copy with these positions. All other
    arrays are read-only, so that nobody changes them for all.

    :param mj: the compiled model
    :param base: the model that this one is a copy of; None if it was compiled itself
    """

    def __init__(self, mj: Any, base: "CompiledModel | None" = None) -> None:
        self.mj = mj
        self.base = self if base is None else base
        self.lock = threading.Lock()
        self._places = [getattr(mj, name).copy() for name in PLACES]
        self.colours = {name: getattr(mj, name).copy() for name in COLOURS}  # as compiled
        self._copies: dict[bytes, weakref.ref[CompiledModel]] = {}
        for name in dir(mj):
            if name not in PLACES + COLOURS:
                array = getattr(mj, name, None)
                if isinstance(array, np.ndarray):
                    array.flags.writeable = False

    def restore(self) -> None:
        """Restore all bodies to their positions as compiled."""
        for name, places in zip(PLACES, self._places, strict=True):
            getattr(self.mj, name)[:] = places

    def places(self) -> dict[str, np.ndarray]:
        """Return a copy of the positions that the bodies have now."""
        return {name: getattr(self.mj, name).copy() for name in PLACES}

    @property
    def has_moved(self) -> bool:
        """Return whether the positions are others than those compiled."""
        now = (getattr(self.mj, name) for name in PLACES)
        return not all(map(np.array_equal, now, self._places))

    def as_placed(self) -> "CompiledModel":
        """Return a model to step with the positions that this one has now, the same at each call.

        It is this model itself if nothing has moved: then nothing ever does, because LIBERO places
        the same fixtures of a task at every reset.
        """
        if not self.has_moved:
            return self
        key = b"".join(array.tobytes() for array in self.places().values())
        reference = self._copies.get(key)
        model = reference() if reference is not None else None
        if model is None:
            model = CompiledModel(copy.copy(self.mj), self)
            self._copies = {k: r for k, r in self._copies.items() if r() is not None}
            self._copies[key] = weakref.ref(model)
        return model


_in_process: "weakref.WeakValueDictionary[str, CompiledModel]" = weakref.WeakValueDictionary()


def compiled(xml: str) -> CompiledModel:
    """Return the compiled model of an MJCF document, from this process or the disk if possible."""
    key = _key(xml)
    model = _in_process.get(key)
    if model is None:
        model = _in_process[key] = CompiledModel(_from_disk(key) or _compile(key, xml))
    return model


def cache_folder() -> Path | None:
    """Return the folder of compiled models on disk; None if that is switched off."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "cfgrl-gym" / "models"


def _key(xml: str) -> str:
    """Digest all that a compiled model depends on: MuJoCo, the document, every file it names."""
    import mujoco

    digest = hashlib.sha256(f"{mujoco.__version__} {platform.machine()}\n{xml}".encode())
    for name in sorted(set(re.findall(r'\bfile="([^"]+)"', xml))):
        status = os.stat(name)
        # Every write to a file sets its change time (ctime), which can't be set by hand.
        content = _file_digest(name, status.st_ino, status.st_size, status.st_ctime_ns)
        if _seen.setdefault(name, content) != content:
            _seen[name] = content
            # MuJoCo keeps assets it has read, and tells a new one by the time of modification.
            if hasattr(mujoco, "mj_clearCache"):
                mujoco.mj_clearCache(mujoco.mj_getCache())
        digest.update(content)
    return digest.hexdigest()


_seen: dict[str, bytes] = {}  # the last content of each file


@functools.cache
def _file_digest(name: str, inode: int, size: int, ctime_ns: int) -> bytes:
    return hashlib.sha256(Path(name).read_bytes()).digest()


def _from_disk(key: str) -> Any | None:
    """Return the model saved under `key`, or None if there is none or it is damaged."""
    import mujoco

    folder = cache_folder()
    if folder is None:
        return None
    path, checksum = folder / f"{key}.mjb", folder / f"{key}.crc32"
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if zlib.crc32(content) != int.from_bytes(checksum.read_bytes(), "big"):
                raise ValueError("the checksum is another one")
        model = mujoco.MjModel.from_binary_path(str(path))
        path.touch()  # now the most recently used
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} can't be used ({error}): compiling again", stacklevel=2)
        return None
    return model


def _compile(key: str, xml: str) -> Any:
    import mujoco

    model = mujoco.MjModel.from_xml_string(xml)
    folder = cache_folder()
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _save(model, folder, key)
            _evict(folder)
        except OSError as error:
            warnings.warn(
                f"the compiled model can't be kept in {folder} ({error}), so the next process will "
                f"compile it again; set {CACHE_VARIABLE} to a folder with room, or to 'off'",
                stacklevel=2,
            )
    return model


def _save(model: Any, folder: Path, key: str) -> None:
    import mujoco

    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    checksum = zlib.crc32(buffer.data).to_bytes(_CHECKSUM_BYTES, "big")
    for suffix, content in (("mjb", buffer.data), ("crc32", checksum)):
        with whole_file(folder / f"{key}.{suffix}") as new:
            new.write_bytes(content)


def _evict(folder: Path) -> None:
    """Delete the least recently used models until the rest is within the limit."""
    kept = 0
    models = [(path.stat(), path) for path in folder.glob("*.mjb")]
    for status, path in sorted(models, key=lambda m: m[0].st_mtime, reverse=True):
        kept += status.st_size
        if kept > CACHE_LIMIT:
            path.unlink(missing_ok=True)
            path.with_suffix(".crc32").unlink(missing_ok=True)


def give_back_freed_memory() -> None:
    """Return freed memory to the system, if the C library can (glibc's `malloc_trim`).

    glibc keeps freed blocks, scattered ones for ever: a process that repeatedly closes a simulator
    and builds another would slowly grow by fragmentation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
