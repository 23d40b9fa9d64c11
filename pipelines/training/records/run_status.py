"""Latest metrics and messages of a run, as the driver and the next start of the workers read them."""


class RunStatus:
    """Metrics, messages, worker failures and starts of one run, in memory.

    The workers write, the driver reads. It outlives the workers, so a later start learns why the last one ended.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}
        self._messages: list[str] = []
        self._user_error: str | None = None
        self._start_steps: list[int] = []
        self._failures: list[str] = []

    def record_start(self, step: int) -> int:
        """Record that the workers start from a step.

        Returns:
            Consecutive starts from this step, this one included.
        """
        self._start_steps = [*(earlier for earlier in self._start_steps if earlier == step), step]
        return len(self._start_steps)

    def record_user_error(self, message: str) -> None:
        """Record an error of the user, with which every later start ends; only the first is stored."""
        self._user_error = self._user_error or message

    def user_error(self) -> str | None:
        """The recorded error of the user; None if there is none."""
        return self._user_error

    def set_metrics(self, metrics: dict[str, float]) -> None:
        """Replace the metrics of the last logged step."""
        self._metrics = metrics

    def post(self, message: str) -> None:
        """Add a message that the driver prints."""
        self._messages.append(message)

    def record_failure(self, message: str) -> None:
        """Add a message that the driver prints, and store it for events.jsonl."""
        self.post(message)
        self._failures.append(message)

    def take_failures(self) -> list[str]:
        """Return the stored worker failures and clear them."""
        failures, self._failures = self._failures, []
        return failures

    def read(self, first_message: int = 0) -> tuple[dict[str, float], list[str]]:
        """Metrics of the last logged step, and the messages from index `first_message` on.

        All messages stay stored: an answer may reach the reader after its time-out.
        """
        return self._metrics, self._messages[first_message:]
