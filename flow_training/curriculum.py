"""Stages of training one after another, each from the weights of the one before.

python -m flow_training.curriculum configs/curriculum/NAME.yaml [--dry_run] [--flag value ...]

The same command goes on where it was stopped: what is done is skipped, what is in progress is resumed.
"""

import argparse
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from flow_training.config import without_token
from flow_training.stage_plan import describe_plan
from flow_training.stages import Curriculum, Stage, read_curriculum

PROG = "flow_training.curriculum"
TRAINER = Path(__file__).resolve().parents[1] / "train_flow.py"  # in a checkout as in an installation
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHARED_FOLDER_DELAY = 60  # seconds until other machines see what one has written; NFS looks at least so often


class PassedOnSignals:
    """Runs commands; while it is entered, a signal to stop goes to the training processes of the one that runs.

    The command has a session of its own, else Ctrl-C would also end the launcher, and the workers that the trainer
    needs to finish its step.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._launcher: subprocess.Popen | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PassedOnSignals":
        ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]  # nohup
        self._previous = {
            number: signal.signal(number, self._receive) for number in STOP_SIGNALS if number not in ignored
        }
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: list[str]) -> int:
        """Run a command; returns its exit code (128 + N after signal N), once all its processes have ended."""
        # Whoever of them lives has the reading end for its standard input, so the writing end shows when none is left.
        reader, writer = os.pipe()
        try:
            self._launcher = subprocess.Popen(command, stdin=reader, start_new_session=True)
            os.close(reader)
            if self.signal is not None:  # it came while the launcher was being started
                self._pass_on()
            code = self._launcher.wait()
            readers = select.poll()
            readers.register(writer, 0)  # errors, that is the end of all readers, are always reported
            readers.poll()
        finally:
            self._launcher = None
            os.close(writer)
        return code if code >= 0 else 128 - code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        print(f"\n{PROG}: {self.signal.name}: no further stage; the one that runs is told to stop", file=sys.stderr)
        self._pass_on()

    def _pass_on(self) -> None:
        """SIGTERM to the training processes, not to their launcher: it would die of it, or kill them too soon."""
        if self._launcher is None:
            return
        try:
            children = psutil.Process(self._launcher.pid).children()
            trainers = [child for child in children if str(TRAINER) in child.cmdline()]
            for process in trainers or [self._launcher]:
                process.terminate()
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass  # it has just ended


def run_curriculum(curriculum: Curriculum, again: str) -> int:
    """Train all stages that are not done.

    Args:
        curriculum: What to do.
        again: The command that goes on after a stop, for messages.

    Returns:
        The exit code: 0, or that of the stage that failed or was stopped, or was trained but not uploaded.
    """
    first = curriculum.first_to_train()
    for number, (stage, state) in enumerate(zip(curriculum.stages, curriculum.states(), strict=True), 1):
        if number <= first:
            hint = "" if state == "done" else f", as {curriculum.stages[first - 1].name} is done"
            _say(f"stage {number}, {stage.name}: {state}{hint}")
            for line in stage.changed_settings() if state == "done" else []:
                _say(f"  {line}")
    exit_code = 0
    with PassedOnSignals() as signals:
        for number, stage in list(enumerate(curriculum.stages, 1))[first:]:
            if signals.signal is not None:
                return 128 + signals.signal
            _say(f"stage {number} of {len(curriculum.stages)}, {stage.name}: {stage.state()}")
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *curriculum.launch]
            code = signals.run([*launcher, str(TRAINER), *stage.arguments])
            if signals.signal is not None and not (code == 0 and stage is curriculum.stages[-1] and stage.is_done()):
                _say(f"stopped by {signals.signal.name} in stage {stage.name}; go on with:  {again}")
                return code or 128 + signals.signal
            if code != 0 and stage.is_done():  # an upload that failed is no reason to lose days
                _say(f"stage {stage.name} is trained, but ended with exit code {code}: see what it says above")
                exit_code = code
            elif code != 0:
                _say(f"stage {stage.name} failed with exit code {code}; when that is mended, go on with:  {again}")
                return code
            elif not _wait_until_done(stage):
                _say(f"stage {stage.name} ended before its last step; go on with:  {again}")
                return 1
    _say(f"all stages are done; the weights are in {curriculum.stages[-1].output_dir}")
    return exit_code


def _wait_until_done(stage: Stage) -> bool:
    """Whether a run that has ended without error is done; on a machine that did not write it this may show late."""
    deadline = time.monotonic() + SHARED_FOLDER_DELAY
    while not stage.is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _say(text: str) -> None:
    print(f"{PROG}: {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}",
        usage="%(prog)s CURRICULUM.yaml [--dry_run] [--launch OPTIONS] [--output_root FOLDER] [--flag value ...]",
        description="Train stages one after another. All further flags are train_flow.py's, for every stage.",
        allow_abbrev=False,
    )
    parser.add_argument("curriculum", type=Path, help="YAML file that lists the stages")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and the state of each stage; no more")
    parser.add_argument("--launch", help="options of accelerate launch, in quotes; they take the place of the file's")
    parser.add_argument("--output_root", help="folder for a folder of each stage, in place of their output_dir")
    arguments, flags = parser.parse_known_args(words)
    try:
        curriculum = read_curriculum(
            arguments.curriculum,
            [word for word in flags if word != "--"],
            arguments.launch,
            arguments.output_root,
        )
        if arguments.dry_run:
            print(describe_plan(curriculum))
            return 0
    except (ValueError, OSError) as error:
        sys.exit(f"{PROG}: error: {error}")
    return run_curriculum(curriculum, shlex.join(["python", "-m", PROG, *without_token(words)]))


if __name__ == "__main__":
    sys.exit(main())
