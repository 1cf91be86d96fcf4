"""The tasks: pure functions of a seed and sizes, without downloads."""

from benchmarks.experiments.tasks.copying import COPY
from benchmarks.experiments.tasks.digits import DIGITS
from benchmarks.experiments.tasks.induction import FRESH, INDUCTION, LONG
from benchmarks.experiments.tasks.recall import MQAR
from benchmarks.experiments.tasks.scan import SCAN
from benchmarks.experiments.tasks.selective import SELECTIVE
from benchmarks.experiments.tasks.task import Task

EXPERIMENTS: dict[str, tuple[Task, ...]] = {
    "mqar": (MQAR,),
    "induction": (INDUCTION,),
    "induction-fresh": (FRESH,),
    "induction-long": (LONG,),
    "copy": (COPY,),
    "selective": (SELECTIVE,),
    "scan": SCAN,
    "digits": (DIGITS,),
}
"""By the command's word; every task of an experiment is trained by itself."""
