import pytest

from sniproxy.wire import Alert, HelloError, Reason, alert_record


@pytest.mark.parametrize(
    ("alert", "number"),
    [
        (Alert.UNEXPECTED_MESSAGE, 10),
        (Alert.RECORD_OVERFLOW, 22),
        (Alert.ILLEGAL_PARAMETER, 47),
        (Alert.DECODE_ERROR, 50),
        (Alert.INTERNAL_ERROR, 80),
        (Alert.MISSING_EXTENSION, 109),
        (Alert.UNRECOGNIZED_NAME, 112),
    ],
)
def test_the_record_of_an_alert(alert: Alert, number: int) -> None:
    assert alert_record(alert) == bytes([21, 3, 3, 0, 2, 2, number])


def test_no_alert_is_sent_that_is_not_tested() -> None:
    assert len(Alert) == 7


def test_an_error_carries_its_answer_and_speaks() -> None:
    error = HelloError(Alert.DECODE_ERROR, Reason.EMPTY_RECORD, "a record of 0 bytes")
    assert (error.alert, error.reason) == (50, "empty_record")
    assert str(error) == error.detail == "a record of 0 bytes"
    assert error.args == (error.alert, error.reason, error.detail)
    assert str(HelloError(Alert.DECODE_ERROR, Reason.EMPTY_RECORD)) == "empty record"


def test_reasons_are_words_for_a_log() -> None:
    for reason in Reason:
        assert reason.replace("_", "").isalpha()
        assert reason == reason.lower() == reason.name.lower()
