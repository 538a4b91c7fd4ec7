"""What moves the weights: AdamW and Muon with float32 masters, schedules of the learning rate, averages of the weights."""

from ernie45.training.optim.config import MuonConfig, OptimizerConfig
from ernie45.training.optim.ema import Ema, EmaConfig
from ernie45.training.optim.optimizer import Optimizer, build_optimizer
from ernie45.training.optim.schedule import LrSchedule, ScheduleConfig

__all__ = [
    "Ema",
    "EmaConfig",
    "LrSchedule",
    "MuonConfig",
    "Optimizer",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
]
