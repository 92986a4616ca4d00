"""`python -m lorica`, and what a launcher such as torchrun starts with `-m lorica`."""

import sys

from lorica.cli.main import main

sys.exit(main())
