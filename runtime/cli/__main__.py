"""`python -m llamac.runtime.cli COMMAND ...` is `llamac COMMAND ...`."""

import sys

from .main import main

sys.exit(main())
