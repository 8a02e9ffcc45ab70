"""When robosuite reads its observations within a control step."""


class SamplingClock:
    """When robosuite measures: one physics substep of each control period, not the last one.

    `robosuite/utils/observables.py` counts time since the last measurement in floating point, and
    the forced measurements of a reset shift its phase (after LIBERO's `set_init_state` it measures
    one substep before the end of a control step). An observation equals LIBERO's only at exactly
    that substep.
    """

    def __init__(self, period: float, substep: float) -> None:
        self._period, self._substep = period, substep
        self._time, self._sampled = 0.0, False

    def restart(self, forced_measurements: int) -> None:
        self._time = 0.0
        for _ in range(forced_measurements):
            self._sampled = True
            self._count()

    def control_step(self, substeps: int) -> int:
        """Let a control step pass; the substep that robosuite measures after, or -1."""
        measured = -1
        for substep in range(substeps):
            if self._tick():
                measured = substep
        return measured

    def _tick(self) -> bool:
        measure = not self._sampled and self._period >= self._time + self._substep
        self._sampled = self._sampled or measure
        self._count()
        return measure

    def _count(self) -> None:
        self._time += self._substep
        if self._time >= self._period:
            self._time %= self._period
            self._sampled = False
