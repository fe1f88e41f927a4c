"""The exact engine: many prompts, edits and continuations in few passes, and the plain way as its twin."""

from taskvec.replay.packed import Packed
from taskvec.replay.plain import Plain
from taskvec.replay.run import packs, replay
from taskvec.replay.tree import Segment, Tree
from taskvec.replay.trials import Answers, Ask, Budget, Trial

__all__ = ["Answers", "Ask", "Budget", "Packed", "Plain", "Segment", "Tree", "Trial", "packs", "replay"]
