"""``python -m kvstore.agents FD``: an agent on the inherited end of a socket pair."""

from __future__ import annotations

import sys

from kvstore.agents.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
