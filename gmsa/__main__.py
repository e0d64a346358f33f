"""`python -m gmsa` is the `gmsa` command."""

import sys

from gmsa.cli.main import main

sys.exit(main())
