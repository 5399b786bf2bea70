"""Training of a student against a teacher, or against labels alone: objective, teacher sources, trainer, state.

`train` is the way in for the chain; `Trainer`, `DistillationObjective` and `ColocatedTeacher` are its parts. The loss
kernel itself lives in `kernels`, the models in `models`, the samples in `data`.
"""
