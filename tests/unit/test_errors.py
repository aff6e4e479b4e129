import errno

import pytest

from psla_fast.errors import exit_on_user_error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines"), "prog: error: two lines"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.tar"),
            "prog: error: a.tar: No space left on device. Make room and run the same command again.",
        ),
        (OSError(errno.EACCES, "Permission denied"), "prog: error: Permission denied."),
        (RuntimeError("CUDA out of memory. Tried to"), "prog: error: not enough memory for a batch."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "prog: error: not enough memory"),
    ],
)
def test_an_error_of_the_input_or_machine_is_one_line_and_status_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped, exit_on_user_error("prog"):
        raise error
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape mismatch"), exit_on_user_error("prog"):
        raise RuntimeError("shape mismatch")


def test_the_environment_can_ask_for_a_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PSLA_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"), exit_on_user_error("prog"):
        raise ValueError("why")


def test_a_rank_says_which_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit), exit_on_user_error("prog"):
        raise ValueError("bad")
    assert capsys.readouterr().err == "prog [rank 3]: error: bad\n"


def test_ctrl_c_is_status_130():
    with pytest.raises(SystemExit) as stopped, exit_on_user_error("prog"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
