"""`python -m llamac.runtime.cli COMMAND ...` is `llamac COMMAND ...`."""

import sys

from . import main

sys.exit(main())
