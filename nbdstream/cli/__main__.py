"""``python -m nbdstream.cli``."""

import sys

from nbdstream.cli import main

sys.exit(main())
