"""Training of what an ARM is compared with, by trl; importing it lets `genarm.training` train these kinds, too."""

from genarm.lab.training.dpo import Dpo
from genarm.lab.training.rlhf import Rlhf
from genarm.lab.training.trajectory import Trajectory
from genarm.training.kinds import register

register(Trajectory(), Dpo(), Rlhf())
