"""Training of autoregressive reward models, from preference pairs to a finished folder."""

from genarm.training.arm import Arm
from genarm.training.kinds import register

register(Arm())
