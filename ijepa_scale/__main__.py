"""`python -m ijepa_scale COMMAND` is `ijepa COMMAND`, for launchers that start modules."""

import sys

from ijepa_scale.commands import main

if __name__ == "__main__":
    sys.exit(main())
