#!/bin/sh
# Off-screen rendering needs EGL (or OSMesa) from the system: install it where that is possible,
# else say what to install.
set -u
packages="libegl1 libgl1 libgl1-mesa-dri libosmesa6"
python="${1:-python3}"
if "$python" -c "from cfgrl_gym.envs.render_backend import choose_backend; choose_backend()" 2>/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing system libraries for rendering: $packages"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages
    exec "$python" -c "from cfgrl_gym.envs.render_backend import choose_backend; choose_backend()"
fi
echo "off-screen rendering is missing; install as root: apt-get install -y $packages" >&2
exit 1
