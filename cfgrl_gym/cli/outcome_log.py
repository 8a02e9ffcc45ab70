"""Keeps an evaluation's outcomes as they come, so that one that is stopped loses no episode."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cfgrl_gym.algorithms.evaluation import EpisodeOutcome


class OutcomeLog:
    """Reads the outcomes that a file has, and adds others to it.

    Its first line names the policy; each other line is an episode's outcome, written at once. A
    last line that was cut off is dropped.

    :param file: made if it doesn't exist
    :param policy: digest of the policy's weights
    :raises ValueError: the file is of another policy, or damaged
    :raises OSError: it can't be read or written
    """

    def __init__(self, file: Path, policy: str) -> None:
        self.file = file
        self.outcomes: dict[float, dict[int, EpisodeOutcome]] = {}  # by cfg_scale and index
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole:
            self._read(whole.splitlines(), policy)
        if len(whole) < len(text):
            os.truncate(file, len(whole.encode()))
        if not whole:
            self._write({"policy": policy})

    def known(self, cfg_scale: float) -> dict[int, EpisodeOutcome]:
        """Return the outcomes at a guidance scale, by index among the starts."""
        return self.outcomes.setdefault(cfg_scale, {})

    def adding(self, cfg_scale: float) -> Callable[[int, EpisodeOutcome], None]:
        """Return the function that adds an outcome at this guidance scale."""

        def add(index: int, outcome: EpisodeOutcome) -> None:
            self._write({"cfg_scale": cfg_scale, "index": index, "outcome": asdict(outcome)})

        return add

    def _read(self, lines: list[str], policy: str) -> None:
        try:
            first, *others = map(json.loads, lines)
            evaluated = first["policy"]
            for line in others:
                outcome = EpisodeOutcome(**line["outcome"])
                self.known(float(line["cfg_scale"]))[int(line["index"])] = outcome
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{self.file}' is damaged ({error}); remove it to evaluate anew"
            ) from error
        if evaluated != policy:
            raise ValueError(
                f"the evaluation in '{self.file.parent}' began with another policy; its episodes "
                "can't be counted together with new ones: evaluate anew in another folder"
            )

    def _write(self, content: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(content) + "\n")
