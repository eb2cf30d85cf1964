"""The `genarm` command: one module per verb, none of which imports anything heavy until it runs."""

import logging as _logging
import os as _os

if "TRANSFORMERS_VERBOSITY" not in _os.environ:  # see `quiet_libraries`; this one speaks as soon as it is imported
    _logging.getLogger("bitsandbytes").setLevel(_logging.ERROR)
