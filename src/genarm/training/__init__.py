"""Training of autoregressive reward models, from preference pairs to a finished folder."""

from genarm.training.arm import Arm
from genarm.training.kinds import register, register_losses
from genarm.training.losses.distil import Distil
from genarm.training.losses.product import Product
from genarm.training.losses.reference import Reference

_ARM = Arm()
register(_ARM)
register_losses(_ARM, Reference(), Product(), Distil())
