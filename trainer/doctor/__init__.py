"""Names what is wrong with a training run, with the evidence and the change to make.

`diagnose` is the face; `signals` measures, `rules_*` judge, each threshold with its reason beside it.
"""

from trainer.doctor.diagnosis import diagnose
from trainer.doctor.finding import Failure, Finding, Severity
from trainer.doctor.summary import DataSummary

__all__ = ["DataSummary", "Failure", "Finding", "Severity", "diagnose"]
