"""The published command line of P3B, handed to `p3b.commands.command_line`."""

import sys

from p3b.commands.command_line import published_main

if __name__ == "__main__":
    sys.exit(published_main())
