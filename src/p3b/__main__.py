"""`python -m p3b` is `p3b`."""

import sys

from p3b.commands.command_line import main

sys.exit(main())
