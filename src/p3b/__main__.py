"""`python -m p3b` is `p3b`."""

import sys

from p3b.cli import main

sys.exit(main())
