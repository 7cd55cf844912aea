"""What the API refuses, in the shape that OpenAI's clients read."""

from typing import Any


class ApiRefusal(Exception):
    """A request that gets no answer: its HTTP status, and one line that says what was found and what is allowed."""

    def __init__(self, status: int, message: str, code: str, retry_after_s: float | None = None) -> None:
        """Refuse with a status and a code for programs; `retry_after_s` is when another try may succeed."""
        message = message.encode("utf-8", "backslashreplace").decode()  # half a surrogate cannot be sent
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "invalid_request_error"
        if self.status in (401, 403):
            kind = "authentication_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """The headers beside it: when to come back, where that is known."""
        if self.retry_after_s is None:
            return {}
        whole_s = max(1, round(self.retry_after_s + 0.5))
        return {"Retry-After": str(whole_s)}


def unknown_model(name: str) -> ApiRefusal:
    """The same for what is not there and what is another's: nobody learns what others have."""
    shown = name[:100]
    message = f"model: found {shown!r}, which is not here or not yours; allowed: those of /v1/models"
    return ApiRefusal(404, message, "model_not_found")


def invalid(message: str) -> ApiRefusal:
    """A request that says something that is not allowed."""
    return ApiRefusal(400, message, "invalid_request")


def broken() -> ApiRefusal:
    """What everybody gets after a step has failed."""
    return ApiRefusal(503, "the engine has failed: this server must be started again", "engine_failed")
