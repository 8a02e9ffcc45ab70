"""Runs `cfgrl` as `python -m cfgrl_gym`."""

import sys

from cfgrl_gym.cli import main

# Worker processes import this module again, and must not run the command.
if __name__ == "__main__":
    sys.exit(main())
