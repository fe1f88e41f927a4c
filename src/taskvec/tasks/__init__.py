"""Tasks: named examples, a prompt format, a loss, and three disjoint splits."""

from taskvec.tasks.read import builtin_tasks, datasets, load_task, read_examples
from taskvec.tasks.task import Dev, Split, Task, TaskSpec, Test, Train, answer_nll

__all__ = [
    "Dev",
    "Split",
    "Task",
    "TaskSpec",
    "Test",
    "Train",
    "answer_nll",
    "builtin_tasks",
    "datasets",
    "load_task",
    "read_examples",
]
