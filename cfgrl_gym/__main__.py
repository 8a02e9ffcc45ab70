"""`python -m cfgrl_gym` is `cfgrl`."""

import sys

from cfgrl_gym.cli import main

# Worker processes import this module again: they must not run it.
if __name__ == "__main__":
    sys.exit(main())
