"""A machine with a clock of its own, and a worker that does as it is told: `make gpu` in no time."""

import os
import signal
import time


class Killed(Exception):
    """The call ends here, whatever it was doing."""


class FakeMachine:
    """Takes for each step its estimate times `pace`, on its own clock.

    Attributes:
        done: names of steps in the order in which they ended.
        killed_at: on the clock, the end of the call.
        outcomes: of steps that end otherwise than well.
        withheld: the variables that were set to 0.
    """

    def __init__(self, steps, pace=1.0, killed_at=float("inf"), outcomes=None):
        self.time, self.pace, self.killed_at, self.outcomes = 0.0, pace, killed_at, outcomes or {}
        self.done, self.of_task = [], {step.task: step for step in steps if step.task}
        self.withheld = []

    def now(self):
        return self.time

    def pause(self):
        self.advance(0.5)

    def advance(self, seconds):
        self.time += seconds
        if self.time >= self.killed_at:
            raise Killed

    def end_of(self, step):
        self.done.append(step.name)
        return {"status": "ok", "note": ""} | self.outcomes.get(step.name, {})

    def work(self, task, limit_s):
        step = self.of_task[task]
        seconds = step.seconds * self.pace
        self.advance(min(seconds, limit_s))
        return self.end_of(step) if seconds <= limit_s else {"status": "cut", "note": ""}

    def start(self, step, limit_s):
        machine, begin = self, self.time

        class Command:
            def outcome(self):
                if machine.time >= begin + min(step.seconds * machine.pace, limit_s):
                    fits = step.seconds * machine.pace <= limit_s
                    return machine.end_of(step) if fits else {"status": "cut", "note": ""}
                return None

        return Command()

    def close(self):
        pass

    def withhold(self, variable):
        self.withheld.append(variable)


def worker(pipe, folder, rehearse):
    """Stands for `gpu_worker.main`."""
    while True:
        word, *_ = pipe.recv()
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "sleep":
            time.sleep(60)
        pipe.send({"status": "failed" if word == "lose" else "ok", "note": str(os.getpid())}
                  | ({"lost": True} if word == "lose" else {}))  # fmt: skip
