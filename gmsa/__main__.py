"""`python -m gmsa` is the `gmsa` command."""

import sys

from gmsa.cli import main

sys.exit(main())
