import pytest

from rluf.__main__ import COMMANDS, main


def test_each_command_is_listed_and_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listing = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in listing
        with pytest.raises(SystemExit) as exit_info:
            main([name, "--help"])
        assert exit_info.value.code == 0
        assert f"rluf.{name}" in capsys.readouterr().out


def test_an_unknown_command_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trane"]) == 2
    assert "unknown command 'trane'; expected one of prepare, reward, train" in capsys.readouterr().err


def test_arguments_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--config", "tiny", "--dry-run", "seed=11"])
    assert "seed: 11" in capsys.readouterr().out
