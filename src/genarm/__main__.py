"""`python -m genarm` is the `genarm` command, which is what `accelerate launch -m genarm` needs."""

import sys

from genarm.cli.main import main

sys.exit(main())
