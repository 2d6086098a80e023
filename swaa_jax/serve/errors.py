"""What a client is told that something is wrong: OpenAI's shape, our words."""

import re
from collections.abc import Sequence

from starlette.responses import JSONResponse, Response

__all__ = ["ApiError", "error_body", "error_response", "refused"]

_NAME = re.compile(r"[A-Za-z_][\w.\[\]]*$")


class ApiError(Exception):
    """A request that is not answered.

    Args:
        message: for the client.
        status: of HTTP.
        kind: OpenAI's `type`.
        code: OpenAI's `code`, for programs.
        param: which field of the request it is about.
        retry_after: seconds, where it is worth trying again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.kind = message, status, kind
        self.code, self.param, self.retry_after = code, param, retry_after


def refused(error: ValueError, *, about: Sequence[str] = ()) -> ApiError:
    """A `name: expected X, got Y` of ours for a client; the name is the field it is about.

    Args:
        error: ours.
        about: fields of which it is one, if any are known; the last if it says none of them.
    """
    message = str(error)
    name, _, rest = message.partition(": ")
    param = re.split(r"[.\[]", name)[0] if rest and _NAME.match(name) else None
    if about and param not in about:
        param = about[-1]
    return ApiError(message, param=param)


def error_body(error: ApiError) -> dict[str, object]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError) -> Response:
    """The whole answer to a request that is refused."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)
