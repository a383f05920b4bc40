"""Servers that give no answer now are asked again; what is broken is not."""

import errno
from collections.abc import Callable

import pytest
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from segmenter_hf.utils import http
from segmenter_hf.utils.http import http_client, is_transient, retry_seconds, status_code, with_retries


def answer_error(status: int, headers: dict[str, str] | None = None) -> Exception:
    """What the real client raises for an answer."""
    transport = http_client.MockTransport(lambda request: http_client.Response(status, headers=headers))
    with http_client.Client(transport=transport) as client, pytest.raises(http_client.HTTPStatusError) as raised:
        client.get("https://hub.test/file").raise_for_status()
    return raised.value


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """The pauses between attempts, which the test does not wait for."""
    pauses: list[float] = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)
    return pauses


def failing(errors: list[Exception]) -> Callable[[], bytes]:
    """What raises these errors one after the other, and then reads."""

    def read() -> bytes:
        if errors:
            raise errors.pop(0)
        return b"read"

    return read


def test_the_client_is_that_of_the_hub() -> None:
    assert issubclass(http_client.ReadTimeout, HTTPError)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again(status) -> None:
    assert is_transient(answer_error(status)) and status_code(answer_error(status)) == status


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_other_answers_are_final(status) -> None:
    assert not is_transient(answer_error(status))


@pytest.mark.parametrize(
    "error",
    [
        http_client.ReadTimeout("slow"),
        http_client.ConnectError("refused"),
        http_client.RemoteProtocolError("cut off"),
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        OSError(errno.EMFILE, "too many open files"),
        OSError(errno.ESTALE, "stale"),
    ],
)
def test_connections_that_fail_are_tried_again(error) -> None:
    assert is_transient(error)
    try:
        raise ValueError("wrapped") from error
    except ValueError as wrapped:
        assert is_transient(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("damaged"),
        FileNotFoundError("missing"),
        OSError(errno.EIO, "bad sector"),
        OfflineModeIsEnabled("offline"),
        http_client.UnsupportedProtocol("ftp"),
    ],
)
def test_what_is_broken_is_not_tried_again(error, waited) -> None:
    with pytest.raises(type(error)):
        with_retries(failing([error]), "file")
    assert not waited


def test_attempts_wait_twice_as_long_each_time_or_as_the_server_asks(waited) -> None:
    errors = [answer_error(503), http_client.ReadTimeout("slow"), answer_error(429, {"Retry-After": "9"})]
    assert with_retries(failing(errors), "file") == b"read"
    assert waited == [1, 2, 9]
    assert retry_seconds(1, answer_error(429, {"Retry-After": "99999"})) == http.MAX_RETRY_SECONDS
    assert retry_seconds(1, answer_error(429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})) == 1


def test_the_last_failure_says_what_to_do(waited) -> None:
    with pytest.raises(
        ConnectionError, match=r"hf://x could not be read in 5 attempts.*answered 503.*run the same again"
    ):
        with_retries(failing([answer_error(503) for _ in range(5)]), "hf://x")
    assert len(waited) == 4
