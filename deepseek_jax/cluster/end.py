"""Why the processes of a job end, and what is said of it."""

import dataclasses

from deepseek_jax.errors import ExitCode


@dataclasses.dataclass
class End:
    """Why processes end: what process 0 sends, and what each says and exits with."""

    why: str
    code: int
    process: int | None = None  # the one that was lost or made a mistake; None: a step hung
    host: str = ""
    stacks: bool = False  # print those of this process first

    def text(self, step: int) -> str:
        """The line for the user after so many steps; "" for a mistake, which has been said already."""
        if self.code == ExitCode.HUNG:
            return f"a step does not end: {self.why}. The stacks of all processes follow."
        if self.code == ExitCode.LOST:
            return (
                f"process {self.process} ({self.host}) was lost after step {max(step, 0)}: {self.why}. "
                "The same command goes on from the newest checkpoint."
            )
        return ""
